"""Connections to HTTP servers, and what their answers say in headers and failures."""

import re
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader

# Connections of one process to one host: reads beyond them wait their turn.
CONNECTIONS = 16
_DROPPED: dict[type[HTTPError], str] = {
    urllib3.exceptions.NameResolutionError: "the name of its host is not known",
    urllib3.exceptions.NewConnectionError: "its host takes no connection",
    urllib3.exceptions.ConnectTimeoutError: "its host does not answer",
    urllib3.exceptions.ReadTimeoutError: "its server fell silent",
    urllib3.exceptions.ProxyError: "the proxy cannot reach it",
}


@lru_cache(maxsize=4)
def pool(process: int, proxy: str | None) -> urllib3.PoolManager:
    """This process's connections: a fork must not talk over its parent's."""
    if proxy:
        return urllib3.ProxyManager(proxy, maxsize=CONNECTIONS, block=True)
    return urllib3.PoolManager(maxsize=CONNECTIONS, block=True)


def proxy_for(url: str) -> str | None:
    """The proxy that this machine is set to use for ``url``."""
    scheme, host, _ = origin(url)
    return None if proxy_bypass(host) else getproxies().get(scheme)


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: who is meant by ``url``."""
    split = urlsplit(url)
    return split.scheme, split.hostname or "", split.port or {"http": 80, "https": 443}.get(split.scheme)


def range_of(response: urllib3.BaseHTTPResponse) -> tuple[int, int | None, int]:
    """First byte, size of the whole (None where not told), last byte of a partial answer; -1 where there are none."""
    found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if not found:
        return -1, None, -1
    first, last, size = found.groups()
    return int(first or -1), None if size == "*" else int(size), int(last or -1)


def size_of(response: urllib3.BaseHTTPResponse) -> int | None:
    """Bytes of the whole file, as the answer tells them."""
    if response.status != 200:
        return range_of(response)[1]
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    """Seconds after which the server asks us to come back."""
    try:
        return urllib3.Retry().get_retry_after(response)
    except InvalidHeader:
        return None


def words(error: HTTPError, otherwise: str) -> str:
    """What went wrong, in ours: the library's own may hold the address that a redirect led to."""
    return next((said for kind, said in _DROPPED.items() if isinstance(error, kind)), otherwise)
