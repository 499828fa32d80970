"""Several sources by weight: said in settings, planned, trained on, and told apart in what comes out."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparktrain import cli, plan, tokens
from sparktrain.config import Data, RunConfig
from sparktrain.errors import ConfigError, DataError
from sparktrain.plan import Assignment, PlanSpec, mixture
from sparktrain.results import RunResult, StepRecord, read_records, shares, write_records
from sparktrain.results.shares import Asked, SourceRecord
from sparktrain.rundir import RunDir
from sparktrain.spark import index, planner, preflight
from sparktrain.tokens import Shard, ds
from tests.conftest import VOCAB, take_steps, tiny_argv, write_shards
from tests.test_results import rank_result, record

TWO = """
[[data.sources]]
name = "code"
path = "c"
weight = 7
[[data.sources]]
name = "prose"
path = ["p/a", "p/b"]
weight = 3
"""


def sources(*named: tuple[str, float | None], **paths: Any) -> list[str]:
    """Flags for sources with these names and weights, at the path of that name or at the name."""
    values = [{"name": name, "path": str(paths.get(name, name)), "weight": weight} for name, weight in named]
    return ["--data.sources", json.dumps(values)]


def parsed(*argv: str) -> RunConfig:
    return cli.parse(RunConfig, ["--data.sequence-length", "16", "--train.total-batch", "8", *argv])


# -- settings ----------------------------------------------------------------------------------------------------------


def test_sources_are_said_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TWO)
    data = cli.parse(RunConfig, [str(tmp_path / "a.toml")]).data
    assert [(s.name, s.path, s.weight) for s in data.sources] == [("code", ("c",), 7.0), ("prose", ("p/a", "p/b"), 3.0)]
    assert data.trained_on == {"data.sources code": ("c",), "data.sources prose": ("p/a", "p/b")}
    whole = parsed("--data.sources", '[{"name": "a", "path": "x"}, {"name": "b", "path": ["y", "z"]}]').data
    one_by_one = parsed(
        "--data.sources", '{"name": "a", "path": "x"}', "--data.sources", '{"name":"b","path":["y","z"]}'
    )
    assert whole.sources == one_by_one.data.sources
    assert whole.trained_on == {"data.sources a": ("x",), "data.sources b": ("y", "z")}
    instead = cli.parse(RunConfig, [str(tmp_path / "a.toml"), "--data.sources", "[]", "--data.path", "d"]).data
    assert instead.trained_on == {"data.path": ("d",)}
    (tmp_path / "b.toml").write_text("[data]\npath = 'd'\n")
    assert cli.parse(RunConfig, [str(tmp_path / "b.toml"), "--data.path", "none", *sources(("a", None))]).data.mixed
    assert Data().trained_on == {"data.path": ("data/train",)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (sources(("a", 1), ("b", -0.5)), "data.sources b has weight -0.5: expected a number from 0 on"),
        (sources(("a", 1), ("b", math.nan)), "data.sources b has weight nan: expected a number from 0 on"),
        (sources(("a", math.inf), ("b", 1)), "data.sources a has weight inf: expected a number from 0 on"),
        (sources(("a", 0), ("b", 0)), "data.sources have weight 0, all of them: give one of them a weight above 0"),
        (sources(("a", 1), ("a", 2)), "data.sources has two sources named a: give each a name of its own"),
        (
            sources(("a", 1), ("b", None)),
            "data.sources b has no weight, a has one: give every source a weight",
        ),
        ([*sources(("a", 1)), "--data.path", "x"], "data.path and data.sources are both given"),
        (["--data.sources", '{"name": "a"}'], "data.sources.path: field required"),
        (["--data.sources", '{"name": " ", "path": "x"}'], "data.sources.name: string should match"),
        (["--data.sources", '{"name": "a", "path": "x", "wieght": 1}'], "did you mean data.sources.weight?"),
        (["--data.sources", '{"name": "a", "path": "x", "weight": "much"}'], "data.sources.weight: .*a valid number"),
        (sources(*((f"s{i}", 1) for i in range(1001))), "data.sources are 1,001, at most 1,000 can be mixed"),
    ],
)
def test_sources_that_cannot_be_mixed_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(*flags)
    assert "\n" not in str(caught.value)


def test_a_files_weight_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    for weight, message in (("nan", "code has weight nan"), ("'7'", "a.toml: data.sources.weight: .*valid number")):
        (tmp_path / "a.toml").write_text(TWO.replace("weight = 7", f"weight = {weight}"))
        with pytest.raises(ConfigError, match=message):
            cli.parse(RunConfig, [str(tmp_path / "a.toml")])


def test_places_of_sources_are_resolved_and_one_of_them_may_have_mirrors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri, mirrors = "https://a.org/d/train", ("https://a.org/d", "https://b.org/d")
    data = parsed(*sources(("near", 1), ("far", 2), far=uri)).data
    found = preflight._absolute(data.model_copy(update={"mirrors": mirrors}))
    assert [(s["name"], s["path"]) for s in found["sources"]] == [("near", [str(tmp_path / "near")]), ("far", [uri])]
    assert Data.model_validate(data.model_dump(mode="json") | found).trained_on["data.sources far"] == (uri,)
    with pytest.raises(ConfigError, match="no mirrors for data.sources near .*near: give two roots or more"):
        preflight._absolute(data.model_copy(update={"mirrors": ("https://c.org/d", "https://d.org/d")}))


# -- the plan ----------------------------------------------------------------------------------------------------------


def shards_of(*counts: int, directory: str = "/d") -> list[Shard]:
    """A shard for each number of sequences of 16."""
    return [Shard(f"{directory}/{i:03d}.ds", 16 * n + 1, 2) for i, n in enumerate(counts)]


@pytest.mark.parametrize("flags", [[], ["--data.order", "psyche"]])
def test_weights_are_parts_of_all_sequences_and_what_is_planned_is_counted(flags: list[str]) -> None:
    config = parsed(*sources(("a", 7e307), ("b", 3e307)), "--train.steps", "150", *flags)
    spec = planner.spec_of(config, shards_of(20, 30), shards_of(500, directory="/e"))
    assert [(s.name, s.shards, round(s.weight, 12)) for s in spec.sources] == [("a", 2, 0.7), ("b", 1, 0.3)]
    rows = plan.rows(spec, 0, spec.num_positions)
    counted = [sum(row.path.startswith(f"/{d}/") for row in rows) for d in "de"]
    assert counted == spec.sequences_of_sources
    assert abs(counted[0] / len(rows) - 0.7) < 0.01
    if not flags:
        assert spec.epochs_begun == [max(row.epoch for row in rows if d in row.path) + 1 for d in ("/d/", "/e/")]
    given = shares.given(spec.asked, spec.sequences_of_sources, [16 * n for n in spec.sequences_of_sources])
    assert given["a"] == {
        "asked": pytest.approx(0.7),
        "part": counted[0] / 1200,
        "sequences": counted[0],
        "tokens": 16 * counted[0],
        "part_of_tokens": counted[0] / 1200,
        "epochs": counted[0] / 50,
    }


def test_without_weights_every_sequence_that_is_left_comes_as_often_as_any_other() -> None:
    skipped = ["--data.skip", '[{"shard": "e/000.ds", "sequences": [0, 150]}]']
    config = parsed(*sources(("a", None), ("b", None)), *skipped, "--train.steps", "1000")
    spec = planner.spec_of(config, shards_of(20, 30), shards_of(300, directory="/e"))
    assert [source.weight for source in spec.sources] == [0.25, 0.75]
    assert spec.asked == (Asked("a", 0.25, 50), Asked("b", 0.75, 150))
    assert spec.epochs_begun == [40, 40]


def test_a_source_of_weight_0_is_not_read_and_one_that_is_left_is_no_mixture() -> None:
    config = parsed(*sources(("a", 0), ("b", 2), ("c", 2)))
    assert list(config.data.trained_on) == ["data.sources b", "data.sources c"]
    spec = planner.spec_of(config, shards_of(20), shards_of(30, directory="/e"))
    assert [(source.name, source.weight) for source in spec.sources] == [("b", 0.5), ("c", 0.5)]
    alone = planner.spec_of(parsed(*sources(("a", 0), ("b", 2))), shards_of(20))
    assert alone == planner.spec_of(parsed("--data.path", "x"), shards_of(20))
    assert alone.sequences_of_sources == [alone.num_positions]


def test_what_is_skipped_of_a_mixture_is_not_counted() -> None:
    entries = (
        '[{"shard": "d/001.ds"}, {"shard": "e/000.ds", "sequences": [3, 9]}, {"steps": [2, 5]}, {"steps": [7, 8]}]'
    )
    config = parsed(*sources(("a", 0.31), ("b", 0.69)), "--data.skip", entries, "--train.steps", "40")
    spec = planner.spec_of(config, shards_of(20, 30), shards_of(100, directory="/e"))
    assert spec.skipped == ((20, 50), (53, 59))
    assert spec.skipped_places == ((16, 40), (80, 88))
    rows = plan.rows(spec, 0, spec.num_positions)
    assert spec.sequences_of_sources == [sum(r.path.startswith(f"/{d}/") for r in rows) for d in "de"]
    assert not any(row.path == "/d/001.ds" for row in rows)
    without = replace(spec, skipped_places=())
    whole = plan.rows(without, 0, spec.num_positions + 32)
    assert [r[4:] for r in rows] == [r[4:] for r in whole if r.pos not in {*range(16, 40), *range(80, 88)}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.skip", '[{"shard": "000.ds"}]'], "000.ds, of which .* b has 2: expected one, say more of its path"),
        (["--data.skip", '[{"shard": "9.ds"}]'], "shard 9.ds, of which data.sources a, data.sources b has 0"),
        (["--data.skip", '[{"shard": "e/000.ds"}]'], "data.skip names all 10 sequences of data.sources b: leave some"),
        (["--train.steps", "100000"], "40,000 epochs of the 10 sequences of data.sources b, more than 10,000: lower"),
    ],
)
def test_a_mixture_that_cannot_be_planned_is_one_line(flags: list[str], message: str) -> None:
    config = parsed(*sources(("a", 1), ("b", 1)), *flags)
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        planner.spec_of(config, shards_of(200), shards_of(10, directory="/e"))
    assert "\n" not in str(caught.value)


def test_every_sources_epochs_are_whole_and_any_number_of_ranks_has_the_same_batches() -> None:
    config = parsed(*sources(("a", 2), ("b", 1)), "--train.steps", "60", "--train.batch-ramp", "[[10, 11]]")
    spec = planner.spec_of(config, shards_of(20, 13), shards_of(41, directory="/e"))
    rows = plan.rows(spec, 0, spec.num_positions)
    for d, kept in (("d", 33), ("e", 41)):
        mine = [row for row in rows if row.path.startswith(f"/{d}/")]
        for epoch in range(max(row.epoch for row in mine)):
            assert len({row.microshard_id for row in mine if row.epoch == epoch}) == kept
    for world in (1, 3, 8):
        slots = [
            spec.first_position(step) + slot
            for step in range(spec.steps)
            for rank in range(world)
            for slot in range(*plan.slots_of(rank, world, spec.batch_of(step)))
        ]
        assert slots == list(range(spec.num_positions))


def test_very_large_and_very_small_weights_are_parts_of_one() -> None:
    for weights in ([1e308] * 5, [5e-324, 5e-324], [1.0, 0.0]):
        assert sum(mixture.normalised(weights)) == pytest.approx(1)


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.block", "4", "--data.skip", '[{"shard": "d/000.ds", "sequences": [3, 9]}, {"steps": [4, 6]}]'],
        ["--data.order", "psyche", "--data.window", "psyche"],
    ],
)
def test_sql_plans_a_mixture_as_settings_ask_for_it(spark: Any, flags: list[str]) -> None:
    config = parsed(*sources(("a", 0.6), ("b", 0.3), ("c", 0.1)), "--train.steps", "40", *flags)
    spec = planner.spec_of(config, shards_of(40, 13), shards_of(90, directory="/e"), shards_of(5, directory="/f"))
    rows = [Assignment(**row.asDict()) for row in planner.plan_frame(spark, spec).collect()]
    assert rows == plan.rows(spec, 0, spec.num_positions)
    assert spec.sequences_of_sources == [sum(r.path.startswith(f"/{d}/") for r in rows) for d in "def"]


# -- what comes out ----------------------------------------------------------------------------------------------------


def mixed_record(step: int, *records: tuple[str, int, int, float]) -> StepRecord:
    sources_ = tuple(SourceRecord(*one) for one in records)
    return record(step, sum(s.loss_sum for s in sources_), sum(s.tokens for s in sources_))._replace(sources=sources_)


def test_losses_of_sources_are_weighted_by_tokens_over_ranks() -> None:
    ranks = [
        rank_result(0, [mixed_record(0, ("a", 3, 30, 60.0), ("b", 1, 10, 50.0)), mixed_record(1, ("a", 4, 40, 40.0))]),
        rank_result(1, [mixed_record(0, ("a", 1, 10, 40.0), ("b", 3, 0, 0.0)), mixed_record(1, ("a", 4, 40, 40.0))]),
    ]
    for rank in ranks:  # no sequence of b in step 1
        rank.records[1] = mixed_record(1, *rank.records[1].sources, ("b", 0, 0, 0.0))
    result = RunResult.merge("run", ranks, sources=(Asked("a", 0.75, 6), Asked("b", 0.25, 8)))
    metrics = result.metrics
    assert metrics["loss_a"].tolist() == [2.5, 1.0]
    assert metrics["loss_b"][0] == 5.0
    assert math.isnan(metrics["loss_b"][1])
    assert metrics["tokens_b"].tolist() == [10, 0]
    assert metrics["sequences_b"].tolist() == [4, 0]
    found = result.summary()["sources"]
    assert found["a"] == {
        "asked": 0.75,
        "part": 0.75,
        "sequences": 12,
        "tokens": 120,
        "part_of_tokens": 120 / 130,
        "epochs": 2.0,
        "loss_first": 2.5,
        "loss_last": 1.0,
    }
    assert (found["b"]["loss_first"], found["b"]["loss_last"], found["b"]["epochs"]) == (5.0, 5.0, 0.5)
    assert "source        a  75.00% of sequences, 75.00% asked: 12 sequences, 120 tokens, 2.00 epochs, loss 2.5000" in (
        result.report()
    )
    never = shares.totals((Asked("c", 0.1, 5),), pa.Table.from_pylist([shares.columns([SourceRecord("c", 0, 0, 0.0)])]))
    assert (never["c"]["loss_last"], never["c"]["part"]) == (None, 0)


def test_records_with_and_without_sources_survive_their_file() -> None:
    plain, mixed = record(0, 6.0, 3), mixed_record(1, ("a", 3, 30, 60.0), ("b", 0, 0, 0.0))
    for records in ([plain], [mixed]):
        assert read_records(write_records(2, records)) == [(2, records[0])]
    assert "sources" not in pq.read_schema(pa.BufferReader(write_records(2, [plain]))).names
    table = pq.read_table(pa.BufferReader(write_records(2, [mixed])))
    assert table["sources"].to_pylist()[0][0] == {"name": "a", "sequences": 3, "tokens": 30, "loss_sum": 60.0}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """``walk`` and ``noise`` in a directory: shards that are easily learned, and of words drawn by chance."""
    write_shards(tmp_path / "walk", shards=2)
    (tmp_path / "noise").mkdir()
    noise = np.random.default_rng(3).integers(0, VOCAB, 4000)
    ds.write(tmp_path / "noise" / "00000_00000_shuffled.ds", [noise], VOCAB, "random walk")
    return tmp_path


def argv_of(two: Path, run: Path, *more: str) -> list[str]:
    """Arguments of jobs/train.py: 3 parts of walk and 1 of noise."""
    argv = tiny_argv(two, run)
    at = argv.index("--data.path")
    mixed = sources(("walk", 3), ("noise", 1), walk=two / "walk", noise=two / "noise")
    return [*argv[:at], *mixed, *argv[at + 2 :], *more]


@pytest.fixture
def trained(on_ranks: Callable[..., list[Any]], two: Path, tmp_path: Path) -> Callable[..., tuple[PlanSpec, RunResult]]:
    """``trained(world, *flags)``: the plan of both sources, and what ranks that train by it hand back."""

    def run(world: int, *flags: str) -> tuple[PlanSpec, RunResult]:
        directory = RunDir(tmp_path / f"run-{world}")
        config = cli.parse(RunConfig, argv_of(two, directory.path, *flags))
        located = index.locate(config.data)
        groups = [[tokens.inspect(path) for path in located[setting]] for setting in config.data.trained_on]
        spec = planner.spec_of(config, *groups)
        directory.plan.mkdir(parents=True)
        rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
        pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")

        def rank(rank: int, size: int) -> list[StepRecord]:
            return take_steps(directory, config, spec, rank, size)[0]

        ranks = [rank_result(r, records, world=world) for r, records in enumerate(on_ranks(world, rank))]
        for one in chain.from_iterable(result.records for result in ranks):
            assert one.loss_sum == pytest.approx(sum(source.loss_sum for source in one.sources), rel=1e-9)
            assert one.tokens == sum(source.tokens for source in one.sources)
        return spec, RunResult.merge("run", ranks, sources=[Asked(*source) for source in spec.asked])

    return run


def test_any_number_of_ranks_tells_the_same_losses_of_sources(
    trained: Callable[..., tuple[PlanSpec, RunResult]], two: Path
) -> None:
    """Also of ranks that differ in speed, of smaller micro-batches, and where a mask leaves half a source out."""
    mask = np.random.default_rng(4).random(4000) < 0.5
    (two / "noise" / "00000_00000_shuffled.ds.loss").write_bytes(mask.astype(np.uint8).tobytes())
    spec, alone = trained(1)
    _, together = trained(3, "--launch.weights", "[1,2,1.5]", "--train.micro-batch", "1")
    for name in ("walk", "noise"):
        losses = [result.metrics[f"loss_{name}"].tolist() for result in (alone, together)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for what in ("sequences", "tokens"):
            assert alone.metrics[f"{what}_{name}"].tolist() == together.metrics[f"{what}_{name}"].tolist()
    counted = alone.summary()["sources"]
    assert [source["sequences"] for source in counted.values()] == spec.sequences_of_sources == [36, 12]
    assert counted["walk"]["tokens"] == 36 * 32
    assert 0.4 * 12 * 32 < counted["noise"]["tokens"] < 0.6 * 12 * 32


def test_the_loss_of_a_source_that_can_be_learned_falls_faster(
    trained: Callable[..., tuple[PlanSpec, RunResult]],
) -> None:
    _, result = trained(2, "--train.steps", "30", "--optimizer.lr", "1e-2")
    walk, noise = result.summary()["sources"].values()
    assert walk["loss_first"] == pytest.approx(noise["loss_first"], abs=0.1)
    assert walk["loss_last"] < noise["loss_last"] - 0.5


def test_a_run_of_two_sources_through_spark(spark: Any, job: Any, two: Path, tmp_path: Path) -> None:
    """Planned and realised parts stand beside what was asked, in what the run prints and in its files."""
    argv = argv_of(two, tmp_path / "run", "--data.heldout", str(two / "walk"))
    code, said, err = job("train", *argv)
    assert code == 0, err
    assert "source     walk   75.00% of sequences, 75.00% asked: 36 sequences, 1,152 tokens, 0.15 epochs" in said
    assert "source     noise  25.00% of sequences, 25.00% asked: 12 sequences, 384 tokens, 0.10 epochs" in said
    code, said, err = job("train", *argv)
    assert code == 0, err
    assert (
        "source        walk   75.00% of sequences, 75.00% asked: 36 sequences, 1,152 tokens, 0.15 epochs, loss" in said
    )
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {n: (s["sequences"], s["tokens"]) for n, s in summary["sources"].items()} == {
        "walk": (36, 1152),
        "noise": (12, 384),
    }
    rows = spark.read.parquet(str(tmp_path / "run" / "metrics.parquet")).selectExpr("step", "rank", "inline(sources)")
    totals = {r.name: (r["sum(sequences)"], r["sum(tokens)"]) for r in rows.groupBy("name").sum().collect()}
    assert totals == {"walk": (36, 1152), "noise": (12, 384)}
    result = RunDir(tmp_path / "run").finished()
    assert result is not None
    assert result.summary()["sources"] == summary["sources"]
    assert {"loss_walk", "loss_noise"} <= set(result.metrics_frame(spark).columns)
    code, said, _ = job("verify", "--run-dir", str(tmp_path / "run"))
    assert (code, said.count("ok ")) == (0, 5)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "data.sources noise: data directory .*noise does not exist: give a directory with"),
        ("empty", "data.sources noise: data directory .*noise holds no .* shards: make some with jobs/tokenize.py"),
        (
            "same file",
            "noise/link.ds and .*walk/00001_00000_shuffled.ds hold the same tokens: remove one of them",
        ),
        ("same tokens", "noise/copy.ds and .*walk/00001_00000_shuffled.ds hold the same tokens: remove one of them"),
        ("tokenizer", "noise/other.ds and .*walk/00000_.*differ in their tokenizer, other and random walk: train on"),
        (
            "token size",
            "noise/x.npy and .*walk/00000_.*differ in their token size, 4 and 2: train on what",
        ),
    ],
)
def test_sources_that_do_not_fit_each_other_are_one_line(spark: Any, two: Path, kind: str, message: str) -> None:
    noise, walked = two / "noise", two / "walk" / "00001_00000_shuffled.ds"
    shutil.rmtree(noise)
    if kind != "missing":
        noise.mkdir()
    if kind == "same file":
        (noise / "link.ds").symlink_to(walked)
    elif kind == "same tokens":
        for suffix in ("", ".index", ".metadata"):
            shutil.copy(f"{walked}{suffix}", noise / f"copy.ds{suffix}")
    elif kind == "tokenizer":
        ds.write(noise / "other.ds", [np.arange(500)], VOCAB, "other")
    elif kind == "token size":
        np.save(noise / "x.npy", np.arange(500, dtype="<u4"))
    data = cli.parse(RunConfig, argv_of(two, two / "run")).data
    with pytest.raises(DataError, match=message) as caught:
        index.read_shards(spark, index.locate(data), data, VOCAB)
    assert "\n" not in str(caught.value)
