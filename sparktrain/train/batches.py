"""This rank's share of every step's batch, read ahead of the loop.

Shapes: B_ = sequences of this rank in a step, L = tokens of a window (S+1 by the default rule).
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice

import pyarrow.dataset as pads

from sparktrain.digests import Digests
from sparktrain.errors import DataError
from sparktrain.plan import Assignment, PlanSpec, rows, runs_of_steps, slots_of
from sparktrain.receipts import Receipt, Receipts
from sparktrain.rundir import RunDir
from sparktrain.tokens import TokenFile
from sparktrain.tokens.ahead import read_ahead
from sparktrain.tokens.opened import Opened
from sparktrain.tokens.sequences import Window, stack
from sparktrain.tokens.source import Opener
from sparktrain.tokens.sources import is_local, open_if_there
from sparktrain.train.batch import Batch

# Steps whose rows are taken from the plan's Parquet files at a time: one read of a row group's statistics each.
_PLAN_WINDOW = 512
# Batches that are read ahead of the one that is trained on, at least.
_AHEAD = 2
# Ranges of servers and stores that are read at a time.
_CONNECTIONS = 16
_OPEN_FILES = 64


class Batches:
    """Iterates ``[B_, L]`` batches, one per step, of rank ``rank`` of ``world``, whose share is by its speed where
    ``weights`` has that of each rank.

    Rows come from the plan on disk. Those of the first step are recomputed and compared: a plan of another run, or
    one edited by hand, is a :class:`DataError` before a token is trained on. Each batch that is handed out is entered
    in ``receipts``.
    """

    def __init__(
        self,
        directory: RunDir,
        spec: PlanSpec,
        rank: int,
        world: int,
        first_step: int = 0,
        weights: Sequence[float] = (),
        opener: Opener = open_if_there,
        receipts: Receipts | None = None,
    ) -> None:
        self._plan = pads.dataset(directory.plan, format="parquet", exclude_invalid_files=False)
        self._spec, self._first_step = spec, first_step
        self._rank, self._world, self._weights, self._receipts = rank, world, weights, receipts
        shards = {shard.path: shard for shard in spec.shards}
        self._remote = not all(map(is_local, shards))
        self._digests = Digests(directory.digests, spec.shards, spec.first_microshards)
        self._files = Opened(lambda path: TokenFile(shards[path], opener), _OPEN_FILES)

    def __iter__(self) -> Iterator[Batch]:
        with closing(self._files), closing(self._by_range() if self._remote else self._by_batch()) as batches:
            for batch, read in batches:
                if self._receipts:
                    self._receipts.add(read)
                yield batch

    def _by_batch(self) -> Generator[tuple[Batch, list[Receipt]], None, None]:
        yield from read_ahead(self._steps(), self._batch, 1, _AHEAD)

    def _by_range(self) -> Generator[tuple[Batch, list[Receipt]], None, None]:
        """Window by window, many at a time: a server's answers take long, but it gives them side by side."""
        runs = list(runs_of_steps(self._spec.stretches, self._first_step, self._spec.steps, _PLAN_WINDOW))
        slots = [slots_of(self._rank, self._world, batch, self._weights) for _, _, batch in runs]
        shares = [(last - first, end - begin) for (first, last), (begin, end, _) in zip(slots, runs, strict=True)]
        wanted = (row for rows_of_step in self._steps() for row in rows_of_step)
        ahead = max(_CONNECTIONS, _AHEAD * max(share for share, _ in shares))
        with closing(read_ahead(wanted, self._window, _CONNECTIONS, ahead)) as windows:
            for share, steps in shares:
                for _ in range(steps):
                    yield _together(list(islice(windows, share)))

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

    def _batch(self, assignments: list[Assignment]) -> tuple[Batch, list[Receipt]]:
        # In the order of the files, in which a row group is decoded once for all rows in it.
        order = sorted(range(len(assignments)), key=lambda i: (assignments[i].path, assignments[i].start))
        found = {i: self._window(assignments[i]) for i in order}
        return _together([found[i] for i in range(len(assignments))])

    def _window(self, assignment: Assignment) -> tuple[Assignment, Window, int]:
        with self._files.use(assignment.path) as file:
            window = file.window(assignment.start, assignment.length, documents=False)
            digest = file.digest_of(window)
        self._digests.check(assignment.path, assignment.microshard_id, digest)
        return assignment, window, digest


def _together(read: Sequence[tuple[Assignment, Window, int]]) -> tuple[Batch, list[Receipt]]:
    batch = Batch.of(stack([window for _, window, _ in read]))
    of = zip(read, batch.targets_of_rows.tolist(), strict=True)
    return batch, [(row.step, row.slot, row.microshard_id, digest, targets) for (row, _, digest), targets in of]
