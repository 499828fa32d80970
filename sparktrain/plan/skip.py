"""Data that is not trained on: half-open ranges, sorted and apart, of microshards or of places in the order.

A skipped **microshard** is in no epoch. What stands last in an epoch's order takes its place there, and nothing else
of that epoch moves; the next epoch begins so much earlier. Skipped **places** are passed over once, as after a spike
of the loss; what comes before them stays as it is, what comes after them moves up.
"""

from collections.abc import Iterable

import numpy as np

from sparktrain.plan.shuffle import Ints

Ranges = tuple[tuple[int, int], ...]


def merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sorted, without overlaps, empty ones or ones that touch."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(r for r in ranges if r[0] < r[1]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def total(ranges: Ranges) -> int:
    return sum(last - first for first, last in ranges)


def members(ranges: Ranges) -> Ints:
    """All numbers in ``ranges``, ascending."""
    return np.concatenate([np.arange(first, last, dtype=np.int64) for first, last in ranges] or [_none()])


def rank_in(ranges: Ranges, values: Ints) -> Ints:
    """How many members of ``ranges`` are below each of ``values`` that is one; -1 for one that is none."""
    if not ranges:
        return np.full(values.shape, -1, dtype=np.int64)
    firsts, lasts = (np.array(column, dtype=np.int64) for column in zip(*ranges, strict=True))
    before = np.concatenate([_none(1), np.cumsum(lasts - firsts)])
    which = np.searchsorted(firsts, values, side="right") - 1
    inside = (which >= 0) & (values < lasts[which])
    return np.where(inside, before[which] + values - firsts[which], -1)


def jumps(ranges: Ranges) -> list[tuple[int, int]]:
    """(position, length): from that position on, counted without what is skipped, places are ``length`` further."""
    found, skipped = [], 0
    for first, last in ranges:
        found.append((first - skipped, last - first))
        skipped += last - first
    return found


def places_of(ranges: Ranges, position: Ints) -> Ints:
    """The place in the whole order of each position, which counts only what is not skipped."""
    if not ranges:
        return position
    at, lengths = (np.array(column, dtype=np.int64) for column in zip(*jumps(ranges), strict=True))
    passed = np.concatenate([_none(1), np.cumsum(lengths)])
    return np.asarray(position + passed[np.searchsorted(at, position, side="right")])


def _none(length: int = 0) -> Ints:
    return np.zeros(length, dtype=np.int64)
