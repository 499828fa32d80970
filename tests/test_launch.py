"""Launching: every way to start ranks gives the same parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.results import RankResult
from sparktrain.rundir import RunDir
from sparktrain.spark import driver
from sparktrain.train.batches import Batches
from sparktrain.train.evaluate import token_losses
from tests.conftest import ROOT, tiny_argv

SUBMIT = [
    *("spark-submit", "--properties-file", str(ROOT / "conf" / "spark-defaults.conf")),
    *("--conf", "spark.ui.enabled=false", "--conf", "spark.driver.host=127.0.0.1"),
    *("--conf", "spark.driver.bindAddress=127.0.0.1"),
]
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYSPARK_PYTHON": sys.executable,
}


@pytest.fixture(scope="module")
def reference(spark: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in Spark's local mode, by the job's own code."""
    run_dir = tmp_path_factory.mktemp("runs") / "local"
    argv = tiny_argv(data, run_dir, "--data.heldout", str(data / "heldout"))
    driver.run(spark, cli.parse(RunConfig, argv))
    return run_dir


def digest_of(run_dir: Path) -> str:
    digests = set(json.loads((run_dir / "result.json").read_text())["digests"].values())
    assert len(digests) == 1
    return str(digests.pop())


@pytest.mark.parametrize("launcher", ["torchrun", "direct"])
def test_a_barrier_stage_gives_the_parameters_of_local_mode(
    spark: Any, reference: Path, data: Path, tmp_path: Path, launcher: str
) -> None:
    argv = tiny_argv(data, tmp_path / "run", "--launch.mode", "executors", "--launch.launcher", launcher)
    result = driver.run(spark, cli.parse(RunConfig, argv))
    assert result.digest == digest_of(reference)


def test_torchrun_by_hand_gives_the_parameters_of_the_spark_run(reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(reference), str(run_dir)], check=True)
    directory = RunDir(run_dir)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, "-m", "sparktrain.worker", str(run_dir)], check=True, cwd=ROOT)
    outcomes = directory.outcomes(2)
    assert [type(o) for o in outcomes] == [RankResult, RankResult]
    assert {o.digest for o in outcomes if isinstance(o, RankResult)} == {digest_of(reference)}
    assert not (run_dir / "LOCK").exists()


def test_executors_of_their_own_give_the_parameters_of_local_mode(reference: Path, data: Path, tmp_path: Path) -> None:
    command = [*SUBMIT, "--master", "local-cluster[2,1,2048]", str(ROOT / "jobs" / "train.py")]
    argv = tiny_argv(data, tmp_path / "run", "--data.heldout", str(data / "heldout"))
    done = subprocess.run([*command, *argv], env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr  # spark-submit hands the driver's stderr on as its own stdout
    assert digest_of(tmp_path / "run") == digest_of(reference)
    assert "[rank 0 " in done.stdout
    assert "step 6/6  loss " in done.stdout


def test_the_result_is_written_and_read_back(spark: Any, reference: Path, data: Path) -> None:
    result = RunDir(reference).finished()
    assert result is not None
    summary = json.loads((reference / "result.json").read_text())
    assert summary["world_size"] == 2
    assert summary["tokens"] == 6 * 8 * 32
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    assert summary["payload_bytes"] == 6 * 4 * summary["num_parameters"]
    assert result.metrics["step"].tolist() == list(range(6))
    frame = result.metrics_frame(spark)
    assert frame.count() == 6
    assert frame.toPandas()["loss"].tolist() == result.metrics["loss"].tolist()
    again = driver.run(spark, cli.parse(RunConfig, tiny_argv(data, reference, "--data.heldout", str(data / "heldout"))))
    assert again == result  # a finished run is read, not trained again
    assert RunDir(reference).latest_generation() == 1


def test_the_model_opens_anywhere_and_gives_the_loss_that_was_measured(reference: Path) -> None:
    directory = RunDir(reference)
    model = AutoModelForCausalLM.from_pretrained(reference / "model").eval()
    result, config, spec = directory.finished(), directory.config(), directory.plan_spec()
    assert result is not None
    assert spec is not None
    with torch.no_grad():
        batch = next(iter(Batches(directory, spec, 0, 1))).to(torch.device("cpu"))
        loss = float(token_losses(model, batch)) / spec.target_tokens(0)
        inputs, labels = batch.tokens[:, :-1].reshape(-1, 32), batch.tokens[:, 1:].reshape(-1, 32)
        logits = model(inputs).logits
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())))
    assert loss < result.metrics["loss"][0]
    assert config.run.dir == reference


def test_a_dry_run_prints_the_plan_and_leaves_nothing(spark: Any, data: Path, tmp_path: Path, job: Any) -> None:
    code, out, _ = job("train", *tiny_argv(data, tmp_path / "run"), "--dry-run")
    assert code == 0
    assert not (tmp_path / "run").exists()
    for part in (
        "48 rows: 6 steps of 8 sequences, 1,536 tokens",
        "adamw: payload ",
        "distro: payload ",
        "rank 1     ",
        "verdict    ready: layouts agree; adamw took a round on each kind of host; 6 steps, a sync in each",
        "microshard_id",
    ):
        assert part in out
