"""The ledger: what ranks read, proven by SQL to be what was planned, whoever read it; every sabotage is named."""

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sparktrain import cli, failpoints, plan, receipts
from sparktrain.checkpoints import name_of
from sparktrain.config import RunConfig
from sparktrain.errors import DataError, LaunchError, ModelError
from sparktrain.lineage import Committed, committed
from sparktrain.plan import PlanSpec
from sparktrain.receipts import Receipt, Receipts
from sparktrain.rundir import RunDir
from sparktrain.spark import audit, digesting, index, planner
from sparktrain.spark.checks import CHECKS
from sparktrain.train import loop
from sparktrain.train.batches import Batches
from sparktrain.train.world import World
from tests.conftest import run_on_ranks, tiny_argv, write_shards

# 62 sequences, 60 of them in an epoch; 168 positions.
SETTINGS = (
    *("--train.steps", "12", "--train.total-batch", "12", "--train.batch-ramp", "[[6, 16]]"),
    *("--data.skip", '[{"shard": "00001_00000_shuffled.ds", "sequences": [3, 5]}, {"steps": [4, 5]}]'),
    *("--checkpoint.every", "2", "--checkpoint.keep-last", "9"),
)


def attempt(directory: RunDir, world: int, failpoint: str = "") -> None:
    """One attempt of the run in ``directory``, by real ranks; with ``failpoint`` it ends where that says."""
    number, spec = directory.new_generation(), directory.plan_spec()
    assert spec is not None

    def rank_main(rank: int, size: int) -> None:
        loop._say = lambda world, text: None  # type: ignore[assignment]
        receipts._MOST = 1  # so that receipts of steps that do not count are on disk, too
        failpoints.arm(failpoint)
        try:
            world = World(rank, size, torch.device("cpu"), "host")
            directory.write_outcome(number, loop.train_in(world, directory, directory.config(), spec, number))
        except RuntimeError as error:
            assert failpoint, error  # noqa: PT017

    run_on_ranks(world, rank_main)


@pytest.fixture(scope="module", autouse=True)
def small(spark: Any) -> Iterator[None]:
    """For a few hundred rows, planning again in mid-query and compiling queries is most of what Spark does."""
    settings = {
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    }
    for name, value in settings.items():
        spark.conf.set(name, value)
    yield
    for name in settings:
        spark.conf.unset(name)


def planned(spark: Any, path: Path, config: RunConfig) -> RunDir:
    """A run directory with a plan, as the driver leaves it."""
    directory = RunDir(path)
    directory.path.mkdir()
    directory.claim(config)
    read = index.read_shards(spark, index.locate(config.data), config.data)
    spec = planner.spec_of(config, *([shard for shard, _ in read[name]] for name in config.data.trained_on))
    digesting.write_digests(spark, spec, config.data, directory.digests)
    planner.write_plan(spark, spec, directory)
    return directory


@pytest.fixture(scope="module")
def run(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run that lost ranks twice: 2 ranks to step 4, 3 to step 8, 1 to the end."""
    path = tmp_path_factory.mktemp("ledger")
    write_shards(path / "train", shards=2, tokens=32 * 31 + 9)
    directory = planned(spark, path / "run", cli.parse(RunConfig, tiny_argv(path, path / "run", *SETTINGS)))
    attempt(directory, 2, "updated@step=5:raise")
    attempt(directory, 3, "updated@step=9:raise")
    attempt(directory, 1)
    return directory


@pytest.fixture
def copy(run: RunDir, tmp_path: Path) -> RunDir:
    """The same run, to be spoiled."""
    return RunDir(shutil.copytree(run.path, tmp_path / "run"))


def spec_of(directory: RunDir) -> PlanSpec:
    spec = directory.plan_spec()
    assert spec is not None
    return spec


def test_a_run_that_changed_its_number_of_ranks_is_clean(run: RunDir, job: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = job("plan", "--audit", str(run.path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == [
        "steps  12 of 12 are committed",
        "       0 to 3 by attempt 1 with 2 ranks",
        "       4 to 7 by attempt 2 with 3 ranks",
        "       8 to 11 by attempt 3 with 1 rank",
    ]
    names = ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C9", "C8", "bytes", "sha256"]
    assert [line.split()[:2] for line in lines[4:-1]] == [[name, "ok"] for name in names]
    assert lines[-1] == ("ledger 168 planned, 168 consumed, 0 missing, 0 doubled, 0 other than planned, wrong bytes: 0")
    # Receipts of steps that were lost are on disk, and do not count.
    given = sum(len(receipts.read(file)) for file in run.path.glob("gen/*/receipts-*.parquet"))
    assert given > 168


@pytest.mark.parametrize(
    "settings",
    [
        ("--data.block", "3", "--launch.weights", "measured"),
        ("--data.order", "psyche", "--data.window", "psyche"),
    ],
)
def test_a_mixture_in_any_order_shared_by_speed_is_clean(spark: Any, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Of two sources, by 2 ranks to step 2, and by 3 from then on."""
    for seed, name in enumerate(("a", "b")):
        write_shards(tmp_path / name, shards=2, tokens=32 * 11 + 9, seed=seed)
    sources = [{"name": name, "path": str(tmp_path / name), "weight": weight} for name, weight in (("a", 7), ("b", 3))]
    argv = tiny_argv(tmp_path, tmp_path / "run", "--data.sources", json.dumps(sources), "--checkpoint.every", "2")
    del argv[(path := argv.index("--data.path")) : path + 2]
    directory = planned(spark, tmp_path / "run", cli.parse(RunConfig, [*argv, *settings]))
    attempt(directory, 2, "updated@step=3:raise")
    attempt(directory, 3)
    lines = list(audit.audit(spark, directory.path))
    assert lines[1:3] == ["       0 to 1 by attempt 1 with 2 ranks", "       2 to 5 by attempt 2 with 3 ranks"]
    assert not [line for line in lines[3:-1] if line.split()[1] != "ok"]
    assert lines[-1] == "ledger 48 planned, 48 consumed, 0 missing, 0 doubled, 0 other than planned, wrong bytes: 0"


# -- sabotages: what is done to a run directory, and which check finds what --------------------------------------------


def edit(file: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])


def plan_row(pos: int, /, **changes: Any) -> Callable[[RunDir], None]:
    """The row of the plan at ``pos``, changed; without changes it is gone."""

    def sabotage(directory: RunDir) -> None:
        def change(rows: list[dict[str, Any]]) -> None:
            for row in [row for row in rows if row["pos"] == pos]:
                row.update(changes) if changes else rows.remove(row)

        for file in directory.plan.glob("*.parquet"):
            edit(file, change)

    return sabotage


def held_by(directory: RunDir, pos: int) -> dict[str, Any]:
    rows = {r["pos"]: r for f in directory.plan.glob("*.parquet") for r in pq.read_table(f).to_pylist()}
    return {name: rows[pos][name] for name in ("microshard_id", "path", "start")}


def held_by_another(pos: int, other: int) -> Callable[[RunDir], None]:
    """Position ``pos`` holds what ``other``, of the same epoch, holds too."""
    return lambda directory: plan_row(pos, **held_by(directory, other))(directory)


def swapped(directory: RunDir) -> None:
    """Positions 7 and 30, both of the first epoch, change what they hold: still once each."""
    first, second = held_by(directory, 7), held_by(directory, 30)
    plan_row(7, **second)(directory)
    plan_row(30, **first)(directory)


def receipt(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[RunDir], None]:
    """The receipts of the checkpoint at step 8, of rank 1 in attempt 2, changed."""
    return lambda directory: edit(directory.receipts(2, 1, 8), change)


def manifest(step: int, generation: int, /, **changes: Any) -> Callable[[RunDir], None]:
    def sabotage(directory: RunDir) -> None:
        file = directory.checkpoints.path / f"{name_of(step, generation)}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return sabotage


SABOTAGES: dict[str, tuple[str, Callable[[RunDir], None], str]] = {
    "row lost": ("C1", plan_row(7), "167 rows at positions 0 to 167 where 168 from 0 on belong"),
    "row moved": ("C1", plan_row(7, pos=8), "168 rows"),
    "microshard twice": ("C2", held_by_another(7, 30), "comes 2 times in epoch 0"),
    "epoch not whole": ("C3", held_by_another(100, 101), "60 microshards 0 to 61 of source 0 in epoch 1"),
    "microshard of no shard": ("C3", plan_row(7, microshard_id=62), "1 microshards 62 to 62 of source in epoch 0"),
    "skipped microshard": ("C3", plan_row(7, microshard_id=35), "microshard 35 is to be skipped"),
    "slot twice": ("C4", plan_row(7, slot=8), "step 0 has 12 rows in slots 0 to 11 expected 12"),
    "step too long": ("C4", plan_row(7, step=1, slot=12), "step 0 has 11 rows"),
    "receipt lost": ("C5", receipt(lambda rows: rows.pop()), "no receipt for slot"),
    "receipt doubled": ("C5", receipt(lambda rows: rows.append(rows[0])), "2 receipts for slot"),
    "other microshard": ("C5", receipt(lambda rows: rows[0].update(microshard_id=61)), "receipt for microshard 61 in"),
    "slot of no plan": ("C5", receipt(lambda rows: rows.append(rows[0] | {"slot": 16})), "in slot 16 of step 7 which"),
    "file of receipts lost": ("C5", lambda directory: directory.receipts(2, 1, 8).unlink(), "no receipt for slot"),
    "lineage cut": ("C5", manifest(10, 3, parent=None), "no receipt for slot 0 of step"),
    "outside its shard": ("C6", plan_row(7, start=1000), "33 tokens from token 1000 of"),
    "shard of no plan": ("C6", plan_row(7, path="/other.ds"), "33 tokens from token"),
    "other bytes once": ("C7", receipt(lambda rows: [row.update(digest=1) for row in rows]), "with 2 digests and 1"),
    "rows swapped": ("C9", swapped, "has microshard"),
    "other seed": (
        "C9",
        lambda d: (d.path / "plan.json").write_text((d.path / "plan.json").read_text().replace('seed": 5', 'seed": 6')),
        "position 0 has microshard",
    ),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_every_sabotage_is_found_by_its_check(spark: Any, copy: RunDir, name: str) -> None:
    check, sabotage, words = SABOTAGES[name]
    sabotage(copy)
    spec = spec_of(copy)
    names = audit.names_of(spark, copy, spec, committed(copy, spec.steps))
    number, line = audit.run_check(spark, names, next(c for c in CHECKS if c.name == check))
    assert number
    assert line.startswith(f"{check:<7}WRONG  {number} found, such as: ")
    assert words in line
    assert line.partition("; ")[2]  # says what to do


def test_bytes_that_changed_are_found_in_the_shards(
    spark: Any, run: RunDir, job: Callable[..., tuple[int, str, str]]
) -> None:
    shard = Path(spec_of(run).shards[0].path)
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:640] + bytes([content[640] ^ 1]) + content[641:])
        code, out, err = job("plan", "--audit", str(run.path))
        trusted, shorter, _ = job("plan", "--audit", str(run.path), "--no-reread")
    finally:
        shard.write_bytes(content)
    assert code == 3
    assert err == f"error: {run.path}: bytes, sha256 found something wrong, see the lines above\n"
    wrong = {line.split()[0]: line for line in out.splitlines() if "WRONG" in line}
    # Token 320 is the last of microshard 9 and the first of microshard 10, each read two or three times.
    assert f"WRONG  2 found, such as: microshard 10 ({shard}, token 320) was read with digest " in wrong["bytes"]
    assert f"shard {shard} has sha256 " in wrong["sha256"]
    assert out.splitlines()[-1].endswith("0 missing, 0 doubled, 0 other than planned, wrong bytes: 2")
    assert trusted == 0
    assert shorter.splitlines()[-1].endswith("wrong bytes: not looked for")


def test_a_run_that_goes_on_is_audited_up_to_its_newest_checkpoint(
    copy: RunDir, job: Callable[..., tuple[int, str, str]]
) -> None:
    """Attempt 2 is not there yet; and a slot that nobody had, in a step that counts, is in the ledger's line."""
    shutil.rmtree(copy.generation(3))
    shutil.rmtree(copy.generation(2))
    for file in copy.checkpoints.path.glob("*-g00000[23]*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    edit(copy.receipts(1, 0, 4), lambda rows: (rows.pop(), rows.append(rows[0])))
    code, out, err = job("plan", "--audit", str(copy.path), "--no-reread")
    assert (code, err) == (3, f"error: {copy.path}: C5 found something wrong, see the lines above\n")
    assert out.splitlines()[:2] == ["steps  4 of 12 are committed", "       0 to 3 by attempt 1 with 2 ranks"]
    assert "ledger 48 planned, 48 consumed, 1 missing, 1 doubled, 0 other" in out.splitlines()[-1]


def test_files_of_an_order_by_file_are_told_from_a_shuffle(spark: Any, run: RunDir, tmp_path: Path) -> None:
    spec = replace(spec_of(run), order="sequential", skipped=(), skipped_places=())
    planner.write_plan(spark, spec, RunDir(tmp_path))
    names = audit.names_of(spark, RunDir(tmp_path), spec, [])
    assert audit._mix(spark, names, spec).startswith("ok     the mix of the files is not judged")
    assert audit._mix(spark, names, replace(spec, order="shuffle")).startswith("note   chi-squared")


# -- what needs no Spark -----------------------------------------------------------------------------------------------


def test_the_lineage_is_of_the_attempt_that_came_to_the_end(copy: RunDir) -> None:
    whole = [Committed(1, 0, 2, 2), Committed(1, 2, 4, 2), Committed(2, 4, 6, 3), Committed(2, 6, 8, 3)]
    last = [Committed(3, 8, 10, 1), Committed(3, 10, 12, 1)]
    assert committed(copy, 12) == whole + last
    # Without checkpoints of its own, an attempt that ended counts from where it began.
    for file in copy.checkpoints.path.glob("*-g000003*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert committed(copy, 12) == [*whole, Committed(3, 8, 12, 1)]
    (copy.generation(3) / "rank-00000.pickle").unlink()
    assert committed(copy, 12) == whole
    manifest(6, 2, step=3)(copy)
    with pytest.raises(DataError, match=r"checkpoint 000000006-g000002 cannot follow one of step 4 and attempt 1"):
        committed(copy, 12)
    (copy.checkpoints.path / f"{name_of(2, 1)}.json").unlink()
    with pytest.raises(ModelError, match="has no readable manifest"):
        committed(copy, 12)


def test_a_run_without_checkpoints_has_receipts(run: RunDir, tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    shutil.copytree(run.plan, directory.plan)
    shutil.copy(run.path / "plan.json", directory.path)
    config = run.config().model_dump() | {"checkpoint": {"every": 0}}
    directory.claim(RunConfig.model_validate(config))
    attempt(directory, 2)
    assert committed(directory, 12) == [Committed(1, 0, 12, 2)]
    files = list(directory.generation(1).glob("receipts-*.parquet"))
    rows = [row for file in files for row in receipts.read(file).to_pylist()]
    digests = {}
    for file in run.path.glob("gen/*/receipts-*.parquet"):
        digests |= {(row["step"], row["slot"]): row["digest"] for row in receipts.read(file).to_pylist()}
    assert {(row["step"], row["slot"]): row["digest"] for row in rows} == digests
    assert len(rows) == 168
    assert {row["targets"] for row in rows} == {32}


def test_a_digest_is_that_of_the_bytes(run: RunDir) -> None:
    spec = spec_of(run)
    row = receipts.read(run.receipts(3, 0, 12)).to_pylist()[-1]
    shard, nth = divmod(row["microshard_id"], 31)
    stored = np.fromfile(spec.shards[shard].path, dtype="<u2")[32 * nth : 32 * nth + 33].tobytes()
    assert row["digest"] == zlib.crc32(stored)


def test_other_bytes_than_planned_are_not_trained_on(run: RunDir, copy: RunDir) -> None:
    spec = spec_of(run)
    bad = next(row for row in plan.rows(spec, 12, 60) if row.path == spec.shards[0].path)
    shard, batches = Path(bad.path), iter(Batches(run, spec, 0, 1))
    content, at = shard.read_bytes(), 2 * (bad.start + 5)
    try:
        shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        for _ in range(bad.step):
            next(batches)
        where = f"sequence at token {bad.start} has crc32"
        with pytest.raises(DataError, match=rf"shard {shard} has other bytes than .* {where} \w+, had \w+; restore"):
            next(batches)
    finally:
        shard.write_bytes(content)
    (copy.digests / "00000.u4").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"00000.u4 has 1 digests, expected 31 of"):
        list(Batches(copy, spec, 0, 1))
    plan_row(bad.pos, microshard_id=40)(copy)
    (copy.digests / "00000.u4").unlink()
    assert len(list(Batches(copy, spec, 0, 1))) == 12  # nothing is known of that shard
    shutil.copytree(run.digests, copy.digests, dirs_exist_ok=True)
    with pytest.raises(DataError, match="the plan has microshard 40 in shard"):
        list(Batches(copy, spec, 0, 1))


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        (lambda d: d.receipts(1, 0, 4).write_bytes(b"torn"), r"receipts-00000-000000004.parquet cannot be read"),
        (lambda d: shutil.copy(d.records(1, 0, 4), d.receipts(1, 0, 4)), "holds no receipts, but columns rank, step"),
        (lambda d: next(d.plan.glob("*.parquet")).write_bytes(b"torn"), r"plan/part-.* cannot be read"),
        (lambda d: damage(next(d.plan.glob("*.parquet"))), r"cannot be audited: .*; restore the file, or"),
        (lambda d: (d.path / "plan.json").unlink(), "holds no plan"),
        (lambda d: (d.path / "config.json").unlink(), "is no run directory"),
    ],
)
def test_what_cannot_be_audited_is_one_line(
    copy: RunDir, job: Callable[..., tuple[int, str, str]], sabotage: Callable[[RunDir], object], words: str
) -> None:
    sabotage(copy)
    code, _, err = job("plan", "--audit", str(copy.path))
    assert code in (2, 3)
    assert re.fullmatch(rf"error: .*{words}.*\n", err)


def test_receipts_that_cannot_be_written_end_the_run_in_one_line(tmp_path: Path) -> None:
    given = Receipts(1, 0, lambda step: tmp_path / "gone" / f"{step}")
    one = np.array([5])
    given.add(Receipt(0, one, one, [77], one))
    with pytest.raises(LaunchError, match=r"receipts could not be written to .*gone/1: No such file") as caught:
        given.write()
    assert "\n" not in str(caught.value)


def test_a_plan_can_be_written_without_training(
    run: RunDir, tmp_path: Path, job: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = job("plan", *tiny_argv(run.path.parent, tmp_path / "run", *SETTINGS))
    assert code == 0
    assert "168 rows: 12 steps of 12 to 16 sequences" in out
    planned = RunDir(tmp_path / "run")
    assert planned.plan_spec() == run.plan_spec()
    assert planned.latest_generation() == 0
    for number in (0, 1):
        assert (planned.digests / f"{number:05d}.u4").read_bytes() == (run.digests / f"{number:05d}.u4").read_bytes()
    code, out, _ = job("plan", "--audit", str(planned.path))
    assert code == 0
    assert out.startswith("steps  0 of 12 are committed: there is no checkpoint yet\n")
