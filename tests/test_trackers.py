"""Trackers: what MLflow's and TensorBoard's own readers find of a run, and that none of them stops one."""

import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError
from sparktrain.pulse import Stretch
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.spark import driver, trackers
from tests.conftest import tiny_argv
from tests.test_results import rank_result, record

BOTH = ("--run.trackers", "mlflow,tensorboard")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real MLflow store of this file's own."""
    directory = tmp_path_factory.mktemp("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{directory / 'mlflow.db'}")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("tests", str(directory / "artifacts")))
    return directory


@pytest.fixture(scope="module")
def tracked(spark: Any, data: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, str]:
    """A finished run among others of a comparison, whose MLflow run's id comes with it."""
    run_dir = tmp_path_factory.mktemp("runs") / "tracked"
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(run_dir.parent / "tokenizer.json"))
    argv = tiny_argv(data, run_dir, *BOTH, "--data.heldout", str(data / "heldout"), "--train.steps", "30")
    argv += ["--model.tokenizer", str(run_dir.parent)]
    with trackers.together(["mlflow"], run_dir.parent / "comparison"):
        result = driver.run(spark, cli.parse(RunConfig, argv))
        parent = mlflow.active_run()
    assert parent is not None
    return result, parent.info.run_id


def test_mlflow_has_parameters_curves_tables_and_a_model_that_writes(tracked: tuple[RunResult, str]) -> None:
    result, parent = tracked
    (run,) = mlflow.search_runs(filter_string=f"tags.mlflow.parentRunId = '{parent}'", output_format="list")
    assert mlflow.get_run(parent).info.status == "FINISHED"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tracked")
    assert (run.data.params["train.steps"], run.data.params["strategy.kind"]) == ("30", "adamw")
    assert run.data.params["model.sizes.hidden_size"] == "64"
    assert run.data.metrics["final.heldout_loss_after"] == result.ranks[0].heldout_after
    client = mlflow.MlflowClient()
    losses = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss")}
    ends = sorted(losses)
    assert ends[-1] == 30
    for begin, end in zip([0, *ends], ends, strict=False):  # each point is the mean of the steps since the last
        assert losses[end] == pytest.approx(np.mean(result.metrics["loss"][begin:end]))
    table = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="metrics.parquet")
    assert pq.read_table(table).num_rows == 2 * 30
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    assert [p.name for p in model.metadata.signature.params] == ["max_new_tokens", "temperature"]
    (text,) = model.predict(["w3 w4"], params={"max_new_tokens": 5})
    assert text.startswith("w3 w4 ")
    assert len(text.split()) == 7


def test_tensorboard_has_the_same_curves(tracked: tuple[RunResult, str]) -> None:
    result, _ = tracked
    events = EventAccumulator(str(Path(result.run_dir) / "tensorboard")).Reload()
    loss = events.Scalars("loss")
    assert loss[-1].step == 30
    assert [point.value for point in events.Scalars("tokens")][-1] == 30 * 8 * 32
    before, after = (point.value for point in events.Scalars("heldout_loss"))
    assert (before, after) == pytest.approx((result.ranks[0].heldout_before, result.ranks[0].heldout_after))


def test_a_run_that_goes_on_is_the_same_run_to_mlflow(data: Path, store: Path, tmp_path: Path) -> None:
    argv = tiny_argv(data, tmp_path / "again", "--run.trackers", "mlflow")
    directory, config = RunDir(tmp_path / "again"), cli.parse(RunConfig, argv)
    directory.path.mkdir()
    directory.claim(config)
    with pytest.raises(KeyboardInterrupt), trackers.tracking(config, directory):
        raise KeyboardInterrupt
    query = f"tags.`sparktrain.run_id` = '{directory.run_id()}'"
    (run,) = mlflow.search_runs(filter_string=query, output_format="list")
    assert run.info.status == "KILLED"
    others = cli.parse(RunConfig, [*argv, "--launch.max-restarts", "1"])
    with pytest.raises(ConfigError), trackers.tracking(others, directory):
        raise ConfigError("train.steps is wrong")
    (run,) = mlflow.search_runs(filter_string=query, output_format="list")
    assert run.info.status == "FAILED"
    assert run.data.params["launch.max_restarts"] == "3"
    assert run.data.tags["sparktrain.error"] == "ConfigError: train.steps is wrong"


def test_a_tracker_whose_server_is_away_costs_one_line(
    data: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("http://127.0.0.1:1")
    try:
        config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run", *BOTH))
        directory = RunDir(tmp_path / "run")
        directory.path.mkdir()
        directory.claim(config)
        with trackers.together(["mlflow"], tmp_path), trackers.tracking(config, directory) as tracking:
            for step in (3, 6):
                tracking.log(Stretch(step, 3, 2, 2.0, 0.1, 1.0, 99, 9.0, 0.1, 0.8, 0.1, 8.0, 8.0, 1, "h", 1.0))
            tracking.finish(RunResult(str(directory.path), (rank_result(0, [record(0, 1.0, 1)], world=1),)))
    finally:
        mlflow.set_tracking_uri(before)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2  # one of the comparison, one of its run, however often that is logged
    for line in warnings:
        assert line.startswith("warning: mlflow failed, the run goes on without it: MlflowException: ")
    events = EventAccumulator(str(directory.path / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("loss")] == [3, 6]


@pytest.mark.parametrize("name", ["mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_refused_in_one_line(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as Python says that there is none
    config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run", "--run.trackers", name))
    with pytest.raises(ConfigError, match=rf"pip install 'sparktrain\[{name}\]'"):
        trackers.check(config)


def test_trackers_are_no_part_of_what_makes_it_the_same_run(data: Path, tmp_path: Path) -> None:
    plain = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run"))
    assert cli.parse(RunConfig, tiny_argv(data, tmp_path / "run", *BOTH)).identity() == plain.identity()
