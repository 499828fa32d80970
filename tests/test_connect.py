"""Spark Connect: a client without Java and without a SparkContext trains on a server that is another process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.rundir import RunDir
from sparktrain.spark import driver
from tests.conftest import ROOT, tiny_argv
from tests.test_ends import wait_until_gone
from tests.test_launch import ENVIRONMENT, SUBMIT, digest_of

SERVER = "org.apache.spark.sql.connect.service.SparkConnectServer"


@pytest.fixture(scope="module")
def client() -> Iterator[dict[str, str]]:
    """The environment of a client, whose server is a real one of two cores."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = [f"spark.connect.grpc.binding.port={port}", "spark.connect.grpc.binding.address=127.0.0.1"]
    settings = [word for setting in [*where, "spark.sql.shuffle.partitions=2"] for word in ("--conf", setting)]
    server = subprocess.Popen(
        [*SUBMIT, "--master", "local[2]", *settings, "--class", SERVER, "spark-internal"],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not _listens(port):
            assert server.poll() is None, "the server ended"
            time.sleep(0.2)
        yield ENVIRONMENT | {"SPARK_REMOTE": f"sc://127.0.0.1:{port}", "JAVA_HOME": "/nowhere"}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def a_job(name: str, *argv: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *argv]


def test_a_client_trains_to_the_parameters_of_local_mode(
    client: dict[str, str], spark: Any, data: Path, tmp_path: Path
) -> None:
    command = a_job("train", *tiny_argv(data, tmp_path / "run"))
    done = subprocess.run(command, env=client, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "ranks      2, executors, 1 threads each" in done.stdout
    assert "step 6/6  loss " in done.stdout + done.stderr  # ranks' lines find the client
    local = driver.run(spark, cli.parse(RunConfig, tiny_argv(data, tmp_path / "local")))
    assert digest_of(tmp_path / "run") == local.digest


def test_an_interrupted_client_leaves_a_checkpoint_and_no_rank(
    client: dict[str, str], data: Path, tmp_path: Path
) -> None:
    argv = tiny_argv(data, tmp_path / "run", "--train.steps", "100000")
    child = subprocess.Popen(
        a_job("train", *argv), env=client, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout is not None
    assert any("step 4/" in line for line in child.stdout)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 130, said
    wait_until_gone(tmp_path / "run")
    assert RunDir(tmp_path / "run").checkpoints.latest_step() >= 4
    assert not (tmp_path / "run" / "LOCK").exists()


def test_more_ranks_than_the_server_has_cores_are_refused_before_anything_is_written(
    client: dict[str, str], data: Path, tmp_path: Path
) -> None:
    command = a_job("train", *tiny_argv(data, tmp_path / "run", "--launch.ranks", "3"))
    done = subprocess.run(command, env=client, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "error: launch.ranks is 3, but the cluster has 2 slots for barrier tasks" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_needs_a_spark_context_says_so_before_anything_is_written(client: dict[str, str], tmp_path: Path) -> None:
    command = a_job("tokenize", "--output", str(tmp_path / "made"))
    done = subprocess.run(command, env=client, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "a Spark Connect client does not have: use spark-submit jobs/tokenize.py" in line
    assert not list(tmp_path.iterdir())
