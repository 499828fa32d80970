"""What all ranks' results add up to."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from sparktrain.errors import Diverged, LaunchError
from sparktrain.results import shares, windows
from sparktrain.results.outcome import RankResult
from sparktrain.results.records import TOTALS, TYPES, RankSteps, StepRecord, table_of
from sparktrain.results.shares import Asked

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
        rank's; bytes: of the rank that has most; ``fewer_than_ring_fp32`` and ``_bf16``: how many times fewer bytes it
        received than a ring all-reduce of the gradient would bring it, null where it received none. With several
        sources, also columns of each: ``shares.columns``."""
        by_step: dict[int, list[StepRecord]] = {}
        for _, record in self._records():
            by_step.setdefault(record.step, []).append(record)
        steps = []
        for step, records in sorted(by_step.items()):
            tokens, first = sum(r.tokens for r in records), records[0]
            merged: dict[str, Any] = {"step": step, "tokens": tokens}
            merged["loss"] = sum(r.loss_sum for r in records) / tokens if tokens else math.nan
            merged |= {"lr": first.lr, "heldout_loss": first.heldout_loss}
            merged |= {n: max(getattr(r, n) for r in records) for n in ("grad_norm", "seconds", *TOTALS)}
            merged |= self._against_ring(merged["bytes_received"], [len(records)])
            steps.append(merged | shares.columns(source for r in records for source in r.sources))
        types = [(name, kind) for name, kind in TYPES.items() if name not in ("step", "loss_sum")]
        types += [(name, pa.float64()) for name in self._against_ring(0, [])]
        mixed = shares.types(source for record in by_step.get(0, []) for source in record.sources)
        return pa.Table.from_pylist(steps, pa.schema([("step", pa.int64()), ("loss", pa.float64()), *types, *mixed]))

    def _against_ring(self, received: int, worlds: Iterable[int]) -> dict[str, float | None]:
        """``received`` bytes of a rank beside what ring all-reduces of the gradient, one in a world of each of these
        sizes, would bring it: 2 (W - 1) / W of the gradient."""
        numbers = 2 * self.ranks[0].num_parameters * sum((world - 1) / world for world in worlds)
        of = {"fp32": 4, "bf16": 2}
        return {f"fewer_than_ring_{n}": numbers * size / received if received else None for n, size in of.items()}

    @property
    def rank_table(self) -> pa.Table:
        """One row per step and rank, as each rank recorded it."""
        return table_of(self._records())

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
        # JSON has no NaN.
        losses = [None if math.isnan(table["loss"][i].as_py()) else table["loss"][i].as_py() for i in (0, -1)]
        skipped = {record.step for _, record in self._records() if record.skipped}
        worlds = Counter(record.step for _, record in self._records()).values()
        totals = {name: pc.sum(table[name]).as_py() for name in ("tokens", "seconds", *TOTALS)}
        return {
            "run_dir": self.run_dir,
            "world_size": first.world,
            "steps": table.num_rows,
            "skipped_steps": len(skipped),
            "num_parameters": first.num_parameters,
            "loss_first": losses[0],
            "loss_last": losses[1],
            "heldout_loss_before": first.heldout_before,
            "heldout_loss_after": first.heldout_after,
            "tokens_per_second": totals["tokens"] / totals["seconds"],
            **totals,
            **self._against_ring(totals["bytes_received"], worlds),
            "sources": shares.totals(self.sources, table),
            "digests": {f"rank {r.rank} on {r.host}": r.digest for r in self.ranks},
        }

    def report(self) -> str:
        """:meth:`summary` for people."""
        from sparktrain.report.text import run_text

        return run_text(self)
