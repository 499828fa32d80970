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
    parts = path.relative_to(ROOT).with_suffix("").parts
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


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """Modules of the longest chain of imports; fails on a cycle."""
    chains: dict[str, list[str]] = {}

    def chain(module: str, above: tuple[str, ...] = ()) -> list[str]:
        assert module not in above, f"cycle: {' -> '.join([*above, module])}"
        if module not in chains:
            # A package's own list of its modules is a table of contents, not a floor.
            below = [m for m in graph[module] if not module.startswith(f"{m}.")]
            longest = max((chain(m, (*above, module)) for m in below), key=len, default=[])
            chains[module] = [module, *longest]
        return chains[module]

    return max((chain(module) for module in graph), key=len)


def test_imports_have_no_cycle_and_are_at_most_five_deep() -> None:
    """A room, a folder of files that do one thing together, counts as one module; inside, it is no deeper below the
    file that opens it."""
    rooms = (
        "sparktrain.tokens.sources",
        "sparktrain.plan",
        "sparktrain.results",
        "sparktrain.compare",
        "sparktrain.report",
        "sparktrain.config",
        "sparktrain.train.strategies.distro",
        "sparktrain.train.strategies.replicas",
        "sparktrain.train.compression",
        "sparktrain.train.parameter_pack",
        "sparktrain.train.external",
        "sparktrain.train.merge",
        "sparktrain.train.pipelines",
        "sparktrain.spark.trackers",
    )
    graph = {name_of(path): set(imports_of(path)) - {name_of(path)} for path in MODULES}
    assert longest_chain(graph)  # no cycle anywhere

    def room_of(module: str) -> str:
        return next((room for room in rooms if f"{module}.".startswith(f"{room}.")), module)

    house: dict[str, set[str]] = {}
    for module, below in graph.items():
        house.setdefault(room_of(module), set()).update({room_of(m) for m in below} - {room_of(module)})
    assert len(longest_chain(house)) <= 5, longest_chain(house)
    for room in rooms:
        inside = {m: {b for b in below if room_of(b) == room} for m, below in graph.items() if room_of(m) == room}
        assert len(longest_chain(inside) if inside else []) <= 6, longest_chain(inside)


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
