"""Notebooks as they are run: by nbclient, in a kernel, top to bottom.

``python -m tests.notebooks`` runs 01 and 02 with their own settings, minutes, and writes 03 in Databricks' source form.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tests.conftest import ROOT

FOLDER = ROOT / "notebooks"


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def read(name: str, parameters: dict[str, Any] | None = None) -> NotebookNode:
    """Notebook ``name``, with a cell after its parameters that sets some of them otherwise, as papermill has it. What
    only Databricks knows is left out."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if "databricks" not in tags(cell)]
    (place,) = [i for i, cell in enumerate(cells) if "parameters" in tags(cell)]
    given = new_code_cell("\n".join(f"{key} = {value!r}" for key, value in (parameters or {}).items()))
    notebook.cells = [*cells[: place + 1], given, *cells[place + 1 :]]
    return notebook


@contextlib.contextmanager
def kernel(folder: Path) -> Iterator[Any]:
    """A function that runs a notebook in ``folder``, in one kernel for all."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["PYSPARK_PYTHON"] = sys.executable
    where: Any = {"metadata": {"path": str(folder)}}
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=900, kernel_name="python3", resources=where)

    def run(notebook: NotebookNode) -> NotebookNode:
        client.nb = notebook
        client.reset_execution_trackers()
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        client.set_widgets_metadata()
        return notebook

    with client.setup_kernel():
        yield run


def output_of(notebook: NotebookNode) -> str:
    """All that cells printed or showed as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def databricks_source(notebook: NotebookNode) -> str:
    """The notebook as the .py file that Databricks imports."""
    cells = []
    for cell in notebook.cells:
        lines = cell.source.splitlines()
        if cell.cell_type == "markdown":
            lines = ["# MAGIC %md", *(f"# MAGIC {line}".rstrip() for line in lines)]
        cells.append("\n".join(f"# MAGIC {line}" if line.startswith("%") else line for line in lines))
    return "# Databricks notebook source\n" + "\n\n# COMMAND ----------\n\n".join(cells) + "\n"


if __name__ == "__main__":
    exported = databricks_source(nbformat.read(FOLDER / "03_on_databricks.ipynb", as_version=4))
    (FOLDER / "03_on_databricks.py").write_text(exported)
    with tempfile.TemporaryDirectory() as directory:
        for name in ("01_quickstart", "02_compare_strategies"):
            with kernel(Path(directory)) as run:
                print(output_of(run(read(name))))
