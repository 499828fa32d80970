"""Run directories in an object store: an S3 server in a process of its own, and real ranks that write to it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktrain import atomic, cli, lock, storage, tokens
from sparktrain.checkpoints import Checkpoints, Manifest, name_of
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, ModelError, RunDirBusy, Superseded
from sparktrain.plan import PlanSpec
from sparktrain.results import RankResult
from sparktrain.rundir import SAVE, RunDir
from sparktrain.spark import audit, driver
from sparktrain.verify import Verify, verify
from tests.conftest import tiny_argv
from tests.test_failpoints import attempt_at

for package in ("moto", "s3fs", "upath"):
    pytest.importorskip(package)

BUCKET = "runs"
KEYS = {"AWS_ACCESS_KEY_ID": "the-key", "AWS_SECRET_ACCESS_KEY": "the-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server with an empty bucket; this process's environment has it and the keys."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "moto ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
                break
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (KEYS | {"AWS_ENDPOINT_URL": address}).items():
                patch.setenv(name, value)
            yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def remote(server: str) -> str:
    """A run directory's URI that nothing is at."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same, of either kind."""
    return storage.place(str(tmp_path / "run") if request.param == "disk" else request.getfixturevalue("remote"))


def at_once(number: int, act: Callable[[int], Any]) -> list[Any]:
    """What ``act(i)`` returns in as many threads that start together; an error stands for itself."""
    barrier, found = threading.Barrier(number), [None] * number

    def run(i: int) -> None:
        barrier.wait()
        try:
            found[i] = act(i)
        except Exception as error:
            found[i] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# -- what differs between a disk and a store -------------------------------------------------------------------------


def test_of_those_who_create_a_file_at_once_one_succeeds(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    found = at_once(6, lambda i: storage.create(place / "file", str(i).encode()))
    assert sorted(type(one).__name__ for one in found) == ["FileExistsError"] * 5 + ["NoneType"]
    assert (place / "file").read_bytes() == str(found.index(None)).encode()


def test_attempts_that_begin_at_once_have_numbers_of_their_own(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    assert sorted(at_once(4, lambda i: RunDir(place).new_generation())) == [1, 2, 3, 4]
    assert RunDir(place).latest_generation() == 4


def test_what_another_process_writes_is_seen_at_once(remote: str) -> None:
    here = storage.place(remote)
    assert storage.entries(here) == {}
    code = f"from sparktrain import storage; (storage.place({remote!r}) / 'STOP').touch()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    assert storage.entries(here) == {"STOP": False}
    assert (here / "STOP").exists()
    (here / "STOP").unlink()
    assert not (here / "STOP").exists()


def test_files_go_to_a_directory_and_come_back_from_it(place: Path) -> None:
    with storage.room(place / "model") as room:
        (room / "config.json").write_text("{}")
        (room / "weights").write_bytes(b"w" * 100)
    assert storage.entries(place / "model") == {"config.json": False, "weights": False}
    with storage.at_hand(place / "model", "config") as here:
        assert (here / "weights").read_bytes() == b"w" * 100
        assert storage.is_local(place) or [file.name for file in here.iterdir()] == ["weights"]
    with storage.at_hand(place / "model" / "weights") as here:
        assert here.stat().st_size == 100
    assert storage.is_local(place) or not here.exists()
    storage.copy(place / "model" / "weights", place / "model" / "again")
    assert (place / "model" / "again").read_bytes() == b"w" * 100
    storage.remove(place)
    assert storage.entries(place) == {}


def _commit(place: Path, step: int, run_id: str = "") -> str:
    files, name = Checkpoints(place), name_of(step, 1)
    part = files.write_part(files.directory(name) / "weights", bytes([step]), None)
    files.seal(name, 0, part)
    files.commit(Manifest(name, step, 1, None, 1, {}, {}, run_id), 5)
    return name


def test_a_checkpoint_that_is_being_removed_does_not_exist(remote: str) -> None:
    place = storage.place(remote)
    files, names = Checkpoints(place), [_commit(place, step) for step in (2, 4, 6)]
    assert files.names() == names[::-1]
    files.retain(keep_last=2, keep_every=0)
    assert files.names() == names[:0:-1]
    (files.path / f"{names[1]}.gone").touch()  # as one who was killed while removing leaves it
    assert files.names() == [names[2]]
    files.sweep()
    assert set(storage.entries(files.path)) == {names[2], *(f"{name}.json" for name in names)}


def test_a_checkpoint_of_another_run_is_refused_by_its_name(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    atomic.write_json(place / "run.json", {"run_id": "mine"})
    own, others = _commit(place, 2, "mine"), _commit(place, 4, "others")
    with pytest.raises(ModelError, match=f"checkpoint {others} of .* is of another run, others, this one is mine"):
        Checkpoints(place).newest()
    storage.remove(Checkpoints(place).directory(others))
    newest, _ = Checkpoints(place).newest()
    assert newest
    assert newest.name == own


# -- one owner -------------------------------------------------------------------------------------------------------


def _of_elsewhere(place: Path, token: str = "theirs") -> None:
    """A lock that a process of another machine made just now."""
    place.mkdir(parents=True, exist_ok=True)
    owner = {"host": "elsewhere", "pid": 7, "since": "then", "token": token}
    storage.create(place / "LOCK", json.dumps(owner).encode())


def test_a_process_of_this_machine_that_renews_nothing_is_no_owner_either(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.mkdir(parents=True, exist_ok=True)
    owner = {
        "host": socket.gethostname(),
        "pid": 1,
        "since": "then",
        "token": "its",
    }  # a pid that somebody else has now
    storage.create(place / "LOCK", json.dumps(owner).encode())
    with pytest.raises(RunDirBusy, match="in use by process 1 on"), RunDir(place).lock():
        pass
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    time.sleep(2.1)
    with RunDir(place).lock():
        pass
    assert storage.entries(place) == {}


def test_a_store_that_writes_over_what_is_there_locks_nothing(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = storage.place(remote)

    def overwrites(path: Any, content: bytes) -> None:
        path.write_bytes(content)

    monkeypatch.setattr(storage, "create", overwrites)
    with pytest.raises(ConfigError, match="writes over what must not be"), RunDir(place).lock():
        pass


def test_a_lock_of_another_machine_is_taken_over_when_it_is_not_renewed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _of_elsewhere(place)
    busy = "in use by process 7 on elsewhere since then, which renewed its lock"
    with pytest.raises(RunDirBusy, match=busy), RunDir(place).lock():
        pass
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    time.sleep(2.1)  # stores have whole seconds

    def start(i: int) -> str:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(RunDir(place).lock())
            finally:
                barrier.wait()
            return "won"

    barrier = threading.Barrier(3)
    monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.2)
    assert sorted(str(type(one).__name__) for one in at_once(3, start)) == ["RunDirBusy", "RunDirBusy", "str"]
    assert capsys.readouterr().out.count("was in use by process 7 on elsewhere since then, which has not renewed") == 1
    assert storage.entries(place) == {}


def test_an_owner_that_was_taken_over_ends_and_writes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.1)
    directory = RunDir(place)
    with directory.lock():
        number = directory.new_generation()
        directory.check_owner()
        (place / "LOCK").unlink()
        _of_elsewhere(place)  # as if this process had been cut off for a minute
        while not directory.over(number).exists():
            time.sleep(0.05)
        for act in (directory.check_owner, directory.new_generation, lambda: directory.write_result(None)):  # type: ignore[arg-type]
            with pytest.raises(Superseded, match="was taken over by process 7 on elsewhere"):
                act()
    assert json.loads((place / "LOCK").read_text())["host"] == "elsewhere"


def test_a_lock_that_was_removed_by_hand_is_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDir(place)
    with directory.lock():
        (place / "LOCK").unlink()
        directory.check_owner()
        with pytest.raises(RunDirBusy, match=f"process {os.getpid()} on "), RunDir(place).lock():
            pass


# -- ranks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spec(data: Path) -> PlanSpec:
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    return PlanSpec(shards, sequence_length=32, total_batch=8, steps=6, seed=5)


@pytest.fixture
def attempt(data: Path, spec: PlanSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """``attempt(place, armed)``: two ranks train 6 steps, a checkpoint every 2; their exit statuses."""
    import torch

    torch.set_num_threads(1)  # a forked process hangs where OpenMP's threads have started
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # as the task does, for those that are killed
    return lambda place, armed="": attempt_at(place, data, spec, tmp_path, armed)


def _ask_for_a_checkpoint(directory: RunDir, generation: int) -> None:
    while directory.latest_generation() < generation:
        time.sleep(0.1)
    directory.request_path(SAVE).touch()


def test_ranks_that_are_killed_while_they_save_to_a_store_go_on_as_if_they_had_not_been(
    attempt: Callable[..., list[int]], remote: str, tmp_path: Path
) -> None:
    disk, store = RunDir(tmp_path / "run"), RunDir(remote)
    assert attempt(disk.path) == [0, 0]
    expected = disk.merge(disk.outcomes(1))  # type: ignore[arg-type]
    assert any(attempt(store.path, "checkpoint.parts@rank=1,step=2:kill"))
    assert any(attempt(store.path, "checkpoint.committed@step=4:kill"))
    asking = threading.Thread(target=_ask_for_a_checkpoint, args=(store, 3))
    asking.start()
    assert attempt(store.path, "batch@step=4:delay=5000") == [0, 0]
    asking.join()
    outcomes = [outcome for outcome in store.outcomes(3) if isinstance(outcome, RankResult)]
    result = store.merge(outcomes)
    assert outcomes[0].resumed_from == name_of(4, 2)
    assert store.checkpoints.names() == [name_of(6, 3), name_of(5, 3)]
    assert not store.request_path(SAVE).exists()
    assert result.digest == expected.digest
    assert result.table["loss"].to_pylist() == expected.table["loss"].to_pylist()
    newest, damages = store.checkpoints.newest()
    assert newest
    assert (newest.name, damages) == (name_of(6, 3), [])
    assert storage.entries(store.model).keys() == storage.entries(disk.model).keys()


@pytest.fixture
def workers(spark: Any, server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The session, whose Python workers know the server, whenever its JVM was started."""
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": server}).items():
        monkeypatch.setitem(spark.sparkContext.environment, name, value)
    return spark


def test_a_run_in_a_store_ends_as_one_on_a_disk_and_can_be_verified_and_audited(
    workers: Any, data: Path, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--checkpoint.every", "2", "--launch.grace", "1", "--data.heldout", str(data / "heldout")]
    expected = driver.run(workers, cli.parse(RunConfig, tiny_argv(data, tmp_path / "run", *more)))
    monkeypatch.setenv("SPARKTRAIN_FAILPOINT", "gradient@rank=1,step=5:kill")
    once = [*more, "--launch.max-restarts", "0"]
    with pytest.raises(Exception, match="SIGKILL"):
        driver.run(workers, cli.parse(RunConfig, tiny_argv(data, remote, *once)))  # type: ignore[arg-type]
    monkeypatch.delenv("SPARKTRAIN_FAILPOINT")
    config = cli.parse(RunConfig, tiny_argv(data, remote, *more))  # type: ignore[arg-type]
    result = driver.run(workers, config)
    assert result.digest == expected.digest
    assert result.table["loss"].to_pylist() == expected.table["loss"].to_pylist()
    assert driver.run(workers, config).digest == expected.digest
    assert all(line.startswith("ok ") for line in verify(Verify(run_dir=remote)))  # type: ignore[arg-type]
    assert "0 missing, 0 doubled, 0 other" in list(audit.audit(workers, storage.place(remote), False))[-1]
    directory = RunDir(remote)
    inside = storage.entries(directory.path)
    assert {"result.json", "metrics.parquet", "model", "plan", "digests", "plan.json"} <= inside.keys()
    assert not any(name.startswith((".", "LOCK")) for name in inside)
    assert storage.entries(directory.logs(2))
    store: Any = directory.path
    written = {file: store.fs.cat_file(file) for file in store.fs.find(store.path)}
    assert not [file for file, content in written.items() if KEYS["AWS_SECRET_ACCESS_KEY"].encode() in content]


# -- bad input -------------------------------------------------------------------------------------------------------


BAD = {
    "ftp://host/run": (2, "has the scheme ftp://, which cannot be locked: give s3://"),
    "memory://runs/x": (2, "has the scheme memory://"),
    "s3://": (2, "names no directory in a bucket"),
    "s3://bucket": (2, "names no directory in a bucket: give s3://BUCKET/DIRECTORY"),
    "s3://bucket/lr[12]": (2, "has one of *[], which drivers of stores take for a pattern: choose another name"),
    "s3://key:secret@bucket/run": (2, "has a password or a query"),
    "gs://bucket/run": (2, "needs the Python package gcsfs: pip install gcsfs"),
    "s3://no-such-bucket/run": (2, "bucket does not exist; check its bucket, address and credentials"),
}


@pytest.mark.parametrize("uri", BAD)
def test_a_store_that_cannot_be_used_is_one_line(
    workers: Any, job: Callable[..., tuple[int, str, str]], data: Path, uri: str
) -> None:
    code, line = BAD[uri]
    status, _, err = job("train", *tiny_argv(data, uri))  # type: ignore[arg-type]
    assert (status, line in err, err.count("\n")) == (code, True, 1), err
    assert "secret" not in err


def test_keys_that_a_store_refuses_are_one_line_and_nothing_is_written(
    workers: Any, server: str, job: Callable[..., tuple[int, str, str]], data: Path, remote: str
) -> None:
    def check_keys(after: str) -> None:
        ask = urllib.request.Request(f"{server}/moto-api/reset-auth", after.encode(), {"Content-Type": "text/plain"})
        urllib.request.urlopen(ask).close()

    check_keys("0")
    try:
        status, _, err = job("train", *tiny_argv(data, remote))  # type: ignore[arg-type]
        asked, _, said = job("verify", remote)
    finally:
        check_keys("inf")
    assert (status, err.count("\n")) == (2, 1), err
    assert "check its bucket, address and credentials" in err
    assert asked != 0
    assert said.count("\n") == 1, said
    assert storage.entries(storage.place(remote)) == {}


def test_a_run_that_wants_a_directory_says_so(data: Path) -> None:
    argv = tiny_argv(data, f"s3://{BUCKET}/run", "--run.trackers", '["tensorboard"]')  # type: ignore[arg-type]
    from sparktrain.spark import trackers

    with pytest.raises(ConfigError, match="run.trackers has tensorboard"):
        trackers.check(cli.parse(RunConfig, argv))
