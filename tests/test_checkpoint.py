"""Checkpoints: what was saved goes on as if nothing had happened, on as many ranks as there are."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparktrain import cli, plan, tokens, verify
from sparktrain.checkpoints import Checkpoints, Manifest, name_of
from sparktrain.config import RunConfig
from sparktrain.errors import DataError, Diverged, LaunchError, ModelError, Stopped, Superseded
from sparktrain.plan import PlanSpec
from sparktrain.results import RankResult, RunResult, write_records
from sparktrain.rundir import SAVE, STOP, RunDir
from sparktrain.train import checkpoint, loop, strategies
from sparktrain.train.live import Live
from sparktrain.train.nonfinite import NonFinite
from sparktrain.train.requests import Requests
from sparktrain.train.world import World
from tests.conftest import tiny_argv

STRATEGIES = {
    "adamw": (),
    "distro": ("--strategy.kind", "distro", "--strategy.compression-decay", "0.9"),
    "distro with overlap": ("--strategy.kind", "distro", "--strategy.overlap"),
    "distro with overlap in bf16": (
        *("--strategy.kind", "distro", "--strategy.overlap", "--strategy.values", "1bit"),
        *("--model.dtype", "bfloat16"),
    ),
    "diloco": ("--strategy.kind", "diloco", "--strategy.sync-every", "3"),
    "diloco in bf16 with fragments under way": (
        *("--strategy.kind", "diloco", "--strategy.sync-every", "4", "--strategy.num-fragments", "2"),
        *("--strategy.fragment-sync-delay", "1", "--strategy.compression", "int4", "--model.dtype", "bfloat16"),
    ),
    "sparseloco": ("--strategy.kind", "sparseloco", "--strategy.sync-every", "3"),
}


class Interrupted(Exception):
    """Stands for whatever ends a rank."""


@pytest.fixture
def start(on_ranks: Callable[..., list[Any]], data: Path) -> Callable[..., RunResult | None]:
    """``start(directory, world, *flags, stop_at=None)``: one attempt of a run of 6 steps in ``directory``."""
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=8, steps=6, seed=5)

    def rank_main(
        rank: int, size: int, config: RunConfig, number: int, stop_at: int | None, ask: tuple[str, int, str]
    ) -> RankResult | None:
        directory, world = RunDir(config.run.dir), World(rank, size, torch.device("cpu"), "host")
        say = loop._line

        def line(record: Any, of: PlanSpec) -> str:
            if record.step == stop_at:
                raise Interrupted
            if (record.step, rank) == (ask[1], 0):
                directory.request_path(ask[0]).write_text(ask[2])
            return say(record, of)

        loop._say, loop._line = (lambda world, text: None), line  # type: ignore[assignment]
        try:
            return loop.train_in(world, directory, config, spec, number)
        except (Interrupted, Stopped):
            return None

    def run(
        path: Path, world: int, *flags: str, stop_at: int | None = None, ask: tuple[str, int, str] = ("", -1, "")
    ) -> RunResult | None:
        directory = RunDir(path)
        if not directory.plan.exists():
            directory.plan.mkdir(parents=True)
            rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
            pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
        config = cli.parse(
            RunConfig, [*tiny_argv(data, path), "--run.log-every", "1", "--checkpoint.every", "2", *flags]
        )
        outcomes = on_ranks(world, rank_main, config, directory.new_generation(), stop_at, ask)
        return directory.merge(outcomes) if all(outcomes) else None

    return run


def losses(result: RunResult | None) -> list[float]:
    assert result is not None
    return list(result.table["loss"].to_pylist())


@pytest.mark.parametrize("flags", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(
    start: Callable[..., RunResult | None], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    whole = start(tmp_path / "whole", 2, *flags)
    assert start(tmp_path / "broken", 2, *flags, stop_at=2) is None
    assert start(tmp_path / "broken", 2, *flags, stop_at=4) is None
    resumed = start(tmp_path / "broken", 2, *flags)
    assert whole is not None
    assert resumed is not None
    assert resumed.digest == whole.digest
    assert losses(resumed) == losses(whole)
    assert resumed.ranks[0].resumed_from == name_of(4, 2)
    assert [record.step for record in resumed.ranks[0].records] == [4, 5]


@pytest.mark.parametrize("flags", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_a_run_goes_on_with_another_number_of_ranks(
    start: Callable[..., RunResult | None], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    whole = start(tmp_path / "whole", 2, *flags)
    start(tmp_path / "elastic", 2, *flags, stop_at=2)
    start(tmp_path / "elastic", 3, *flags, stop_at=4)
    resumed = start(tmp_path / "elastic", 1, *flags)
    assert whole is not None
    assert resumed is not None
    assert [r.world for r in resumed.ranks] == [1]
    assert resumed.table["step"].to_pylist() == list(range(6))
    assert resumed.table["tokens"].to_pylist() == [8 * 32] * 6
    assert resumed.rank_table.num_rows == 2 * 2 + 2 * 3 + 2 * 1
    # AdamW has no state of a rank's own; DisTrO's momentum of ranks that are new or gone is lost, which costs a little.
    tolerance = 2e-5 if not flags else 0.05
    assert losses(resumed) == pytest.approx(losses(whole), rel=tolerance)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    start: Callable[..., RunResult | None], tmp_path: Path
) -> None:
    whole = start(tmp_path / "whole", 2)
    assert start(tmp_path / "run", 2, "--checkpoint.every", "0", ask=(STOP, 1, "")) is None
    newest, _ = RunDir(tmp_path / "run").checkpoints.newest()
    assert newest is not None
    assert newest.step == 3  # asked after step 1, all ranks agree on it in step 2
    resumed = start(tmp_path / "run", 2)
    assert resumed is not None
    assert losses(resumed) == losses(whole)


def test_a_checkpoint_can_be_asked_for(start: Callable[..., RunResult | None], tmp_path: Path) -> None:
    assert start(tmp_path, 2, "--checkpoint.every", "0", ask=(SAVE, 2, "")) is not None
    assert [path.stem for path in (tmp_path / "checkpoints").glob("*.json")] == [name_of(4, 1)]
    assert not (tmp_path / SAVE).exists()


def test_a_loss_that_is_no_number_stops_all_ranks_before_anything_is_updated(
    on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    def rank_main(rank: int, size: int) -> str:
        directory, world = RunDir(tmp_path), World(rank, size, torch.device("cpu"), "host")
        live = Live(tmp_path, RunConfig(), world, 0)
        requests = Requests(
            directory,
            world,
            False,
            live.waits,
            NonFinite(directory, world, live, False, False, lambda: 0).skips_loss,
        )
        requests.agree(6, 1.0)
        with pytest.raises(Diverged) as caught:
            requests.agree(7, float("nan") if rank == 1 else 1.0)
        return str(caught.value)

    assert on_ranks(3, rank_main) == [
        f"loss is {what} in step 7 on rank 1: lower optimizer.lr or check the data"
        for what in ("not a number", "nan", "not a number")
    ]


def test_a_checkpoint_opens_as_a_model_directory(start: Callable[..., RunResult | None], tmp_path: Path) -> None:
    """Its weights are those that all ranks share, whatever look-ahead each of them is at."""
    shared = {}
    for world in (1, 2):
        path = tmp_path / str(world)
        start(path, world, "--strategy.kind", "distro", "--strategy.overlap", stop_at=3)
        manifest, _ = RunDir(path).checkpoints.newest()
        assert manifest is not None
        assert manifest.step == 2
        here = path / "checkpoints" / manifest.name
        assert json.loads((here / "config.json").read_text())["use_cache"] is True
        shared[world] = AutoModelForCausalLM.from_pretrained(here).state_dict()
    # In two steps of a constant size no weight gets further from another run's than both together went.
    moved = max(float((shared[1][name] - shared[2][name]).abs().max()) for name in shared[1])
    assert 0 < moved <= 2 * 2 * 3e-3


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    start: Callable[..., RunResult | None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = start(tmp_path / "whole", 1)
    start(tmp_path / "run", 1, stop_at=5)
    checkpoints = RunDir(tmp_path / "run").checkpoints
    newest = checkpoints.directory(name_of(4, 1))
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = start(tmp_path / "run", 1)
    assert f"checkpoint {newest.name} is damaged: checkpoints/{newest.name}/model.safetensors has another content" in (
        capfd.readouterr().out
    )
    assert resumed is not None
    assert resumed.ranks[0].resumed_from == name_of(2, 1)
    assert losses(resumed) == losses(whole)


def test_what_was_not_committed_does_not_exist_and_is_swept(
    start: Callable[..., RunResult | None], tmp_path: Path
) -> None:
    start(tmp_path, 1, stop_at=3)
    checkpoints = RunDir(tmp_path).checkpoints
    torn = checkpoints.directory(name_of(4, 1))
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    manifest = checkpoints.path / f".{torn.name}.json.0123.tmp"
    manifest.write_bytes(b"{")
    assert checkpoints.newest()[0] == checkpoints.read(name_of(2, 1))
    start(tmp_path, 1)
    assert not torn.exists()
    assert not manifest.exists()


def test_old_checkpoints_go_but_for_those_that_are_kept(tmp_path: Path) -> None:
    checkpoints, last = Checkpoints(tmp_path), None
    for step in (10, 20, 30, 40, 50):
        name = name_of(step, 1)
        parts = checkpoints.write_part(checkpoints.directory(name) / "tokenizer.json", b"same", last)
        parts |= checkpoints.write_part(checkpoints.directory(name) / "model.safetensors", b"%d" % step, last)
        checkpoints.seal(name, 0, parts)
        last = checkpoints.commit(Manifest(name, step, 1, last and last.name, 1, {}, {}), 1.0)
        (checkpoints.path / f"{name_of(10, 1)}.pin").touch()
        checkpoints.retain(keep_last=2, keep_every=20)
    kept = sorted(path.name for path in checkpoints.path.glob("*/"))
    assert kept == [name_of(step, 1) for step in (10, 20, 40, 50)]
    assert all(checkpoints.damage(checkpoints.read(name)) is None for name in kept)
    # What did not change is on disk once; the lineage outlives what it names.
    assert (checkpoints.directory(kept[0]) / "tokenizer.json").stat().st_nlink == 4
    assert [manifest.step for manifest in checkpoints.lineage(name_of(50, 1))] == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b"tor"), "has 3 bytes, expected 4"),
        (lambda file: file.write_bytes(b"torm"), "has another content than was written"),
    ],
)
def test_any_damage_of_a_part_is_told(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    checkpoints, name = Checkpoints(tmp_path), name_of(1, 1)
    parts = checkpoints.write_part(checkpoints.directory(name) / "part", b"torn", None)
    checkpoints.seal(name, 0, parts)
    manifest = checkpoints.commit(Manifest(name, 1, 1, None, 1, {}, {}), 1.0)
    damage(checkpoints.directory(name) / "part")
    assert words in str(checkpoints.damage(manifest))
    assert checkpoints.newest()[0] is None


def test_a_checkpoint_waits_for_every_rank(tmp_path: Path) -> None:
    checkpoints, name = Checkpoints(tmp_path), name_of(1, 1)
    checkpoints.directory(name).mkdir(parents=True)
    checkpoints.seal(name, 0, {})
    with pytest.raises(LaunchError, match="rank 1 did not write its part"):
        checkpoints.commit(Manifest(name, 1, 1, None, 2, {}, {}), 0.1)
    assert checkpoints.newest()[0] is None


@pytest.mark.parametrize("kind", strategies.STRATEGIES)
def test_ranks_that_are_not_the_same_any_more_save_nothing_and_are_named(
    on_ranks: Callable[..., list[Any]], tmp_path: Path, kind: str
) -> None:
    directory = RunDir(tmp_path)
    generation = directory.new_generation()
    config = RunConfig.model_validate({"strategy": {"kind": kind}, "model": {"sizes": {"hidden_size": 32}}})

    def rank_main(rank: int, size: int) -> bool:
        world = World(rank, size, torch.device("cpu"), "host")
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        build = strategies.STRATEGIES[kind].build
        strategy = build(dict(model.named_parameters()), config.strategy, config.optimizer, 10)
        saver = checkpoint.Checkpointer(directory, config, world, generation, None, {})
        if rank == 1:
            strategy.extract()["weight"].view(torch.int32)[5, 5] ^= 1
        with pytest.raises(Diverged, match="after step 4: rank 1 differ from rank 0"):
            saver.save(4, model, strategy, [])  # type: ignore[arg-type]
        return True

    assert on_ranks(3, rank_main) == [True] * 3
    assert not directory.checkpoints.directory(name_of(4, generation)).exists()


def test_the_newest_checkpoint_is_that_which_rank_0_is_committing(
    on_ranks: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDir(tmp_path)
    generation, config, slow = directory.new_generation(), RunConfig(), "checkpoint.manifest"
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

    def rank_main(rank: int, size: int) -> int:
        world = World(rank, size, torch.device("cpu"), "host")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
        strategy = strategies.STRATEGIES["adamw"].build(
            dict(model.named_parameters()), config.strategy, config.optimizer, 10
        )
        monkeypatch.setattr(checkpoint.failpoints, "reach", lambda name, **at: time.sleep(name == slow))
        with checkpoint.Checkpointer(directory, config, world, generation, None, {}) as saver:
            saver.save(4, model, strategy, [])
            return saver.newest()

    assert on_ranks(2, rank_main) == [4, 4]


def test_an_attempt_that_was_superseded_saves_nothing(
    start: Callable[..., RunResult | None], tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    start(tmp_path, 1, stop_at=3)
    directory = RunDir(tmp_path)
    stale = directory.latest_generation()
    directory.new_generation()

    def rank_main(rank: int, size: int) -> bool:
        world = World(rank, size, torch.device("cpu"), "host")
        saver = checkpoint.Checkpointer(directory, directory.config(), world, stale, None, {})
        with pytest.raises(Superseded, match="a newer one runs"):
            saver.save(4, torch.nn.Linear(1, 1), None, [])  # type: ignore[arg-type]
        return True

    (tmp_path / "config.json").write_text(RunConfig().model_dump_json())
    assert on_ranks(1, rank_main) == [True]
    assert not directory.checkpoints.directory(name_of(4, stale)).exists()


def test_state_survives_the_disk_to_the_bit(tmp_path: Path) -> None:
    tree = {
        "shared": [1, 2.5, None, True, "text", (torch.tensor(3, dtype=torch.int16),)],
        7: {"empty": [], "nan": torch.tensor([float("nan"), -0.0]), "bf16": torch.ones(2, 3, dtype=torch.bfloat16)},
    }
    tensors, text = checkpoint.pack(tree)
    file = tmp_path / "state.safetensors"
    file.write_bytes(safetensors.torch.save(tensors, {"tree": text}))
    back = checkpoint.read(file, torch.device("cpu"))
    assert repr(back) == repr(tree)
    file.write_bytes(b"\0" * 20)
    with pytest.raises(ModelError, match=r"state\.safetensors cannot be read"):
        checkpoint.read(file, torch.device("cpu"))


def test_a_run_directory_is_verified_and_every_damage_found(
    start: Callable[..., RunResult | None], tmp_path: Path, data: Path
) -> None:
    start(tmp_path, 2, stop_at=3)
    result = start(tmp_path, 3)
    assert result is not None
    directory = RunDir(tmp_path)
    for rank in result.ranks:
        directory.write_outcome(2, rank)
    directory.write_result(result)
    (tmp_path / "config.json").write_text(cli.parse(RunConfig, tiny_argv(data, tmp_path)).model_dump_json())
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=8, steps=6, seed=5)
    directory.write_plan_spec(spec)

    def verified() -> list[str]:
        lines = []
        try:
            lines += verify.verify(verify.Verify(run_dir=tmp_path))
        except DataError as error:
            return [line for line in lines if line.startswith("WRONG")] or [str(error)]
        return lines

    assert [line.split(":")[0] for line in verified()] == [
        "ok     plan",
        "ok     checkpoints",
        "ok     history",
        "ok     receipts",
        "ok     result",
    ]
    wrong = {
        "plan.json": lambda text: text.replace(b'"seed": 5', b'"seed": 6'),
        f"checkpoints/{name_of(6, 2)}/model.safetensors": lambda content: content[:-1] + b"x",
        "gen/000002/records-00001-000000004.parquet": lambda content: write_records(1, []),
        "gen/000002/receipts-00001-000000004.parquet": lambda content: content[:99] + b"x" + content[100:],
        "gen/000001/receipts-00000-000000002.parquet": lambda content: b"",
        "gen/000002/rank-00002.pickle": lambda content: content[:-9],
    }
    for name, damage in wrong.items():
        file = tmp_path / name
        before = file.read_bytes()
        file.write_bytes(damage(before))
        assert verified() != [], name
        assert all(not line.startswith("ok") for line in verified()), name
        file.write_bytes(before)
    assert all(line.startswith("ok") for line in verified())
