"""What a rank did between two syncs: one row per (window, rank), from measured steps.

A window that went wrong says so: a loss that is not a number stays one, in the row and in the column of the table, and
what was not measured is null. Tables, not JSON, carry them: JSON has no NaN.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

import pyarrow as pa

from sparktrain.results import StepRecord


@dataclass(frozen=True)
class WindowMetrics:
    """Losses in nats per target token: of the first and the last step, and of all tokens of the window. Seconds are
    this rank's; ``seconds`` holds the phases and what lies between them.

    Args:
        window: 0 for the steps before the first sync.
        examples: sequences trained on.
        delta_norm: L2 norm of what the window changed of the parameters; None where not measured.
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


def windows(
    rank: int,
    records: Sequence[StepRecord],
    sync_every: int,
    examples_per_step: int,
    delta_norms: Mapping[int, float] | None = None,
) -> list[WindowMetrics]:
    """One row per window of ``sync_every`` steps, counted from step 0; windows cut by a start or an end are shorter.

    Args:
        records: one rank's steps, in order.
        examples_per_step: the rank's share of the global batch.
        delta_norms: by window.
    """
    assert sync_every >= 1
    norms = delta_norms or {}
    rows = []
    for window, group in groupby(records, lambda record: record.step // sync_every):
        steps = list(group)
        rows.append(
            WindowMetrics(
                window=window,
                rank=rank,
                first_step=steps[0].step,
                steps=len(steps),
                tokens=sum(s.tokens for s in steps),
                examples=examples_per_step * len(steps),
                loss_first=_loss(steps[:1]),
                loss_mean=_loss(steps),
                loss_last=_loss(steps[-1:]),
                delta_norm=norms.get(window),
                seconds=sum(s.seconds for s in steps),
                data_seconds=sum(s.data_seconds for s in steps),
                compute_seconds=sum(s.compute_seconds for s in steps),
                communication_seconds=sum(s.communication_seconds for s in steps),
                payload_bytes=sum(s.payload_bytes for s in steps),
            )
        )
    return rows


def table(rows: Sequence[WindowMetrics]) -> pa.Table:
    """The rows as a table, by window and rank: NaN is NaN in it, and None null."""
    ordered = sorted(rows, key=lambda row: (row.window, row.rank))
    kinds = {int: pa.int64(), float: pa.float64(), float | None: pa.float64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in WindowMetrics.__annotations__.items()])
    return pa.Table.from_pylist([asdict(row) for row in ordered], schema)


def _loss(steps: Sequence[StepRecord]) -> float:
    """A rank whose share had no target tokens has no loss: NaN."""
    tokens = sum(s.tokens for s in steps)
    return sum(s.loss_sum for s in steps) / tokens if tokens else math.nan
