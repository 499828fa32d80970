"""Batches: the same global batch for any number of ranks, and only by the plan that was promised."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sparktrain import plan, tokens
from sparktrain.errors import DataError
from sparktrain.plan import Assignment, PlanSpec
from sparktrain.rundir import RunDir
from sparktrain.train.batches import Batches


@pytest.fixture
def planned(data: Path, tmp_path: Path) -> tuple[RunDir, PlanSpec]:
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=10, steps=40, seed=5)  # straddles an epoch
    assert spec.num_epochs == 2
    write(tmp_path, plan.rows(spec, 0, spec.num_positions))
    return RunDir(tmp_path), spec


def write(directory: Path, rows: list[Assignment]) -> None:
    (directory / "plan").mkdir(exist_ok=True)
    table = pa.Table.from_pylist([row._asdict() for row in rows])
    pq.write_table(table, directory / "plan" / "part-0.parquet", row_group_size=100)


def test_the_global_batch_of_a_step_does_not_depend_on_the_number_of_ranks(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    alone = list(Batches(directory, spec, 0, 1))
    assert len(alone) == 40
    assert alone[0].shape == (10, 33)
    for world in (2, 3, 4, 10):
        shares = [list(Batches(directory, spec, rank, world)) for rank in range(world)]
        for step, whole in enumerate(alone):
            assert torch.equal(torch.cat([share[step] for share in shares]), whole)


def test_a_batch_holds_the_tokens_that_its_rows_name(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    batch = next(iter(Batches(directory, spec, 0, 1, first_step=3)))
    for row, window in zip(plan.rows(spec, 30, 40), batch, strict=True):
        shard = np.fromfile(row.path, dtype="<u2")
        assert window.tolist() == shard[row.start : row.start + row.length].tolist()


def test_the_order_goes_on_where_it_is_resumed(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    whole = list(Batches(directory, spec, 1, 3))
    assert all(torch.equal(a, b) for a, b in zip(whole[17:], Batches(directory, spec, 1, 3, 17), strict=True))


def test_a_plan_of_another_order_is_refused_before_the_first_token(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    rows = plan.rows(spec, 0, spec.num_positions)
    swapped = [rows[0]._replace(start=rows[1].start, path=rows[1].path), *rows[1:]]
    write(directory.path, swapped)
    with pytest.raises(DataError, match="is not what the run's seed gives"):
        next(iter(Batches(directory, spec, 0, 2)))


def test_a_plan_with_a_row_missing_is_refused(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    rows = plan.rows(spec, 0, spec.num_positions)
    write(directory.path, rows[:200] + rows[201:])
    with pytest.raises(DataError, match="holds 399 rows for steps 0 to 39 of this rank, expected 400"):
        next(iter(Batches(directory, spec, 0, 1)))


def test_heldout_windows_are_spread_over_all_shards(data: Path) -> None:
    shards = [tokens.inspect(path) for path in tokens.find_shards(data / "train")]
    windows = plan.spread_windows(shards, 32, 12)
    assert len(windows) == 12
    assert {shard for shard, _ in windows} == set(shards)
    assert len(plan.spread_windows(shards, 32, 10**6)) == 3 * 124
