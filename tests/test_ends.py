"""Failures of ranks, launchers and drivers: none is hidden, silent or left running."""

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

from sparktrain import cli, plan
from sparktrain.config import RunConfig
from sparktrain.errors import LaunchError
from sparktrain.rundir import RunDir
from sparktrain.spark import driver, launch, planner, preflight, task
from tests.conftest import ROOT, tiny_argv, write_shards
from tests.test_launch import ENVIRONMENT, SUBMIT, digest_of


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
    wait_until_gone(directory.path)


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


def wait_until_gone(run_dir: Path) -> None:
    """No rank of the run is left, and nobody holds it: in 1 to 5 s on a machine that has nothing else to do."""
    deadline = time.monotonic() + 20
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
    wait_until_gone(tmp_path / "run")


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
    wait_until_gone(tmp_path / "run")
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
    wait_until_gone(tmp_path / "run")
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
    wait_until_gone(tmp_path / "run")
