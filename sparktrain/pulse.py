"""How far each rank is: counters in a small file per rank, which a thread beside the loop renews every second.

The loop pays nothing for it: the thread reads the list of records that the loop makes anyway. Counters run from the
attempt's start, so that a reader who misses a second misses nothing, and what lies between two looks is a difference.
"""

import contextlib
import json
import math
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sparktrain.atomic import show
from sparktrain.beside import beside
from sparktrain.results import StepRecord

SECONDS = 1.0


@dataclass(frozen=True)
class Pulse:
    """One rank since its attempt began: ``step`` of the plan are done, ``steps`` of them in this attempt. The others
    are sums of :class:`StepRecord`'s fields over those; ``lr`` and ``grad_norm`` are the last step's."""

    rank: int
    host: str
    step: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    lr: float = 0.0
    grad_norm: float = 0.0
    seconds: float = 0.0
    data_seconds: float = 0.0
    compute_seconds: float = 0.0
    communication_seconds: float = 0.0
    payload_bytes: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def after(self, records: Sequence[StepRecord]) -> "Pulse":
        """This and the steps of ``records``, which follow."""
        if not records:
            return self
        values = asdict(self) | {"step": records[-1].step + 1, "steps": self.steps + len(records)}
        values |= {"lr": records[-1].lr, "grad_norm": records[-1].grad_norm}
        for name in values.keys() - {"rank", "host", "step", "steps", "lr", "grad_norm"}:
            values[name] += sum(getattr(record, name) for record in records)
        return Pulse(**values)


@contextlib.contextmanager
def beating(path: Path, rank: int) -> Iterator[list[StepRecord]]:
    """A list for the loop to append its records to; the file at ``path`` follows it while inside."""
    records: list[StepRecord] = []

    def beat(over: threading.Event) -> None:
        seen, pulse, last = 0, Pulse(rank, socket.gethostname()), False
        while not last:
            last = over.wait(SECONDS)
            new = records[seen:]
            if new:
                seen, pulse = seen + len(new), pulse.after(new)
                with contextlib.suppress(OSError):  # a full disk is for checkpoints to tell
                    show(path, json.dumps(asdict(pulse)))

    with beside("pulse", beat):
        yield records


def read(path: Path) -> Pulse | None:
    """The pulse at ``path``; None where there is none yet."""
    try:
        return Pulse(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Stretch:
    """What ranks did between two looks at them.

    Args:
        step: steps of the plan that rank 0 has done.
        steps: of them in this stretch.
        ranks: those that were seen.
        loss: nats per target token of all ranks; NaN where there was none.
        tokens: target tokens of all ranks since the attempt began.
        data, compute, communication: parts of the ranks' time, of 1.
        payload_bytes: per step and rank, mean since the attempt began; rounds of many steps make it jump otherwise.
        bytes_received: the same of what rank 0 received.
        slowest: the rank that needs longest for data and compute, as the others wait for it in communication.
        behind: how much longer than the fastest, as a ratio.
    """

    step: int
    steps: int
    ranks: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    data: float
    compute: float
    communication: float
    payload_bytes: float
    bytes_received: float
    slowest: int
    slowest_host: str
    behind: float

    def __str__(self) -> str:
        """All but the step, most wanted first: a narrow terminal cuts off the end."""
        slowest = f", slowest rank {self.slowest} on {self.slowest_host} ({self.behind:.2f} x the fastest)"
        return (
            f"loss {self.loss:.4f}, {_short(self.tokens_per_second)} tokens/s, {_short(self.payload_bytes)}B a step, "
            f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, compute {self.compute:.0%}, "
            f"communication {self.communication:.0%}, data {self.data:.0%}{slowest if self.ranks > 1 else ''}"
        )


def between(before: Mapping[int, Pulse], now: Mapping[int, Pulse]) -> Stretch | None:
    """The stretch from ``before`` to ``now``, pulses by rank; None where rank 0 did no step in it."""
    if 0 not in now or now[0].steps <= (before[0].steps if 0 in before else 0):
        return None
    past = {rank: before.get(rank, Pulse(rank, pulse.host)) for rank, pulse in now.items()}

    def grown(rank: int, *names: str) -> float:
        return float(sum(getattr(now[rank], name) - getattr(past[rank], name) for name in names))

    def share(name: str) -> float:
        return sum(grown(rank, name) for rank in now) / max(1e-9, sum(grown(rank, "seconds") for rank in now))

    tokens = sum(grown(rank, "tokens") for rank in now)
    moving = [rank for rank in now if grown(rank, "steps")]
    busy = {rank: grown(rank, "data_seconds", "compute_seconds") / grown(rank, "steps") for rank in moving}
    slowest, first = max(moving, key=lambda rank: busy[rank]), now[0]
    return Stretch(
        step=first.step,
        steps=first.steps - past[0].steps,
        ranks=len(now),
        loss=sum(grown(rank, "loss_sum") for rank in now) / tokens if tokens else math.nan,
        lr=first.lr,
        grad_norm=first.grad_norm,
        tokens=sum(pulse.tokens for pulse in now.values()),
        tokens_per_second=sum(grown(rank, "tokens") / max(1e-9, grown(rank, "seconds")) for rank in moving),
        data=share("data_seconds"),
        compute=share("compute_seconds"),
        communication=share("communication_seconds"),
        payload_bytes=first.payload_bytes / first.steps,
        bytes_received=first.bytes_received / first.steps,
        slowest=slowest,
        slowest_host=now[slowest].host,
        behind=busy[slowest] / max(1e-9, min(busy.values())),
    )


def _short(value: float) -> str:
    """12,345,678 as 12.3M."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return f"{value:.0f}"
