"""A user's mistake is one line that names the thing and says what to do, an exit code, and nothing left behind.

One test for all of them; what is wrong is a row of a table below tests/cases.
"""

import contextlib
import hashlib
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sparktrain import cli
from sparktrain.errors import ConfigError
from tests.cases import Case, Given, Place, made, models, runs, settings, shards, texts
from tests.conftest import ROOT

CASES = [*settings.CASES, *shards.CASES, *models.CASES, *runs.CASES, *texts.CASES]
# Spark's, whatever we do.
_NOT_OURS = re.compile(r"WARN|Stage|Setting default log level|adjust logging level")


@pytest.fixture(scope="module")
def given(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Made when they are first asked for, once."""
    root, there = tmp_path_factory.mktemp("given"), {}

    def once(name: str, make: Callable[[Path], None]) -> Callable[[], Path]:
        def ask() -> Path:
            if name not in there:
                there[name] = root / name
                make(there[name])
            return there[name]

        return ask

    return Given(data, once("model", made.model), once("run", lambda path: made.run(path, data)))


@pytest.fixture
def place(given: Given, tmp_path: Path) -> Iterator[Place]:
    with contextlib.ExitStack() as leave:
        yield Place(tmp_path, given, leave)


@pytest.fixture
def conf(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], None]]:
    """Set Spark settings that a session normally has from its start, for one test."""
    changed: list[str] = []
    case = request.node.callspec.params["case"]
    if case.apart or case.job not in ("train", "tokenize") or case in (*settings.FILES, *settings.ARGUMENTS):
        yield lambda key, value: None
        return
    spark = request.getfixturevalue("spark")
    spark.conf.set("spark.sql.legacy.setCommandRejectsSparkCoreConfs", "false")

    def set_(key: str, value: str) -> None:
        spark.conf.set(key, value)
        changed.append(key)

    yield set_
    for key in [*changed, "spark.sql.legacy.setCommandRejectsSparkCoreConfs"]:
        spark.conf.unset(key)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.job}: {case.name}")
def test_a_mistake_is_one_line_and_changes_nothing(
    case: Case, place: Place, conf: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = case.make(place)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    for name, value in case.conf.items():
        conf(name, value)
    monkeypatch.chdir(place.cwd)
    monkeypatch.setattr(tempfile, "tempdir", str(place.root / "tmp"))
    before = snapshot(place)
    capfd.readouterr()
    if case.apart:
        code, out, err = in_a_process(case.job, argv, place)
    else:
        code = in_this_process(case.job, argv, place, monkeypatch)
        out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not _NOT_OURS.search(line)]
    assert len(lines) == 1, err or out
    assert lines[0].startswith("error: "), lines
    assert re.search(case.message, lines[0]), lines[0]
    assert code == case.code, lines[0]
    assert "Traceback" not in out
    assert "hunter2" not in out + err  # a secret in all cases that have one
    assert snapshot(place) == before


def test_the_debug_flag_shows_where_it_went_wrong(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml does not exist"):
        cli.main(runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"], ["nowhere.toml", "--debug"])
    monkeypatch.setenv("SPARKTRAIN_DEBUG", "1")
    with pytest.raises(ConfigError, match="nowhere.toml does not exist"):
        cli.main(runpy.run_path(str(ROOT / "jobs" / "train.py"))["main"], ["nowhere.toml"])
    assert capfd.readouterr().err == ""


def test_there_are_a_hundred_mistakes_and_each_has_a_name() -> None:
    names = [f"{case.job}: {case.name}" for case in CASES]
    assert len(names) == len(set(names)) >= 100


def in_this_process(job: str, argv: list[str], place: Place, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a job's own main, as it would be of the job."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(place.stdin))
    if job == "worker":
        monkeypatch.setattr(sys, "argv", ["worker", *argv])
        run = partial(runpy.run_module, "sparktrain.worker", run_name="__main__")
    else:
        run = partial(cli.main, runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"], argv)
    with pytest.raises(SystemExit) as exit_:
        run()
    return int(exit_.value.code or 0)


def in_a_process(job: str, argv: list[str], place: Place) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a job."""
    program = ["-m", "sparktrain.worker"] if job == "worker" else [str(ROOT / "jobs" / f"{job}.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(place.root / "tmp")}
    command = [sys.executable, *program, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=place.cwd, check=False)
    return done.returncode, done.stdout, done.stderr


def snapshot(place: Place) -> dict[str, tuple[Any, ...]]:
    """Everything a job could write to by mistake: kind, time of the last change, content. The run directory's own time
    changes with the lock that is in it meanwhile."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in (path for root in (place.root, place.given.data) for path in root.rglob("*")):
        changed = path.lstat().st_mtime_ns if path != place.run else 0
        if path.is_symlink():
            found[str(path)] = ("link", os.readlink(path))
        elif path.is_file():
            found[str(path)] = ("file", changed, hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            found[str(path)] = ("other", changed, oct(path.lstat().st_mode))
    return found
