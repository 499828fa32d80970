"""The baseline: AdamW on the all-reduced gradient (data parallel), one bucketed all-reduce per step.

The figure that every other strategy's bytes are compared with: 2 (W-1)/W of the gradient per rank and step.
"""

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from sparktrain.config import AdamW, Optimizer
from sparktrain.train.strategies import inner
from sparktrain.train.strategies.contract import Traffic


class AllReduceAdamW:
    """``torch.optim.AdamW`` (fused where torch has it) on the mean gradient over ranks.

    Args:
        parameters: by name; those that get no gradient in a step are neither averaged nor updated, which must be the
            same ones on every rank.
        settings: learning rate at the start, betas, eps, weight decay (of matrices only).
        process_group: ranks to average over; none: all.
    """

    local = refuses = False
    delta_norm = None
    phases: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        settings: Optimizer,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.optimizer = inner.adamw(parameters, settings)
        self.traffic = Traffic()
        self._named = {name: p for name, p in parameters.items() if p.requires_grad}
        self._parameters = list(self._named.values())
        self._group = process_group
        self._world = dist.get_world_size(process_group)

    def average_gradients(self) -> None:
        """One all-reduce of all gradients in one flat buffer per dtype; ``.grad`` becomes a view into it."""
        if self._world == 1:
            return
        for dtype in sorted({p.dtype for p in self._parameters}, key=str):
            owners = [p for p in self._parameters if p.dtype == dtype and p.grad is not None]
            gradients = [p.grad for p in owners if p.grad is not None]
            bucket = torch.cat([g.reshape(-1) for g in gradients])
            began = time.perf_counter()
            dist.all_reduce(bucket, group=self._group)
            self.traffic.seconds += time.perf_counter() - began
            self.traffic.add_ring_all_reduce(bucket.nbytes, self._world)
            bucket /= self._world
            pieces = torch.split(bucket, [g.numel() for g in gradients])
            for parameter, piece in zip(owners, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)

    def step(self, lr: float, tokens: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def retune(self, optimizer: Optimizer, section: AdamW) -> None:
        inner.retune(self.optimizer, optimizer)

    def sync(self) -> None:
        """Nothing: every step leaves the same parameters on every rank."""

    def extract(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self._named.items()}

    def state_dict(self) -> dict[str, Any]:
        """All of it is shared: a world of any size goes on from it."""
        return {"shared": self.optimizer.state_dict(), "rank": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["shared"])


def build(
    parameters: dict[str, torch.nn.Parameter], section: AdamW, optimizer: Optimizer, steps: int
) -> AllReduceAdamW:
    return AllReduceAdamW(parameters, optimizer)


def traffic_per_step(shapes: Sequence[torch.Size], section: AdamW, world: int, element_bytes: int = 4) -> Traffic:
    traffic = Traffic()
    if world > 1:
        traffic.add_ring_all_reduce(element_bytes * sum(shape.numel() for shape in shapes), world)
    return traffic
