"""The run directory has one owner, one run, and attempts that never share a number."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, RunDirBusy
from sparktrain.rundir import RunDir


def test_a_run_keeps_its_directory_and_its_resolved_settings(tmp_path: Path) -> None:
    directory, config = RunDir(tmp_path / "run"), RunConfig.model_validate({"train": {"steps": 5}})
    with directory.lock():
        directory.claim(config)
    directory.check(config)
    assert directory.config() == config
    assert sorted(p.name for p in directory.path.iterdir()) == ["config.json", "run.json"]


def test_another_run_is_refused_by_the_settings_that_differ(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    directory.claim(RunConfig.model_validate({"train": {"steps": 5}}))
    directory.check(RunConfig.model_validate({"train": {"steps": 5}, "launch": {"ranks": 7}, "run": {"log_every": 3}}))
    with pytest.raises(ConfigError, match="holds another run: run.seed was 0, is 4; train.steps was 5, is 6"):
        directory.check(RunConfig.model_validate({"train": {"steps": 6}, "run": {"seed": 4}}))


def test_a_directory_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty and holds no sparktrain run"):
        RunDir(tmp_path).check(RunConfig())
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be made"), RunDir(tmp_path / "file" / "run").lock():
        pass


def test_a_second_start_is_told_who_holds_the_run(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    mine = f"in use by process {os.getpid()} on .* since 20"
    with directory.lock(), pytest.raises(RunDirBusy, match=mine), RunDir(tmp_path / "run").lock():
        pass
    assert not directory.path.exists()  # nothing was written, so nothing is left


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=lambda: None)
    child.start()
    child.join()
    with RunDir(tmp_path).lock():
        pass
    tmp_path.mkdir(exist_ok=True)
    mine = {"host": os.uname().nodename, "pid": child.pid, "since": "then"}
    (tmp_path / "LOCK").write_text(json.dumps(mine))
    with RunDir(tmp_path).lock():
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "LOCK").write_text(json.dumps(mine | {"host": "elsewhere"}))
    with pytest.raises(RunDirBusy, match="on elsewhere"), RunDir(tmp_path).lock():
        pass


def test_a_lock_that_says_nothing_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "LOCK").write_text("")
    with pytest.raises(RunDirBusy, match="by process unknown on an unknown host"), RunDir(tmp_path).lock():
        pass
    assert (tmp_path / "LOCK").read_text() == ""


def test_of_starts_at_once_over_a_dead_lock_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gone = context.Process(target=lambda: None)
    gone.start()
    gone.join()
    (tmp_path / "LOCK").write_text(json.dumps({"host": os.uname().nodename, "pid": gone.pid, "since": "then"}))
    queue, release = context.Queue(), context.Event()

    def start() -> None:
        try:
            with RunDir(tmp_path).lock():
                queue.put("won")
                release.wait(30)
        except RunDirBusy:
            queue.put("busy")

    children = [context.Process(target=start) for _ in range(6)]
    for child in children:
        child.start()
    assert sorted(queue.get(timeout=30) for _ in children) == ["busy"] * 5 + ["won"]
    release.set()
    for child in children:
        child.join()


def test_attempts_started_at_once_get_different_numbers(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=lambda: queue.put(RunDir(tmp_path).new_generation())) for _ in range(8)]
    for child in children:
        child.start()
    numbers = sorted(queue.get(timeout=30) for _ in children)
    for child in children:
        child.join()
    assert numbers == list(range(1, 9))
    assert RunDir(tmp_path).latest_generation() == 8


def test_a_directory_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        RunDir(tmp_path).config()


def test_what_a_start_that_was_killed_leaves_is_no_other_run(tmp_path: Path) -> None:
    for name in (".probe-0", ".run.json.0123.tmp", ".LOCK.4567.tmp"):
        (tmp_path / name).touch()
    directory = RunDir(tmp_path)
    with directory.lock():
        directory.check(RunConfig())
        directory.claim(RunConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "nonsense", '{"pid": "x", "host": "h", "since": 0}'])
def test_files_that_are_none_are_told_in_one_line(tmp_path: Path, text: str) -> None:
    directory = RunDir(tmp_path)
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.dir .* has a run\.json that is none"):
        directory.check(RunConfig())
    assert directory.plan_spec() is None


def test_what_a_killed_process_had_half_written_is_swept(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    attempt = directory.generation(directory.new_generation())
    halves = [attempt / ".rank-00001.pickle.0123.tmp", attempt / "pulse-00001.tmp"]
    for half in halves:
        half.write_bytes(b"half")
    directory.new_generation()
    assert attempt.is_dir()
    assert not any(half.exists() for half in halves)
