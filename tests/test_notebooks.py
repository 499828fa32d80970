"""Notebooks define nothing and run top to bottom, here on small settings; a cell's interrupt stops a run cleanly."""

import ast
from pathlib import Path

import nbformat
import pytest

from sparktrain.rundir import RunDir
from tests import notebooks
from tests.test_launch import ranks_of

ALL = sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))
SMALL = {"hidden_size": 32, "steps": 4}


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_defines_nothing_and_comes_without_outputs(name: str) -> None:
    for cell in nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
            assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]


def test_the_databricks_source_form_is_the_notebook() -> None:
    notebook = nbformat.read(notebooks.FOLDER / "03_on_databricks.ipynb", as_version=4)
    written = (notebooks.FOLDER / "03_on_databricks.py").read_text()
    assert written == notebooks.databricks_source(notebook), "make notebooks writes it again"
    ast.parse(written)


def test_notebooks_run_top_to_bottom_and_an_interrupted_cell_goes_on(tmp_path: Path) -> None:
    strategies = {kind: {"strategy": {"kind": kind}} for kind in ("adamw", "distro")}
    with notebooks.kernel(tmp_path) as run:
        first = run(notebooks.read("01_quickstart", {"text_files": "s*.py", "vocab_size": 512, **SMALL}))
        assert "def test_" in notebooks.output_of(first)
        assert "communication" in str(first.metadata.widgets)  # the bar's text
        assert (tmp_path / "quickstart" / "run" / "model" / "config.json").exists()
        second = run(notebooks.read("02_compare_strategies", {"strategies": strategies, **SMALL}))
        assert "less than adamw" in notebooks.output_of(second)
        third = {"volume": ".", "data": "quickstart/data", "run_dir": "third", "ranks": 2, "total_batch": 8}
        endless = notebooks.read("03_on_databricks", third | {"trackers": [], "hidden_size": 32, "steps": 100_000})
        # The run, then its interrupt: sent by the kernel to itself once ranks train, as the square button's is.
        at = next(i for i, cell in enumerate(endless.cells) if "driver.run(" in cell.source)
        endless.cells[at].source = INTERRUPTED + endless.cells[at].source
        endless.cells = endless.cells[: at + 1]
        with pytest.raises(Exception, match="KeyboardInterrupt"):
            run(endless)
        directory = RunDir(tmp_path / "third")
        assert directory.checkpoints.newest()[0] is not None
        assert not (directory.path / "LOCK").exists()
        assert not ranks_of(directory.path)


INTERRUPTED = """
import os, signal, threading, time
from pathlib import Path

def interrupt():
    while not Path(run_dir, "gen", "000001", "pulse-00000.json").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
"""
