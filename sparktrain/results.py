"""What ranks hand back and what the driver makes of it: plain values only, never tensors.

Each rank writes its own pickled output file, ``RankResult`` or ``RankFailure``. The driver reads them with an
unpickler that admits these classes and nothing else, so a planted pickle is refused, not run.
"""

import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparktrain import windows
from sparktrain.errors import Diverged, LaunchError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class StepRecord(NamedTuple):
    """One step of one rank. Losses are sums in nats over this rank's target tokens; times in seconds.

    ``optimizer_seconds``, a part of ``compute_seconds``: from the gradient to the update. ``heldout_loss``: nats per
    token after the step, the same on all ranks; None where it was not measured. ``examples``: sequences trained on.
    ``delta_norm``: in a step that ends a round, L2 norm of what this rank changed of the parameters in it; else None.
    What an external trainer does not tell, loss or gradient norm, is NaN.
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
    heldout_loss: float | None = None
    examples: int = 0
    delta_norm: float | None = None


_TOTALS = [name for name in StepRecord._fields if name.endswith(("_seconds", "_bytes")) or name.startswith("bytes_")]
_TYPES = {name: pa.int64() if kind is int else pa.float64() for name, kind in StepRecord.__annotations__.items()}


@dataclass(frozen=True)
class RankResult:
    """What a rank that finished hands back.

    Args:
        digest: sha256 of all its parameters at the end.
        heldout_before: held-out loss in nats per token at the start, the same on all ranks; None where not asked for.
        records: the steps of this attempt.
        first_step_at: seconds since the epoch when its first step ended, on this rank's clock.
        resumed_from: the checkpoint that the attempt began from; None: from the first step.
    """

    rank: int
    world: int
    host: str
    records: list[StepRecord]
    digest: str
    num_parameters: int
    heldout_before: float | None
    heldout_after: float | None
    first_step_at: float
    resumed_from: str | None = None


@dataclass(frozen=True)
class RankFailure:
    """What a rank that raised leaves behind. ``echo``: it only noticed that another rank was gone."""

    rank: int
    host: str
    kind: str
    message: str
    traceback: str
    exit_code: int
    echo: bool


Outcome = RankResult | RankFailure

_ADMITTED = {(cls.__module__, cls.__qualname__): cls for cls in (StepRecord, RankResult, RankFailure)}


class _OutcomeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no result type")
        return _ADMITTED[module, name]


def dump_outcome(outcome: Outcome) -> bytes:
    """The bytes of an output file."""
    return pickle.dumps(outcome, protocol=4)


def load_outcome(data: bytes, name: str) -> Outcome:
    """Inverse of :func:`dump_outcome`; raises :class:`LaunchError` naming the file for anything but our types."""
    try:
        outcome = _OutcomeUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise LaunchError(f"output file {name} was refused: {error}; nothing of it was run: remove it") from None
    if not isinstance(outcome, RankResult | RankFailure):
        raise LaunchError(f"output file {name} was refused: it holds a {type(outcome).__name__}, not a rank's result")
    return outcome


def write_records(rank: int, records: Sequence[StepRecord]) -> bytes:
    """Steps of a rank as a Parquet file's content."""
    file = io.BytesIO()
    pq.write_table(_table_of([(rank, record) for record in records]), file)
    return file.getvalue()


def read_records(content: bytes) -> list[tuple[int, StepRecord]]:
    """Inverse of :func:`write_records`, each step with its rank."""
    rows = pq.read_table(io.BytesIO(content)).to_pylist()
    return [(row.pop("rank"), StepRecord(**row)) for row in rows]


def _table_of(records: Sequence[tuple[int, StepRecord]]) -> pa.Table:
    schema = pa.schema({"rank": pa.int64()} | _TYPES)
    return pa.Table.from_pylist([{"rank": rank, **record._asdict()} for rank, record in records], schema)


@dataclass(frozen=True)
class RunResult:
    """A finished run: every rank's result, and what they add up to.

    ``earlier``: steps of the attempts before the last one, with the ranks of then.
    """

    run_dir: str
    ranks: tuple[RankResult, ...]
    earlier: tuple[tuple[int, StepRecord], ...] = ()

    @classmethod
    def merge(
        cls, run_dir: str, outcomes: Sequence[RankResult], earlier: Sequence[tuple[int, StepRecord]] = ()
    ) -> "RunResult":
        """All ranks' results as one; raises :class:`Diverged` where their parameters differ."""
        ranks = tuple(sorted(outcomes, key=lambda r: r.rank))
        world = ranks[0].world
        missing = sorted(set(range(world)) - {r.rank for r in ranks})
        if missing:
            raise LaunchError(
                f"no output file from rank {missing[0]} of {world}: the run did not finish; start it again"
            )
        if len(ranks) > world or any(r.world != world for r in ranks):
            raise LaunchError(f"{len(ranks)} output files of {world} ranks: remove those that are not of this run")
        odd = [r for r in ranks if r.digest != ranks[0].digest]
        if odd:
            names = ", ".join(f"rank {r.rank} on {r.host} ({r.digest[:12]})" for r in odd)
            raise Diverged(
                f"parameters differ at the end of the run: rank 0 has {ranks[0].digest[:12]}, but {names}: "
                "the executors' machines or torch builds differ; use one kind of machine and the same packages on all"
            )
        return cls(run_dir, ranks, tuple(earlier))

    @property
    def digest(self) -> str:
        return self.ranks[0].digest

    @property
    def table(self) -> pa.Table:
        """One row per step over all ranks. ``loss``: nats per target token of the global batch; seconds: the slowest
        rank's; bytes: of the rank that has most."""
        by_step: dict[int, list[StepRecord]] = {}
        for _, record in self._records():
            by_step.setdefault(record.step, []).append(record)
        steps = []
        for step, records in sorted(by_step.items()):
            tokens, first = sum(r.tokens for r in records), records[0]
            merged: dict[str, Any] = {"step": step, "loss": sum(r.loss_sum for r in records) / tokens, "tokens": tokens}
            merged |= {"lr": first.lr, "heldout_loss": first.heldout_loss}
            steps.append(merged | {n: max(getattr(r, n) for r in records) for n in ("grad_norm", "seconds", *_TOTALS)})
        types = [(name, kind) for name, kind in _TYPES.items() if name not in ("step", "loss_sum")]
        return pa.Table.from_pylist(steps, pa.schema([("step", pa.int64()), ("loss", pa.float64()), *types]))

    @property
    def rank_table(self) -> pa.Table:
        """One row per step and rank, as each rank recorded it."""
        return _table_of(self._records())

    @property
    def windows(self) -> pa.Table:
        """One row per window, the steps between two syncs, and rank: see ``windows.py``."""
        return windows.table(windows.windows(self.rank_table.to_pylist()))

    def _records(self) -> list[tuple[int, StepRecord]]:
        return [*self.earlier, *((r.rank, record) for r in self.ranks for record in r.records)]

    @property
    def metrics(self) -> "pd.DataFrame":
        """:attr:`table` as a pandas frame."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    def metrics_frame(self, spark: Any) -> Any:
        """:attr:`table` as a Spark frame of session ``spark``."""
        return spark.createDataFrame(self.table)

    def plot(self) -> "Figure":
        """Loss, learning rate, gradient norm, tokens/s, bytes and the ranks' time; ConfigError without matplotlib."""
        from sparktrain.report.figures import run_figure

        return run_figure(self)

    def summary(self) -> dict[str, Any]:
        """The run in one dictionary: what ``result.json`` holds."""
        table, first = self.table, self.ranks[0]

        # JSON has no NaN. A program that tells no loss has skipped nothing: its steps have no optimizer_seconds.
        losses = [None if math.isnan(table["loss"][i].as_py()) else table["loss"][i].as_py() for i in (0, -1)]
        told = zip(table["loss"].to_pylist(), table["optimizer_seconds"].to_pylist(), strict=True)
        totals = {name: pc.sum(table[name]).as_py() for name in ("tokens", "seconds", *_TOTALS)}
        return {
            "run_dir": self.run_dir,
            "world_size": first.world,
            "steps": table.num_rows,
            "skipped_steps": sum(not math.isfinite(loss) and updated > 0 for loss, updated in told),
            "num_parameters": first.num_parameters,
            "loss_first": losses[0],
            "loss_last": losses[1],
            "heldout_loss_before": first.heldout_before,
            "heldout_loss_after": first.heldout_after,
            "tokens_per_second": totals["tokens"] / totals["seconds"],
            **totals,
            "digests": {f"rank {r.rank} on {r.host}": r.digest for r in self.ranks},
        }

    def report(self) -> str:
        """:meth:`summary` for people."""
        from sparktrain.report.text import run_text

        return run_text(self)
