"""Run directories that cannot be gone on with or verified, and machines on which nothing can run."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sparktrain.checkpoints import name_of
from tests.cases import Case, Place, edit, flags

Change = Callable[[Path], Any]
PLAN = "plan/part-0.parquet"
RECORDS = "gen/000001/records-00001-000000004.parquet"


class Malicious:
    """Runs a command in whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def planted(run: Path) -> None:
    (run / "gen" / "000001" / "rank-00001.pickle").write_bytes(pickle.dumps(Malicious(run / "executed")))


def written(name: str, content: str | bytes) -> Change:
    def change(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def changed(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda run: edit(run / name, change)


def removed(name: str) -> Change:
    return lambda run: (run / name).unlink()


def rows(change: Callable[[Any], Any]) -> Change:
    """The plan's table after ``change``."""
    return lambda run: pq.write_table(change(pq.read_table(run / PLAN)), run / PLAN)


def doubled(table: Any) -> Any:
    return table.take([0, 0, *range(2, table.num_rows)])


def start(change: Change, *more: str) -> Callable[[Place], list[str]]:
    """jobs/train.py on a run directory that holds only what ``change`` makes."""

    def make(place: Place) -> list[str]:
        change(place.run)
        return place.train(*more)

    return make


def again(change: Change, *more: str) -> Callable[[Place], list[str]]:
    """jobs/train.py on a run that was finished, after ``change``."""

    def make(place: Place) -> list[str]:
        change(place.finished())
        return place.train("--checkpoint.every", "2", *more)

    return make


def verified(change: Change) -> Callable[[Place], list[str]]:
    """jobs/verify.py on a run that was finished, after ``change``."""

    def make(place: Place) -> list[str]:
        change(place.finished())
        return [str(place.run)]

    return make


def nothing(run: Path) -> None:
    """All is well with the run."""


def holder(**values: Any) -> Change:
    owner = {"host": "node7", "pid": 12, "since": "2026-01-01T00:00:00+00:00"} | values
    return written("LOCK", json.dumps(owner))


WRONG = "[1-5] of 5 checks found something wrong, see the lines above"
START = [
    Case("run.dir is a file", start(lambda run: run.write_text("x")), 2, "run.dir .*run cannot be made|is a file"),
    Case("run.dir below a file", flags("--run.dir", f"{__file__}/x"), 2, "run.dir .* cannot be made: .*; choose anoth"),
    Case("run.dir cannot be made", flags("--run.dir", "/proc/none/x"), 2, "run.dir /proc/none/x cannot be made: "),
    Case("run.dir's name too long", flags("--run.dir", "x" * 5000), 2, "run.dir .*xxx cannot be made: File name too l"),
    Case("run.dir holds other things", start(written("novel.txt", "x")), 2, "is not empty and holds no sparktrain run"),
    Case(
        "run.dir in use", start(holder()), 5, "is in use by process 12 on node7 since 2026-01-01.*taken over after 60 s"
    ),
    Case("run.dir in use by us", start(holder(host=os.uname().nodename, pid=os.getpid())), 5, "is in use by process "),
    Case("lock of nobody", start(written("LOCK", "")), 5, "is in use by process unknown on an unknown host"),
    Case("run.json torn", again(changed("run.json", lambda c: c[:20])), 2, "has a run.json that is none: choose anot"),
    Case("run.json of a list", again(written("run.json", "[]")), 2, "has a run.json that is none: choose another"),
    Case("run.json a bomb", again(written("run.json", "[" * 100_000)), 2, "has a run.json that is none: choose anothe"),
    Case(
        "run of a newer sparktrain",
        again(changed("run.json", lambda c: c.replace(b'"format": 1', b'"format": 2'))),
        2,
        "has format 2, this sparktrain writes 1: choose another run.dir",
    ),
    Case(
        "another seed", again(nothing, "--run.seed", "6"), 2, "holds another run: run.seed was 5, is 6: choose another"
    ),
    Case("another batch", again(nothing, "--train.total-batch", "16"), 2, "train.total_batch was 8, is 16: choose ano"),
    Case("another strategy", again(nothing, "--strategy.kind", "distro"), 2, "holds another run: strategy"),
    Case("another length", again(nothing, "--train.steps", "9"), 2, "holds another run: train.steps was 6, is 9"),
    Case(
        "a planted pickle",
        again(planted),
        7,
        "rank-00001.pickle was refused: it names posix.system, which is no result type; nothing of it was run",
    ),
    Case("a rank's file of nothing", again(written("gen/000001/rank-00001.pickle", "")), 7, "rank-00001.pickle was re"),
    Case(
        "a rank's file of another",
        again(lambda run: os.replace(run / "gen/000001/rank-00000.pickle", run / "gen/000001/rank-00001.pickle")),
        7,
        "is that of rank 0: remove it",
    ),
    Case("a rank's file torn", again(changed("gen/000001/rank-00001.pickle", lambda c: c[:-9])), 7, "was refused"),
]

VERIFY = [
    Case("no such run", lambda p: ["nowhere"], 2, "nowhere is no run directory: it has no config.json", "verify"),
    Case("no run", lambda p: [], 2, "run_dir: field required", "verify"),
    Case("two runs", lambda p: ["a", "b"], 2, "unrecognized arguments|unknown|found b", "verify"),
    Case("config torn", verified(changed("config.json", lambda c: c[:40])), 2, "config.json", "verify"),
    Case(
        "config of another version",
        verified(changed("config.json", lambda c: c.replace(b"train", b"trane"))),
        2,
        "config.json",
        "verify",
    ),
    *(
        Case(name, verified(change), 3, WRONG, "verify")
        for name, change in [
            ("plan.json gone", removed("plan.json")),
            (
                "a checkpoint of another run",
                changed(f"checkpoints/{name_of(6, 1)}.json", lambda c: re.sub(rb'"run_id": "\w', b'"run_id": "z', c)),
            ),
            (
                "a checkpoint beyond the plan's end",
                changed(f"checkpoints/{name_of(6, 1)}.json", lambda c: c.replace(b'"step": 6', b'"step": 7')),
            ),
            ("plan.json torn", changed("plan.json", lambda c: c[:40])),
            ("plan.json of another seed", changed("plan.json", lambda c: c.replace(b'"seed": 5', b'"seed": 6'))),
            ("plan's file torn", changed(PLAN, lambda c: c[:-9])),
            ("plan's file of nothing", written(PLAN, "")),
            ("a row deleted", rows(lambda table: table.slice(1))),
            ("a row doubled", rows(doubled)),
            (
                "two rows swapped",
                rows(lambda t: t.set_column(4, t.schema.field(4), t.column(4).take([1, 0, *range(2, t.num_rows)]))),
            ),
            ("a column missing", rows(lambda table: table.drop(["start"]))),
            (
                "a checkpoint's part changed",
                changed(f"checkpoints/{name_of(4, 1)}/rank-00001.safetensors", lambda c: c[:-1] + b"x"),
            ),
            (
                "a checkpoint's part torn",
                changed(f"checkpoints/{name_of(4, 1)}/rank-00001.safetensors", lambda c: c[:-1]),
            ),
            ("a checkpoint's part gone", removed(f"checkpoints/{name_of(6, 1)}/rank-00000.safetensors")),
            ("a manifest of nothing", written(f"checkpoints/{name_of(4, 1)}.json", "{}")),
            (
                "a manifest whose parts lead out",
                changed(
                    f"checkpoints/{name_of(2, 1)}.json",
                    lambda c: re.sub(rb'"checkpoints/[^"]*rank-00000', b'"../../elsewhere', c),
                ),
            ),
            ("steps gone", removed(RECORDS)),
            ("steps torn", changed(RECORDS, lambda c: c[:-9])),
            ("a rank's file torn", changed("gen/000001/rank-00001.pickle", lambda c: c[:-9])),
            ("a planted pickle", planted),
        ]
    ),
]


def java(said: str) -> Callable[[Place], list[str]]:
    """jobs/train.py where JAVA_HOME has a program that says so of its version."""

    def make(place: Place) -> list[str]:
        place.file("java/bin/java", f"#!/bin/sh\necho '{said}' >&2\n").chmod(0o755)
        return place.train()

    return make


HOME = {"JAVA_HOME": "../inputs/java"}
MACHINE = [
    Case(
        "no Java",
        flags(),
        2,
        "Spark needs Java 17 or newer and none was found at JAVA_HOME: install it",
        apart=True,
        environment={"JAVA_HOME": "/nowhere"},
    ),
    Case(
        "Java that is none",
        java("what?"),
        2,
        "needs Java 17 or newer, .*java is not Java",
        apart=True,
        environment=HOME,
    ),
    Case(
        "Java that is old",
        java('openjdk version "11.0.2" 2019-01-15'),
        2,
        "Spark needs Java 17 or newer, .*/bin/java is 11: install it",
        apart=True,
        environment=HOME,
    ),
    Case(
        "rank of no run",
        lambda p: ["nowhere"],
        2,
        "nowhere is no run directory: it has no config.json",
        "worker",
        apart=True,
    ),
    Case("rank without a run", lambda p: [], 2, "give a run directory", "worker", apart=True),
    Case(
        "rank without a plan",
        lambda p: (os.unlink(p.finished() / "plan.json"), [str(p.run)])[1],
        2,
        "has no plan: start the run with jobs/train.py",
        "worker",
        apart=True,
    ),
    Case(
        "rank of a torn config",
        lambda p: (edit(p.finished() / "config.json", lambda c: c[:40]), [str(p.run)])[1],
        2,
        "config.json",
        "worker",
        apart=True,
    ),
    Case(
        "rank in words",
        lambda p: [str(p.finished())],
        2,
        "RANK is 'two': expected a whole number",
        "worker",
        apart=True,
        environment={"RANK": "two"},
    ),
    Case(
        "failpoint",
        lambda p: [str(p.finished())],
        2,
        "SPARKTRAIN_FAILPOINT: failpoint 'nowhere:kill' is none",
        "worker",
        apart=True,
        environment={"SPARKTRAIN_FAILPOINT": "nowhere:kill"},
    ),
]

CASES = [*START, *VERIFY, *MACHINE]
