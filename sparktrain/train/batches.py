"""This rank's share of every step's batch, read ahead of the loop.

Shapes: B_ = sequences of this rank in a step, L = tokens of a window (S+1 by the default rule).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.dataset as pads
import torch

from sparktrain.errors import DataError
from sparktrain.plan import Assignment, PlanSpec, rows, runs_of_steps, slots_of
from sparktrain.rundir import RunDir
from sparktrain.tokens import TokenFile, read_windows

# Steps whose rows are taken from the plan's Parquet files at a time: one read of a row group's statistics each.
_PLAN_WINDOW = 512


class Batches:
    """Iterates ``[B_, L]`` int64 token tensors, one per step, of rank ``rank`` of ``world``, whose share is by
    its speed where ``weights`` has that of each rank.

    Rows come from the plan on disk. Those of the first step are recomputed and compared: a plan of another run, or
    one edited by hand, is a :class:`DataError` before a token is trained on.
    """

    def __init__(
        self,
        directory: RunDir,
        spec: PlanSpec,
        rank: int,
        world: int,
        first_step: int = 0,
        weights: Sequence[float] = (),
    ) -> None:
        self._plan = pads.dataset(directory.plan, format="parquet", exclude_invalid_files=False)
        self._spec, self._first_step = spec, first_step
        self._rank, self._world, self._weights = rank, world, weights
        self._files = {shard.path: shard for shard in spec.shards}
        self._open: dict[str, TokenFile] = {}

    def __iter__(self) -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = None
            for rows_of_step in self._steps():
                following = reader.submit(self._read, rows_of_step)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def _steps(self) -> Iterator[list[Assignment]]:
        for begin, end, batch in runs_of_steps(self._spec.stretches, self._first_step, self._spec.steps, _PLAN_WINDOW):
            first_slot, last_slot = slots_of(self._rank, self._world, batch, self._weights)
            step, slot = pads.field("step"), pads.field("slot")
            table = self._plan.to_table(
                columns=list(Assignment._fields),
                filter=(step >= begin) & (step < end) & (slot >= first_slot) & (slot < last_slot),
            ).sort_by("pos")
            found = [Assignment(**row) for row in table.to_pylist()]
            share = last_slot - first_slot
            if len(found) != share * (end - begin):
                raise DataError(
                    f"the plan holds {len(found)} rows for steps {begin} to {end - 1} of this rank, "
                    f"expected {share * (end - begin)}: the plan is damaged; remove the run directory and start again"
                )
            if begin == self._first_step:
                self._compare(found[:share], first_slot)
            for i in range(0, len(found), share):
                yield found[i : i + share]

    def _compare(self, found: list[Assignment], first_slot: int) -> None:
        first = self._spec.first_position(self._first_step) + first_slot
        promised = rows(self._spec, first, first + len(found))
        for row, expected in zip(found, promised, strict=True):
            if row != expected:
                raise DataError(f"plan row {row} is not what the run's seed gives, {expected}: the plan was changed")

    def _read(self, assignments: list[Assignment]) -> torch.Tensor:
        windows = [(self._token_file(a.path), a.start) for a in assignments]
        return torch.from_numpy(read_windows(windows, self._spec.window_length))

    def _token_file(self, path: str) -> TokenFile:
        if path not in self._open:
            self._open[path] = TokenFile(self._files[path])
        return self._open[path]
