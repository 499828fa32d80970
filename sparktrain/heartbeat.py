"""Where each rank is, and which one hangs.

A thread of every rank writes down, every second or so, what its loop is at; the driver reads that. A rank that is
stopped falls silent; one that is stuck in a read or a lock goes on to say where; the others wait for it, and say so.
Clocks of two machines are never compared: a rank tells for how long it has been where it is, and the driver measures
for how long it has heard nothing new.
"""

import contextlib
import datetime
import faulthandler
import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sparktrain.beside import beside
from sparktrain.config import Launch

# In the order in which a rank comes to them within a step: who waits for the others is further than they are.
PLACES = {
    "starts": "starting",
    "loads": "loading model and checkpoint",
    "reads": "reading its batch",
    "computes": "computing its gradient",
    "agrees": "waiting for the other ranks",
    "updates": "exchanging and applying the update",
    "saves": "saving",
    "evaluates": "measuring the held-out loss",
    "ended": "at its end, but what started it was not",
}
_STEP = ("reads", "computes", "agrees", "updates")
_WAITING = ("agrees", "updates", "ended")
_LEAST_SECONDS, _STEPS = 60.0, 10
# Of the collective time-out: who hangs is to be named before those who wait for it give up.
_PART = 0.9


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself.

    Args:
        beat: goes up by one with each.
        step: the step it is in; -1 before the first.
        seconds: for how long it has been at ``place`` without getting anywhere.
        since: when that began, on its own clock, for people.
        slowest: seconds of its slowest step so far; 0: it has done none.
    """

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    place: str
    seconds: float
    since: str
    slowest: float


@dataclass
class _Here:
    """This process's own place."""

    step: int = -1
    place: str = "starts"
    since: float = 0.0
    step_since: float = 0.0
    slowest: float = 0.0


_here = _Here()


def at(place: str, step: int | None = None) -> None:
    """This rank has come to ``place``, or further in it; of ``step`` where that is another one."""
    now = time.monotonic()
    if step is not None and step != _here.step:
        if _here.step >= 0:
            _here.slowest = max(_here.slowest, now - _here.step_since)
        _here.step, _here.step_since = step, now
    _here.place, _here.since = place, now


@contextlib.contextmanager
def beating(file: Path, rank: int, host: str, pid: int, launch: Launch) -> Iterator[None]:
    """Keep ``file`` up to date while inside; who hangs prints the stacks of its threads."""
    vars(_here).update(vars(_Here(since=time.monotonic())))

    def beat(number: int) -> Heartbeat:
        seconds = time.monotonic() - _here.since
        since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
        said = Heartbeat(
            rank, host, pid, number, _here.step, _here.place, seconds, f"{since:%H:%M:%S} UTC", _here.slowest
        )
        # In place: a reader passes over what it cannot parse, and no rank that is killed leaves a temporary file.
        with contextlib.suppress(OSError):
            file.write_text(json.dumps(asdict(said)))
        return said

    def beats(over: threading.Event) -> None:
        number, stuck_since = 0, -1.0
        while not over.wait(interval(launch)):
            number += 1
            said = beat(number)
            if said.place not in _WAITING and said.seconds > limit(said, launch) and _here.since != stuck_since:
                stuck_since = _here.since
                print(f"no progress for {said.seconds:.0f} s while {PLACES[said.place]}:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__ or 2)
        at("ended")
        beat(number + 1)

    beat(0)
    with beside("heartbeat", beats):
        yield


def read(files: Iterable[Path]) -> list[Heartbeat]:
    """What ranks said last; those that said nothing yet, or are just saying it, are left out."""
    found = []
    for file in files:
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Heartbeat(**json.loads(file.read_text())))
    return found


def interval(launch: Launch) -> float:
    """Seconds between two beats."""
    return min(3.0, max(0.2, (launch.step_timeout or _LEAST_SECONDS) / 20))


def limit(heartbeat: Heartbeat, launch: Launch, silent: bool = False) -> float:
    """Seconds that a rank may be where it is, or ``silent``."""
    longest = _PART * launch.collective_timeout
    if heartbeat.place not in _STEP:
        return longest
    if launch.step_timeout:
        return float(launch.step_timeout)
    if heartbeat.slowest == 0 or not (silent or heartbeat.place == "computes"):
        return longest
    return min(longest, max(_LEAST_SECONDS, _STEPS * heartbeat.slowest))


class Watch:
    """Judges what the ranks of an attempt say of themselves, by the limits of ``launch``."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._heard: dict[int, tuple[int, float]] = {}

    def hung(self, heartbeats: Iterable[Heartbeat], now: float) -> str | None:
        """Which rank hangs at ``now`` (seconds of a clock that never goes back), in one line; None: none does."""
        silent, idle, by_rank = {}, {}, {}
        for heartbeat in heartbeats:
            rank = heartbeat.rank
            if self._heard.get(rank, (-1, now))[0] != heartbeat.beat:
                self._heard[rank] = heartbeat.beat, now
            by_rank[rank] = heartbeat
            silent[rank] = 0.0 if heartbeat.place == "ended" else now - self._heard[rank][1]
            idle[rank] = heartbeat.seconds + now - self._heard[rank][1]

        def first(ranks: Iterable[int]) -> int:
            return min(ranks, key=lambda r: (by_rank[r].step, list(PLACES).index(by_rank[r].place), r))

        limits = {rank: limit(heartbeat, self._launch) for rank, heartbeat in by_rank.items()}
        lost = [r for r, heartbeat in by_rank.items() if silent[r] > limit(heartbeat, self._launch, silent=True)]
        stuck = [r for r, heartbeat in by_rank.items() if heartbeat.place not in _WAITING and idle[r] > limits[r]]
        if lost:
            return self._say(by_rank[first(lost)], f"no sign of life for {silent[first(lost)]:.0f} s")
        if stuck:
            return self._say(by_rank[first(stuck)], f"no progress for {idle[first(stuck)]:.0f} s")
        if idle and all(idle[r] > limits[r] for r in idle):
            return self._say(by_rank[first(idle)], f"no rank made progress for {min(idle.values()):.0f} s")
        return None

    def _say(self, last: Heartbeat, what: str) -> str:
        step = f" of step {last.step}" if last.step >= 0 else ""
        setting = "launch.step_timeout" if last.place in _STEP else "launch.collective_timeout"
        return (
            f"rank {last.rank} on {last.host} hangs: {what}; since {last.since} it was {PLACES[last.place]}{step} "
            f"(longer than {setting} allows)"
        )
