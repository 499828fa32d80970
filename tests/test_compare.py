"""Comparing strategies: one table of them all, a front of what is worth its bytes, and runs that go on."""

import csv
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest

from sparktrain import cli
from sparktrain.compare import Compare, Comparison, compare, running
from sparktrain.compare.comparison import Entry
from sparktrain.compare.pictures import pareto_front
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, Diverged, RunDirBusy
from sparktrain.report.figures import png
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.spark import driver
from tests.conftest import ROOT, tiny_argv
from tests.test_report import a_result


def a_comparison(path: Path) -> Comparison:
    """``a`` at two learning rates, of which the second is better; ``b``, worse for a thousandth of the bytes."""
    results = [
        ("a", "adamw", 1e-3, a_result(path / "1", received=1_000_000, floor=3.5)),
        ("a", "adamw", 2e-3, a_result(path / "2", received=1_000_000, floor=3.0)),
        ("b", "distro", 1e-3, a_result(path / "3", received=1000, floor=3.2)),
    ]
    return Comparison(tuple(Entry(name, kind, lr, result, 4) for name, kind, lr, result in results))


def test_a_table_has_a_row_per_run_and_says_which_count(tmp_path: Path) -> None:
    comparison = a_comparison(tmp_path)
    rows = comparison.table.to_pylist()
    assert [(row["strategy"], row["lr"], row["best"]) for row in rows] == [
        ("a", 1e-3, False),
        ("a", 2e-3, True),
        ("b", 1e-3, True),
    ]
    last = rows[2]
    assert last["loss"] == pytest.approx(3.2 + 5 * np.exp(-np.arange(36, 40) / 8).mean())
    assert last["heldout_loss"] == pytest.approx(3.3)
    assert last["tokens_per_second"] == pytest.approx(128 / 0.375)
    assert (last["bytes_received"], last["tokens"], last["ranks"]) == (40_000, 40 * 128, 2)
    assert last["less_than_ring"] == pytest.approx(1000 * 4 / 1000)  # 2 (W-1)/W of 1000 numbers of 4 bytes
    assert last["optimizer_seconds"] == pytest.approx(40 * 0.0625)
    assert comparison.frame["strategy"].tolist() == ["a", "a", "b"]


def test_a_table_is_the_same_in_every_form(tmp_path: Path) -> None:
    comparison = a_comparison(tmp_path)
    comparison.write(tmp_path)
    rows = comparison.table.to_pylist()
    assert pq.read_table(tmp_path / "compare.parquet").to_pylist() == rows
    with open(tmp_path / "compare.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(r["strategy"], float(r["heldout_loss"]), int(r["bytes_sent"])) for r in read] == [
        (r["strategy"], r["heldout_loss"], r["bytes_sent"]) for r in rows
    ]
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.count("*") for line in lines] == [0, 0, 0, 1, 1]
    assert "| 40,000,000 |" in lines[2]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["loss_over_bytes.png", "loss_over_tokens.png"]


def test_one_rank_sends_nothing_and_is_compared_all_the_same(tmp_path: Path) -> None:
    alone = Comparison((Entry("a", "adamw", 1e-3, a_result(tmp_path, world=1, received=0), 4),))
    assert alone.table["less_than_ring"].to_pylist() == [None]
    assert "|        |" not in alone.markdown().splitlines()[0]
    assert png(alone.loss_over_bytes()).startswith(b"\x89PNG")


def test_a_front_is_what_nothing_beats_in_both() -> None:
    points = np.array([[1.0, 2.0, 2.0, 3.0, 4.0, 0.5], [5.0, 4.0, 3.0, 3.0, 1.0, 9.0]])
    assert pareto_front(points).tolist() == [[0.5, 1.0, 2.0, 4.0], [9.0, 5.0, 3.0, 1.0]]
    rng = np.random.default_rng(0)
    many = rng.random((2, 300))
    front = pareto_front(many)
    for cost, loss in many.T:
        assert ((front[0] <= cost) & (front[1] <= loss)).any()
    assert (np.diff(front[0]) > 0).all()
    assert (np.diff(front[1]) < 0).all()


def test_pictures_show_the_best_run_of_each_strategy(tmp_path: Path) -> None:
    comparison = a_comparison(tmp_path)
    tokens, moved = comparison.loss_over_tokens().axes[0], comparison.loss_over_bytes().axes[0]
    assert [t.get_text() for t in tokens.get_legend().get_texts()] == ["a, lr 0.002", "b, lr 0.001"]
    lines = {line.get_label(): line for line in moved.lines}
    assert moved.get_xscale() == "log"
    assert lines["a, lr 0.002"].get_xdata()[-1] == 40_000_000
    assert lines["b, lr 0.001"].get_ydata()[-1] == pytest.approx(3.3)
    front = np.stack(lines["Pareto front"].get_data())
    assert front[0, 0] == 10_000  # b's first point after bytes have come
    assert front[:, -1].tolist() == pytest.approx([40_000_000, 3.1])


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            'strategies = ["adamw", "lion"]',
            "strategies has the kind 'lion': expected one of adamw, distro, diloco",
        ),
        (
            'strategies = [{ kind = "distro", topk = 3 }]',
            "strategies has 'topk' with distro: expected some of",
        ),
        ('strategies = ["adamw", { kind = "adamw", lr = 1e-3 }]', "strategies has 2 of the name adamw: give each anot"),
        ('strategies = [{ kind = "adamw", lr = [] }, 3]', "strategies: input should be an object, found 3"),
        ('strategies = [{ kind = "adamw", name = "../x" }]', "strategies.name: string should match pattern"),
        ('[strategy]\nkind = "adamw"', "unknown key strategy: did you mean strategies?"),
        ("strategies = []", "at least 1 item"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path: Path, toml: str, message: str) -> None:
    (file := tmp_path / "c.toml").write_text(toml)
    with pytest.raises(ConfigError) as caught:
        cli.parse(Compare, [str(file)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_example_is_one_model_under_all_strategies() -> None:
    runs = [run for _, run in cli.parse(Compare, [str(ROOT / "conf" / "compare.toml")]).runs()]
    assert [run.strategy.kind for run in runs] == ["adamw", "distro", "diloco", "sparseloco"]
    assert [run.run.dir.name for run in runs][:2] == ["adamw-lr0.003", "distro-lr0.001"]

    def common(run: RunConfig) -> dict[str, Any]:
        return run.model_dump(exclude={"strategy": True, "optimizer": {"lr"}, "run": {"dir"}})

    assert all(common(run) == common(runs[0]) for run in runs)


def refuse(run: RunConfig) -> RunResult:
    raise AssertionError(run)


def test_a_directory_of_something_else_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    def refused(*argv: str) -> str:
        with pytest.raises((ConfigError, RunDirBusy)) as caught:
            compare(cli.parse(Compare, ["--run.dir", str(tmp_path / "c"), *argv]), refuse)
        return str(caught.value)

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes").touch()
    assert "is not empty and holds no compare: choose another run.dir" in refused()
    (tmp_path / "c" / "notes").unlink()
    with pytest.raises(AssertionError):
        compare(cli.parse(Compare, ["--run.dir", str(tmp_path / "c")]), refuse)
    assert "holds another compare: train.steps was 1000, is 9: choose another run.dir" in refused("--train.steps", "9")
    (tmp_path / "c" / "compare.json").write_text("{")
    assert "has a compare.json that is none" in refused()
    with RunDir(tmp_path / "c").lock():
        assert "is in use by process" in refused()
    (tmp_path / "file").touch()
    assert "cannot be made: Not a directory" in refused("--run.dir", str(tmp_path / "file" / "c"))


def test_strategies_are_compared_and_a_compare_goes_on_where_it_was(
    spark: Any, data: Path, tmp_path: Path, job: Any
) -> None:
    heldout = ("--data.heldout", str(data / "heldout"), "--eval.every", "2", "--checkpoint.every", "0")
    argv = [*tiny_argv(data, tmp_path / "compare"), *heldout, "--data.heldout-sequences", "16"]
    code, out, err = job("compare", *argv, "--strategies", "adamw,distro")
    assert code == 0, err
    directory = tmp_path / "compare"
    rows = pq.read_table(directory / "compare.parquet").to_pylist()
    assert [row["strategy"] for row in rows] == ["adamw", "distro"]
    for row in rows:
        summary = json.loads((Path(row["run_dir"]) / "result.json").read_text())
        assert row["heldout_loss"] == summary["heldout_loss_after"] < summary["heldout_loss_before"]
        assert row["tokens"] == 6 * 8 * 32
    assert rows[0]["less_than_ring"] == pytest.approx(1)
    assert rows[1]["less_than_ring"] > 10
    assert (directory / "compare.md").read_text() in out
    # Again: finished runs are read, and the table is made again.
    (directory / "compare.md").unlink()
    config = cli.parse(Compare, [*argv, "--strategies", "adamw,distro"])
    comparison = compare(config, partial(driver.run, spark))
    assert RunDir(directory / "adamw-lr0.003").latest_generation() == 1
    assert (directory / "compare.md").exists()
    frame = comparison.spark_frame(spark)
    assert [row["strategy"] for row in frame.orderBy("bytes_received").collect()] == ["distro", "adamw"]
    assert dict(frame.dtypes)["less_than_ring"] == "double"
    with pytest.raises(
        ConfigError, match=r"distro-lr0\.003 holds another run: strategy\.compression_topk was 32, is 8"
    ):
        compare(
            cli.parse(Compare, [*argv, "--strategies", '{"kind": "distro", "compression_topk": 8}']),
            partial(driver.run, spark),
        )
    # The page of one of them.
    code, out, err = job("report", str(directory / "distro-lr0.003"))
    assert (code, err) == (0, "")
    text = Path(out.strip()).read_text()
    assert "distro-lr0.003: distro, 2 ranks" in text
    assert "http" not in text


@pytest.fixture
def store(tmp_path: Path) -> Iterator[None]:
    """A real MLflow store."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("compare", str(tmp_path / "artifacts")))
    yield
    mlflow.set_tracking_uri(before)


def test_a_run_that_diverges_is_a_row_and_mlflow_has_the_others_as_children_of_one(
    spark: Any, data: Path, store: None, tmp_path: Path, job: Any
) -> None:
    # Weights that decay by their ninety-eightfold are soon no numbers.
    argv = [*tiny_argv(data, tmp_path / "compare"), "--optimizer.weight-decay", "9.9", "--train.steps", "40"]
    argv += ["--strategies", '{"kind": "adamw", "lr": [9.9, 1e-3]}', "--run.trackers", "mlflow"]
    code, out, err = job("compare", *argv)
    assert code == 0, err
    assert "adamw, lr 9.9 diverged: rank " in out
    lost, kept = pq.read_table(tmp_path / "compare" / "compare.parquet").to_pylist()
    assert lost["outcome"].startswith("diverged: rank ")
    assert "lower optimizer.lr" in lost["outcome"]
    assert (lost["lr"], lost["loss"], lost["best"]) == (9.9, None, False)
    assert (kept["lr"], kept["outcome"], kept["best"]) == (1e-3, "finished", True)
    cells = [cell.strip() for cell in (tmp_path / "compare" / "compare.md").read_text().splitlines()[2].split("|")]
    assert cells[1:5] == ["adamw", "9.9", "diverged", ""]
    (parent,) = mlflow.search_runs(filter_string="run_name = 'compare'", output_format="list")
    children = mlflow.search_runs(
        filter_string=f"tags.mlflow.parentRunId = '{parent.info.run_id}'", output_format="list"
    )
    assert parent.info.status == "FINISHED"
    assert {run.info.run_name: run.info.status for run in children} == {
        "adamw-lr9.9": "FAILED",
        "adamw-lr0.001": "FINISHED",
    }
    names = {file.path for file in mlflow.artifacts.list_artifacts(run_id=parent.info.run_id)}
    assert {"compare.md", "compare.parquet", "loss_over_bytes.png", "loss_over_tokens.png"} <= names


def test_where_all_runs_diverge_there_is_nothing_to_compare(tmp_path: Path) -> None:
    def diverge(run: RunConfig) -> RunResult:
        raise Diverged(f"loss is nan at {run.optimizer.lr}")

    with pytest.raises(Diverged, match="all 4 runs of .* diverged: lower optimizer.lr"):
        compare(cli.parse(Compare, ["--run.dir", str(tmp_path / "c")]), diverge)
    assert not (tmp_path / "c" / "compare.md").exists()


def test_a_compare_of_sources_elsewhere_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = '[{"name": "a", "path": "x", "weight": 1}, {"name": "b", "path": "y", "weight": 2}]'
    config = cli.parse(Compare, ["--run.dir", str(tmp_path / "run"), "--data.sources", named])
    for place in ("run", "here", "there"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        running._claim(tmp_path / "run", config)
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(ConfigError, match="holds another compare: data.sources was .*here/x"):
        running._claim(tmp_path / "run", config)
