"""A rank that hangs is noticed, named, and gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparktrain import cli, heartbeat
from sparktrain.config import Launch, RunConfig
from sparktrain.errors import LaunchError
from sparktrain.heartbeat import Heartbeat
from sparktrain.rundir import RunDir
from sparktrain.spark import driver
from tests.conftest import ROOT, tiny_argv

STEPS = ("--train.steps", "40")
LAUNCH = Launch(step_timeout=10, collective_timeout=100)


def said(rank: int, place: str, beat: int, *, step: int = 7, seconds: float = 0.0, slowest: float = 1.0) -> Heartbeat:
    return Heartbeat(rank, f"host{rank}", 1, beat, step, place, seconds, "12:00:00 UTC", slowest)


def test_a_silent_rank_hangs_and_not_those_that_wait_for_it() -> None:
    watch = heartbeat.Watch(LAUNCH)
    for now in range(10):
        assert watch.hung([said(0, "agrees", now, seconds=now), said(1, "agrees", 0)], now) is None
    found = watch.hung([said(0, "agrees", 11, seconds=11), said(1, "agrees", 0)], 11)
    assert found == (
        "rank 1 on host1 hangs: no sign of life for 11 s; since 12:00:00 UTC it was waiting for the other ranks "
        "of step 7 (longer than launch.step_timeout allows)"
    )


def test_a_rank_that_is_stuck_hangs_and_not_those_that_came_to_wait_before_it() -> None:
    watch = heartbeat.Watch(LAUNCH)
    assert watch.hung([said(0, "agrees", 1, seconds=30), said(1, "reads", 1, seconds=9)], 0) is None
    found = watch.hung([said(0, "agrees", 2, seconds=32), said(1, "reads", 2, seconds=11)], 2)
    assert found is not None
    assert found.startswith("rank 1 on host1 hangs: no progress for 11 s; since 12:00:00 UTC it was reading its batch")


def test_a_slow_rank_that_gets_on_does_not_hang_however_long_others_wait() -> None:
    watch = heartbeat.Watch(LAUNCH)
    for now in range(100):
        assert watch.hung([said(0, "agrees", now, seconds=now), said(1, "computes", now, seconds=9)], now) is None


def test_where_all_wait_for_one_another_the_last_to_come_is_named() -> None:
    found = heartbeat.Watch(LAUNCH).hung(
        [said(0, "updates", 1, seconds=12), said(1, "agrees", 1, seconds=11), said(2, "ended", 9, step=8, seconds=50)],
        0,
    )
    assert found is None  # the one that ended may have to wait for a checkpoint to be written
    found = heartbeat.Watch(LAUNCH).hung([said(0, "updates", 1, seconds=12), said(1, "agrees", 1, seconds=11)], 0)
    assert found is not None
    assert found.startswith("rank 1 on host1 hangs: no rank made progress for 11 s")


def test_without_a_setting_a_step_may_take_ten_times_the_slowest_and_loading_nearly_the_collective_timeout() -> None:
    launch = Launch()
    assert heartbeat.limit(said(0, "computes", 1, slowest=30.0), launch) == 300
    assert heartbeat.limit(said(0, "computes", 1, slowest=0.1), launch) == 60
    assert heartbeat.limit(said(0, "computes", 1, slowest=100.0), launch) == 540
    for place in ("starts", "loads", "reads", "agrees", "updates", "saves", "evaluates"):
        assert heartbeat.limit(said(0, place, 1), launch) == 540
    assert heartbeat.limit(said(0, "updates", 1), launch, silent=True) == 60
    assert heartbeat.limit(said(0, "saves", 1), launch, silent=True) == 540
    assert heartbeat.limit(said(0, "computes", 1, slowest=0.0), launch) == 540  # the first step takes what it takes


@pytest.fixture
def disturbed(spark: Any, data: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Any, psutil.Process]]]:
    """``disturbed(act, *flags)``: a run, whose rank 1 ``act`` is given once a checkpoint is there; its
    result and its error, one of them None, and that rank's process."""

    def run(act: Callable[[psutil.Process], None], *flags: str) -> tuple[Any, Any, psutil.Process]:
        directory, found = RunDir(tmp_path / "run"), []

        def disturb() -> None:
            while not directory.checkpoints.names():
                time.sleep(0.02)
            found.append(psutil.Process(heartbeat.read([directory.heartbeat(1, 1)])[0].pid))
            act(found[0])

        thread = threading.Thread(target=disturb)
        thread.start()
        argv = tiny_argv(data, directory.path, *STEPS, "--checkpoint.every", "4", *flags)
        result = error = None
        try:
            result = driver.run(spark, cli.parse(RunConfig, argv))
        except LaunchError as raised:
            error = raised
        thread.join()
        return result, error, found[0]

    yield run
    for file in (tmp_path / "run").glob("gen/*/heartbeat-*.json"):
        for left in heartbeat.read([file]):
            if psutil.pid_exists(left.pid) and str(tmp_path) in " ".join(psutil.Process(left.pid).cmdline()):
                os.kill(left.pid, signal.SIGKILL)


def test_a_process_knows_whether_who_started_it_is_there() -> None:
    code = "import sys; from sparktrain.parent import is_orphan; print(is_orphan(int(sys.argv[1])))"

    def said(starter: int, *by: str) -> str:
        command = [*by, sys.executable, "-c", code, str(starter)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    by_a_shell = ("sh", "-c", '"$@"; exit $?', "sh")
    assert said(os.getpid()) == said(os.getpid(), *by_a_shell) == "False"
    other = subprocess.Popen(["sleep", "60"])
    assert said(other.pid) == said(other.pid, *by_a_shell) == "True"
    other.kill()
    other.wait()


def test_a_rank_that_is_stopped_ends_when_its_parent_does(tmp_path: Path) -> None:
    code = """
import sys, time, torch
from sparktrain.rundir import RunDir
from sparktrain.train.requests import Requests
from sparktrain.train.world import World
with Requests(RunDir(sys.argv[1]), World(0, 1, torch.device("cpu"), "here"), False, bool, bool).heeding_sigterm(0.2):
    print("ready", flush=True)
    time.sleep(600)
"""
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    (rank,) = psutil.Process(parent.pid).children()
    rank.suspend()
    parent.kill()
    parent.wait()
    assert rank in psutil.wait_procs([rank], timeout=20)[0]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_stopped_rank_is_named_and_killed(disturbed: Any) -> None:
    flags = ("--launch.step-timeout", "4", "--launch.grace", "1", "--launch.max-restarts", "0")
    result, error, rank = disturbed(lambda process: process.suspend(), *flags)
    assert result is None
    assert str(error).startswith("rank 1 on ")
    assert " hangs: no sign of life for " in str(error)
    assert "(longer than launch.step_timeout allows); stacks are in " in str(error)
    assert error.transient
    assert is_gone(rank)


def test_a_run_whose_rank_was_stopped_goes_on_by_itself_to_the_same_end(
    spark: Any, data: Path, tmp_path: Path, disturbed: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--launch.mode", "executors", "--launch.step-timeout", "4", "--launch.grace", "1")
    result, error, rank = disturbed(lambda process: process.suspend(), *flags)
    assert error is None
    assert is_gone(rank)
    out = capfd.readouterr().out
    assert "rank 1 on " in out
    assert " hangs: no sign of life for " in out
    assert "; restart 1 of 3 in 1 s" in out
    assert result.ranks[0].resumed_from is not None
    argv = tiny_argv(data, tmp_path / "undisturbed", *STEPS)
    assert result.digest == driver.run(spark, cli.parse(RunConfig, argv)).digest
