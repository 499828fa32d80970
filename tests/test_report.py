"""Pictures and the page: what was measured is in them, and a page needs nothing but itself."""

import base64
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError
from sparktrain.report.figures import heldout_points, png, smoothed
from sparktrain.report.page import Report, page, write_report
from sparktrain.results import RankResult, RunResult, StepRecord
from sparktrain.rundir import RunDir
from tests.conftest import ROOT

TITLES = ["Loss", "Learning rate", "Gradient norm", "Speed", "Bytes of a rank so far", "Time of each rank"]


def a_result(run_dir: Path, steps: int = 40, world: int = 2, received: int = 1000, floor: float = 3.0) -> RunResult:
    """A run whose loss falls to ``floor``; rank 1 computes twice as long as rank 0."""

    def record(rank: int, step: int) -> StepRecord:
        return StepRecord(
            step=step,
            loss_sum=64 * (floor + 5 * math.exp(-step / 8)),
            tokens=64,
            lr=1e-3 * (1 - step / steps),
            grad_norm=1.0 + (step == 3) * 50,
            seconds=0.25 + rank * 0.125,
            data_seconds=0.0,
            compute_seconds=0.125 * (1 + rank),
            communication_seconds=0.125,
            payload_bytes=received,
            bytes_sent=received,
            bytes_received=received,
            optimizer_seconds=0.0625,
            heldout_loss=floor + 5 * math.exp(-step / 8) if step % 10 == 9 and step < steps - 1 else None,
        )

    ranks = [
        RankResult(r, world, f"<host{r}>", [record(r, s) for s in range(steps)], "ab" * 32, 1000, 8.0, floor + 0.1, 0.0)
        for r in range(world)
    ]
    return RunResult.merge(str(run_dir), ranks)


class Reader(HTMLParser):
    """What a browser would fetch, and whether every element ends."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_in_six_panels_shows_what_was_recorded(tmp_path: Path) -> None:
    result = a_result(tmp_path)
    figure = result.plot()
    panels = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == TITLES
    raw, _, heldout = panels[0].lines
    np.testing.assert_allclose(raw.get_ydata(), result.metrics["loss"])
    assert list(zip(*heldout.get_data(), strict=True)) == heldout_points(result)
    assert [step for step, _ in heldout_points(result)] == [0, 10, 20, 30, 40]
    np.testing.assert_allclose(panels[1].lines[0].get_ydata(), result.metrics["lr"])
    np.testing.assert_allclose(panels[3].lines[0].get_ydata(), 128 / 0.375)
    assert [line.get_ydata()[-1] for line in panels[4].lines] == [40_000] * 3
    bars: dict[str, list[float]] = {c.get_label(): [bar.get_width() for bar in c] for c in panels[5].containers}
    assert bars["forward and backward"] == pytest.approx([40 * 0.0625, 40 * 0.1875])
    assert bars["communication"] == pytest.approx([5.0, 5.0])
    assert [text.get_text() for text in panels[5].get_yticklabels()] == ["rank 0\n<host0>", "rank 1\n<host1>"]
    image = Image.open(io.BytesIO(png(figure)))
    assert image.format == "PNG"
    assert image.size == (1210, 1100)
    assert len(set(image.convert("RGB").resize((100, 100)).getdata())) > 50  # it is not blank


@pytest.mark.parametrize(("steps", "world"), [(1, 1), (2, 3)])
def test_a_run_of_a_step_or_of_a_rank_has_pictures_too(tmp_path: Path, steps: int, world: int) -> None:
    assert png(a_result(tmp_path, steps, world, received=0).plot()).startswith(b"\x89PNG")


def test_a_moving_average_of_a_constant_is_that_constant() -> None:
    np.testing.assert_allclose(smoothed([3.0] * 200), 3.0)
    wave = np.tile([0.0, 2.0], 500)
    assert np.abs(smoothed(wave)[100:] - 1).max() < 0.1


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    config = cli.parse(RunConfig, ["--run.dir", str(tmp_path / "<b>run"), "--model.tokenizer", "<script>"])
    directory = RunDir(tmp_path / "run")
    (tmp_path / "run").mkdir()
    directory.claim(config)
    text = page(directory, a_result(directory.path))
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    (picture,) = reader.fetched
    kind, _, data = picture.partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1210, 1100)
    assert not re.search(r"https?:|//|@import|url\(|<script|<b>", text.replace(picture, ""))
    for fact in ("8.0000 → 3.1000", "5,120", "<host1>", "ab" * 32, '"total_batch": 64', "<b>run: adamw, 2 ranks"):
        assert fact in reader.text


def test_a_report_is_of_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run directory"):
        write_report(Report(run_dir=tmp_path))
    RunDir(tmp_path).claim(cli.parse(RunConfig, []))
    with pytest.raises(ConfigError, match=r"is not finished: start the same command again"):
        write_report(Report(run_dir=tmp_path))


def without_matplotlib(code: str) -> subprocess.CompletedProcess[str]:
    block = "import sys; sys.modules['matplotlib'] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_matplotlib_everything_else_works_and_pictures_say_what_to_do() -> None:
    done = without_matplotlib(
        "import sparktrain.spark.driver, sparktrain.compare, sparktrain.report.page\n"
        "from sparktrain import cli\n"
        "from sparktrain.results import RunResult\n"
        "cli.main(lambda argv: RunResult('run', ()).plot(), [])"
    )
    assert done.returncode == 2
    assert done.stderr == "error: pictures need matplotlib: pip install 'sparktrain[plot]'\n"


def test_pictures_are_not_imported_before_they_are_asked_for() -> None:
    code = "import sys, sparktrain.compare, sparktrain.report.page; first = {'pandas'} & set(sys.modules)\n"
    code += "import sparktrain.spark.driver, sparktrain.spark.evaluate  # pyspark's TorchDistributor imports pandas\n"
    code += "print(first | {'torch', 'matplotlib'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
