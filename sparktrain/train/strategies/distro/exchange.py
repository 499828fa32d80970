"""How messages travel: one all-gather per step, maybe during the next one, counted where it is started."""

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparktrain.train.strategies.contract import Traffic
from sparktrain.train.strategies.replicas.agreement import (
    agree_on_layout,
    all_gather,
    compare_digests,
    exchange_digest,
)


class Exchange:
    """The ranks of a process group; one rank where torch.distributed is not in use.

    The group is looked at in the first step, so an optimizer may be made before it.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.traffic = Traffic()
        self.seconds = 0.0
        self._group, self._device = group, device
        self.agreed = False
        self._work: Any = None
        self._everyones: Tensor | None = None

    @property
    def world(self) -> int:
        return dist.get_world_size(self._group) if dist.is_initialized() else 1

    def agree(self, tensors: Sequence[str], settings: str, payload_bytes: int, gradient_bytes: int) -> None:
        """Compare layouts over ranks, and warn where all this is in vain."""
        agree_on_layout("DisTrO", tensors, settings, self._device, self._group)
        self.agreed = True
        received, ring = (self.world - 1) * payload_bytes, 2 * gradient_bytes * (self.world - 1) // self.world
        if received > ring:
            warnings.warn(
                f"DisTrO makes each of {self.world} ranks receive {received} bytes per step, a ring all-reduce of the "
                f"gradient {ring}: send fewer coefficients (compression_topk) or 1-bit values, or use AdamW",
                stacklevel=4,
            )

    def start(self, message: Tensor) -> None:
        """Start to bring all ranks' messages together."""
        self.traffic.add_all_gather(len(message), self.world)
        if self.world == 1:
            self._everyones = message.unsqueeze(0)
            return
        everyones = message.new_empty(self.world * len(message))
        self._work = all_gather(everyones, message, group=self._group, async_op=True)
        self._everyones = everyones.view(self.world, -1)

    def messages(self) -> Tensor | None:
        """All ranks' messages, [ranks, bytes], as soon as they are here; None: nothing is under way."""
        if self._work is not None:
            began = time.perf_counter()
            self._work.wait()
            self._work = None
            waited = time.perf_counter() - began
            self.seconds += waited
            self.traffic.seconds += waited
        return self._everyones

    def resume(self, everyones: Tensor | None) -> None:
        """Go on with messages that were under way when the state was saved; None: with none."""
        self._work = None
        self._everyones = None if everyones is None else everyones.to(self._device)

    def verify(self, digest: int, step: int) -> None:
        """``Diverged`` naming the ranks whose parameters differ."""
        compare_digests(exchange_digest(digest, self._device, self._group), step)
