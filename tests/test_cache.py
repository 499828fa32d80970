"""The cache: what is read is the shard, whatever happened to the disk, the server or other processes."""

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktrain.errors import DataError
from sparktrain.tokens import sources
from sparktrain.tokens.sources import http
from sparktrain.tokens.sources.cache import Cache
from sparktrain.tokens.sources.entry import entry_size
from tests.web import FAST, Web, serve

SHARDS = {f"/{i}.ds": np.random.default_rng(i).bytes(30_000 + 1111 * i) for i in range(6)}
LARGE = 1 << 30
processes = multiprocessing.get_context("fork")


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as server:
        server.files = dict(SHARDS)
        yield server


def cache_at(directory: Path, max_bytes: int = LARGE) -> Cache:
    return Cache(directory / "cache", max_bytes, partial(http.open_if_there, patience=FAST))


def of(web: Web, name: str) -> tuple[str, int, str]:
    """What ``Cache.open`` is asked for the shard ``name``."""
    return f"{web.url}{name}", len(SHARDS[name]), hash_of(name)


def hash_of(name: str) -> str:
    return hashlib.sha256(SHARDS[name]).hexdigest()


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "cache").iterdir() if path.name != "lock")


def run(*tasks: Callable[[], Any]) -> None:
    """Each of ``tasks`` in a process of its own, all at once; none may fail."""

    def guarded(task: Callable[[], Any]) -> None:
        task()
        os._exit(0)

    started = [processes.Process(target=guarded, args=(task,)) for task in tasks]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * len(tasks)


def test_a_shard_is_fetched_once_and_read_from_here_ever_after(web: Web, tmp_path: Path) -> None:
    first = cache_at(tmp_path).open(*of(web, "/0.ds"))
    assert (first.uri, first.size()) == of(web, "/0.ds")[:2]
    assert first.read(0, first.size()) == SHARDS["/0.ds"]
    asked = len(web.asked)
    again = cache_at(tmp_path).open("http://127.0.0.1:1/gone.ds", *of(web, "/0.ds")[1:])
    assert again.read(4095, 9000) == SHARDS["/0.ds"][4095:13095]
    assert len(web.asked) == asked
    assert entries(tmp_path) == [hash_of("/0.ds")]
    with pytest.raises(DataError, match="has 30000 bytes, expected at least 30001"):
        again.read(0, 30_001)


def test_a_shard_of_many_pieces_is_put_together_right(tmp_path: Path) -> None:
    content = np.random.default_rng(9).bytes((20 << 20) + 7)
    (tmp_path / "large.ds").write_bytes(content)
    cache = Cache(tmp_path / "cache", LARGE, sources.open_if_there)
    source = cache.open(str(tmp_path / "large.ds"), len(content), hashlib.sha256(content).hexdigest())
    assert source.read(0, len(content)) == content


@settings(max_examples=40, deadline=None)
@given(size=st.integers(0, 20_000), data=st.data())
def test_any_range_of_any_size_is_the_shards(
    size: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = random.Random(size).randbytes(size)
    directory = tmp_path_factory.mktemp("any")
    (directory / "a.ds").write_bytes(content)
    cache = Cache(directory / "cache", LARGE, sources.open_if_there)
    source = cache.open(str(directory / "a.ds"), size, hashlib.sha256(content).hexdigest())
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    assert source.read(begin, end - begin) == content[begin:end]
    source.close()


# Damage


@settings(max_examples=40, deadline=None)
@given(where=st.integers(0, entry_size(30_000) - 1), bit=st.integers(0, 7), reopened=st.booleans())
def test_a_flipped_bit_anywhere_is_found_and_the_shard_fetched_again(
    where: int, bit: int, reopened: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("flip")
    (directory / "0.ds").write_bytes(SHARDS["/0.ds"])
    cache = Cache(directory / "cache", LARGE, sources.open_if_there)
    asked = (str(directory / "0.ds"), 30_000, hash_of("/0.ds"))
    source = cache.open(*asked)
    entry = directory / "cache" / hash_of("/0.ds")
    raw = bytearray(entry.read_bytes())
    raw[where] ^= 1 << bit
    with open(entry, "r+b") as file:
        file.write(raw)
    if reopened:
        source.close()
        source = cache.open(*asked)
    assert source.read(0, 30_000) == SHARDS["/0.ds"]
    raw[where] ^= 1 << bit
    if reopened or where < 30_000:  # sums are in memory while it is open
        assert entry.read_bytes() == raw
    source.close()


@pytest.mark.parametrize("left", [0, 10_000, 30_000])
def test_a_truncated_entry_is_fetched_again(web: Web, tmp_path: Path, left: int) -> None:
    source = cache_at(tmp_path).open(*of(web, "/0.ds"))
    os.truncate(tmp_path / "cache" / hash_of("/0.ds"), left)
    assert source.read(10, 29_000) == SHARDS["/0.ds"][10:29_010]
    os.truncate(tmp_path / "cache" / hash_of("/0.ds"), left)
    assert cache_at(tmp_path).open(*of(web, "/0.ds")).read(10, 29_000) == SHARDS["/0.ds"][10:29_010]


def test_threads_that_find_the_same_damage_fetch_once_and_all_read_right(web: Web, tmp_path: Path) -> None:
    source = cache_at(tmp_path).open(*of(web, "/0.ds"))
    entry = tmp_path / "cache" / hash_of("/0.ds")
    with open(entry, "r+b") as file:
        file.write(bytes(30_000))
    asked = len(web.asked)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: source.read(100 * i, 100), range(100)))
    assert got == [SHARDS["/0.ds"][100 * i : 100 * i + 100] for i in range(100)]
    assert len(web.asked) == asked + 2
    source.close()


def test_bytes_damaged_on_the_way_are_fetched_again(web: Web, tmp_path: Path) -> None:
    def fault(n: int, path: str) -> None:
        web.files["/0.ds"] = bytes(30_000) if n < 2 else SHARDS["/0.ds"]

    web.fault = fault
    assert cache_at(tmp_path).open(*of(web, "/0.ds")).read(0, 30_000) == SHARDS["/0.ds"]


def test_a_shard_that_is_not_what_the_manifest_says_is_one_line_and_leaves_nothing(web: Web, tmp_path: Path) -> None:
    uri, size, sha256 = of(web, "/0.ds")
    web.files["/0.ds"] = bytes(size)
    zeros = hashlib.sha256(bytes(size)).hexdigest()
    with pytest.raises(DataError, match=f"0.ds has sha256 {zeros}, its manifest says {sha256}") as caught:
        cache_at(tmp_path).open(uri, size, sha256)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"0\.ds has 30000 bytes, its manifest says 30001"):
        cache_at(tmp_path).open(uri, size + 1, sha256)
    with pytest.raises(DataError, match=r"none\.ds does not exist"):
        cache_at(tmp_path).open(f"{web.url}/none.ds", size, sha256)
    web.fault = lambda n, path: 500
    with pytest.raises(DataError, match="its server answers 500"):
        cache_at(tmp_path).open(uri, size, sha256)
    assert entries(tmp_path) == []


# What a manifest may not do


@given(name=st.text() | st.sampled_from(["../x", "/tmp/x", "lock", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"]))
def test_no_name_leads_out_of_the_cache(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("names")
    cache = Cache(directory / "cache", LARGE, lambda uri: pytest.fail(f"opened {uri}"))
    with pytest.raises(DataError, match="expected 64 lower-case hexadecimal digits"):
        cache.open("x.ds", 10, name)
    assert [path.name for path in directory.rglob("*")] == ["cache"]


@pytest.mark.parametrize("prefix", ["", "fetching-"])
def test_a_link_or_pipe_in_the_cache_is_refused(web: Web, tmp_path: Path, prefix: str) -> None:
    cache = cache_at(tmp_path)
    target = tmp_path / "precious"
    target.write_bytes(b"mine")
    entry = tmp_path / "cache" / (prefix + hash_of("/0.ds"))
    entry.symlink_to(target)
    with pytest.raises(DataError, match="cannot be opened: .*; remove it"):
        cache.open(*of(web, "/0.ds"))
    entry.unlink()
    os.mkfifo(entry)
    with pytest.raises(DataError, match="is no file: remove it"):
        cache.open(*of(web, "/0.ds"))
    assert target.read_bytes() == b"mine"


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    assert cache_at(tmp_path).directory.stat().st_mode & 0o777 == 0o700
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(DataError, match="can be written by others: choose one that is yours alone"):
        cache_at(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be made"):
        Cache(tmp_path / "file", LARGE, sources.open_if_there)


# Room


def room_for(*names: str) -> int:
    return sum(entry_size(len(SHARDS[name])) for name in names)


def test_the_least_recently_used_goes_first(web: Web, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, room_for("/0.ds", "/1.ds", "/2.ds"))
    for name in ("/0.ds", "/1.ds", "/0.ds", "/2.ds", "/0.ds", "/3.ds"):
        cache.open(*of(web, name)).close()
        time.sleep(0.01)
    # 3 is larger than the 1 that went, so 2 went as well.
    assert entries(tmp_path) == sorted([hash_of("/0.ds"), hash_of("/3.ds")])


def test_what_is_in_use_here_or_in_another_process_is_never_evicted(web: Web, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, room_for("/1.ds", "/2.ds"))
    ready, done = processes.Event(), processes.Event()

    def user() -> None:
        source = cache_at(tmp_path).open(*of(web, "/1.ds"))
        ready.set()
        assert done.wait(30)
        assert source.read(5, 500) == SHARDS["/1.ds"][5:505]
        os._exit(0)

    other = processes.Process(target=user)
    other.start()
    assert ready.wait(30)
    here = cache.open(*of(web, "/2.ds"))
    with pytest.raises(DataError, match=r"needs \d+ bytes of the cache .* may hold \d+ and has \d+ in use"):
        cache.open(*of(web, "/0.ds"))
    assert entries(tmp_path) == sorted([hash_of("/1.ds"), hash_of("/2.ds")])
    here.close()
    cache.open(*of(web, "/0.ds")).close()
    assert entries(tmp_path) == sorted([hash_of("/0.ds"), hash_of("/1.ds")])
    done.set()
    other.join(30)
    assert other.exitcode == 0
    cache.open(*of(web, "/2.ds")).close()
    assert hash_of("/2.ds") in entries(tmp_path)


def test_a_shard_larger_than_the_cache_costs_nothing_that_is_there(web: Web, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, room_for("/0.ds"))
    cache.open(*of(web, "/0.ds")).close()
    with pytest.raises(DataError, match="let it be larger or do without it"):
        cache.open(*of(web, "/5.ds"))
    assert entries(tmp_path) == [hash_of("/0.ds")]


# Processes


def test_ranks_that_want_one_shard_at_once_fetch_it_once(web: Web, tmp_path: Path) -> None:
    web.fault = lambda n, path: "slow"
    start = processes.Barrier(5)

    def rank() -> None:
        cache = cache_at(tmp_path)
        start.wait(30)
        assert cache.open(*of(web, "/0.ds")).read(0, 30_000) == SHARDS["/0.ds"]

    run(*[rank] * 5)
    assert len(web.asked) == 2  # its size, its bytes
    assert entries(tmp_path) == [hash_of("/0.ds")]


def test_ranks_that_evict_each_others_shards_all_read_right_within_the_bound(web: Web, tmp_path: Path) -> None:
    limit = room_for("/3.ds", "/4.ds", "/5.ds")
    seen: list[int] = []

    def rank(seed: int) -> None:
        order, cache = random.Random(seed), cache_at(tmp_path, limit)
        for _ in range(40):
            name = order.choice(sorted(SHARDS))
            source = cache.open(*of(web, name))
            begin = order.randrange(len(SHARDS[name]) - 200)
            assert source.read(begin, 200) == SHARDS[name][begin : begin + 200]
            source.close()

    def watch() -> None:
        while not stop.wait(0.001):
            sizes = [0]
            for path in (tmp_path / "cache").glob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    sizes.append(0)
            seen.append(sum(sizes))

    # Two ranks of one shard each and one to come: never too little room for the third.
    stop = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    run(*[partial(rank, seed) for seed in range(2)])
    stop.set()
    watcher.join()
    # The watcher does not see all files at one time: a shard may be counted before it went, its heir after it came.
    assert 0 < max(seen) <= limit + entry_size(len(SHARDS["/5.ds"]))
    assert sum((tmp_path / "cache" / name).stat().st_size for name in entries(tmp_path)) <= limit
    for name in entries(tmp_path):
        assert hashlib.sha256((tmp_path / "cache" / name).read_bytes()[: _size_of(name)]).hexdigest() == name


def _size_of(sha256: str) -> int:
    return next(len(content) for name, content in SHARDS.items() if hash_of(name) == sha256)


def test_a_rank_killed_while_it_fetches_leaves_nothing_in_the_way(web: Web, tmp_path: Path) -> None:
    fetching = threading.Event()

    def fault(n: int, path: str) -> str | None:
        if n == 1:
            fetching.set()
            return "silent"
        return None

    web.fault = fault
    doomed = processes.Process(target=lambda: cache_at(tmp_path).open(*of(web, "/0.ds")))
    doomed.start()
    assert fetching.wait(30)
    assert entries(tmp_path) == [f"fetching-{hash_of('/0.ds')}"]
    assert doomed.pid is not None
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join(30)
    cache = cache_at(tmp_path, room_for("/1.ds"))
    cache.open(*of(web, "/1.ds")).close()
    assert entries(tmp_path) == [hash_of("/1.ds")], "what the dead one was fetching makes room"
    cache.open(*of(web, "/0.ds")).close()
    assert entries(tmp_path) == [hash_of("/0.ds")]


def test_a_rank_that_waited_for_one_that_was_killed_fetches_itself(web: Web, tmp_path: Path) -> None:
    fetching = threading.Event()

    def fault(n: int, path: str) -> str | None:
        if n == 1:
            fetching.set()
            return "silent"
        return None

    web.fault = fault
    doomed = processes.Process(target=lambda: cache_at(tmp_path).open(*of(web, "/0.ds")))
    doomed.start()
    assert fetching.wait(30)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: cache_at(tmp_path).open(*of(web, "/0.ds")).read(0, 9))
        time.sleep(0.1)
        assert doomed.pid is not None
        os.kill(doomed.pid, signal.SIGKILL)
        assert waiting.result(30) == SHARDS["/0.ds"][:9]
    doomed.join(30)
