"""A rank's rows of the plan on disk, step by step, read ahead of who takes them."""

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads

from sparktrain.errors import DataError
from sparktrain.plan import Assignment, PlanSpec, Share, rows, runs_of_steps, slots_of
from sparktrain.storage import dataset
from sparktrain.tokens.ahead import read_ahead

# Rows that are taken from the plan's Parquet files at a time: a row group of these is decoded whole each time.
_PLAN_ROWS = 1 << 16


class Shares:
    """Those of rank ``rank`` of ``world`` from ``first_step`` on of the plan in the directory ``plan``: of one step,
    two, four and so on, while they are no more than ``together`` windows. See
    :class:`~sparktrain.train.batches.Batches`."""

    def __init__(
        self,
        plan: Path,
        spec: PlanSpec,
        rank: int,
        world: int,
        first_step: int,
        weights: Sequence[float],
        together: int,
    ) -> None:
        # As a dictionary, a path of each row costs a number and not a string.
        format_ = pads.ParquetFileFormat(dictionary_columns={"path"})
        self._plan = pads.dataset(**dataset(plan), format=format_, exclude_invalid_files=False)
        self._spec, self._first_step = spec, first_step
        self._rank, self._world, self._weights = rank, world, weights
        self._together = together
        self._steps = 1

    def read(self) -> Generator[Share, None, None]:
        """In their order. Raises :class:`DataError` for a plan that is damaged or of another run."""
        most = max(stretch.batch for stretch in self._spec.stretches)
        steps = runs_of_steps(self._spec.stretches, self._first_step, self._spec.steps, max(1, _PLAN_ROWS // most))
        with closing(read_ahead(steps, self._of_run, 1, 1)) as found:
            for shares in found:
                yield from shares

    def _of_run(self, run: tuple[int, int, int]) -> list[Share]:
        begin, end, batch = run
        first_slot, last_slot = slots_of(self._rank, self._world, batch, self._weights)
        step, slot, length = pads.field("step"), pads.field("slot"), self._spec.window_length
        here = (step >= begin) & (step < end) & (slot >= first_slot) & (slot < last_slot)
        table = self._plan.to_table(
            columns=list(Assignment._fields), filter=here & (pads.field("length") == length)
        ).sort_by("pos")
        share = last_slot - first_slot
        if table.num_rows != share * (end - begin):
            raise DataError(
                f"the plan holds {table.num_rows} rows for steps {begin} to {end - 1} of this rank, "
                f"expected {share * (end - begin)}: the plan is damaged; remove the run directory and start again"
            )
        paths = table.column("path").unify_dictionaries().combine_chunks()
        names = ("slot", "pos", "epoch", "microshard_id", "start")
        columns = {name: table.column(name).to_numpy().astype(np.int64) for name in names}
        columns["path"] = paths.indices.to_numpy().astype(np.int64)
        shards = paths.dictionary.to_pylist()
        whole = Share(begin, **columns, paths=shards, window_length=length, num_steps=end - begin)
        if begin == self._first_step:
            self._compare(whole.part(0, 1).rows(), first_slot)
        shares, done = list[Share](), 0
        while done < end - begin:
            self._steps = min(self._steps, max(1, self._together // share))
            shares.append(whole.part(done, min(self._steps, end - begin - done)))
            done += shares[-1].num_steps
            self._steps *= 2
        return shares

    def _compare(self, found: list[Assignment], first_slot: int) -> None:
        first = self._spec.first_position(self._first_step) + first_slot
        promised = rows(self._spec, first, first + len(found))
        for row, expected in zip(found, promised, strict=True):
            if row != expected:
                raise DataError(f"plan row {row} is not what the run's seed gives, {expected}: the plan was changed")
