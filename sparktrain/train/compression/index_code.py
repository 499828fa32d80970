"""How the indices of chosen coefficients are written: a fixed number of bits per chunk, near the entropy bound.

    B     chunks;  K coefficients of a chunk;  area: symbols 0 .. area - 1, and ``area`` for "absent"

A chunk's symbols ascend; only ``area`` may repeat. The set is unordered, so k symbols need log2 C(area, k) bits, not
k log2(area). Three codes, and the shortest is taken:

* enumeration: the rank of the set among all of its size (combinatorial number system); optimal; needs 63 bits.
* Elias-Fano: the low bits of each symbol as they are, the high bits in unary; within 8 % of the bound up to k = 256
  of 4096 with one sign bit each.
* a bitmap, where almost everything is chosen.

Bits are tensors of 0 and 1 in uint8; :mod:`wire` packs them.
"""

import functools
import math

import torch
from torch import Tensor


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
    return encode[code_name(area, topk)](index_BK, area)


def decode_index(bits: Tensor, chunks: int, topk: int, area: int) -> Tensor:
    """Inverse of :func:`encode_index` on the same bits in one flat tensor. ``ValueError``: no such set was encoded."""
    decode = {"enumeration": _denumerate, "elias-fano": _elias_fano_decode, "bitmap": _bitmap_decode}
    index = decode[code_name(area, topk)](bits, chunks, topk, area)
    if index.numel() and (index.min() < 0 or index.max() > area):
        raise ValueError("update is damaged: an index lies outside its chunk")
    return index


@functools.cache
def _sizes(area: int, topk: int) -> dict[str, int]:
    low = _low_bits(area, topk)
    sizes = {"elias-fano": topk * (low + 1) + (area >> low), "bitmap": area}
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


def _bitmap(index_BK: Tensor, area: int) -> list[Tensor]:
    bits = torch.zeros(len(index_BK), area + 1, dtype=torch.uint8, device=index_BK.device)
    return [bits.scatter_(1, index_BK.long(), 1)[:, :area].reshape(-1)]


def _bitmap_decode(bits: Tensor, chunks: int, topk: int, area: int) -> Tensor:
    chosen = bits.view(chunks, area).bool()
    if bool((chosen.sum(1) > topk).any()):
        raise ValueError("update is damaged: a chunk has too many indices")
    symbol = torch.where(chosen, torch.arange(area, device=bits.device), area)
    return symbol.sort(1).values[:, :topk].contiguous()
