"""A real HTTP server for tests, with the faults that real ones have."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sparktrain.tokens.sources.patience import Patience

FAST = Patience(attempts=4, first_wait=0.001, longest_wait=0.002, longest_asked=0.01, connect=5, read=5)
IMPATIENT = replace(FAST, read=0.2, slowest=1 << 20)
Fault = Any
"""None, or a status, ``(status, headers)``, or one of the words that ``_Handler._fault`` knows."""


class Web(ThreadingHTTPServer):
    """Serves ``files``; ``fault(nth request from 0, path)`` says what goes wrong with it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.fault: Callable[[int, str], Fault] = lambda n, path: None
        self.asked: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is its own business."""


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        with self.server.lock:
            n = len(self.server.asked)
            self.server.asked.append((self.path, self.headers["Range"], self.headers["Authorization"]))
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        try:
            fault = self.server.fault(n, self.path)
            if fault == "slow":
                time.sleep(0.03)
                fault = None
            if fault is None:
                self._serve(self.path.partition("?")[0])
            else:
                self._fault(fault)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def _serve(self, path: str, ignore_range: bool = False, times: float = 1.0, shift: int = 0) -> None:
        """The file or the part asked for; ``times`` is how much of the part to send, honestly."""
        body = self.server.files.get(path)
        if body is None:
            self._answer(404, {}, b"no such thing")
        elif self.headers["Range"] is None or ignore_range:
            self._answer(200, {}, body)
        else:
            first, last = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
            if first >= len(body):
                self._answer(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
                return
            first, last = first + shift, min(last, len(body) - 1)
            last = first + max(1, int((last + 1 - first) * times)) - 1
            self._answer(206, {"Content-Range": f"bytes {first}-{last}/{len(body)}"}, body[first : last + 1])

    def _fault(self, fault: Fault) -> None:
        if isinstance(fault, int):
            self._answer(fault, {}, b"sorry")
        elif isinstance(fault, tuple):
            self._answer(fault[0], fault[1], b"")
        elif fault == "drop":
            self.close_connection = True
        elif fault == "silent":
            time.sleep(0.4)
            self.close_connection = True
        elif fault in ("truncate", "drip"):
            self._cut(fault)
        elif fault == "ignore":
            self._serve(self.path, ignore_range=True)
        elif fault == "half":
            self._serve(self.path, times=0.5)
        elif fault == "other":
            self._serve(self.path, shift=1)
        elif fault == "gzip":
            self._answer(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b")
        else:
            raise AssertionError(fault)

    def _cut(self, fault: str) -> None:
        """Promise the whole part; send half of it and hang up, or send it too slowly."""
        body = self.server.files[self.path]
        first, last = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        part = body[first : last + 1]
        self.close_connection = True
        if fault == "truncate":
            self.wfile.write(part[: len(part) // 2])
        for byte in part if fault == "drip" else b"":
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve() -> Iterator[Web]:
    with Web() as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield web
        web.shutdown()
        thread.join()
