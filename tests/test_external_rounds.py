"""A program in place of a rank's own steps: the same parameters, the same files, and one line where it fails."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig

from sparktrain import cli, plan, tokens
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, Diverged, SparktrainError
from sparktrain.plan import PlanSpec
from sparktrain.results import RankResult, RunResult
from sparktrain.rundir import RunDir
from sparktrain.train import loop
from sparktrain.train.external.process import own_device
from sparktrain.train.world import World
from tests.conftest import ROOT, TINY_MODEL, tiny_argv

DILOCO = ("--strategy.kind", "diloco", "--strategy.sync-every", "3")
EXAMPLE = (sys.executable, str(ROOT / "examples" / "trainer.py"), "{job_manifest}", "--micro-batch", "4", "--model")

# Moves every weight by a hundredth of the round's learning rates, and counts its rounds in what it keeps.
LIGHT = """
import json, os, sys
import numpy as np
job = json.load(open(sys.argv[1]))
round = int(open(job["inner_optimizer_state_path"]).read()) if "inner_optimizer_state_path" in job else 0
payloads = [batch["payload"] for batch in job["batches"]]
here = os.path.dirname(job["result_manifest_path"])
def write(values):
    os.mkdir(job["output_parameter_pack_path"])
    values.tofile(job["output_parameter_pack_path"] + "/values.f32le")
    manifest = open(job["base_parameter_pack_path"] + "/manifest.json").read()
    open(job["output_parameter_pack_path"] + "/manifest.json", "w").write(manifest)
def finish(**told):
    open(here + "/kept", "w").write(str(round + 1))
    told = {"steps_completed": len(payloads), "inner_optimizer_state_path": here + "/kept"} | told
    json.dump(told, open(job["result_manifest_path"], "w"))
values = np.fromfile(job["base_parameter_pack_path"] + "/values.f32le", "<f4")
moved = values + np.float32((1 + round) * sum(p["learning_rate"] for p in payloads) / 100)
"""
GOOD = "write(moved); finish(metrics=dict(loss=2.5, grad_norm=0.5))"


@pytest.fixture
def light(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """Flags for a program that does without torch, and runs this code."""

    def flags(code: str = GOOD) -> tuple[str, ...]:
        (tmp_path / "light.py").write_text(LIGHT + code)
        return ("--inner-loop.command", json.dumps([sys.executable, str(tmp_path / "light.py"), "{job_manifest}"]))

    return flags


class Interrupted(Exception):
    """Stands for whatever ends a rank."""


@pytest.fixture
def start(
    on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """``start(name, *flags, world=2, stop_at=None)``: an attempt of a run of 6 steps: its result, None where it was
    stopped after step ``stop_at``, or its first rank's error."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=8, steps=6, seed=5)

    def rank_main(rank: int, size: int, config: RunConfig, number: int, stop_at: int | None) -> Any:
        say = loop._line

        def line(record: Any, of: PlanSpec) -> str:
            if record.step == stop_at:
                raise Interrupted
            return say(record, of)

        loop._say, loop._line = (lambda world, text: None), line  # type: ignore[assignment]
        try:
            world = World(rank, size, torch.device("cpu"), "host")
            return loop.train_in(world, RunDir(config.run.dir), config, spec, number)
        except (Interrupted, SparktrainError) as error:
            return error

    def run(name: str, *flags: str, world: int = 2, stop_at: int | None = None) -> Any:
        directory = RunDir(tmp_path / name)
        argv = [*tiny_argv(data, directory.path), "--run.log-every", "1", "--checkpoint.every", "2", *DILOCO, *flags]
        config = cli.parse(RunConfig, argv)
        if not directory.plan.exists():
            directory.plan.mkdir(parents=True)
            rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
            pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
            directory.claim(config)
        outcomes = on_ranks(world, rank_main, config, directory.new_generation(), stop_at)
        assert list(scratch.iterdir()) == []
        errors = [outcome for outcome in outcomes if not isinstance(outcome, RankResult)]
        return errors[0] if errors else directory.merge(outcomes)

    return run


def test_a_program_ends_where_the_ranks_themselves_end_also_when_it_was_interrupted(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    AutoConfig.for_model("llama", **json.loads(TINY_MODEL)).save_pretrained(tmp_path / "model")
    whole = start("whole")
    program = ("--inner-loop.command", json.dumps([*EXAMPLE, str(tmp_path / "model")]))
    assert isinstance(start("program", *program, stop_at=5), Interrupted)
    resumed = start("program", *program)
    assert isinstance(resumed, RunResult)
    # Due after step 2, but there was no state of it: the first round's end was next.
    assert resumed.ranks[0].resumed_from == "000000003-g000001"
    assert resumed.digest == whole.digest
    ours, theirs = (result.windows.to_pylist() for result in (whole, resumed))
    for mine, other in zip(ours, theirs, strict=True):
        same = ("window", "rank", "first_step", "steps", "tokens", "examples", "delta_norm", "payload_bytes")
        assert [mine[name] for name in same] == [other[name] for name in same]
        assert other["loss_mean"] == pytest.approx(mine["loss_mean"])
    assert resumed.table["lr"].to_pylist() == whole.table["lr"].to_pylist()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--strategy.sync-every", "4", "--strategy.num-fragments", "2", "--strategy.fragment-sync-delay", "1"),
        ("--strategy.kind", "sparseloco"),
        ("--model.dtype", "bfloat16", "--inner-loop.exclude-globs", "lm_head*"),
    ],
    ids=["diloco", "fragments under way", "sparseloco", "bfloat16, a part of the tensors"],
)
def test_rounds_resume_to_the_bit_with_what_the_program_keeps(
    start: Callable[..., Any], light: Callable[..., Any], flags: tuple[str, ...]
) -> None:
    whole = start("whole", *light(), *flags)
    assert start("broken", *light(), *flags, stop_at=whole.ranks[0].records[-1].step) is not None
    resumed = start("broken", *light(), *flags)
    assert resumed.digest == whole.digest
    assert resumed.ranks[0].resumed_from is not None
    assert [record.step for record in whole.ranks[1].records] == list(range(6))
    for record in whole.ranks[0].records:
        parts = record.data_seconds + record.compute_seconds + record.communication_seconds
        assert (record.loss_sum, record.tokens, record.grad_norm) == (2.5 * 128, 128, 0.5)
        assert parts == pytest.approx(record.seconds)


def test_a_world_of_another_size_goes_on(start: Callable[..., Any], light: Callable[..., Any]) -> None:
    assert start("run", *light(), stop_at=5) is not None
    resumed = start("run", *light(), world=3)
    assert [record.step for record in resumed.ranks[2].records] == [3, 4, 5]
    assert resumed.table["tokens"].to_pylist() == [8 * 32] * 6


def test_a_program_reads_the_tokens_that_the_plan_names(
    start: Callable[..., Any], light: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    code = f"""
for batch in job["batches"]:
    name = "{kept}/" + os.environ["MINE"] + "-%d-%d" % (batch["payload"]["step"], batch["ordinals"][0])
    open(name + ".json", "w").write(json.dumps(batch))
    os.link(batch["payload"]["shard_paths"][0], name + ".npz")
assert os.environ["OMP_NUM_THREADS"] == "1"
"""
    start("run", *light(code + GOOD), "--inner-loop.env", '{"MINE": "x"}')
    spec = PlanSpec(tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train")), 32, 8, 6, 5)
    seen = []
    for file in kept.glob("*.json"):
        batch = json.loads(file.read_text())
        assert (batch["kind"], batch["pipeline_kind"], batch["payload"]["microshards_per_batch"]) == (
            "micro_epoch",
            "sharded-static",
            4,
        )
        assert batch["bytes_len"] == file.with_suffix(".npz").stat().st_size
        assert batch["microshard_ids"] == [str(number) for number in batch["ordinals"]]
        with np.load(file.with_suffix(".npz")) as arrays:
            assert list(arrays) == ["tokens"]
            seen += list(zip(batch["ordinals"], arrays["tokens"].tolist(), strict=True))
    files = {shard.path: tokens.TokenFile(shard) for shard in spec.shards}
    expected = {
        row.microshard_id: files[row.path].read(row.start, row.length).tolist()
        for row in plan.rows(spec, 0, spec.num_positions)
    }
    assert len(seen) == spec.num_positions
    assert dict(seen) == expected


@pytest.mark.parametrize(
    ("code", "flags", "message"),
    [
        ("sys.exit('no GPU')", (), "inner_loop.command of rank 0 in round 0 ended with status 1: no GPU$"),
        (
            "import time; time.sleep(60)",
            ("--inner-loop.timeout", "1"),
            "did not end within 1 s and was killed.*timeout",
        ),
        ("open(job['result_manifest_path'], 'w').write('{\"st')", (), "result.json that is not valid JSON"),
        ("write(moved); finish(steps_completed=2)", (), r"rank 0 in round 0 completed 2 step\(s\), requested 3"),
        ("write(moved[1:]); finish()", (), "byte length .* does not match parameter count"),
        ("write(moved * np.nan); finish()", (), "returned parameters that are not finite, first in lm_head.weight"),
    ],
)
def test_a_program_that_fails_ends_the_run_in_one_line(
    start: Callable[..., Any], light: Callable[..., Any], code: str, flags: tuple[str, ...], message: str
) -> None:
    error = start("run", *light(code), *flags)
    assert isinstance(error, SparktrainError)
    assert "\n" not in str(error)
    assert error.exit_code == 7
    with pytest.raises(SparktrainError, match=message):
        raise error


def test_a_loss_that_is_no_number_ends_the_run_and_one_that_is_not_told_does_not(
    start: Callable[..., Any], light: Callable[..., Any]
) -> None:
    code = "write(moved); finish(metrics=dict(loss=float('nan')))"
    with pytest.raises(Diverged, match="loss is nan in step 2 on rank [01]: lower optimizer.lr"):
        raise start("nan", *light(code))
    result = start("silent", *light("write(moved); finish()"))
    assert np.isnan(result.table["loss"].to_pylist()).all()
    assert result.summary()["loss_last"] is None
    assert "loss          nan -> nan" in result.report()


def test_fewer_steps_weigh_what_they_weigh(start: Callable[..., Any], light: Callable[..., Any]) -> None:
    code = "write(moved); finish(steps_completed=3 - job['batches'][0]['lease_id'].endswith('-0'))"
    result = start("run", *light(code), "--no-inner-loop.require-exact-steps")
    tokens_of_ranks = [sum(record.tokens for record in rank.records) for rank in result.ranks]
    assert max(tokens_of_ranks) > min(tokens_of_ranks) > 0
    with pytest.raises(SparktrainError, match=r"completed 0 step\(s\), requested 3"):
        raise start("none", *light("write(moved); finish(steps_completed=0)"), "--no-inner-loop.require-exact-steps")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--strategy.kind", "adamw"), "strategy.kind adamw syncs in every step: set strategy.kind to diloco or spar"),
        (("--strategy.kind", "distro"), "strategy.kind distro syncs in every step"),
        (("--strategy.kind", "diloco"), "strategy.sync_every is auto, which measures .*: set strategy.sync_every to"),
        (("--inner-loop.command", "python my.py"), "inner_loop.command is 'python my.py': expected a list"),
        (("--inner-loop.command", '[" "]'), "expected the program first"),
        (("--inner-loop.timeout", "0"), "inner_loop.timeout: input should be greater than 0"),
        (("--inner-loop.include-globs", " "), "inner_loop.include_globs contains an empty pattern"),
        (("--inner-loop.env", '{"": "x"}'), "no empty names: remove them"),
    ],
)
def test_settings_without_rounds_or_without_a_program_are_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.parse(
            RunConfig, [*flags] if "--inner-loop.command" in flags else ["--inner-loop.command", '["true"]', *flags]
        )


def test_each_ranks_program_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert own_device(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,MIG-7")
    assert own_device(1) == {"CUDA_VISIBLE_DEVICES": "MIG-7"}
