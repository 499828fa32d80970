"""How the indices of chosen coefficients are written: a fixed number of bits per chunk, near the entropy bound.

    B     chunks;  K coefficients of a chunk;  area: symbols 0 .. area - 1, and ``area`` for "absent"

A chunk's symbols ascend; only ``area`` may repeat. The set is unordered, so k symbols need log2 C(area, k) bits, not
k log2(area). These codes, and the shortest is taken:

* enumeration: the rank of the set among all of its size (combinatorial number system); optimal; needs 63 bits.
* Elias-Fano: the low bits of each symbol as they are, the high bits in unary; within 10 % of the bound up to a 16th of
  the area, with one sign bit each.
* groups of g neighbours: a bit says whether any is chosen; which ones is a word of a prefix code, b bits long for each
  that is. (g, b) = (3, 2), (5, 3), (11, 4) are the largest groups that b bits have words for. Slower than Elias-Fano,
  so they are used above a 16th of the area only, where it is no longer within a tenth of the bound.
* a bitmap, where almost everything is chosen.

Bits are tensors of 0 and 1 in uint8; :mod:`wire` packs them.
"""

import functools
import math

import torch
from torch import Tensor

_GROUPS = {"groups of 3": (3, 2), "groups of 5": (5, 3), "groups of 11": (11, 4)}


def code_name(area: int, topk: int) -> str:
    """Which code writes ``topk`` symbols of a chunk in the fewest bits."""
    return min(_sizes(area, topk).items(), key=lambda item: item[1])[0]


def index_bits(area: int, topk: int) -> int:
    """Bits per chunk."""
    return min(_sizes(area, topk).values())


def encode_index(index_BK: Tensor, area: int) -> list[Tensor]:
    """Bits of all chunks, as flat tensors one after the other."""
    topk = index_BK.shape[1]
    encode = {"enumeration": _enumerate, "elias-fano": _elias_fano, "bitmap": _bitmap}
    name = code_name(area, topk)
    return _groups(index_BK, area, *_GROUPS[name]) if name in _GROUPS else encode[name](index_BK, area)


def decode_index(bits: Tensor, chunks: int, topk: int, area: int) -> Tensor:
    """Inverse of :func:`encode_index` on the same bits in one flat tensor. ``ValueError``: no such set was encoded."""
    decode = {
        "enumeration": _denumerate,
        "elias-fano": _elias_fano_decode,
        "bitmap": _bitmap_decode,
    }
    name = code_name(area, topk)
    if name in _GROUPS:
        return _groups_decode(bits, chunks, topk, area, *_GROUPS[name])
    index = decode[name](bits, chunks, topk, area)
    if index.numel() and (index.min() < 0 or index.max() > area):
        raise ValueError("update is damaged: an index lies outside its chunk")
    return index


@functools.cache
def _sizes(area: int, topk: int) -> dict[str, int]:
    low = _low_bits(area, topk)
    sizes = {
        "elias-fano": topk * (low + 1) + (area >> low),
        "bitmap": area,
    }
    if 16 * topk > area:
        sizes |= {name: -(-area // group) + width * topk for name, (group, width) in _GROUPS.items()}
    # Sets with repeats of "absent" are few more than sets without; one code for both.
    enumeration = (math.comb(area + topk, topk) - 1).bit_length() if topk <= 63 else 64
    return sizes | ({"enumeration": enumeration} if enumeration <= 63 else {})


@functools.cache
def _low_bits(area: int, topk: int) -> int:
    return min(range(area.bit_length() + 1), key=lambda low: (topk * (low + 1) + (area >> low), low))


def to_planes(number: Tensor, bits: int) -> Tensor:
    """The lowest ``bits`` bits of non-negative integers, lowest plane first: [bits, numel] flattened."""
    plane = torch.arange(bits, dtype=number.dtype, device=number.device).unsqueeze(1)
    return ((number.reshape(1, -1) >> plane) & 1).to(torch.uint8).view(-1)


def from_planes(bits: Tensor, width: int) -> Tensor:
    """Inverse of :func:`to_planes`: flat int64."""
    planes = bits.view(width, -1)
    number = torch.zeros(planes.shape[1], dtype=torch.int64, device=bits.device)
    for plane in range(width):
        number.add_(planes[plane].long() << plane)
    return number


@functools.cache
def _binomials(area: int, topk: int, device: torch.device) -> Tensor:
    """[K, area + K]: C(x, i + 1) for each x."""
    table = [[math.comb(x, i + 1) for x in range(area + topk)] for i in range(topk)]
    return torch.tensor(table, dtype=torch.int64, device=device)


def _enumerate(index_BK: Tensor, area: int) -> list[Tensor]:
    topk = index_BK.shape[1]
    table = _binomials(area, topk, index_BK.device)
    # Adding 0, 1, 2, ... turns ascending symbols with repeats into a set without.
    distinct = index_BK + torch.arange(topk, device=index_BK.device)
    rank = table.gather(1, distinct.T.long()).sum(0)
    return [to_planes(rank, index_bits(area, topk))]


def _denumerate(bits: Tensor, chunks: int, topk: int, area: int) -> Tensor:
    rank = from_planes(bits, index_bits(area, topk))
    table = _binomials(area, topk, bits.device)
    distinct = torch.empty(topk, chunks, dtype=torch.int64, device=bits.device)
    for i in reversed(range(topk)):
        distinct[i] = torch.searchsorted(table[i], rank, right=True) - 1
        rank = rank - table[i][distinct[i]]
    return (distinct - torch.arange(topk, device=bits.device).unsqueeze(1)).T.contiguous()


def _elias_fano(index_BK: Tensor, area: int) -> list[Tensor]:
    chunks, topk = index_BK.shape
    low = _low_bits(area, topk)
    unary = torch.zeros(chunks, topk + (area >> low), dtype=torch.uint8, device=index_BK.device)
    unary.scatter_(1, (index_BK >> low).long() + torch.arange(topk, device=index_BK.device), 1)
    return [unary.view(-1), to_planes(index_BK, low)]


def _elias_fano_decode(bits: Tensor, chunks: int, topk: int, area: int) -> Tensor:
    low = _low_bits(area, topk)
    width = topk + (area >> low)
    unary = bits[: chunks * width].view(chunks, width)
    if not bool((unary.sum(1, dtype=torch.int32) == topk).all()):
        raise ValueError("update is damaged: a chunk does not have the right number of indices")
    high = unary.nonzero()[:, 1].view(chunks, topk) - torch.arange(topk, device=bits.device)
    return (high << low) + from_planes(bits[chunks * width :], low).view(chunks, topk)


@functools.cache
def _words(group: int, width: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The prefix code of the non-empty subsets of ``group`` places, as bits of a number: ``width`` bits per member.

    Returns the symbols of each subset, [2^group, group], and per level the table [nodes, 2^width] that leads from a
    node and a symbol to a node of the next level, or to subset s as -s.
    """
    subsets = [[s for s in range(1 << group) if s.bit_count() == level + 1] for level in range(group)]
    inner = [0] * group  # nodes of each level that must go on to hold the words of those below
    for level in reversed(range(group - 1)):
        inner[level] = -(-(len(subsets[level + 1]) + inner[level + 1]) >> width)
    symbols = torch.zeros(1 << group, group, dtype=torch.uint8)
    tables: list[Tensor] = []
    prefixes: list[list[int]] = [[]]
    for level, members in enumerate(subsets):
        words = [[*prefix, symbol] for prefix in prefixes for symbol in range(1 << width)]
        leads = [-s for s in members] + list(range(inner[level])) + [0] * len(words)
        tables.append(torch.tensor(leads[: len(words)], device=device).view(-1, 1 << width))
        for subset, word in zip(members, words, strict=False):
            symbols[subset, : level + 1] = torch.tensor(word, dtype=torch.uint8)
        prefixes = words[len(members) : len(members) + inner[level]]
    return symbols.to(device), tables


def _groups(index_BK: Tensor, area: int, group: int, width: int) -> list[Tensor]:
    chunks, topk = index_BK.shape
    places = torch.zeros(chunks, -(-area // group) * group + 1, dtype=torch.int64, device=index_BK.device)
    places.scatter_(1, torch.where(index_BK < area, index_BK, places.shape[1] - 1).long(), 1)
    member = places[:, :-1].view(chunks, -1, group)
    subset, count = (member << torch.arange(group, device=index_BK.device)).sum(2), member.sum(2)
    words = _words(group, width, index_BK.device)[0]
    # First symbols of all groups, then second symbols of those that have one, and so on.
    symbols = torch.zeros(chunks, topk + 1, dtype=torch.uint8, device=index_BK.device)
    begin = torch.zeros(chunks, 1, dtype=torch.int64, device=index_BK.device)
    for level in range(int(count.max()) if count.numel() else 0):
        active = count > level
        at = torch.where(active, begin + active.cumsum(1) - 1, topk)
        symbols.scatter_(1, at, words[:, level][subset])
        begin = begin + active.sum(1, keepdim=True)
    return [(count > 0).to(torch.uint8).view(-1), to_planes(symbols[:, :topk].contiguous(), width)]


def _groups_decode(bits: Tensor, chunks: int, topk: int, area: int, group: int, width: int) -> Tensor:
    number = chunks * -(-area // group)
    active = bits[:number].view(chunks, -1).bool()
    symbols = from_planes(bits[number:], width).view(chunks, topk)
    begin, node, subset = (torch.zeros_like(active[:, :n], dtype=torch.int64) for n in (1, None, None))
    for table in _words(group, width, bits.device)[1]:
        read = symbols.gather(1, (begin + active.cumsum(1) - 1).clamp(0, topk - 1))
        begin = begin + active.sum(1, keepdim=True)
        lead = table[node, read]
        subset = torch.where(active & (lead < 0), -lead, subset)
        active, node = active & (lead >= 0), lead.clamp(min=0)
    chosen = (subset.unsqueeze(2) >> torch.arange(group, device=bits.device) & 1).bool().view(chunks, -1)
    if bool((begin > topk).any()) or bool(active.any()) or bool(chosen[:, area:].any()):
        raise ValueError("update is damaged: a chunk has other indices than can be")
    return _places(chosen[:, :area], topk)


def _bitmap(index_BK: Tensor, area: int) -> list[Tensor]:
    bits = torch.zeros(len(index_BK), area + 1, dtype=torch.uint8, device=index_BK.device)
    return [bits.scatter_(1, index_BK.long(), 1)[:, :area].reshape(-1)]


def _bitmap_decode(bits: Tensor, chunks: int, topk: int, area: int) -> Tensor:
    chosen = bits.view(chunks, area).bool()
    if bool((chosen.sum(1) > topk).any()):
        raise ValueError("update is damaged: a chunk has too many indices")
    return _places(chosen, topk)


def _places(chosen: Tensor, topk: int) -> Tensor:
    """Where each row of ``chosen`` [chunks, area] is true, ascending, then ``area``."""
    chunks, area = chosen.shape
    row, place = chosen.nonzero().unbind(1)
    count = chosen.sum(1)
    slot = torch.arange(len(row), device=chosen.device) - (count.cumsum(0) - count)[row]
    index = torch.full((chunks, topk), area, device=chosen.device)
    index[row, slot] = place
    return index
