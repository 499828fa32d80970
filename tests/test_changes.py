"""Settings that change while a run goes on: who may change what, and that the run is still one that can be repeated."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparktrain import cli
from sparktrain.changes import Change, Changes, changed
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.spark import driver
from tests.conftest import tiny_argv
from tests.test_checkpoint import losses, start

__all__ = ["start"]  # a fixture

Start = Callable[..., RunResult | None]


def with_(**values: Any) -> RunConfig:
    return changed(RunConfig(), [Change("", "hot", {key.replace("__", "."): value for key, value in values.items()})])


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("hot", {"optimizer__lr": 1e-4, "schedule__kind": "constant", "train__max_grad_norm": 0.5}),
        ("warm", {"optimizer__lr": 1e-4, "optimizer__betas": [0.8, 0.9]}),
        ("cold", {"train__micro_batch": 4}),
    ],
)
def test_a_change_is_of_the_kind_that_its_settings_need(tmp_path: Path, kind: Any, values: dict[str, Any]) -> None:
    changes = Changes(tmp_path)
    wrong: Any = {"hot": "warm", "warm": "hot", "cold": "warm"}[kind]
    with pytest.raises(ConfigError, match=f"is {kind}, the change was said to be {wrong}: say --kind {kind}"):
        changes.ask(wrong, RunConfig(), with_(**values))
    changes.ask(kind, RunConfig(), with_(**values))
    (waiting,) = changes.all()
    assert changed(RunConfig(), [waiting]) == with_(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train__total_batch": 128}, "train.total_batch cannot change, it is part of what this run is: start another"),
        ({"data__path": ["elsewhere"]}, "data.path cannot change"),
        ({"launch__ranks": 3}, "launch.ranks is read when a run starts: touch STOP .* again with --launch.ranks"),
        ({}, "nothing changes: give a setting with another value"),
    ],
)
def test_what_makes_the_run_cannot_change(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Changes(tmp_path).ask("cold", RunConfig(), with_(**values))
    assert not list(tmp_path.iterdir())


def test_changes_count_in_the_order_in_which_they_were_taken(tmp_path: Path) -> None:
    changes = Changes(tmp_path)
    changes.ask("hot", RunConfig(), with_(optimizer__lr=1e-4))
    (first,) = changes.take(40)
    # The attempt that took it died; the next one begins before, and there is one change more.
    changes.ask("hot", with_(optimizer__lr=1e-4), with_(optimizer__lr=2e-4))
    assert [(c.step, c.values["optimizer.lr"]) for c in changes.take(20)] == [(40, 1e-4), (40, 2e-4)]
    assert changes.take(60)[0] == first
    assert changes.describe()[1] == "changed    optimizer.lr is 0.0002 from step 41 on"


CHANGES = {
    "adamw": ("warm", {"optimizer.betas": [0.5, 0.6], "optimizer.weight_decay": 1.0}),
    "distro": ("warm", {"strategy.compression_decay": 0.5, "optimizer.weight_decay": 1.0}),
    "diloco": ("warm", {"optimizer.betas": [0.5, 0.6], "strategy.outer_lr": 0.3}),
    "sparseloco": ("warm", {"optimizer.betas": [0.5, 0.6], "strategy.outer_lr": 0.3, "strategy.error_decay": 0.1}),
    "hot": ("hot", {"optimizer.lr": 1e-5, "schedule.kind": "constant", "train.max_grad_norm": 1e-3}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_is_interrupted_after_a_change_ends_as_one_that_was_not(
    start: Start, tmp_path: Path, name: str
) -> None:
    kind, values = CHANGES[name]
    flags = ["--strategy.kind", "adamw" if name == "hot" else name, "--checkpoint.every", "1"]
    if name in ("diloco", "sparseloco"):
        flags += ["--strategy.sync-every", "2"]
    if name == "diloco":
        flags += ["--strategy.outer", "sgd"]
    for run in ("whole", "broken"):
        (tmp_path / run / "changes").mkdir(parents=True)
    # From step 2 on, known beforehand; and taken at the start of an attempt that goes on with step 2.
    change = Change("20260101T000000.000000-00000000", kind, values, 2)
    (tmp_path / "whole/changes/taken.json").write_text(json.dumps([vars(change)]))
    for file in ("whole", "broken"):
        content = json.dumps({"kind": kind, "values": values})
        (tmp_path / file / f"changes/{change.name}.json").write_text(content) if file == "whole" else None
    unchanged = start(tmp_path / "unchanged", 2, *flags)
    whole = start(tmp_path / "whole", 2, *flags)
    assert start(tmp_path / "broken", 2, *flags, stop_at=2) is None
    (tmp_path / f"broken/changes/{change.name}.json").write_text(json.dumps({"kind": kind, "values": values}))
    assert start(tmp_path / "broken", 2, *flags, stop_at=4) is None
    broken = start(tmp_path / "broken", 2, *flags)
    assert whole is not None
    assert broken is not None
    assert Changes(tmp_path / "broken").taken() == [change]
    assert (broken.digest, losses(broken)) == (whole.digest, losses(whole))
    assert losses(whole)[:2] == losses(unchanged)[:2]
    assert unchanged is not None
    assert whole.digest != unchanged.digest


def test_a_change_is_taken_by_a_run_that_runs(start: Start, tmp_path: Path) -> None:
    name = "20260101T000000.000000-00000000"
    (tmp_path / "changes").mkdir()
    content = json.dumps({"kind": "hot", "values": {"optimizer.lr": 1e-5, "schedule.kind": "constant"}})
    result = start(tmp_path, 2, ask=(f"changes/{name}.json", 2, content))
    assert result is not None
    (taken,) = Changes(tmp_path).taken()
    lr = result.table["lr"].to_pylist()
    assert taken.step == 4  # asked after step 2, all ranks agree on it in step 3
    assert lr[4:] == [1e-5, 1e-5]
    assert min(lr[:4]) > 1e-5


def test_a_cold_change_starts_ranks_again_and_a_finished_run_takes_none(
    spark: Any, job: Callable[..., tuple[int, str, str]], data: Path, tmp_path: Path, capfd: Any
) -> None:
    argv = tiny_argv(
        data, tmp_path / "run", "--train.steps", "300", "--run.log-every", "100", "--checkpoint.every", "5"
    )
    config, directory = cli.parse(RunConfig, argv), RunDir(tmp_path / "run")

    def ask() -> None:
        while not directory.checkpoints.latest_step():
            time.sleep(0.05)
        now = directory.config()
        Changes(directory.path).ask("cold", now, changed(now, [Change("", "cold", {"train.micro_batch": 2})]))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    result = driver.run(spark, config)
    asking.join()
    (change,) = Changes(directory.path).taken()
    step = change.step or 0
    assert 5 < step < 300
    assert directory.latest_generation() == 2
    assert result.ranks[0].resumed_from == f"{step:09d}-g000001"
    assert f"settings changed after step {step}: ranks start again" in capfd.readouterr().out
    code, _, err = job("change", str(directory.path), "--kind", "hot", "--optimizer.lr", "1e-4")
    assert (code, err) == (2, f"error: {directory.path} holds a finished run: nothing in it can change\n")


def test_the_job_says_what_it_changes_and_what_it_was_not_told(
    job: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(RunConfig().model_dump_json())
    code, out, _ = job("change", str(tmp_path), "--kind", "hot", "--optimizer.lr", "1e-4")
    assert (code, out) == (0, "optimizer.lr will be 0.0001\n")
    for argv, message in [
        (("--kind", "hot", "--optimizer.lr", "1e-4"), "nothing changes"),
        (("--kind", "hot", "--optimizer.lr", "-1"), "optimizer.lr"),
        (("--kind", "tepid", "--optimizer.lr", "1e-3"), "kind"),
        (("--optimizer.lr", "1e-3"), "kind"),
        (("--kind", "hot", "--train.steps", "7"), "train.steps cannot change"),
    ]:
        code, out, err = job("change", str(tmp_path), *argv)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    code, _, err = job("change", str(tmp_path / "none"), "--kind", "hot", "--optimizer.lr", "1e-4")
    assert (code, "is no run directory" in err) == (2, True)
