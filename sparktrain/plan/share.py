"""What one rank takes of a step, in columns; and which of it lies together."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

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
    """Rows of the plan that one rank has of one step, by slot.

    Args:
        step: of all of them.
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

    def __len__(self) -> int:
        return len(self.pos)

    def rows(self) -> list[Assignment]:
        """The same, row by row."""
        columns = (self.slot, self.pos, self.epoch, self.microshard_id, self.path, self.start)
        return [
            Assignment(self.step, slot, pos, epoch, microshard, self.paths[path], start, self.window_length)
            for slot, pos, epoch, microshard, path, start in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def ranges(self, most: int) -> Iterator[Range]:
        """The windows in ranges of at most ``most`` tokens, or one window, by shard and place there."""
        order = np.lexsort((self.start, self.path))
        path, start, here = self.path[order], self.start[order], np.arange(len(order))
        begins = np.ones(len(order), dtype=np.bool_)
        begins[1:] = (path[1:] != path[:-1]) | (start[1:] > start[:-1] + self.window_length)
        # Of a longer run, the first of each so many windows, which lie a window apart at most.
        begins |= (here - np.maximum.accumulate(np.where(begins, here, 0))) % max(1, most // self.window_length) == 0
        firsts = np.flatnonzero(begins)
        offsets = start - start[firsts][np.cumsum(begins) - 1]
        places, bounds = order.tolist(), [*firsts.tolist(), len(order)]
        starts, within, names = start[firsts].tolist(), offsets.tolist(), path[firsts].tolist()
        for i, (first, end) in enumerate(pairwise(bounds)):
            length = within[end - 1] + self.window_length
            yield Range(self.paths[names[i]], starts[i], length, places[first:end], within[first:end])
