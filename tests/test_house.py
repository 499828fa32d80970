"""The house: walls, budgets, and a README that tells the truth about both."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = sorted((ROOT / "sparktrain").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))


def name_of(path: Path) -> str:
    """Its dotted name; a folder of files of one kind with a table of them, such as sources/, counts as one module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if "sources" in parts:
        parts = (*parts[: parts.index("sources") + 1], "__init__")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Modules of ours that ``path`` imports at its top: what the door opens inside a function is behind the door."""
    known = {name_of(m) for m in MODULES}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} & known
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & known


def test_no_module_is_over_250_lines_and_no_function_over_50() -> None:
    for path in [*MODULES, *JOBS]:
        text = path.read_text()
        assert text.count("\n") <= (30 if path in JOBS else 250), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 50, f"{path}: {node.name}"


def test_imports_have_no_cycle_and_are_at_most_five_deep() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(name_of(path), set()).update(set(imports_of(path)) - {name_of(path)})
    depths: dict[str, int] = {}

    def depth(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"cycle: {' -> '.join([*above, module])}"
        if module not in depths:
            # A package's own list of its modules is a table of contents, not a floor.
            below = [m for m in graph[module] if not module.startswith(f"{m}.")]
            depths[module] = 1 + max((depth(m, (*above, module)) for m in below), default=0)
        return depths[module]

    deepest = max(graph, key=depth)
    assert depths[deepest] <= 5, f"{deepest}: {depths[deepest]}"


def test_the_driver_never_imports_torch() -> None:
    code = "import sys, sparktrain.spark.driver, sparktrain.spark.tokenize as _; print({'torch'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_importing_the_package_does_nothing() -> None:
    code = "import sys; before = set(sys.modules); import sparktrain; print(sorted(set(sys.modules) - before))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "['sparktrain']"


@pytest.mark.parametrize(
    "pattern", [r"\bTODO\b", r"\bFIXME\b", r"pickle\.load\b", r"torch\.load", r"\beval\(", r"yaml\.load\b"]
)
def test_nothing_is_left_open_and_nothing_foreign_is_unpickled(pattern: str) -> None:
    for path in [*MODULES, *JOBS]:
        hits = [line for line in path.read_text().splitlines() if re.search(pattern, line) and ".eval()" not in line]
        assert not hits, f"{path}: {hits}"


def test_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in MODULES:
        if path.name != "__init__.py":
            assert f"{path.name}" in readme, f"README.md does not name {path.relative_to(ROOT)}"
