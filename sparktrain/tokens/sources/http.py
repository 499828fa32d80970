"""A file of an HTTP server, read by byte ranges.

A token for a host is read from the environment, from the variable that :func:`token_variable` names, when a source
on that host is opened; it is sent to that host only, wherever a redirect leads. What a redirect leads to may be a
signed address, so errors name the address that was asked for and never the one that answered.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from sparktrain.errors import DataError
from sparktrain.tokens.sources.answer import origin, pool, proxy_for, range_of, retry_after, size_of, words
from sparktrain.tokens.sources.patience import Passing, Patience, persist

T = TypeVar("T")

# How far into a file a read begins at most where a server ignores ranges: all before it has to be thrown away.
_MOST_SKIPPED = 16 << 20
# Seconds for which the end of a redirect is asked directly; signed addresses are good for longer.
_NEAR_SECONDS = 300.0
_MOST_REDIRECTS = 5
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Token:
    """What proves who we are, and the environment variable it comes from; None where that is not set."""

    variable: str
    value: str | None = field(repr=False)


class HttpSource:
    """See :class:`sparktrain.tokens.source.Source`. Opening it costs one small request, which learns the size."""

    descriptor = None

    def __init__(self, uri: str, url: str, token: Token, patience: Patience) -> None:
        """``url`` is where ``uri``, which errors name, is. Raises FileNotFoundError where there is nothing."""
        self.uri = uri
        self._url, self._token, self._patience = url, token, patience
        self._near, self._near_until = url, 0.0
        self._size = self._persist(self._ask_size)

    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self._size:
            raise DataError(
                f"shard {self.uri} ends at byte {self._size}, expected at least {offset + length}: "
                "it was truncated after the plan was made; restore it"
            )
        got = bytearray()

        def attempt() -> None:
            # What an attempt got stays: a server may send less than asked for, one that hangs up is asked for the rest.
            while len(got) < length:
                self._append(got, offset + len(got), offset + length)

        try:
            self._persist(attempt)
        except FileNotFoundError:
            raise DataError(f"{self.uri} was there and is gone: restore it or take it out of the data") from None
        return bytes(got)

    def close(self) -> None:
        """Nothing: connections belong to the process."""

    def _persist(self, attempt: Callable[[], T]) -> T:
        try:
            return persist(self._patience, attempt)
        except Passing as failure:
            raise DataError(
                f"{self.uri} cannot be read: {failure} ({self._patience.attempts} attempts); try later or add a mirror"
            ) from None

    def _ask_size(self) -> int:
        with self._get(0, 0) as response:
            if response.status == 416 and range_of(response)[1] == 0:
                return 0
            size = size_of(response)
        if size is None:
            raise DataError(f"{self.uri} has a server that does not tell its size: use one that honours byte ranges")
        return size

    def _append(self, got: bytearray, begin: int, end: int) -> None:
        """What one request gives of bytes [begin, end), at least one; :class:`Passing` where it gives none or stops."""
        with self._get(begin, end - 1) as response:
            if size_of(response) not in (None, self._size):
                raise DataError(
                    f"{self.uri} has {size_of(response)} bytes and had {self._size} when it was opened: "
                    "it was replaced under the run; restore it or start again"
                )
            if response.status == 200:
                skip, expected = begin, end
            else:
                first, _, last = range_of(response)
                skip, expected = 0, min(end, last + 1)
                if first != begin or expected <= begin:
                    raise DataError(f"{self.uri} has a server that answers other byte ranges than it is asked for")
            if skip > _MOST_SKIPPED:
                raise DataError(f"{self.uri} has a server that ignores byte ranges: use one that honours them")
            for chunk in self._chunks(response, skip, expected - begin):
                got += chunk

    def _chunks(self, response: urllib3.BaseHTTPResponse, skip: int, length: int) -> Iterator[bytes]:
        """``length`` bytes of the body after the first ``skip``."""
        left = skip + length
        deadline = time.monotonic() + self._patience.read + left / self._patience.slowest
        while left:
            try:
                chunk = response.read1(min(left, _CHUNK), decode_content=False)
            except HTTPError as error:
                raise Passing(words(error, "its server hung up in mid-answer")) from None
            if not chunk:
                raise Passing("its server hung up in mid-answer")
            if time.monotonic() > deadline:
                raise Passing(f"its server sends less than {self._patience.slowest} bytes per second")
            thrown = max(0, min(len(chunk), left - length))
            left -= len(chunk)
            yield chunk[thrown:]

    @contextmanager
    def _get(self, first: int, last: int) -> Iterator[urllib3.BaseHTTPResponse]:
        """The answer for bytes [first, last]: 200, 206 or 416; anything else is raised."""
        near = self._near if time.monotonic() < self._near_until else self._url
        url, response = self._follow(near, f"bytes={first}-{last}")
        try:
            if response.status not in (200, 206, 416) and near != self._url:
                self._near_until = 0.0
                raise Passing(f"its server answers {response.status}", asked=0.0)
            if url not in (near, self._url):
                self._near, self._near_until = url, time.monotonic() + _NEAR_SECONDS
            self._check(response)
            yield response
        except Passing:
            self._near_until = 0.0
            raise
        finally:
            # Closing without releasing would take the connection's place in the pool away for ever.
            response.close()
            response.release_conn()

    def _follow(self, url: str, byte_range: str) -> tuple[str, urllib3.BaseHTTPResponse]:
        """The answer at the end of redirects, and where that is."""
        timeout = urllib3.Timeout(connect=self._patience.connect, read=self._patience.read)
        for _ in range(_MOST_REDIRECTS + 1):
            headers = {"Range": byte_range, "Accept-Encoding": "identity", "User-Agent": "sparktrain"}
            if self._token.value and origin(url) == origin(self._url):
                headers["Authorization"] = f"Bearer {self._token.value}"
            try:
                # Redirects are followed here: urllib3 would log where they lead.
                response = pool(os.getpid(), proxy_for(url)).request(
                    "GET", url, headers=headers, redirect=False, retries=False, preload_content=False, timeout=timeout
                )
            except urllib3.exceptions.SSLError:
                raise DataError(f"{self.uri} has a certificate that this machine does not trust: install it") from None
            except HTTPError as error:
                self._near_until = 0.0
                raise Passing(words(error, "its server hung up")) from None
            target = response.get_redirect_location()
            if not target:
                return url, response
            response.close()
            response.release_conn()
            was, url = url, urljoin(url, target)
            if origin(url)[0] not in ("http", "https") or (origin(was)[0], origin(url)[0]) == ("https", "http"):
                raise DataError(f"{self.uri} is redirected from {origin(was)[0]} to {origin(url)[0]}: that is refused")
        raise DataError(f"{self.uri} is redirected more than {_MOST_REDIRECTS} times: give the address it leads to")

    def _check(self, response: urllib3.BaseHTTPResponse) -> None:
        status = response.status
        if status in (404, 410):
            raise FileNotFoundError(self.uri)
        if status in (401, 403):
            has = "which is set, does not admit to it" if self._token.value else "which is not set"
            raise DataError(
                f"{self.uri} may not be read (HTTP {status}): its token is taken from the environment variable "
                f"{self._token.variable}, {has}; set it on driver and executors"
            )
        if status in _PASSING:
            raise Passing(f"its server answers {status}", asked=retry_after(response))
        if status not in (200, 206, 416):
            raise DataError(f"{self.uri} cannot be read: its server answers {status}; check the address")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DataError(f"{self.uri} has a server that sends it compressed though asked not to: turn that off")


def open_if_there(uri: str, patience: Patience | None = None) -> HttpSource | None:
    """See :data:`sparktrain.tokens.source.Opener`."""
    try:
        split = urlsplit(uri)
        origin(uri)
    except ValueError:
        raise DataError("an http address is malformed: check its host and port") from None
    variable = token_variable(split.hostname or "")
    if split.query or split.fragment or "@" in split.netloc or not split.hostname:
        raise DataError(
            f"{split.scheme}://{split.hostname or ''}{split.path} is given with a user, password, query or fragment, "
            f"which would end up in the plan and in logs: give the address alone and a token in {variable}"
        )
    try:
        return HttpSource(uri, uri, Token(variable, os.environ.get(variable)), patience or Patience())
    except FileNotFoundError:
        return None


def token_variable(host: str) -> str:
    """The environment variable with the token for ``host``: ``SPARKTRAIN_TOKEN_DATA_EXAMPLE_ORG``. A host has its own
    so that none, a mirror above all, is handed what was meant for another; ``-`` is ``__``."""
    return "SPARKTRAIN_TOKEN_" + re.sub(r"[^A-Z0-9_]", "_", host.upper().replace("-", "__"))
