"""Bad inputs, one file per kind of thing that is wrong, as rows of tables that tests/test_bad_input.py goes through."""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.conftest import tiny_argv


@dataclass(frozen=True)
class Given:
    """What is there before a case makes its mistake: all of it whole, to be copied and damaged."""

    data: Path
    """``train`` and ``heldout`` shards."""
    model: Callable[[], Path]
    """A trained model's directory, made when it is first asked for."""
    run: Callable[[], Path]
    """A run that is finished, with a plan and three checkpoints."""


@dataclass
class Place:
    """Where a case happens: ``inputs`` (what a user has), ``cwd``, ``run`` and ``out`` below ``root``."""

    root: Path
    given: Given
    leave: contextlib.ExitStack
    stdin: str = ""

    def __post_init__(self) -> None:
        for name in ("inputs", "cwd", "tmp"):
            (self.root / name).mkdir()

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def cwd(self) -> Path:
        return self.root / "cwd"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @cached_property
    def data(self) -> Path:
        """A copy of the data."""
        return Path(shutil.copytree(self.given.data, self.inputs / "data"))

    @property
    def train_dir(self) -> Path:
        return self.data / "train"

    def model(self, name: str = "model") -> Path:
        """A copy of the model."""
        return Path(shutil.copytree(self.given.model(), self.inputs / name))

    def finished(self) -> Path:
        """A copy of the finished run, as this place's run directory."""
        return Path(shutil.copytree(self.given.run(), self.run))

    def file(self, name: str, content: str | bytes) -> Path:
        """A new input file."""
        path = self.inputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def train(self, *more: str) -> list[str]:
        """Arguments of jobs/train.py on data that is whole."""
        return tiny_argv(self.given.data, self.run, *more)


@dataclass(frozen=True)
class Case:
    """One mistake.

    Args:
        name: unique among all.
        make: makes the mistake at a place; returns the job's arguments.
        code: the exit code that it must have.
        message: regular expression that the line must match.
        job: a file of jobs/, or ``worker``.
        environment: variables, while it runs.
        conf: Spark settings, while it runs.
        apart: run it in a process of its own.
    """

    name: str
    make: Callable[[Place], list[str]]
    code: int
    message: str
    job: str = "train"
    environment: dict[str, str] = field(default_factory=dict)
    conf: dict[str, str] = field(default_factory=dict)
    apart: bool = False


def flags(*more: str) -> Callable[[Place], list[str]]:
    """jobs/train.py with these besides what it needs."""
    return lambda place: place.train(*more)


def toml(text: str | bytes, *more: str) -> Callable[[Place], list[str]]:
    """jobs/train.py with a file of settings."""
    return lambda place: [str(place.file("c.toml", text)), *more]


def swap(argv: list[str], flag: str, value: str) -> list[str]:
    """``argv`` with another value of a flag, where one more would be added to it."""
    at = argv.index(flag) + 1
    return [*argv[:at], value, *argv[at + 1 :]]


def damaged(change: Callable[[Path], Any], *more: str) -> Callable[[Place], list[str]]:
    """jobs/train.py on training shards after ``change``."""

    def make(place: Place) -> list[str]:
        change(place.train_dir)
        return tiny_argv(place.data, place.run, *more)

    return make


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file's content."""
    content = path.read_bytes()
    os.unlink(path)  # it may be a link
    path.write_bytes(change(content))
