"""Sources: the data is right or the error is one line, whatever a real server does; and no secret is ever said."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktrain import tokens
from sparktrain.errors import DataError
from sparktrain.tokens import TokenFile, ds, sources
from sparktrain.tokens.ahead import read_ahead
from sparktrain.tokens.sources import answer, http
from sparktrain.tokens.sources.http import HttpSource, Token, token_variable
from sparktrain.tokens.sources.listing import expand
from sparktrain.tokens.sources.mirrors import Mirrors
from sparktrain.tokens.sources.patience import Passing, persist
from tests.conftest import ROOT
from tests.web import FAST, IMPATIENT, Fault, Web, serve

CANARY = "hf_c4naryc4naryc4naryc4nary"
DATA = np.random.default_rng(7).bytes(100_000)


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as server:
        server.files["/a.ds"] = DATA
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def opened(web: Web, path: str = "/a.ds") -> HttpSource:
    source = http.open_if_there(web.url + path, FAST)
    assert source is not None
    return source


def one_line(caught: pytest.ExceptionInfo[DataError]) -> str:
    said = str(caught.value)
    assert "\n" not in said
    assert CANARY not in said
    return said


# HTTP: right data in spite of the server


@settings(max_examples=25, deadline=None)
@given(offset=st.integers(0, len(DATA)), length=st.integers(0, 5000))
def test_any_range_is_the_files(offset: int, length: int) -> None:
    with serve() as web:
        web.files["/a.ds"] = DATA
        source = opened(web)
        assert source.size() == len(DATA)
        if offset + length <= len(DATA):
            assert source.read(offset, length) == DATA[offset : offset + length]
        else:
            with pytest.raises(DataError, match=f"ends at byte {len(DATA)}, expected at least {offset + length}"):
                source.read(offset, length)


@pytest.mark.parametrize("fault", [500, 502, 503, 504, 429, 408, "drop", "truncate", "half", "ignore"])
def test_a_server_that_fails_at_times_is_asked_again_and_the_data_is_right(web: Web, fault: Fault) -> None:
    web.fault = lambda n, path: fault if n in (1, 2, 5) else None
    source = opened(web)
    assert source.read(50_000, 40_000) == DATA[50_000:90_000]
    assert source.read(3, 9) == DATA[3:12]
    assert len(web.asked) >= (3 if fault == "ignore" else 4)


def test_what_came_before_a_server_hung_up_is_not_asked_for_again(web: Web) -> None:
    web.fault = lambda n, path: "truncate" if n in (1, 2) else None
    assert opened(web).read(0, 80_000) == DATA[:80_000]
    assert [range for _, range, _ in web.asked] == ["bytes=0-0", *(f"bytes={k}-79999" for k in (0, 40_000, 60_000))]


@pytest.mark.parametrize("fault", ["silent", "drip"])
def test_a_server_that_falls_silent_or_trickles_is_given_up_and_asked_again(web: Web, fault: Fault) -> None:
    web.fault = lambda n, path: fault if n == 1 else None
    source = http.open_if_there(f"{web.url}/a.ds", IMPATIENT)
    assert source is not None
    begin = time.monotonic()
    assert source.read(10, 1000) == DATA[10:1010]
    assert time.monotonic() - begin < 5  # the whole drip would take fifty seconds


def test_retry_after_is_waited_for_but_not_for_ever(web: Web) -> None:
    web.fault = lambda n, path: (429, {"Retry-After": "3600" if n == 1 else "soon"}) if n in (1, 2) else None
    source = opened(web)
    begin = time.monotonic()
    assert source.read(0, 4) == DATA[:4]
    assert time.monotonic() - begin < 5

    waits: list[float] = []

    def attempt() -> None:
        waits.append(time.monotonic())
        if len(waits) < 3:
            raise Passing("not yet", asked=0.2)

    persist(replace(FAST, longest_asked=0.1), attempt)
    assert all(b - a >= 0.1 for a, b in pairwise(waits))


def test_waits_grow_and_differ_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits() -> list[float]:
        times: list[float] = []

        def attempt() -> None:
            times.append(time.monotonic())
            raise Passing("never")

        with pytest.raises(Passing, match="never"):
            persist(replace(FAST, attempts=5, first_wait=0.03, longest_wait=0.12), attempt)
        return [b - a for a, b in pairwise(times)]

    first, second = waits(), waits()
    assert len(first) == 4
    assert all(wait >= floor for wait, floor in zip(first, (0.03, 0.06, 0.12, 0.12), strict=True))
    assert any(abs(a - b) > 1e-3 for a, b in zip(first, second, strict=True))


def test_connections_are_bounded_and_none_is_lost_to_failures(web: Web) -> None:
    source = http.open_if_there(f"{web.url}/a.ds", replace(FAST, attempts=50))
    assert source is not None
    web.fault = lambda n, path: {1: "truncate", 2: "ignore"}.get(n % 4, "slow")
    with ThreadPoolExecutor(40) as pool:
        got = list(pool.map(lambda i: source.read(100 * i, 100), range(120)))
    assert got == [DATA[100 * i : 100 * i + 100] for i in range(120)]
    assert 2 <= web.busiest <= answer.CONNECTIONS


def test_a_fork_does_not_talk_over_its_parents_connection(web: Web) -> None:
    source = opened(web)
    child = os.fork()
    if child == 0:
        os._exit(0 if source.read(5, 10) == DATA[5:15] else 1)
    assert source.read(0, 10) == DATA[:10]
    assert os.waitpid(child, 0)[1] == 0


def test_an_empty_file_and_a_missing_one(web: Web) -> None:
    web.files["/empty.ds"] = b""
    assert opened(web, "/empty.ds").size() == 0
    assert http.open_if_there(f"{web.url}/none.ds", FAST) is None
    with pytest.raises(DataError, match=r"none\.ds does not exist: restore it"):
        sources.open_source(f"{web.url}/none.ds")


# HTTP: one line where it cannot be


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, r"cannot be read: its server answers 500 \(4 attempts\); try later or add a mirror"),
        (503, "its server answers 503"),
        ("drop", "its server hung up"),
        ("truncate", "hung up in mid-answer"),
        (404, "was there and is gone"),
        (400, "its server answers 400; check the address"),
        ("other", "answers other byte ranges than it is asked for"),
        ("gzip", "sends it compressed though asked not to"),
        ((206, {"Content-Range": "bytes 0-9/10"}), "has 10 bytes and had 100000 when it was opened"),
        ((206, {"Content-Range": "bananas"}), "answers other byte ranges"),
        ((302, {"Location": "/a.ds"}), "is redirected more than 5 times"),
        ((302, {"Location": "ftp://127.0.0.1/a.ds"}), "is redirected from http to ftp: that is refused"),
    ],
)
def test_a_server_that_goes_on_failing_is_one_line(web: Web, fault: Fault, message: str) -> None:
    source = opened(web)
    web.fault = lambda n, path: fault
    with pytest.raises(DataError, match=message) as caught:
        source.read(20, 1)
    assert one_line(caught).startswith(f"{web.url}/a.ds ")


def test_ranges_ignored_in_a_large_file_are_one_line_and_not_a_download(web: Web) -> None:
    web.files["/large.ds"] = bytes(17 << 20)
    web.fault = lambda n, path: "ignore"
    source = opened(web, "/large.ds")
    assert source.read(100, 50) == bytes(50)
    with pytest.raises(DataError, match="ignores byte ranges: use one that honours them"):
        source.read((17 << 20) - 50, 50)


def test_no_server_and_no_host_are_one_line() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(DataError, match="its host takes no connection") as caught:
        http.open_if_there(f"http://127.0.0.1:{port}/a.ds", FAST)
    one_line(caught)


# HTTP: secrets


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_is_named_by_its_variable_and_never_by_its_value(
    web: Web, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    variable = token_variable("127.0.0.1")
    web.fault = lambda n, path: status if web.asked[n][2] != "Bearer right" else None
    with pytest.raises(DataError, match=rf"HTTP {status}\).* variable {variable}, which is not set") as caught:
        sources.open_source(f"{web.url}/a.ds")
    one_line(caught)
    monkeypatch.setenv(variable, CANARY)
    with caplog.at_level(logging.DEBUG), pytest.raises(DataError, match="is set, does not admit to it") as caught:
        sources.open_source(f"{web.url}/a.ds")
    one_line(caught)
    assert web.asked[-1][2] == f"Bearer {CANARY}"
    assert CANARY not in caplog.text
    assert CANARY not in repr(Token(variable, CANARY))
    monkeypatch.setenv(variable, "right")
    assert sources.open_source(f"{web.url}/a.ds").read(0, 9) == DATA[:9]


def test_each_host_has_its_own_token() -> None:
    assert token_variable("data.example.org") == "SPARKTRAIN_TOKEN_DATA_EXAMPLE_ORG"
    assert token_variable("data-example.org") != token_variable("data.example.org")


def test_a_redirect_is_followed_without_the_token_and_then_asked_directly(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(token_variable("127.0.0.1"), CANARY)
    with serve() as other:
        other.files["/blob"] = DATA
        web.fault = lambda n, path: (302, {"Location": f"{other.url}/blob?signature={CANARY}"})
        source = opened(web)
        assert source.read(7, 70) == DATA[7:77]
        assert {authorization for _, _, authorization in web.asked} == {f"Bearer {CANARY}"}
        assert {authorization for _, _, authorization in other.asked} == {None}
        assert (len(web.asked), len(other.asked)) == (1, 2)

        other.fault = lambda n, path: 403 if n == 2 else None  # the signature has expired
        assert source.read(8, 80) == DATA[8:88]
        assert len(web.asked) == 2

        other.fault = lambda n, path: 403
        with pytest.raises(DataError, match="may not be read") as caught:
            source.read(0, 1)
        assert "signature" not in one_line(caught)


def test_a_redirect_on_the_same_host_keeps_the_token(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(token_variable("127.0.0.1"), CANARY)
    web.fault = lambda n, path: (307, {"Location": "a.ds"}) if path == "/moved.ds" else None
    assert opened(web, "/moved.ds").read(1, 5) == DATA[1:6]
    assert {authorization for _, _, authorization in web.asked} == {f"Bearer {CANARY}"}


@pytest.mark.parametrize(
    "uri",
    [
        f"http://me:{CANARY}@127.0.0.1/a.ds",
        f"https://127.0.0.1/a.ds?sig={CANARY}",
        f"sftp://me:{CANARY}@host/a.ds",
        f"http://{CANARY}@127.0.0.1/a.ds",
        f"http://127.0.0.1:{CANARY}/a.ds",
    ],
)
def test_an_address_with_a_secret_is_refused_without_saying_it(uri: str) -> None:
    with pytest.raises(DataError, match="address is malformed|is given with a") as caught:
        sources.open_source(uri)
    one_line(caught)


def test_the_machines_proxy_is_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", web.url)
    web.files["http://data.example/a.ds"] = DATA  # what a proxy is asked for
    source = http.open_if_there("http://data.example/a.ds", FAST)
    assert source is not None
    assert source.read(4, 4) == DATA[4:8]


# Mirrors


def mirrored(*webs: Web) -> Mirrors:
    return Mirrors([f"{web.url}/" for web in webs], partial(http.open_if_there, patience=FAST))


def test_where_a_mirror_fails_the_next_is_asked_and_remembered(web: Web) -> None:
    with serve() as second:
        second.files = {"/a.ds": DATA, "/b.ds": DATA[::-1]}
        mirrors = mirrored(web, second)
        source = mirrors.open_if_there(f"{web.url}/a.ds")
        assert source is not None
        assert (source.size(), source.read(0, 5), len(second.asked)) == (len(DATA), DATA[:5], 0)
        web.fault = lambda n, path: 500
        assert source.read(5, 5) == DATA[5:10]
        failed = len(web.asked)
        assert source.read(10, 5) == DATA[10:15]
        other = mirrors.open_if_there(f"{web.url}/b.ds")
        assert other is not None
        assert other.read(0, 5) == DATA[::-1][:5]
        assert len(web.asked) == failed, "a mirror that is down is not asked again while another answers"
        web.fault, second.fault = lambda n, path: None, lambda n, path: "drop"
        assert source.read(20, 5) == DATA[20:25]


def test_mirrors_that_all_fail_are_all_named_in_one_line(web: Web) -> None:
    with serve() as second:
        second.files = {"/a.ds": DATA[:-1]}
        mirrors = mirrored(web, second)
        source = mirrors.open_if_there(f"{web.url}/a.ds")
        assert source is not None
        web.fault = lambda n, path: 503
        with pytest.raises(
            DataError, match="any of 2: .*answers 503.*; .*99999 bytes, elsewhere it has 100000"
        ) as caught:
            source.read(0, 1)
        one_line(caught)


def test_a_file_is_missing_only_where_all_mirrors_say_so(web: Web) -> None:
    with serve() as second:
        mirrors = mirrored(web, second)
        assert mirrors.open_if_there(f"{web.url}/a.ds") is not None
        assert mirrors.open_if_there(f"{web.url}/none.ds") is None
        second.fault = lambda n, path: 500
        with pytest.raises(DataError, match="answers 500"):
            mirrors.open_if_there(f"{web.url}/none.ds")


# fsspec and the Hub


def test_anything_fsspec_opens_is_a_source() -> None:
    fsspec.filesystem("memory").pipe({"/data/b.ds": DATA, "/data/a.ds": b"1234", "/data/a.ds.metadata": b"t|2\n2\n"})
    fsspec.filesystem("memory").pipe("/data/sub/c.ds", b"12")
    assert tokens.find_shards("memory://data") == ["memory://data/a.ds", "memory://data/b.ds"]
    assert tokens.find_shards("memory://data/b.ds") == ["memory://data/b.ds"]
    assert tokens.inspect("memory://data/a.ds").num_tokens == 2
    source = sources.open_source("memory://data/b.ds")
    assert (source.size(), source.read(99, 1000)) == (len(DATA), DATA[99:1099])
    assert sources.open_if_there("memory://data/none.ds") is None
    assert sources.open_if_there("memory://data") is None
    with pytest.raises(DataError, match="ends at byte 100000, expected at least 100001"):
        source.read(99_999, 2)
    fsspec.filesystem("memory").rm("/data/b.ds")
    with pytest.raises(DataError, match="was there and is gone"):
        source.read(0, 1)


def test_a_driver_that_is_not_installed_is_named_with_its_package() -> None:
    for scheme, package in {"gs": "gcsfs", "abfs": "adlfs"}.items():
        with pytest.raises(DataError, match=f"needs the Python package {package}: pip install {package}") as caught:
            sources.open_source(f"{scheme}://bucket/a.ds")
        one_line(caught)


class Refusing(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A store whose driver says too much."""

    protocol = "refusing"

    def info(self, path: str, **kwargs: object) -> dict[str, object]:
        kind = PermissionError if "denied" in path else ConnectionError
        raise kind(f"GET https://store/x?sig={CANARY} with Bearer {CANARY}\n of https://me:{CANARY}@store")


def test_drivers_errors_are_one_line_without_secrets() -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(
        DataError, match=r"denied\.ds may not be read: PermissionError GET .*; give driver and"
    ) as caught:
        sources.open_source("refusing://denied.ds")
    one_line(caught)
    with pytest.raises(DataError, match=r"a\.ds cannot be read: ConnectionError.*\(3 attempts\)") as caught:
        sources.open_source("refusing://a.ds")
    one_line(caught)


HUB = """
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from sparktrain import tokens
from sparktrain.errors import DataError
from sparktrain.tokens import sources
from sparktrain.tokens.sources import hf
from tests.web import FAST
sources.SOURCES["hf"] = sources.Kind(partial(hf.open_if_there, patience=FAST), partial(hf.files_in, patience=FAST))
for where in sys.argv[1:]:
    try:
        found = tokens.find_shards(where)
        print(found, [tokens.inspect(uri).num_tokens for uri in found])
    except DataError as error:
        print(error)
"""


def test_a_dataset_of_the_hub_is_pinned_to_its_commit_and_its_token_stays_on_the_hub(web: Web) -> None:
    commit, api, tree = "c" * 40, "/api/datasets/me/mine", [("a.ds", 8), ("a.ds.metadata", 6), ("README.md", 1)]
    listing = [{"type": "file", "path": f"en/{name}", "size": size, "oid": "0" * 40} for name, size in tree]
    info = {"id": "me/mine", "sha": commit, "private": True, "tags": [], "downloads": 0, "likes": 0}
    web.files[f"{api}/revision/v1"] = json.dumps(info).encode()
    web.files[f"{api}/tree/{commit}/en"] = json.dumps(listing).encode()
    with serve() as store:
        store.files["/blob"] = b"12345678"
        at = f"/datasets/me/mine/resolve/{commit}/en"
        web.files[f"{at}/a.ds.metadata"] = b"t|4\n2\n"

        def fault(n: int, path: str) -> Fault:
            if web.asked[n][2] != f"Bearer {CANARY}" or path.startswith("/api/datasets/me/hidden"):
                return 401
            return (302, {"Location": f"{store.url}/blob?s=1"}) if path == f"{at}/a.ds" else None

        web.fault = fault
        home = {"HF_ENDPOINT": web.url, "HF_TOKEN": CANARY, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        uris = ["hf://datasets/me/mine@v1/en", "hf://datasets/me/hidden/en", "hf://me/model/x.ds"]
        ran = subprocess.run(
            [sys.executable, "-c", HUB, *uris], env={**os.environ, **home}, capture_output=True, text=True
        )
        pinned = f"hf://datasets/me/mine@{commit}/en/a.ds"
        assert ran.stdout.splitlines()[0] == f"['{pinned}'] [2]", ran.stderr
        assert "me/hidden/en may not be read or is not there (HTTP 401)" in ran.stdout.splitlines()[1]
        assert "set HF_TOKEN" in ran.stdout.splitlines()[1]
        assert "expected hf://datasets/OWNER/NAME[@REVISION]/path" in ran.stdout.splitlines()[2]
        assert CANARY not in ran.stdout + ran.stderr
        assert {authorization for _, _, authorization in store.asked} == {None}


# Listing


def test_templates_count_as_they_are_written() -> None:
    assert expand("http://h/x-{08..11}.ds") == [f"http://h/x-{n}.ds" for n in ("08", "09", "10", "11")]
    assert expand("http://h/x-{9..11}.ds") == [f"http://h/x-{n}.ds" for n in (9, 10, 11)]
    assert expand("s3://b/x.ds") == ["s3://b/x.ds"]


@given(first=st.integers(0, 99999), count=st.integers(1, 50), width=st.integers(5, 8))
def test_a_padded_template_is_in_the_order_of_its_numbers(first: int, count: int, width: int) -> None:
    found = expand(f"http://h/{{{first:0{width}}..{first + count - 1:0{width}}}}.ds")
    assert len(found) == count
    if f"{first:0{width}}".startswith("0"):
        assert found == sorted(found)


@pytest.mark.parametrize("uri", ["{}", "{a..b}", "{3..1}", "{00..100}", "{0..9}{0..9}", "{0..9", "{0..99999999}"])
def test_what_is_no_template_is_said(uri: str) -> None:
    with pytest.raises(DataError, match="is no template: expected"):
        expand(f"http://h/{uri}.ds")


def test_shards_of_servers_are_listed_by_address_and_template_and_read_alike(web: Web, tmp_path: Path) -> None:
    for i in range(3):
        ds.write(tmp_path / f"x-{i:02}.ds", [np.arange(50 * i + 9)], 1000, "tok")
    web.files = {f"/{file.name}": file.read_bytes() for file in tmp_path.iterdir()}
    found = tokens.find_shards([f"{web.url}/x-02.ds", f"{web.url}/x-{{00..01}}.ds"])
    assert found == [f"{web.url}/x-{i:02}.ds" for i in range(3)]
    assert [tokens.inspect(uri).num_tokens for uri in found] == [9, 59, 109]
    assert TokenFile(tokens.inspect(found[2])).read(30, 4).tolist() == [30, 31, 32, 33]
    assert tokens.find_shards(tmp_path.as_uri()) == tokens.find_shards(tmp_path) == tokens.find_shards(str(tmp_path))
    assert tokens.find_shards(tmp_path / "x-01.ds") == [str(tmp_path / "x-01.ds")]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("http://127.0.0.1/data/", r"cannot be listed: give \*\.ds/.* files, one by one or as x-\{000\.\.012\}"),
        ("gopher://h/a.ds", "has the scheme gopher://, which is unknown: use a path, file://, http://"),
        ("memory://nowhere", "does not exist: give a directory with"),
        (["http://h/a.ds", "http://h/a.ds"], "is in the data twice, by name or by a link: name it once"),
        ("nowhere/a.ds", "does not exist"),
    ],
)
def test_places_without_shards_are_named(where: str | list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokens.find_shards(where)


# Reading ahead


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 30), workers=st.integers(1, 5), ahead=st.integers(1, 6))
def test_reading_ahead_keeps_the_order_and_its_bounds(count: int, workers: int, ahead: int) -> None:
    drawn = running = most = 0
    lock = threading.Lock()

    def items() -> Iterator[int]:
        nonlocal drawn
        for i in range(count):
            drawn += 1
            yield i

    def read(i: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.0005 * (i % 3))
        with lock:
            running -= 1
        return i * i

    for i, got in enumerate(read_ahead(items(), read, workers, ahead)):
        assert got == i * i
        assert drawn <= i + 1 + ahead
    assert drawn == count
    assert most <= workers


def test_reading_ahead_fails_at_the_turn_of_what_failed_and_stops_when_closed() -> None:
    started: list[int] = []

    def read(i: int) -> int:
        started.append(i)
        if i == 3:
            raise DataError("the third")
        return i

    ahead = read_ahead(range(100), read, 2, 4)
    assert [next(ahead), next(ahead), next(ahead)] == [0, 1, 2]
    with pytest.raises(DataError, match="the third"):
        next(ahead)
    endless = read_ahead(iter(int, 1), read, 2, 4)
    next(endless)
    endless.close()
    count = len(started)
    time.sleep(0.02)
    assert len(started) == count < 20


def test_a_loop_does_not_wait_where_the_source_keeps_up(web: Web) -> None:
    web.fault = lambda n, path: "slow"  # 30 ms an answer, eight at a time: 3.75 ms each
    source = opened(web)
    batches = read_ahead(range(40), lambda i: source.read(i, 100), 8, 16)
    next(batches)
    time.sleep(0.2)
    waited = 0.0
    for _ in range(39):
        begin = time.monotonic()
        next(batches)
        waited += time.monotonic() - begin
        time.sleep(0.01)
    assert waited < 0.3  # one at a time would be 1.2 s
