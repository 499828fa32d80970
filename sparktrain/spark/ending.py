"""How the ranks of a Spark task end: with the task, with their attempt, and when they hang.

Pickled by value like ``task.py``, and for the same reason.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.5
# Each look is a request to a store.
_POLL_REMOTE_SECONDS = 2.0
# For torchrun to report on ranks that were killed.
_REPORT_SECONDS = 5.0


def die_with_parent() -> None:
    """To be called in a process that was just forked."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def stop(child: subprocess.Popen[bytes], grace: float) -> None:
    """End the process group, by SIGTERM and after ``grace`` by SIGKILL. Ranks are in sessions of torchrun's making;
    they follow it by their parent-death signal (``worker.py``)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                child.wait(grace)


@contextmanager
def with_attempt(child: subprocess.Popen[bytes], run_dir: str, over: str, beats: tuple[str, ...]) -> Iterator[None]:
    """Kill ``child``'s ranks, which write the files ``beats``, and it, when file ``over`` is made while inside.

    The ranks one by one: one that hangs may heed no signal but SIGKILL, and torchrun's end sends another.
    """
    left = threading.Event()

    def follow() -> None:
        while not left.wait(_POLL_REMOTE_SECONDS if "://" in over else _POLL_SECONDS):
            if _exists(over):
                for pid in _pids(run_dir, beats):
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_REPORT_SECONDS)
                stop(child, 0.5)
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _pids(run_dir: str, beats: tuple[str, ...]) -> list[int]:
    """The ranks that write ``beats`` and run on this machine."""
    said = [_read(file) for file in beats]
    here = [int(s["pid"]) for s in said if s.get("host") == socket.gethostname()]
    return [pid for pid in here if _is_rank(pid, run_dir)]


def _is_rank(pid: int, run_dir: str) -> bool:
    """Whether the process is a rank of the run, and not one that got its number since."""
    if sys.platform != "linux":
        return True
    with suppress(OSError):
        return run_dir.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def _exists(file: str) -> bool:
    if "://" not in file:
        return os.path.exists(file)
    with suppress(OSError):
        return _remote(file).exists()
    return False


def _remote(uri: str) -> Path:
    from sparktrain.storage import place

    return place(uri)


def _read(file: str) -> dict[str, Any]:
    """A file's values; none where it is not there, or just being written."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            place = _remote(file) if "://" in file else Path(file)
            return dict(json.loads(place.read_text(encoding="utf-8")))
        time.sleep(0.02)
    return {}
