"""What ranks that hold replicas must agree on, and how a rank that does not is named.

These are control messages of a few bytes; every rank calls them in the same order, and every branch is taken on what
all ranks have received.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparktrain.errors import ConfigError, Diverged

_TEXT = 256
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGEST_BLOCK = 1 << 18
_DIGEST_PRIME = 0x100000001B3

# Its name before torch 2.13, where the old one warns on every rank.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def agree_on_layout(
    strategy: str, descriptions: Sequence[str], settings: str, device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """``ConfigError`` on every rank where settings or tensors differ, naming the first tensor that does."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    summary = [_hash(settings), len(descriptions), _hash("\n".join(descriptions))]
    everyones = _gather(torch.tensor(summary, device=device), group)
    if bool((everyones[:, 0] != everyones[0, 0]).any()):
        texts = _gather_text(settings, device, group)
        rank = next(r for r, text in enumerate(texts) if text != texts[0])
        raise ConfigError(
            f"{strategy}'s settings differ between ranks: rank 0 has {texts[0]}, rank {rank} has {texts[rank]}"
        )
    if not bool((everyones != everyones[0]).any()):
        return
    most = int(everyones[:, 1].max())
    hashes = torch.tensor([_hash(d) for d in descriptions] + [0] * (most - len(descriptions)), device=device)
    everyones = _gather(hashes, group)
    first = int((everyones != everyones[0]).any(0).long().argmax())
    texts = _gather_text(descriptions[first] if first < len(descriptions) else "no such tensor", device, group)
    rank = next(r for r, text in enumerate(texts) if text != texts[0])
    raise ConfigError(
        f"ranks train different parameters: tensor {first} is {texts[0]} on rank 0 and {texts[rank]} on rank {rank}"
    )


def compare_digests(digests: Sequence[int], step: int) -> None:
    """``Diverged`` naming the ranks in the minority where not all are equal."""
    if len(set(digests)) == 1:
        return
    common = max(digests, key=lambda d: (digests.count(d), -digests.index(d)))
    others = [rank for rank, value in enumerate(digests) if value != common]
    raise Diverged(
        f"parameters differ between ranks after step {step}: rank{'s' if len(others) > 1 else ''} "
        f"{', '.join(map(str, others))} differ from rank {digests.index(common)}; "
        f"ranks on different kinds of processor do not compute the same bits"
    )


def exchange_digest(digest: int, device: torch.device, group: dist.ProcessGroup | None) -> list[int]:
    """Every rank's digest."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [digest]
    return [from_bytes(row) for row in _gather(to_bytes(digest, device), group)]


def to_bytes(number: int, device: torch.device) -> Tensor:
    """Eight bytes of an unsigned 64-bit number."""
    return torch.tensor(list(number.to_bytes(8, "little")), dtype=torch.uint8, device=device)


def from_bytes(data: Tensor) -> int:
    return int.from_bytes(bytes(data.tolist()), "little")


def digest(tensors: Sequence[Tensor]) -> int:
    """A 64-bit sum of all words, each times an odd number of its place."""
    total = 0
    if not tensors:
        return total
    place = torch.arange(_DIGEST_BLOCK, device=tensors[0].device)
    # Half of 2^64 / golden ratio, so that it fits int64; products wrap around.
    place = place.mul_(0x4F1BBCDCBFA53E0B).bitwise_or_(1)
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
        for block in torch.split(words, _DIGEST_BLOCK):
            part = int((block.to(torch.int64) * place[: len(block)]).sum())
            total = (total * _DIGEST_PRIME + part) % 2**64
    return total


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _gather(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks, len(mine)]; as bytes, which every backend takes."""
    data = mine.contiguous().view(torch.uint8)
    world = dist.get_world_size(group)
    everyones = torch.empty(world * len(data), dtype=torch.uint8, device=mine.device)
    all_gather(everyones, data, group=group)
    return everyones.view(mine.dtype).view(world, -1)


def _gather_text(text: str, device: torch.device, group: dist.ProcessGroup | None) -> list[str]:
    data = text.encode()[:_TEXT].ljust(_TEXT)
    rows = _gather(torch.tensor(list(data), dtype=torch.uint8, device=device), group)
    return [bytes(row.tolist()).decode(errors="replace").strip() for row in rows]
