"""What ranks must agree on, and how a rank that does not is named.

These are control messages of a few bytes; every rank calls them in the same order, and every branch is taken on what
all ranks have received.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparktrain.errors import ConfigError, Diverged
from sparktrain.train.compression.wire import VALUES

_TEXT = 256

# Its name before torch 2.13, where the old one warns on every rank.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def names_of(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Names of named parameters, numbers of others."""
    names: list[str] = []
    for group in groups:
        names += group.get("param_names") or [str(len(names) + i) for i in range(len(group["params"]))]
    return names


def describe(groups: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """One line per parameter: all that its place in the layout depends on."""
    members = [(number, p) for number, group in enumerate(groups) for p in group["params"]]
    return [f"{name} {list(p.shape)} {p.dtype} of group {n}" for name, (n, p) in zip(names, members, strict=True)]


def check_parameters(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """``ConfigError`` naming the first parameter that cannot be trained."""
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ConfigError(
                f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}: "
                f"DisTrO trains float32, bfloat16 and float64 parameters; convert it or leave it out"
            )
        if not parameter.is_contiguous():
            raise ConfigError(f"parameter {name} is not contiguous in memory: store .contiguous() of it in the model")
        if parameter.device != parameters[0].device:
            raise ConfigError(
                f"parameter {name} is on {parameter.device}, {names[0]} on {parameters[0].device}: "
                f"DisTrO needs all parameters on one device"
            )


def check_settings(decay: float, topk: int, chunk: int, lr: float, weight_decay: float, values: str) -> None:
    """``ConfigError`` naming the setting that is out of range."""
    if values not in VALUES:
        raise ConfigError(f"values is {values!r}: expected one of {', '.join(VALUES)}")
    if not (math.isfinite(lr) and lr >= 0):
        raise ConfigError(f"lr is {lr}: expected a number of at least 0")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ConfigError(f"weight_decay is {weight_decay}: expected a number of at least 0")
    if not 0 <= decay <= 1:
        raise ConfigError(f"compression_decay is {decay}: expected a number in [0, 1]")
    if chunk < 1:
        raise ConfigError(f"compression_chunk is {chunk}: expected at least 1")
    if topk < 1:
        raise ConfigError(f"compression_topk is {topk}: expected at least 1")
    if topk > chunk**2:
        raise ConfigError(
            f"compression_topk is {topk}, more than a chunk of {chunk} x {chunk} holds: set it to at most {chunk**2}"
        )


def agree_on_layout(
    descriptions: Sequence[str], settings: str, device: torch.device, group: dist.ProcessGroup | None
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
            f"DisTrO's settings differ between ranks: rank 0 has {texts[0]}, rank {rank} has {texts[rank]}"
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


def first_not_finite(names: Sequence[str], gradients: Sequence[Tensor | None]) -> str | None:
    """Name of the first parameter whose gradient holds an infinity or a NaN; ``ConfigError``: one is sparse."""
    sparse = [name for name, g in zip(names, gradients, strict=True) if g is not None and g.layout != torch.strided]
    if sparse:
        raise ConfigError(f"the gradient of {sparse[0]} is sparse: DisTrO needs dense ones (Embedding(sparse=False))")
    present = [g for g in gradients if g is not None]
    if not present or bool(torch.stack(torch._foreach_norm(present)).isfinite().all()):
        return None
    # The norm of huge but finite gradients overflows: look at the elements themselves.
    named = zip(names, gradients, strict=True)
    return next((name for name, g in named if g is not None and not bool(g.isfinite().all())), None)


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
