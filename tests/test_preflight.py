"""Preflight: what the cluster cannot do is said before anything starts, with the setting to change."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktrain import cli
from sparktrain.config import Data, RunConfig
from sparktrain.errors import ConfigError, DataError, LaunchError
from sparktrain.spark import preflight, sanity
from tests.conftest import tiny_argv


@pytest.fixture
def conf(spark: Any) -> Iterator[Any]:
    """Set Spark settings that a session normally has from its start, for one test."""
    changed = []
    spark.conf.set("spark.sql.legacy.setCommandRejectsSparkCoreConfs", "false")

    def set_(key: str, value: str) -> None:
        spark.conf.set(key, value)
        changed.append(key)

    yield set_
    for key in changed:
        spark.conf.unset(key)
    spark.conf.unset("spark.sql.legacy.setCommandRejectsSparkCoreConfs")


def test_auto_is_decided_by_the_master_and_written_down(spark: Any, conf: Any, data: Path, tmp_path: Path) -> None:
    config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run"))
    local = preflight.resolve(spark, config)
    assert (local.launch.mode, local.launch.ranks) == ("local", 2)
    assert local.data.path == (str(data / "train"),)
    conf("spark.task.cpus", "3")
    stage = preflight.resolve(
        spark, cli.parse(RunConfig, tiny_argv(data, tmp_path / "run", "--launch.mode", "executors"))
    )
    assert (stage.launch.mode, stage.launch.ranks, stage.launch.threads) == ("executors", 2, 3)


@pytest.mark.parametrize("mode", ["local", "executors"])
def test_executors_report_in_seconds_and_leave_nothing(spark: Any, data: Path, tmp_path: Path, mode: str) -> None:
    config = preflight.resolve(spark, cli.parse(RunConfig, tiny_argv(data, tmp_path, "--launch.mode", mode)))
    began = time.monotonic()
    model = preflight.check_executors(spark, config, [str(data / "train")])
    assert time.monotonic() - began < 60  # on a loaded machine; about 6 s alone
    assert model["vocab_size"] == 512
    assert list(tmp_path.iterdir()) == []


def test_executors_that_differ_are_named() -> None:
    packages = dict.fromkeys(("torch", "transformers", "numpy", "pyarrow", "pyspark"), "1") | {"sparktrain": "0.1.0"}
    report = {"node": 0, "host": "a", "python": "3.11.7", "packages": packages}
    other = report | {"node": 1, "host": "b", "packages": packages | {"torch": "2"}}
    with pytest.raises(LaunchError, match="executor b has torch 2, executor a has 1"):
        sanity.check_versions([report, other])
    with pytest.raises(LaunchError, match="executor b lacks torch"):
        sanity.check_versions([report, other | {"packages": packages | {"torch": "missing"}}])
    with pytest.raises(LaunchError, match="executor b has sparktrain 9, the driver"):
        sanity.check_versions([report, other | {"packages": packages | {"sparktrain": "9"}}])


def test_places_are_resolved_and_mirrors_must_be_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = "https://a.org/d/train"
    found = preflight._absolute(Data(path=("d", uri), cache_dir=Path("c")))
    assert found == {"path": [str(tmp_path / "d"), uri], "cache_dir": str(tmp_path / "c")}
    mirrors = ("https://a.org/d", "https://b.org/d")
    assert preflight._absolute(Data(path=(uri,), mirrors=mirrors))["mirrors"] == list(mirrors)
    with pytest.raises(ConfigError, match="no mirrors for data.path https://a.org/d2: give two roots or more"):
        preflight._absolute(Data(path=("https://a.org/d2",), mirrors=mirrors))
    with pytest.raises(DataError, match="gopher://h/d has the scheme gopher://, which is unknown"):
        preflight._absolute(Data(path=("gopher://h/d",)))
