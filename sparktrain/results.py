"""What ranks hand back and what the driver makes of it: plain values only, never tensors.

Each rank writes its own pickled output file, ``RankResult`` or ``RankFailure``. The driver reads them with an
unpickler that admits these classes and nothing else, so a planted pickle is refused, not run.
"""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparktrain import shares
from sparktrain.errors import Diverged, LaunchError
from sparktrain.shares import Asked, SourceRecord

if TYPE_CHECKING:
    import pandas as pd


class StepRecord(NamedTuple):
    """One step of one rank. Losses are sums in nats over this rank's target tokens; times in seconds; ``sources`` only
    where several are mixed."""

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
    sources: tuple[SourceRecord, ...] = ()


RankSteps = Sequence[tuple[int, StepRecord]]
_MEASURED = StepRecord._fields[StepRecord._fields.index("grad_norm") : -1]


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

_ADMITTED = {(cls.__module__, cls.__qualname__): cls for cls in (StepRecord, SourceRecord, RankResult, RankFailure)}


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
    return [(row.pop("rank"), StepRecord(**shares.from_row(row))) for row in rows]


def _table_of(records: RankSteps) -> pa.Table:
    return pa.Table.from_pylist([{"rank": rank, **shares.to_row(record._asdict())} for rank, record in records])


@dataclass(frozen=True)
class RunResult:
    """A finished run: every rank's result, and what they add up to.

    ``earlier``: steps of the attempts before the last one, with the ranks of then; ``sources``: of a mixture.
    """

    run_dir: str
    ranks: tuple[RankResult, ...]
    earlier: tuple[tuple[int, StepRecord], ...] = ()
    sources: tuple[Asked, ...] = ()

    @classmethod
    def merge(
        cls, run_dir: str, outcomes: Sequence[RankResult], earlier: RankSteps = (), sources: Sequence[Asked] = ()
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
        return cls(run_dir, ranks, tuple(earlier), tuple(sources))

    @property
    def digest(self) -> str:
        return self.ranks[0].digest

    @property
    def table(self) -> pa.Table:
        """One row per step over all ranks. ``loss``: nats per target token of the global batch; seconds: the slowest
        rank's; bytes: of the rank that has most. With several sources, also columns of each: ``shares.columns``."""
        by_step: dict[int, list[StepRecord]] = {}
        for _, record in self._records():
            by_step.setdefault(record.step, []).append(record)
        steps = []
        for _, records in sorted(by_step.items()):
            tokens = sum(r.tokens for r in records)
            merged = {"step": records[0].step, "loss": sum(r.loss_sum for r in records) / tokens, "tokens": tokens}
            merged |= {"lr": records[0].lr} | {name: max(getattr(r, name) for r in records) for name in _MEASURED}
            steps.append(merged | shares.columns(source for r in records for source in r.sources))
        return pa.Table.from_pylist(steps)

    @property
    def rank_table(self) -> pa.Table:
        """One row per step and rank, as each rank recorded it."""
        return _table_of(self._records())

    def _records(self) -> list[tuple[int, StepRecord]]:
        return [*self.earlier, *((r.rank, record) for r in self.ranks for record in r.records)]

    @property
    def metrics(self) -> "pd.DataFrame":
        """:attr:`table` as a pandas frame."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    def metrics_frame(self, spark: Any) -> Any:
        """:attr:`table` as a Spark frame of session ``spark``."""
        return spark.createDataFrame(self.table.to_pylist())

    def summary(self) -> dict[str, Any]:
        """The run in one dictionary: what ``result.json`` holds."""
        table, first = self.table, self.ranks[0]

        def total(name: str) -> Any:
            return pc.sum(table[name]).as_py()

        seconds = total("seconds")
        tokens = total("tokens")
        return {
            "run_dir": self.run_dir,
            "world_size": first.world,
            "steps": table.num_rows,
            "num_parameters": first.num_parameters,
            "loss_first": table["loss"][0].as_py(),
            "loss_last": table["loss"][-1].as_py(),
            "heldout_loss_before": first.heldout_before,
            "heldout_loss_after": first.heldout_after,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            **{name: total(name) for name in _MEASURED[_MEASURED.index("data_seconds") :]},
            "sources": shares.totals(self.sources, table),
            "digests": {f"rank {r.rank} on {r.host}": r.digest for r in self.ranks},
        }

    def report(self) -> str:
        """:meth:`summary` for people."""
        s = self.summary()
        held = (
            f"held-out loss {s['heldout_loss_before']:.4f} -> {s['heldout_loss_after']:.4f}\n"
            if s["heldout_loss_before"] is not None
            else ""
        )
        sources = "".join(f"source        {line}\n" for line in shares.lines(s["sources"]))
        digests = "\n".join(f"digest        {name}: {digest}" for name, digest in s["digests"].items())
        return (
            f"{s['steps']} steps, {s['tokens']:,} tokens, {s['world_size']} ranks, {s['num_parameters']:,} parameters\n"
            f"loss          {s['loss_first']:.4f} -> {s['loss_last']:.4f}\n"
            f"{held}{sources}"
            f"speed         {s['tokens_per_second']:,.0f} tokens/s; seconds: {s['compute_seconds']:.1f} compute, "
            f"{s['communication_seconds']:.1f} communication, {s['data_seconds']:.1f} data\n"
            f"bytes         payload {s['payload_bytes']:,}, sent {s['bytes_sent']:,}, received {s['bytes_received']:,} "
            f"per rank\n"
            f"{digests}\n"
            f"run directory {self.run_dir}"
        )
