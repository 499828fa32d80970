"""``report.html`` in a real browser: what it shows, what it asks for, what the console says.

``SPARKTRAIN_BROWSER``, or the PATH, has a Chromium; without one this is skipped. The page of a run of one's own:
``SPARKTRAIN_PAGE=RUN_DIR/report.html``.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.report.page import page
from sparktrain.rundir import RunDir
from tests.test_report import a_result

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
BROWSER = os.environ.get("SPARKTRAIN_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: set SPARKTRAIN_BROWSER")


class Seen(NamedTuple):
    """A page as the browser has it: what it asked the network for by itself, its console, pixels ``[H, W, 3]``."""

    asked: list[str]
    console: list[str]
    pixels: np.ndarray


def opened(file: Path, folder: Path, width: int = 1280, height: int = 1800) -> Seen:
    """``file`` in a browser with a profile of its own; it finds no network where it looks for one."""
    folder.mkdir()
    log, picture = folder / "net.json", folder / "page.png"
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"),
        *(f"--log-net-log={log}", f"--screenshot={picture}", "--proxy-server=http://127.0.0.1:9", file.as_uri()),
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
    found = json.loads(log.read_text())
    start = found["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event["params"] for event in found["events"] if event["type"] == start and "url" in event.get("params", {})]
    # What has no origin is the browser's own: updates, the time, dictionaries.
    asked = [
        job["url"] for job in jobs if job.get("initiator") != "not an origin" and not job["url"].startswith("file:")
    ]
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", said)
    return Seen(asked, console, np.asarray(Image.open(picture).convert("RGB")))


def amount(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(pixels.astype(int) - color).max(axis=2) < 12).sum())


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A run's page."""
    if given := os.environ.get("SPARKTRAIN_PAGE"):
        return Path(given)
    directory = RunDir(tmp_path / "run")
    directory.path.mkdir()
    directory.claim(cli.parse(RunConfig, ["--run.dir", str(tmp_path / "run")]))
    (file := tmp_path / "report.html").write_text(page(directory, a_result(directory.path)))
    return file


def test_a_page_shows_its_pictures_and_asks_for_nothing(report: Path, tmp_path: Path) -> None:
    seen = opened(report, tmp_path / "wide")
    assert (seen.asked, seen.console) == ([], [])
    assert amount(seen.pixels, BLUE) > 5000  # the ranks' bars
    assert amount(seen.pixels, VERMILION) > 500
    dark = (seen.pixels.max(axis=2) < 80).any(axis=1)
    assert dark.sum() > 400  # rows of text, all the way down


def test_a_page_fits_a_telephone(report: Path, tmp_path: Path) -> None:
    """What is wider scrolls by itself: nothing but white is left of the right edge."""
    seen = opened(report, tmp_path / "narrow", 500)
    assert amount(seen.pixels, BLUE) > 1000
    assert (seen.pixels[:, -10:] > 250).all()


def test_what_a_page_asks_for_and_says_is_seen_here(tmp_path: Path) -> None:
    (file := tmp_path / "other.html").write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("no good")</script>'
    )
    seen = opened(file, tmp_path / "other")
    assert seen.asked == ["http://127.0.0.1:9/x.png"]
    assert any("no good" in line for line in seen.console)
