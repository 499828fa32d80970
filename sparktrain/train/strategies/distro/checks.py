"""Which settings, parameters and gradients DisTrO can work with, and how one that it cannot is named."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparktrain.errors import ConfigError
from sparktrain.train.compression.wire import VALUES


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
