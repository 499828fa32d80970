"""How many steps a round has: as set, or so many that communication takes less than a twentieth of the time."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from sparktrain.errors import ConfigError

Every = int | Literal["auto"]

# Communication may take this share of the time; a round has at most so many steps.
SHARE, MOST = 0.05, 500
# The first sync also opens connections; the second is measured.
_MEASURED_ROUND = 2


class Bounds(NamedTuple):
    """What "auto" keeps to: steps of a round at least, and rounds of a run that is long enough for them."""

    steps: int
    rounds: int


def first_every(sync_every: Every, fragments: int, bounds: Bounds) -> int:
    """Steps of the first round. ``ConfigError`` where fragments do not divide it."""
    if sync_every == "auto":
        return -(-bounds.steps // fragments) * fragments
    if isinstance(sync_every, bool) or not isinstance(sync_every, int) or sync_every < 1:
        raise ConfigError(f"sync_every is {sync_every!r}: expected a number of steps of at least 1, or auto")
    if sync_every % fragments:
        raise ConfigError(
            f"num_fragments is {fragments}, which does not divide sync_every {sync_every}: set sync_every to "
            f"{-(-sync_every // fragments) * fragments}"
        )
    return sync_every


def choose_every(
    step_seconds: Sequence[float], sync_seconds: Sequence[float], fragments: int, planned_steps: int, bounds: Bounds
) -> tuple[int, str]:
    """Steps of a round, and why, from what each rank measured: of a step, and of a round's syncs.

    The rank that waited least for a sync waited for the network alone. ``planned_steps``: of the run; 0: unknown.
    """
    step, sync = max(statistics.median(step_seconds), 1e-9), min(sync_seconds)
    least, most = bounds.steps, max(bounds.steps, planned_steps // bounds.rounds) if planned_steps else MOST
    wanted = math.ceil(sync / (SHARE * step))
    every = -(-min(max(wanted, least), most, MOST) // fragments) * fragments
    part = sync / (sync + every * step)
    return every, f"a step takes {step:.3g} s, a sync {sync:.3g} s: communication is {part:.1%} of the time"


class Cadence:
    """When ranks synchronise.

    Args:
        sync_every: steps of a round, or "auto": measured in the second round, in which all ranks take the same choice.
            As that is by the clock, a run may choose otherwise when it is run again, but not when it is resumed.
        fragments: must divide it.
        planned_steps: of the run; 0: unknown.
    """

    def __init__(self, sync_every: Every, fragments: int, planned_steps: int, bounds: Bounds) -> None:
        self.every = first_every(sync_every, fragments, bounds)
        self.settled = sync_every != "auto"
        self.rounds = 0
        self.planned_steps = planned_steps
        self._fragments, self._bounds = fragments, bounds
        self._watched = 0
        self._seconds: list[float] = []
        self._resumed_at = 0.0
        self._waited_before = 0.0

    def step_ends(self) -> None:
        """Called before a sync may begin."""
        if not self.settled and self._resumed_at:
            self._seconds.append(time.perf_counter() - self._resumed_at)

    def step_begins(self) -> None:
        """Called when the strategy hands back to the loop."""
        self._resumed_at = time.perf_counter()

    def round_ends(self, waited: float) -> list[float] | None:
        """Seconds of a step and of a sync, where now is the time to choose. ``waited``: for collectives, so far."""
        self.rounds += 1
        self._watched += 1
        measured = None
        if not self.settled and self._watched == _MEASURED_ROUND:
            measured = [statistics.median(self._seconds), waited - self._waited_before]
        self._waited_before = waited
        return measured

    def choose(self, measured: Sequence[Sequence[float]]) -> str:
        """The choice and its reason, from what all ranks measured."""
        steps, syncs = ([row[i] for row in measured] for i in (0, 1))
        self.every, reason = choose_every(steps, syncs, self._fragments, self.planned_steps, self._bounds)
        self.settled = True
        return f"sync_every {self.every}: {reason}"
