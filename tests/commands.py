"""The shell blocks of README and docs, and which of them run: ``make commands``.

A block is preceded by a comment that a reader does not see: ``<!-- runnable -->``: :func:`run` runs it as it is;
``<!-- not here: REASON -->``: it cannot run here; ``<!-- in .ci/run -->``: CI runs it by itself.

``python -m tests.commands`` runs all that are runnable, minutes, in an empty folder that looks like the repository,
where conf/quickstart.toml asks for a small model and a few steps; and the notebooks that tests do not run, on the data
that the commands have left there.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests import notebooks
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {
    r"hidden_size = \d+": "hidden_size = 32",
    r"intermediate_size = \d+": "intermediate_size = 64",
    r"num_hidden_layers = \d+": "num_hidden_layers = 1",
    r"steps = 240": "steps = 4",
    r"heldout_sequences = 64": "heldout_sequences = 8",
}
NOTEBOOKS: dict[str, dict[str, Any]] = {
    "02_compare_strategies": {"data": "data/mine", "hidden_size": 32, "steps": 20},
    "03_on_databricks": {
        "data": "data/mine",
        "run_dir": "runs/third",
        "ranks": 2,
        "hidden_size": 32,
        "steps": 4,
        "total_batch": 8,
        "trackers": [],
    },
}


class Block(NamedTuple):
    """A fenced block of shell commands, and the comment before it."""

    page: str
    mark: str
    commands: str


def blocks() -> list[Block]:
    """Every block of ```bash, in order; a fence that names no language is output."""
    fence = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```bash\n(.*?)```", re.DOTALL)
    return [Block(page.name, *found) for page in PAGES for found in fence.findall(page.read_text())]


def prepare(folder: Path) -> dict[str, str]:
    """Make ``folder`` look like the repository, small; the environment for its commands."""
    (folder / "jobs").symlink_to(ROOT / "jobs")
    (folder / "conf").mkdir()
    for file in (ROOT / "conf").iterdir():
        text = file.read_text()
        for pattern, value in SMALL.items():
            text = re.sub(rf"(?m)^{pattern}$", value, text)
        (folder / "conf" / file.name).write_text(text)
    texts = folder / "TEXT_DIR"
    texts.mkdir()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py")):
        (texts / f"{source.stem}.txt").write_bytes(source.read_bytes())
    defaults = folder / "spark"
    defaults.mkdir()
    for_one_machine = "spark.master local[2]\nspark.ui.enabled false\nspark.driver.host 127.0.0.1\n"
    (defaults / "spark-defaults.conf").write_text(for_one_machine + "spark.driver.bindAddress 127.0.0.1\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    spark = {"SPARK_CONF_DIR": str(defaults), "PYSPARK_PYTHON": "python", "SPARK_LOCAL_IP": "127.0.0.1"}
    return os.environ | spark | {"PATH": path, "PYTHONPATH": str(ROOT)}


def run(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """What the commands of ``block`` print; raises where one fails, and leaves no process."""
    child = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", block.commands],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = child.communicate(timeout=900)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        raise AssertionError(f"{block.page}: exit code {child.returncode} of\n{block.commands}\n{out}")
    return out


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        surroundings = prepare(Path(directory))
        for each in blocks():
            if each.mark == "runnable":
                print(each.page, each.commands, run(each, Path(directory), surroundings), sep="\n", flush=True)
        for name, parameters in NOTEBOOKS.items():
            with notebooks.kernel(Path(directory)) as execute:
                print(name, notebooks.output_of(execute(notebooks.read(name, parameters))), sep="\n", flush=True)
