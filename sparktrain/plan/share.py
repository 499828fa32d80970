"""What one rank takes of a step, in columns; and which of it lies together."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparktrain.plan.shuffle import Ints
from sparktrain.plan.spec import Assignment


class Range(NamedTuple):
    """Windows that follow one another in a shard, to be read in one piece: tokens [start, start + length).

    ``places``: the windows' places in the share; ``offsets``: where each begins, in tokens from ``start``.
    """

    path: str
    start: int
    length: int
    places: list[int]
    offsets: list[int]


@dataclass(frozen=True)
class Share:
    """Rows of the plan that one rank has of a step, by slot; or of several that follow one another, as many of each.

    Args:
        step: the first.
        slot, pos, epoch, microshard_id, start: ``[n]`` int64, see :class:`Assignment`.
        path: ``[n]`` indices into ``paths``.
        paths: shards.
        window_length: L, tokens of each.
    """

    step: int
    slot: Ints
    pos: Ints
    epoch: Ints
    microshard_id: Ints
    path: Ints
    start: Ints
    paths: list[str]
    window_length: int
    num_steps: int = 1

    def __len__(self) -> int:
        return len(self.pos)

    def part(self, first: int, num_steps: int) -> "Share":
        """That of ``num_steps`` of its steps, from its ``first``-th on."""
        n = len(self) // self.num_steps
        here, step = slice(first * n, (first + num_steps) * n), self.step + first
        columns = (self.slot, self.pos, self.epoch, self.microshard_id, self.path, self.start)
        slot, pos, epoch, microshard_id, path, start = (column[here] for column in columns)
        mine = (slot, pos, epoch, microshard_id, path, start, self.paths, self.window_length)
        return Share(step, *mine, num_steps)

    def by_step(self) -> "Iterator[Share]":
        """That of each step."""
        return (self.part(i, 1) for i in range(self.num_steps))

    def rows(self) -> list[Assignment]:
        """The same of one step, row by row."""
        columns = (self.slot, self.pos, self.epoch, self.microshard_id, self.path, self.start)
        return [
            Assignment(self.step, slot, pos, epoch, microshard, self.paths[path], start, self.window_length)
            for slot, pos, epoch, microshard, path, start in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def by_shard(self, stride: int, most: int) -> Iterator[tuple[str, list[int], list[list[int]]]]:
        """Of each shard its path, and runs of at most ``most`` windows each of which begins ``stride`` tokens after the
        one before it: where the first begins, and their places in the share. In the order of the shard."""
        order = np.lexsort((self.start, self.path))
        path, start = self.path[order], self.start[order]
        begins = np.ones(len(order), dtype=np.bool_)
        begins[1:] = (path[1:] != path[:-1]) | (start[1:] - start[:-1] != stride)
        firsts, places = np.flatnonzero(_cut(begins, most)), order.tolist()
        runs = [places[first:end] for first, end in pairwise([*firsts.tolist(), len(places)])]
        if len(firsts) == len(order):
            runs = order[:, None].tolist()
        starts, names = start[firsts].tolist(), path[firsts]
        bounds = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(runs)]
        for first, end in pairwise(bounds):
            yield self.paths[names[first]], starts[first:end], runs[first:end]

    def ranges(self, most: int) -> Iterator[Range]:
        """The windows in ranges of at most ``most`` tokens, or one window, by shard and place there."""
        order = np.lexsort((self.start, self.path))
        path, start = self.path[order], self.start[order]
        begins = np.ones(len(order), dtype=np.bool_)
        begins[1:] = (path[1:] != path[:-1]) | (start[1:] > start[:-1] + self.window_length)
        begins = _cut(begins, max(1, most // self.window_length))  # windows of a run lie a window apart at most
        firsts = np.flatnonzero(begins)
        offsets = start - start[firsts][np.cumsum(begins) - 1]
        places, bounds = order.tolist(), [*firsts.tolist(), len(order)]
        starts, within, names = start[firsts].tolist(), offsets.tolist(), path[firsts].tolist()
        for i, (first, end) in enumerate(pairwise(bounds)):
            length = within[end - 1] + self.window_length
            yield Range(self.paths[names[i]], starts[i], length, places[first:end], within[first:end])


def _cut(begins: npt.NDArray[np.bool_], most: int) -> npt.NDArray[np.bool_]:
    """``begins``, and where a run that is at most ``most`` long would be longer."""
    if begins.all():
        return begins
    here = np.arange(len(begins))
    longer: npt.NDArray[np.bool_] = (here - np.maximum.accumulate(np.where(begins, here, 0))) % most == 0
    return begins | longer
