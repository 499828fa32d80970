"""The planner: SQL gives plan.py's numbers; disjoint and complete, by SQL."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparktrain import cli, plan, tokens
from sparktrain.config import Data, RunConfig
from sparktrain.errors import DataError
from sparktrain.plan import Assignment, PlanSpec, Source
from sparktrain.rundir import RunDir
from sparktrain.spark import index, planner
from sparktrain.tokens import Shard


def spec_over(num_tokens: list[int], batch: int, steps: int) -> PlanSpec:
    shards = tuple(Shard(f"/shards/{i:03d}.ds", n, 2) for i, n in enumerate(num_tokens))
    return PlanSpec(shards, sequence_length=16, total_batch=batch, steps=steps, seed=11)


@pytest.mark.parametrize(
    ("num_tokens", "batch", "steps"),
    [
        ([16 * 40 + 1, 16 * 61 + 9, 16 * 3 + 1], 7, 40),  # 104 microshards, 2.7 epochs
        ([17], 3, 5),  # one microshard, an epoch per position
        ([16 * 4099 + 1], 64, 65),  # prime number of microshards
        ([16 * n + 1 for n in (1, 50, 1, 200, 2)], 16, 20),  # shards of very different sizes
    ],
)
def test_sql_gives_the_same_rows_as_arithmetic(spark: Any, num_tokens: list[int], batch: int, steps: int) -> None:
    spec = spec_over(num_tokens, batch, steps)
    rows = planner.plan_frame(spark, spec).collect()
    assert [Assignment(**row.asDict()) for row in rows] == plan.rows(spec, 0, spec.num_positions)


@pytest.mark.parametrize(
    "changes",
    [
        {"block": 5},
        {"block": 200},  # longer than the data
        {"order": "sequential", "ramp": ((5, 4), (9, 17), (39, 1))},
        {"order": "psyche", "psyche_seed": "2a" * 32},
        {"skipped": ((0, 3), (50, 70), (103, 104)), "skipped_places": ((5, 9), (100, 211))},
        {"skipped": ((30, 45),), "block": 4, "sources": (Source("a", 1, 0.3), Source("b", 2, 0.7))},
        {"order": "psyche", "psyche_seed": "2a" * 32, "sources": (Source("a", 1, 0.5), Source("b", 2, 0.5))},
    ],
)
def test_sql_and_arithmetic_agree_on_every_order(spark: Any, changes: dict[str, Any]) -> None:
    spec = replace(spec_over([16 * 40 + 1, 16 * 61 + 9, 16 * 3 + 1], 7, 40), **changes)
    rows = [Assignment(**row.asDict()) for row in planner.plan_frame(spark, spec).collect()]
    assert rows == plan.rows(spec, 0, spec.num_positions)
    gone = {m for first, last in spec.skipped for m in range(first, last)}
    assert not gone & {row.microshard_id for row in rows}
    assert len({(row.epoch, row.microshard_id) for row in rows}) == len(rows)


def test_ranks_of_the_view_have_the_slots_of_the_arithmetic(spark: Any, tmp_path: Path) -> None:
    spec = replace(spec_over([1000], 4, 10), ramp=((3, 9), (7, 5)))
    planner.write_plan(spark, spec, RunDir(tmp_path))
    for weights in ((), (1.0, 2.5, 0.3)):
        for row in planner.assignments(spark, tmp_path, 3, weights).collect():
            first, last = plan.slots_of(row["rank"], 3, spec.batch_of(row.step), weights)
            assert first <= row.slot < last


def config_with(*argv: str) -> RunConfig:
    return cli.parse(RunConfig, ["--data.sequence-length", "16", "--train.total-batch", "8", *argv])


def test_what_is_to_be_skipped_is_named_by_shard_or_by_step() -> None:
    shards = spec_over([16 * 40 + 1, 16 * 60 + 1], 8, 10).shards
    entries = (
        '[{"shard": "001.ds"}, {"shard": "/shards/000.ds", "sequences": [3, 9]}, {"steps": [2, 3]}, {"steps": [4, 5]}]'
    )
    spec = planner.spec_of(config_with("--data.skip", entries), shards)
    assert spec.skipped == ((3, 9), (40, 100))
    # What was step 5 before the entry for step 2 is step 4 after it.
    assert spec.skipped_places == ((16, 24), (40, 48))
    ramp = planner.spec_of(config_with("--train.batch-ramp", "[[2, 16]]", "--data.skip", '[{"steps": [1, 3]}]'), shards)
    assert ramp.skipped_places == ((8, 32),)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ('[{"shard": "9.ds"}]', "data.skip names shard 9.ds, of which data.path has 0"),
        ('[{"shard": "000.ds", "sequences": [3, 41]}]', "sequences to 41 of shard 000.ds, which has 40"),
        ('[{"shard": "000.ds"}]', "data.skip names all 40 sequences"),
    ],
)
def test_a_skip_that_cannot_be_is_one_line(entries: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        planner.spec_of(config_with("--data.skip", entries), spec_over([16 * 40 + 1], 8, 10).shards)
    assert "\n" not in str(caught.value)


def test_sql_and_arithmetic_agree_on_psyches_windows_and_on_rows(spark: Any) -> None:
    rows_of_16 = Shard("/shards/rows.parquet", 16 * 20, 4, "parquet", row_length=16)
    spec = replace(spec_over([16 * 40, 16 * 61 + 1], 7, 30), window="psyche")
    spec = replace(spec, shards=(spec.shards[0], rows_of_16, spec.shards[1]))
    rows = [Assignment(**row.asDict()) for row in planner.plan_frame(spark, spec).collect()]
    assert rows == plan.rows(spec, 0, spec.num_positions)
    assert {row.length for row in rows} == {16}
    first_epoch = {(row.path, row.start) for row in rows if row.epoch == 0}
    counts = [len([path for path, _ in first_epoch if path == shard.path]) for shard in spec.shards]
    assert counts == [39, 20, 61]


def test_the_plan_on_disk_is_disjoint_and_complete_by_sql(spark: Any, data: Path, tmp_path: Path) -> None:
    indexed = index.index_shards(spark, tokens.locate_shards(data / "train"), Data())
    hashed = [replace(shard, num_bytes=0, sha256="") for shard, _ in indexed]
    assert hashed == [tokens.inspect(path) for path in tokens.find_shards(data / "train")]
    spec = PlanSpec(tuple(shard for shard, _ in indexed), 32, total_batch=9, steps=100, seed=1)
    directory = RunDir(tmp_path)
    planner.write_plan(spark, spec, directory)
    assert directory.plan_spec() == spec
    for world in (1, 2, 3, 4, 9):
        planner.assignments(spark, tmp_path, world).createOrReplaceTempView("assignments")

        def one(query: str) -> Any:
            return spark.sql(query).collect()[0][0]

        n = spec.num_microshards
        assert one("select count(*) from assignments") == 900
        assert one("select max(pos) - min(pos) + 1 - count(distinct pos) from assignments") == 0
        assert (
            one("select count(*) from (select 1 from assignments group by epoch, microshard_id having count(*) > 1)")
            == 0
        )
        assert one("select count(distinct microshard_id) from assignments where epoch = 0") == n
        assert (
            one("select count(*) from (select 1 from assignments group by path, start, epoch having count(*) > 1)") == 0
        )
        assert (
            one("select count(*) from (select 1 from assignments group by step having count(distinct slot) <> 9)") == 0
        )
        assert one("select count(distinct rank) from assignments") == world
        shares = {r.rank: (r.lo, r.hi + 1) for r in spark.sql(
            "select rank, min(slot) lo, max(slot) hi from assignments group by rank"
        ).collect()}  # fmt: skip
        assert shares == {rank: plan.slots_of(rank, world, 9) for rank in range(world)}


def test_the_same_plan_is_not_written_again_and_another_one_replaces_it(spark: Any, tmp_path: Path) -> None:
    spec, directory = spec_over([1000], 4, 10), RunDir(tmp_path)
    planner.write_plan(spark, spec, directory)
    files = sorted(p.name for p in directory.plan.glob("*.parquet"))
    planner.write_plan(spark, spec, directory)
    assert sorted(p.name for p in directory.plan.glob("*.parquet")) == files
    other = spec_over([1000], 4, 12)
    planner.write_plan(spark, other, directory)
    assert directory.plan_spec() == other
    assert planner.assignments(spark, tmp_path, 1).count() == 48


def test_a_run_directory_may_have_any_name(spark: Any, tmp_path: Path) -> None:
    run = tmp_path / "a b%20ü'q[1]{x},*?"
    run.mkdir()
    planner.write_plan(spark, spec_over([1000], 4, 10), RunDir(run))
    assert planner.assignments(spark, run, 2).count() == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == [run.name]
    assert list((run / "plan").glob("*.parquet"))


def test_assignments_need_a_plan_and_a_world_that_fits(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no plan"):
        planner.assignments(spark, tmp_path, 2)
    planner.write_plan(spark, spec_over([1000], 4, 10), RunDir(tmp_path))
    with pytest.raises(ValueError, match="world_size is 5: expected 1 to train.total_batch 4"):
        planner.assignments(spark, tmp_path, 5)
