"""Steps as stretches of positions, and the slots of a step shared among ranks.

A **stretch** is a run of steps with one batch size. Positions are cumulative: a step begins where the one before it
ended, whatever their sizes, so a batch that grows neither skips nor repeats a position.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparktrain.plan.shuffle import Ints


class Stretch(NamedTuple):
    """Steps from ``first_step`` on have ``batch`` positions each, the first of them at ``first_position``."""

    first_step: int
    first_position: int
    batch: int


def stretches_of(total_batch: int, ramp: Sequence[tuple[int, int]]) -> list[Stretch]:
    """``total_batch`` from step 0 and each ``(step, batch)`` of ``ramp``, whose steps ascend, from its step on."""
    found = [Stretch(0, 0, total_batch)]
    for step, batch in ramp:
        found.append(Stretch(step, first_position(found, step), batch))
    return found


def first_position(stretches: Sequence[Stretch], step: int) -> int:
    """Where ``step`` begins: exact, in Python's integers."""
    stretch = stretch_of(stretches, step)
    return stretch.first_position + (step - stretch.first_step) * stretch.batch


def stretch_of(stretches: Sequence[Stretch], step: int) -> Stretch:
    """The stretch that ``step`` lies in."""
    return next(s for s in reversed(stretches) if s.first_step <= step)


def steps_and_slots(stretches: Sequence[Stretch], position: Ints) -> tuple[Ints, Ints]:
    """The step of each position and its slot there."""
    firsts = np.array([s.first_position for s in stretches], dtype=np.int64)
    which = np.searchsorted(firsts, position, side="right") - 1
    steps, batches = (np.array(column, dtype=np.int64)[which] for column in list(zip(*stretches, strict=True))[::2])
    step, slot = np.divmod(position - firsts[which], batches)
    return step + steps, slot


def runs_of_steps(
    stretches: Sequence[Stretch], first_step: int, last_step: int, limit: int
) -> Iterator[tuple[int, int, int]]:
    """(begin, end, batch): [first_step, last_step) in pieces of at most ``limit`` steps that have one batch size."""
    begin, ends = first_step, [s.first_step for s in stretches[1:]] + [last_step]
    while begin < last_step:
        end = min(begin + limit, last_step, next(e for e in ends if e > begin))
        yield begin, end, stretch_of(stretches, begin).batch
        begin = end


def slots_of(rank: int, world: int, batch: int, weights: Sequence[float] = ()) -> tuple[int, int]:
    """Half-open range of slots of ``rank``: together the ranks cover [0, batch) once, for any world size.

    With ``weights``, the speed of each rank, the slowest rank's time for its share, slots over speed, is as short as
    whole slots allow, and every rank has at least one.
    """
    if len(set(weights)) <= 1:
        return rank * batch // world, (rank + 1) * batch // world
    shares = _shares(batch, weights)
    first = sum(shares[:rank])
    return first, first + shares[rank]


def _shares(batch: int, weights: Sequence[float]) -> list[int]:
    """Each slot goes to the rank that would be done first with it. Rounding proportional shares (largest remainders)
    can leave one rank a slot more than that."""
    assert len(weights) <= batch
    assert all(w > 0 and math.isfinite(w) for w in weights)
    shares = [1] * len(weights)
    queue = [(2 / weight, rank) for rank, weight in enumerate(weights)]
    heapq.heapify(queue)
    for _ in range(batch - len(weights)):
        _, rank = queue[0]
        shares[rank] += 1
        heapq.heapreplace(queue, ((shares[rank] + 1) / weights[rank], rank))
    return shares
