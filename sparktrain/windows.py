"""What a rank did between two syncs: one row per (window, rank), from measured steps.

A window that went wrong says so: a loss that is not a number stays one, in the row and in the column of the table, and
what was not measured is null. Tables, not JSON, carry them: JSON has no NaN.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa

Step = Mapping[str, Any]


@dataclass(frozen=True)
class WindowMetrics:
    """Losses in nats per target token: of the first and the last step, and of all tokens of the window. Seconds are
    this rank's; ``seconds`` holds the phases and what lies between them.

    Args:
        window: 0 for the steps before the first sync.
        examples: sequences trained on.
        delta_norm: L2 norm of what this rank's steps changed of the parameters, which is the pseudo-gradient's; None in
            a window that no sync ended.
    """

    window: int
    rank: int
    first_step: int
    steps: int
    tokens: int
    examples: int
    loss_first: float
    loss_mean: float
    loss_last: float
    delta_norm: float | None
    seconds: float
    data_seconds: float
    compute_seconds: float
    communication_seconds: float
    payload_bytes: int


def windows(steps: Sequence[Step]) -> list[WindowMetrics]:
    """One row per window and rank of ``steps``, each a ``StepRecord`` as a mapping, with its ``rank``.

    A window ends with a step that has a ``delta_norm``, on all ranks alike; those cut by a start or an end are shorter.
    Where ranks agree after every step there is no such step, and the run is one window.
    """
    ends = sorted({step["step"] for step in steps if step["delta_norm"] is not None})
    placed = sorted(((bisect_left(ends, s["step"]), s["rank"], s["step"], s) for s in steps), key=itemgetter(0, 1, 2))
    return [
        _window(window, rank, [step for *_, step in group])
        for (window, rank), group in groupby(placed, key=itemgetter(0, 1))
    ]


def table(rows: Sequence[WindowMetrics]) -> pa.Table:
    """The rows as a table: NaN is NaN in it, and None null."""
    kinds = {int: pa.int64(), float: pa.float64(), float | None: pa.float64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in WindowMetrics.__annotations__.items()])
    return pa.Table.from_pylist([asdict(row) for row in rows], schema)


def _window(window: int, rank: int, steps: Sequence[Step]) -> WindowMetrics:
    sums = ("tokens", "examples", "seconds", "data_seconds", "compute_seconds", "communication_seconds")
    return WindowMetrics(
        window=window,
        rank=rank,
        first_step=steps[0]["step"],
        steps=len(steps),
        loss_first=_loss(steps[:1]),
        loss_mean=_loss(steps),
        loss_last=_loss(steps[-1:]),
        delta_norm=steps[-1]["delta_norm"],
        **{name: sum(step[name] for step in steps) for name in (*sums, "payload_bytes")},
    )


def _loss(steps: Sequence[Step]) -> float:
    """A rank whose share had no target tokens has no loss: NaN."""
    tokens = sum(step["tokens"] for step in steps)
    return sum(step["loss_sum"] for step in steps) / tokens if tokens else math.nan
