"""The one collective of a sync: an all-gather of bytes, or an all-reduce of floats, maybe during the next steps.

With its contribution a rank says how much it weighs, how many steps it took, whether all of it is finite, and a digest
of what ranks should share. Bytes begin with that (``HEAD``); floats end with it (``TAIL``), in base 16, with squares:
W ranks sent the same digit exactly if W times the sum of squares is the square of the sum. So all ranks see the same
trouble, and gather in another collective who is in it.
"""

import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sparktrain.errors import Diverged
from sparktrain.train.strategies.contract import Traffic
from sparktrain.train.strategies.replicas.agreement import all_gather, compare_digests

HEAD = 32
TAIL = 50
_STEP_DIGITS, _DIGEST_DIGITS = 8, 16


class Head(NamedTuple):
    """What a rank says of its contribution. digest: of the shared parameters before it."""

    weight: float
    steps: int
    digest: int
    finite: bool

    def to_bytes(self) -> bytes:
        return struct.pack("<dqQq", *self)

    def to_floats(self) -> list[float]:
        digits = [self.steps >> 4 * i & 15 for i in range(_STEP_DIGITS)]
        digits += [self.digest >> 4 * i & 15 for i in range(_DIGEST_DIGITS)]
        return [self.weight, float(not self.finite), *map(float, digits), *(float(d * d) for d in digits)]


class Received(NamedTuple):
    """What all ranks contributed: uint8 [ranks, bytes] to be weighed, or the float32 sum, weighed."""

    data: Tensor
    weights: list[float]
    total: float


class Exchange:
    """The ranks of a process group; one rank where torch.distributed is not in use.

    exact: ranks must have taken equally many steps.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, exact: bool) -> None:
        self.traffic = Traffic()
        self.exact = exact
        self.group, self._device = group, device
        self._work: Any = None
        self._under_way: Tensor | None = None
        self._head = Head(0.0, 0, 0, True)

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def busy(self) -> bool:
        return self._under_way is not None

    def send(self, head: Head, message: Tensor) -> None:
        """Start to bring contributions together: uint8 with room for a head, or float32 with room for a tail, which
        is where the sum will be."""
        assert not self.busy
        self._head, world = head, self.world
        self._under_way = message
        if message.dtype == torch.uint8:
            message[:HEAD] = torch.frombuffer(bytearray(head.to_bytes()), dtype=torch.uint8)
            if world > 1:
                self.traffic.add_all_gather(len(message), world)
                self._under_way = message.new_empty(world * len(message))
                self._work = self._timed(lambda: self._gather(self._under_way, message))
            self._under_way = self._under_way.view(world, -1)
            return
        message[-TAIL:] = torch.tensor(head.to_floats())
        if world > 1:
            self.traffic.add_ring_all_reduce(message.nbytes, world)
            self._work = self._timed(lambda: dist.all_reduce(message, group=self.group, async_op=True))

    def receive(self) -> Received:
        """Everyone's contributions. ``Diverged`` names the ranks that do not fit."""
        assert self._under_way is not None
        if self._work is not None:
            self._timed(self._finish)
        data, self._work, self._under_way = self._under_way, None, None
        if data.dtype == torch.uint8:
            heads = _heads(data)
            check(heads, self.exact)
            weights = [head.weight for head in heads]
            return Received(data[:, HEAD:], weights, sum(weights) or 1.0)
        tail = [float(value) for value in data[-TAIL:].tolist()]
        if not _fits(tail, self.world, self.exact):
            check(self.heads(self._head), self.exact)
        return Received(data[:-TAIL], [1.0], tail[0] or 1.0)

    def heads(self, mine: Head) -> list[Head]:
        """Everyone's, by a collective of its own."""
        return _heads(self._rows(torch.frombuffer(bytearray(mine.to_bytes()), dtype=torch.uint8)))

    def numbers(self, mine: Sequence[float]) -> list[list[float]]:
        """Everyone's, by a collective of its own."""
        rows = self._rows(torch.tensor(mine, dtype=torch.float64).view(torch.uint8)).cpu()
        values: list[list[float]] = rows.contiguous().view(torch.float64).view(len(rows), -1).tolist()
        return values

    def say(self, text: str) -> None:
        """Rank 0 prints it."""
        if not dist.is_initialized() or dist.get_rank(self.group) == 0:
            print(text, flush=True)

    def _rows(self, mine: Tensor) -> Tensor:
        if self.world == 1:
            return mine.unsqueeze(0)
        mine = mine.to(self._device)
        everyones = mine.new_empty(self.world * len(mine))
        all_gather(everyones, mine, group=self.group)
        return everyones.view(self.world, -1)

    def _gather(self, everyones: Tensor | None, message: Tensor) -> Any:
        return all_gather(everyones, message, group=self.group, async_op=True)

    def _finish(self) -> None:
        self._work.wait()
        if self._device.type == "cuda":
            # There, wait() returns at once, and the time would not be that of the network.
            torch.cuda.synchronize(self._device)

    def _timed(self, call: Any) -> Any:
        began = time.perf_counter()
        result = call()
        self.traffic.seconds += time.perf_counter() - began
        return result


def check(heads: Sequence[Head], exact: bool) -> None:
    """``Diverged`` where contributions cannot be averaged, the same on every rank."""
    bad = [str(rank) for rank, head in enumerate(heads) if not head.finite]
    if bad:
        raise Diverged(
            f"parameters are no longer finite on rank {', '.join(bad)}: lower optimizer.lr, or look at the data there"
        )
    steps = [head.steps for head in heads]
    if exact and len(set(steps)) > 1:
        most = max(steps)
        rank = next(r for r, taken in enumerate(steps) if taken != most)
        raise Diverged(
            f"rank {rank} took {steps[rank]} inner steps in this round, rank {steps.index(most)} {most}: call step() "
            f"equally often on all ranks"
        )
    compare_digests([head.digest for head in heads], max(steps))


def _heads(rows: Tensor) -> list[Head]:
    values = [struct.unpack("<dqQq", bytes(row.tolist())) for row in rows[:, :HEAD]]
    return [Head(weight, steps, digest, bool(finite)) for weight, steps, digest, finite in values]


def _fits(tail: list[float], world: int, exact: bool) -> bool:
    digits = _STEP_DIGITS + _DIGEST_DIGITS
    sums, squares = tail[2 : 2 + digits], tail[2 + digits :]
    equal = [world * square == total * total for total, square in zip(sums, squares, strict=True)]
    return tail[1] == 0 and all(equal if exact else equal[_STEP_DIGITS:])
