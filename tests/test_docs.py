"""Docs build without a warning, every command in them is accounted for, the bundle is one that Databricks takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from databricks.bundles.jobs import Job
from databricks.bundles.volumes import Volume

from tests import commands
from tests.conftest import ROOT


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "site" / "api" / "runs" / "index.html").read_text()
    assert "sparktrain.spark.driver.run" in page
    assert ":class:" not in page


def test_every_page_of_the_docs_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in listed


def test_every_shell_block_is_run_by_make_commands_or_says_why_not() -> None:
    found = commands.blocks()
    assert {"README.md", "standalone.md"} <= {block.page for block in found if block.mark == "runnable"}
    for block in found:
        known = block.mark in ("runnable", "in .ci/run") or block.mark.startswith("not here: ")
        assert known, f"{block.page}: mark this block, see tests/commands.py:\n{block.commands}"
    scripts = (ROOT / ".ci" / "run").read_text()
    assert "\nmake commands\n" in scripts
    assert "tests.commands" in (ROOT / "Makefile").read_text()
    for block in found:
        if block.mark == "in .ci/run":
            assert all(line in scripts for line in block.commands.split("\n") if line)


def test_the_bundles_job_is_one_that_databricks_knows() -> None:
    bundle = yaml.safe_load((ROOT / "databricks.yml").read_text())
    resources = bundle["resources"]
    job = Job.from_dict(resources["jobs"]["train"])
    assert Job.from_dict(job.as_dict()) == job
    assert Volume.from_dict(resources["volumes"]["files"]).as_dict() == resources["volumes"]["files"]
    with pytest.raises(ValueError, match="Unexpected field"):  # it would find a key that is none
        Job.from_dict(resources["jobs"]["train"] | {"retries": 3})
    (task,) = job.tasks
    assert task.spark_python_task is not None
    assert (ROOT / str(task.spark_python_task.python_file)).exists()
    assert task.job_cluster_key == job.job_clusters[0].job_cluster_key  # type: ignore[union-attr]
    variables = set(bundle["variables"])
    used = {part.split("}")[0] for part in (ROOT / "databricks.yml").read_text().split("${var.")[1:]}
    assert used == variables
