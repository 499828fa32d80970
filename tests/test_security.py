"""No secret is left behind, no port is open to everyone, and nothing foreign is run: looked at in a whole run."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparktrain import redaction, worker
from sparktrain.spark import launch
from tests.conftest import ROOT, tiny_argv
from tests.test_reach import manifest
from tests.web import Web, serve

SECRETS = {
    "SPARKTRAIN_TOKEN_127_0_0_1": "canary-of-the-server",
    "HF_TOKEN": "hf_canaryofthehub",
    "AWS_SECRET_ACCESS_KEY": "canary+of/the+store",
    "FSSPEC_SFTP_PASSWORD": "canary of a driver",
}
SIGNATURE = "canary-of-a-signature"


@pytest.fixture
def guarded(data: Path) -> Iterator[Web]:
    """The data on a server that wants the token and leads to signed addresses."""
    with serve() as web:
        files = {file.name: file.read_bytes() for file in sorted((data / "train").iterdir())}
        for root in ("d", "blobs"):
            web.files |= {f"/{root}/train/{name}": content for name, content in files.items()}
        web.files["/d/manifest.json"] = manifest({f"train/{name}": content for name, content in files.items()})

        def fault(n: int, path: str) -> Any:
            if web.asked[n][2] != f"Bearer {SECRETS['SPARKTRAIN_TOKEN_127_0_0_1']}":
                return 401
            known = path.startswith("/d/train/") and path in web.files
            return (302, {"Location": f"{path.replace('/d/', '/blobs/')}?sig={SIGNATURE}"}) if known else None

        web.fault = fault
        yield web


def listening(run_dir: Path) -> set[str]:
    """Addresses that processes of a run take connections on: driver, torchrun, ranks; not Spark's JVM."""
    found = set()
    for process in psutil.process_iter():
        try:
            if str(run_dir) in process.cmdline() and process.name() != "java":
                found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
    return found


def test_a_run_leaves_no_secret_and_no_door_open(guarded: Web, data: Path, tmp_path: Path) -> None:
    """Two ranks read from a server that they have to prove themselves to, and are looked at while they train."""
    argv = tiny_argv(data, tmp_path / "run", "--data.cache-dir", str(tmp_path / "cache"))
    argv[argv.index("--data.path") + 1] = f"{guarded.url}/d/train"
    command = [*("spark-submit", "--master", "local[2]"), str(ROOT / "jobs" / "train.py"), *argv]
    command += ["--train.steps", "60", "--checkpoint.every", "60"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | SECRETS | {"PATH": path, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    (tmp_path / "tmp").mkdir()
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)
    assert child.stdout is not None
    said, doors = "", set()
    deadline = threading.Timer(240, child.kill)
    deadline.start()
    for line in child.stdout:
        said += line
        if "step 2/" in line:
            doors = listening(tmp_path / "run")
    deadline.cancel()
    assert child.wait() == 0, said
    assert doors == {"127.0.0.1"}
    assert any(signed.endswith(f"sig={SIGNATURE}") for signed, _, _ in guarded.asked)
    assert os.listdir(tmp_path / "tmp") == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {"config.json", "result.json", "rank-00001.pickle", "metrics.parquet", "stdout.log"}
    assert kinds <= {path.name for path in files}
    for secret in (*SECRETS.values(), SIGNATURE):
        assert secret not in said
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_the_drivers_log_port_is_on_one_address() -> None:
    server = launch.LogServer()
    server.start("127.0.0.1")
    try:
        doors = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert ("127.0.0.1", server.port) in doors
        assert server.port not in {port for address, port in doors if address != "127.0.0.1"}
    finally:
        server.shutdown()


def test_an_exception_with_a_secret_in_it_is_written_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    said = (
        f"GET https://me:{SIGNATURE}@h/x?sig={SIGNATURE}&b=1 as {SECRETS['AWS_SECRET_ACCESS_KEY']} with "
        f"Bearer {SIGNATURE} or AKIAIOSFODNN7EXAMPLE, {SECRETS['FSSPEC_SFTP_PASSWORD']}"
    )
    hidden = "GET https://…h/x… as … with … or …, …"
    assert redaction.hidden(said) == hidden
    try:
        raise OSError(said)
    except OSError as error:
        failure = worker._failure(1, error)
    assert failure.message == hidden
    assert not any(secret in failure.traceback for secret in (*SECRETS.values(), SIGNATURE))


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/me/mine@abc/en/a.ds does not exist: restore it",
        "abfs://container@account.dfs.core.windows.net/en has tokens of 2 bytes",
        "input should be 'adamw' or 'distro', found 'adam'; see --help",
        "what is this? x=3",
        "data.token_size is 4: leave data.token_size out",
    ],
)
def test_what_is_no_secret_is_said(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "datasets")
    monkeypatch.setenv("SHORT_TOKEN", "en")
    assert redaction.hidden(text) == text
