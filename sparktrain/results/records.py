"""One step of one rank, and many of them as a table."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sparktrain.results import shares
from sparktrain.results.shares import SourceRecord

PHASES = ("transform", "selection", "coding", "apply")


class StepRecord(NamedTuple):
    """One step of one rank. Losses are sums in nats over this rank's target tokens; times in seconds.

    ``optimizer_seconds``, a part of ``compute_seconds``: from the gradient to the update; those of :data:`PHASES` are
    parts of it, 0 where a strategy does not tell them. ``heldout_loss``: nats per token after the step, the same on all
    ranks; None where it was not measured. ``examples``: sequences trained on.
    ``delta_norm``: in a step that ends a round, L2 norm of what this rank changed of the parameters in it; else None.
    ``sources``: only where several are mixed. What an external trainer does not tell, loss or gradient norm, is NaN.
    """

    step: int
    loss_sum: float
    tokens: int
    lr: float
    grad_norm: float
    seconds: float
    data_seconds: float
    compute_seconds: float
    communication_seconds: float
    payload_bytes: int
    bytes_sent: int
    bytes_received: int
    optimizer_seconds: float = 0.0
    transform_seconds: float = 0.0
    selection_seconds: float = 0.0
    coding_seconds: float = 0.0
    apply_seconds: float = 0.0
    heldout_loss: float | None = None
    examples: int = 0
    delta_norm: float | None = None
    sources: tuple[SourceRecord, ...] = ()

    @property
    def skipped(self) -> bool:
        """Whether its update was left out. A program that tells no gradient norm has skipped nothing: its steps have no
        ``optimizer_seconds``."""
        return not math.isfinite(self.grad_norm) and self.optimizer_seconds > 0


RankSteps = Sequence[tuple[int, StepRecord]]

TOTALS = [name for name in StepRecord._fields if name.endswith(("_seconds", "_bytes")) or name.startswith("bytes_")]
_PLAIN = StepRecord._fields[:-1]
TYPES = {name: pa.int64() if StepRecord.__annotations__[name] is int else pa.float64() for name in _PLAIN}


def write_records(rank: int, records: Sequence[StepRecord]) -> bytes:
    """Steps of a rank as a Parquet file's content."""
    file = io.BytesIO()
    pq.write_table(table_of([(rank, record) for record in records]), file)
    return file.getvalue()


def read_records(content: bytes) -> list[tuple[int, StepRecord]]:
    """Inverse of :func:`write_records`, each step with its rank."""
    rows = pq.read_table(io.BytesIO(content)).to_pylist()
    return [(row.pop("rank"), StepRecord(**shares.from_row(row))) for row in rows]


def table_of(records: RankSteps) -> pa.Table:
    """A row per step and rank."""
    mixed = any(record.sources for _, record in records)
    schema = pa.schema({"rank": pa.int64()} | TYPES | ({"sources": shares.TYPE} if mixed else {}))
    return pa.Table.from_pylist([{"rank": rank, **shares.to_row(record._asdict())} for rank, record in records], schema)
