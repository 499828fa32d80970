"""A run whose executor, torchrun, rank and driver are killed ends as if they had not been: tests/chaos.py, shortly."""

from pathlib import Path
from typing import Any

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.rundir import RunDir
from sparktrain.spark import driver
from tests import chaos
from tests.conftest import write_shards


def test_a_run_whose_processes_are_killed_ends_as_if_they_had_not_been(spark: Any, tmp_path: Path, capfd: Any) -> None:
    base = tmp_path / "chaos"
    write_shards(base / "train", tokens=20_000)
    quiet, directory = RunDir(base / "quiet"), RunDir(base / "run")
    undisturbed = driver.run(spark, cli.parse(RunConfig, chaos.argv_of(base, quiet.path, 400, [])))
    victims = ["executor", "torchrun", "driver JVM", "rank"]
    disturbed = chaos.Chaos(chaos.argv_of(base, directory.path, 400, []), directory, victims, (0.5, 1.5), 1)
    disturbed.run()
    assert disturbed.starts == 2, "only a killed driver is to be started again"
    assert list(chaos.differences(directory, undisturbed)) == []
    said = "".join(file.read_text() for file in sorted(base.glob("driver-*.log")))
    assert "executor 0 was lost: " in said or "executor 1 was lost: " in said
    assert "torchrun of task " in said
