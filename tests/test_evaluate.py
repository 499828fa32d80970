"""The loss of a model: the same number whoever measures it, during training and after, and an error is an error."""

import json
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from sparktrain import cli, plan, tokens, trained
from sparktrain.config import Data, RunConfig
from sparktrain.errors import ConfigError, DataError, ModelError
from sparktrain.evaluation import Evaluate, Evaluation, Share, Work
from sparktrain.plan import PlanSpec
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.spark.evaluate import evaluate
from sparktrain.tokens import tokenizer
from sparktrain.train import loop
from sparktrain.train.evaluate import measure
from sparktrain.train.generate import Generate, generate
from sparktrain.train.world import World
from tests.conftest import run_on_ranks, tiny_argv

DILOCO = ("--strategy.kind", "diloco", "--strategy.sync-every", "2")


def train(data: Path, path: Path, *flags: str) -> RunResult:
    """A run of two ranks without Spark."""
    heldout = ("--data.heldout", str(data / "heldout"), "--schedule.kind", "constant")
    config = cli.parse(RunConfig, [*tiny_argv(data, path), *heldout, *flags])
    shards = tuple(tokens.inspect(shard) for shard in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=8, steps=config.train.steps, seed=5)
    directory = RunDir(path)
    directory.plan.mkdir(parents=True)
    rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
    pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
    directory.claim(config)
    number = directory.new_generation()

    def rank_main(rank: int, size: int) -> Any:
        loop._say = lambda world, text: None  # type: ignore[assignment]
        return loop.train_in(World(rank, size, torch.device("cpu"), "host"), directory, config, spec, number)

    outcomes = run_on_ranks(2, rank_main)
    for outcome in outcomes:
        directory.write_outcome(number, outcome)
    result = directory.merge(outcomes)
    directory.write_result(result)
    return result


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a tokenizer and checkpoints after 3 and 6 steps."""
    path = tmp_path_factory.mktemp("evaluate") / "run"
    (path.parent / "tokenizer").mkdir()
    tokenizer.train(["def test(self): return self.test\n"], 260).save(path.parent / "tokenizer")
    argv = ("--checkpoint.every", "3", "--checkpoint.keep-last", "2")
    train(data, path, *argv, "--model.tokenizer", str(path.parent / "tokenizer"))
    return path


def work_of(run_dir: Path, data: Path, **changes: Any) -> Work:
    shards = tuple(tokens.inspect(shard) for shard in tokens.find_shards(data / "train"))
    where = Data(path=(str(data / "train"),), sequence_length=32)
    asked = {"model": run_dir / "model", "data": where, "shards": shards, "sequences": 0, "seed": 0, "micro_batch": 8}
    return Work(**asked | {"autocast": "none", "world": 1} | changes)


@pytest.mark.parametrize("flags", [(), DILOCO], ids=["adamw", "diloco"])
def test_measuring_while_training_changes_nothing_and_is_what_a_shorter_run_measures_at_its_end(
    data: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    plain = train(data, tmp_path / "plain", *flags)
    watched = train(data, tmp_path / "watched", "--eval.every", "1" if flags else "2", *flags)
    shorter = train(data, tmp_path / "shorter", "--train.steps", "4", *flags)
    assert watched.digest == plain.digest
    assert watched.table["loss"].to_pylist() == plain.table["loss"].to_pylist()
    found = watched.table["heldout_loss"].to_pylist()
    assert found[3] == shorter.ranks[0].heldout_after
    # In the midst of a round, it is the last round's weights that all share.
    before = plain.ranks[0].heldout_before
    two, four = found[1], found[3]
    assert found == ([before, two, two, four, four, None] if flags else [None, two, None, four, None, None])
    assert four < two < before
    assert pq.read_table(tmp_path / "watched" / "metrics.parquet")["heldout_loss"].type == pa.float64()


def test_the_update_has_seconds_of_its_own(run_dir: Path) -> None:
    result = RunDir(run_dir).finished()
    assert result is not None
    assert all(0 < r.optimizer_seconds < r.compute_seconds for rank in result.ranks for r in rank.records)


def test_eval_every_needs_data() -> None:
    with pytest.raises(ConfigError, match=r"eval\.every is 5, but there is no data to measure: set data\.heldout"):
        cli.parse(RunConfig, ["--eval.every", "5"])


@pytest.mark.parametrize("sequences", [0, 100])
def test_every_sequence_is_in_one_share_for_any_number_of_ranks(run_dir: Path, data: Path, sequences: int) -> None:
    whole = work_of(run_dir, data, sequences=sequences).share()
    assert len(whole) == len({(shard.path, start) for shard, start in whole}) == (sequences or 3 * 124)
    for world in (2, 3, 7):
        shares = [work_of(run_dir, data, sequences=sequences, world=world, rank=r).share() for r in range(world)]
        assert list(chain(*shares)) == whole
        assert all(len(share) % 8 == 0 for share in shares[:-1])


def test_a_sample_is_by_seed_and_spread_over_the_split(run_dir: Path, data: Path) -> None:
    drawn = work_of(run_dir, data, sequences=100).share()
    assert drawn == work_of(run_dir, data, sequences=100).share()
    assert drawn != work_of(run_dir, data, sequences=100, seed=1).share()
    assert all(15 < count < 55 for count in Counter(shard.path for shard, _ in drawn).values())


def test_the_number_is_the_same_for_any_number_of_ranks(run_dir: Path, data: Path) -> None:
    def loss_on(world: int) -> Evaluation:
        works = [work_of(run_dir, data, sequences=52, world=world, rank=rank) for rank in range(world)]
        return Evaluation.add_up(works[0], reversed([measure(work) for work in works]))

    alone = loss_on(1)
    assert (alone.sequences, alone.of, alone.tokens) == (52, 3 * 124, 52 * 32)
    for world in (2, 3, 5):
        assert loss_on(world) == alone


def test_a_mean_is_over_tokens_and_exact_in_any_order(run_dir: Path, data: Path) -> None:
    sums = {"1/3": 1, "1" + "0" * 20: 2, "2/3": 1}
    shares = [Share(loss_sum=loss_sum, targets=targets) for loss_sum, targets in sums.items()]
    work = work_of(run_dir, data)
    assert {Evaluation.add_up(work, order).loss for order in (shares, shares[::-1], shares[1:] + shares[:1])} == {
        (10**20 + 1) / 4
    }
    with pytest.raises(DataError, match="has no target"):
        Evaluation.add_up(work, [Share(loss_sum="0", targets=0)])


def test_spark_tasks_measure_what_the_run_did_and_say_what_goes_wrong(
    spark: Any, run_dir: Path, data: Path, job: Any
) -> None:
    result = RunDir(run_dir).finished()
    assert result is not None
    code, out, err = job("evaluate", "--model", str(run_dir / "checkpoints" / "000000006-g000001"), "--ranks", "2")
    assert (code, err) == (0, "")
    assert float(out.split()[1]) == pytest.approx(result.ranks[0].heldout_after, abs=1e-6)
    assert f"tokens        {124 * 32:,} in 124 of 124 sequences of 32" in out
    # Where a task's process fails, its own words are the error.
    (model := run_dir.parent / "nan").mkdir()
    for file in (run_dir / "model").iterdir():
        shutil.copy(file, model)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    spoilt = {name: value * torch.nan for name, value in weights.items()}
    safetensors.torch.save_file(spoilt, model / "model.safetensors", {"format": "pt"})
    argv = ("--sequence-length", "32", "--sequences", "8", "--ranks", "1")
    code, _, err = job("evaluate", "--model", str(model), "--data", str(data / "heldout"), *argv)
    assert code == ModelError.exit_code
    assert err == f"error: the loss of {model} is nan: its weights are damaged, or autocast is not for it\n"


def test_what_cannot_be_measured_is_one_line(run_dir: Path, data: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], **changes: Any) -> str:
        with pytest.raises(kind) as caught:
            measure(work_of(run_dir, data, **changes))
        return str(caught.value)

    shutil.copytree(run_dir / "model", bare := tmp_path / "bare")
    file, whole = bare / "model.safetensors", safetensors.torch.load_file(run_dir / "model" / "model.safetensors")
    file.unlink()
    assert f"{bare} is no model: expected model.safetensors" in refused(ModelError, model=bare)
    file.write_bytes(b"torn")
    assert f"{file} is no safetensors file" in refused(ModelError, model=bare)
    lacking = {name: value for name, value in whole.items() if name != "model.norm.weight"}
    safetensors.torch.save_file(lacking, file, {"format": "pt"})
    assert f"{bare} lacks the weights of model.norm.weight" in refused(ModelError, model=bare)
    few = {name: value[:100] if len(value) == 512 else value for name, value in whole.items()}
    safetensors.torch.save_file(few, file, {"format": "pt"})
    settings = json.loads((bare / "config.json").read_text()) | {"vocab_size": 100}
    (bare / "config.json").write_text(json.dumps(settings))
    assert f"but the vocab_size of {bare} is 100" in refused(DataError, model=bare)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "nowhere"), r"nowhere is no directory: give a run directory, a checkpoint or"),
        (("--model", "{data}"), r"data0 holds no run, no checkpoint and no model: give"),
        (("--model", "{run}/checkpoints/000000009-g000001"), r"checkpoint 000000009-g000001 of .* has no readable"),
        (("--model", "{run}/model", "--sequence-length", "129"), r"sequence_length is 129, more than the model's"),
        (("--model", "{run}", "--data", "{data}/none"), r"none"),
        (("--model", "{data}/hf"), r"data is not set, and .*hf comes from no run: say which split"),
        (("--model", "{data}/other"), r"other is no language model: its config.json has no vocab_size"),
        (("--model", "{run}", "--sequences", "-1"), r"sequences: input should be greater than or equal to 0"),
        ((), r"model: field required"),
    ],
)  # fmt: skip
def test_a_wrong_question_is_one_line(
    spark: Any, run_dir: Path, tmp_path: Path, argv: tuple[str, ...], message: str
) -> None:
    (data := tmp_path / "data0").mkdir()
    for name, settings in {"hf": '{"vocab_size": 512}', "other": "{}"}.items():
        (data / name).mkdir()
        (data / name / "config.json").write_text(settings)
    words = [word.format(run=run_dir, data=data) for word in argv]
    with pytest.raises((ConfigError, DataError, ModelError), match=message) as caught:
        evaluate(spark, cli.parse(Evaluate, words))
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_finished_is_its_newest_whole_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, unfinished := tmp_path / "run")
    (unfinished / "result.json").unlink()
    shutil.rmtree(unfinished / "model")
    assert trained.find(unfinished).directory == unfinished / "checkpoints" / "000000006-g000001"
    damaged = unfinished / "checkpoints" / "000000006-g000001"
    (damaged / "model.safetensors").write_bytes(b"torn")
    assert trained.find(unfinished).directory.name == "000000003-g000001"
    with pytest.raises(ModelError, match="checkpoint .*000000006-g000001 is damaged: .*model.safetensors has 4 bytes"):
        trained.find(damaged)
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(ModelError, match="has no model yet, it is not finished and has no checkpoint: train on"):
        trained.find(unfinished)


def test_text_is_sampled_from_runs_checkpoints_and_directories_piece_by_piece(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "000000006-g000001"
    # The tiny model's vocabulary is larger than the tokenizer's: what it knows not, it leaves out.
    texts = [
        list(generate(Generate(model=model, prompt="def test", max_new_tokens=12, seed=3)))
        for model in (run_dir, checkpoint, run_dir / "model")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert "".join(texts[0]).startswith("def test")
    shutil.copytree(run_dir / "model", mute := tmp_path / "mute", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ModelError, match="holds no tokenizer: expected .*tokenizer.json; put the model's own there"):
        next(generate(Generate(model=mute, prompt="def")))
    with pytest.raises(ConfigError, match="prompt has 1[0-9][0-9] tokens, the model 128 positions"):
        next(generate(Generate(model=run_dir, prompt="x" * 140)))
    (mute / "tokenizer.json").write_text("{}")
    (mute / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="model.safetensors is no safetensors file"):
        next(generate(Generate(model=mute, prompt="def")))
