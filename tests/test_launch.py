"""Launching: every way to start ranks gives the same parameters, and no failure is hidden, silent or left running."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparktrain import cli, plan
from sparktrain.config import RunConfig
from sparktrain.errors import LaunchError
from sparktrain.results import RankResult
from sparktrain.rundir import RunDir
from sparktrain.spark import driver, launch, planner, preflight, task
from sparktrain.train.batches import Batches
from sparktrain.train.evaluate import token_losses
from tests.conftest import ROOT, tiny_argv, write_shards

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
        batch = next(iter(Batches(directory, spec, 0, 1)))
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


@pytest.mark.parametrize("mode", ["local", "executors"])
def test_a_rank_that_raises_ends_the_run_with_its_own_words(spark: Any, tmp_path: Path, mode: str) -> None:
    write_shards(tmp_path / "train")
    argv = tiny_argv(tmp_path, tmp_path / "run", "--launch.mode", mode)
    config = preflight.resolve(spark, cli.parse(RunConfig, argv))
    directory = RunDir(config.run.dir)
    with directory.lock():
        prepared = driver._prepare(spark, config)
        directory.claim(config)
        planner.write_plan(spark, prepared.spec, directory)
    # The last shard that rank 1 alone reads in the first step loses its end after the plan was made.
    rows = plan.rows(prepared.spec, 0, 8)
    victim = max(rows[4:], key=lambda row: (row.path not in {r.path for r in rows[:4]}, row.start))
    os.truncate(victim.path, 2 * victim.start + 2)
    early = plan.rows(prepared.spec, 0, 24)  # what is read ahead of the first step
    went_wrong = {row.slot // 4 for row in early if row.path == victim.path}
    number = directory.new_generation()
    logs = str(directory.logs(number))
    job = task.Job(str(directory.path), logs, number, "test", preflight.import_path(), 1, "torchrun", 4.0)
    began = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        launch.launch(spark, job, 2, mode == "local", use_gpu=False)
    assert time.monotonic() - began < 60
    assert str(caught.value).startswith(tuple(f"rank {rank} on " for rank in went_wrong))
    size = f"shard {victim.path} has {2 * victim.start + 2} bytes, expected 8000 by its manifest or the plan"
    assert f"failed: DataError: {size}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    wait_until_gone(directory.path, 5)


@pytest.fixture
def long_run(data: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start jobs/train.py in a process of its own, on a run that would take minutes; returns once it trains."""
    started: list[subprocess.Popen[str]] = []

    def start(
        mode: str, submit: Sequence[str] = (*SUBMIT, "--master", "local[2]"), *flags: str
    ) -> subprocess.Popen[str]:
        flags = flags or ("--train.steps", "100000", "--launch.max-restarts", "0")
        argv = tiny_argv(data, tmp_path / "run", "--launch.mode", mode, *flags)
        command = [*submit, str(ROOT / "jobs" / "train.py"), *argv]
        child = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(child)
        assert child.stdout is not None
        for line in child.stdout:
            if "step 4/" in line:
                return child
        raise AssertionError("it ended before it trained")

    yield start
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def ranks_of(run_dir: Path) -> dict[int, psutil.Process]:
    """Rank processes of a run, by rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if str(run_dir) in command and "sparktrain.worker" in command and "torch.distributed.run" not in command:
                found[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    return found


def wait_until_gone(run_dir: Path, seconds: float) -> None:
    """No rank of the run is left, and nobody holds it, within so many seconds."""
    deadline = time.monotonic() + seconds
    while ranks_of(run_dir) or (run_dir / "LOCK").exists():
        assert time.monotonic() < deadline, f"left: {ranks_of(run_dir)} {list(run_dir.glob('LOCK'))}"
        time.sleep(0.1)


def end_of(child: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """Exit code and error line of a job that must end by itself in so many seconds."""
    out, _ = child.communicate(timeout=seconds)
    lines = [line for line in out.splitlines() if line.startswith(("error: ", "interrupted"))]
    return child.returncode, lines[-1] if lines else out


@pytest.mark.parametrize("mode", ["local", "executors"])
def test_a_killed_rank_ends_the_run_and_is_named(long_run: Any, tmp_path: Path, mode: str) -> None:
    child = long_run(mode)
    ranks_of(tmp_path / "run")[1].kill()
    code, line = end_of(child, 30)
    assert code == 7
    assert line.startswith("error: rank 1 on ")
    assert "was ended by SIGKILL (killed from outside, often for lack of memory: lower train.micro_batch)" in line
    wait_until_gone(tmp_path / "run", 5)


def test_a_run_whose_rank_was_killed_goes_on_by_itself_to_the_same_end(
    spark: Any, long_run: Any, data: Path, tmp_path: Path
) -> None:
    flags = ("--train.steps", "60", "--checkpoint.every", "20")
    child = long_run("executors", (*SUBMIT, "--master", "local[2]"), *flags)
    while not list((tmp_path / "run" / "checkpoints").glob("*.json")):
        time.sleep(0.05)
    ranks_of(tmp_path / "run")[1].kill()
    out, _ = child.communicate(timeout=90)
    assert child.returncode == 0, out
    assert "was ended by SIGKILL" in out
    assert "; restart 1 of 3 in 4 s" in out
    assert "going on from checkpoint 0000000" in out
    undisturbed = driver.run(spark, cli.parse(RunConfig, tiny_argv(data, tmp_path / "undisturbed", *flags)))
    assert digest_of(tmp_path / "run") == undisturbed.digest
    again = RunDir(tmp_path / "run").finished()
    assert again is not None
    assert again.table["loss"].to_pylist() == undisturbed.table["loss"].to_pylist()


@pytest.mark.parametrize(
    ("mode", "submit"),
    [("local", (sys.executable,)), ("executors", (*SUBMIT, "--master", "local[2]"))],
    ids=["python-local", "spark-submit-executors"],
)
def test_ctrl_c_stops_the_ranks(long_run: Any, tmp_path: Path, mode: str, submit: Sequence[str]) -> None:
    child = long_run(mode, submit)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
    wait_until_gone(tmp_path / "run", 6)
    newest, damages = RunDir(tmp_path / "run").checkpoints.newest()
    assert newest is not None, "no checkpoint was saved within the grace time"
    assert newest.step >= 4
    assert not damages
    code, line = end_of(child, 20)
    assert code == 130
    if submit == (sys.executable,):  # under spark-submit the JVM, which carries the driver's output, may go first
        assert line == "interrupted"


def test_ranks_do_not_outlive_a_killed_torchrun(long_run: Any, tmp_path: Path) -> None:
    child = long_run("local")
    agent = ranks_of(tmp_path / "run")[0].parent()
    assert agent is not None
    agent.kill()
    wait_until_gone(tmp_path / "run", 5)
    code, line = end_of(child, 30)
    assert code == 7
    assert line.startswith("error: torchrun of task 0 on ")
    assert "was ended by SIGKILL" in line


@pytest.mark.parametrize(("mode", "killed"), [("executors", "the driver"), ("local", "spark-submit")])
def test_ranks_do_not_outlive_a_killed_driver(long_run: Any, tmp_path: Path, mode: str, killed: str) -> None:
    child = long_run(mode)
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    alive = [p for p in family if p.status() != psutil.STATUS_ZOMBIE]
    drivers = [p for p in alive if "jobs/train.py" in " ".join(p.cmdline())]
    for process in drivers if killed == "the driver" else [p for p in drivers if "java" in p.name()]:
        process.kill()
    if killed == "the driver":
        (tmp_path / "run" / "LOCK").unlink(missing_ok=True)  # a next start finds its process gone
    wait_until_gone(tmp_path / "run", 6)
