"""Notebooks define nothing; the first runs top to bottom, and a cell's interrupt stops a run cleanly.

02 and 03 are run, small, with the commands of the docs (tests/commands.py).
"""

import ast
import base64
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from PIL import Image

from sparktrain.rundir import RunDir
from tests import notebooks
from tests.test_ends import ranks_of

ALL = sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))


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


def test_the_quickstart_runs_and_its_interrupted_cell_goes_on(tmp_path: Path) -> None:
    small = {"text_files": "s*.py", "vocab_size": 512, "hidden_size": 32, "steps": 200}
    notebook = notebooks.read("01_quickstart", small)
    at = next(i for i, cell in enumerate(notebook.cells) if "driver.run(" in cell.source)
    before, after = notebook.copy(), notebook.copy()
    before.cells = [*notebook.cells[:at], notebook.cells[at].copy()]
    before.cells[at].source = INTERRUPTED + notebook.cells[at].source
    after.cells = notebook.cells[at:]
    directory = RunDir(tmp_path / "quickstart" / "run")
    with notebooks.kernel(tmp_path) as run:
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            run(before)
        newest, _ = directory.checkpoints.newest()
        assert newest is not None
        assert not (directory.path / "LOCK").exists()
        assert not ranks_of(directory.path)
        run(after)
    said = notebooks.output_of(after)
    assert f"going on from checkpoint {newest.name}" in said
    assert "200 steps" in said
    assert "def test_" in said
    assert "communication" in str(after.metadata.widgets)  # the bar's text
    (picture,) = [o.data["image/png"] for o in after.cells[0].outputs if "image/png" in o.get("data", {})]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")).astype(int)
    assert (np.abs(pixels - (0x00, 0x72, 0xB2)).max(axis=2) < 12).sum() > 100  # the live plot's line, drawn last


# Before the run: an interrupt once ranks train, from the kernel to itself, as the square button has it sent.
INTERRUPTED = """
import os, signal, threading, time
from pathlib import Path

def interrupt():
    while not Path(config.run.dir, "gen", "000001", "pulse-00000.json").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
"""
