"""Ranks that hang, noticed by the driver: the one process that sees all of them and does not wait for any."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sparktrain import heartbeat
from sparktrain.beside import beside
from sparktrain.config import Launch

# For the tasks to end their ranks by themselves, before Spark is asked to end the tasks.
_TASKS_SECONDS = 15.0


class Verdict:
    """Whether and when a rank was found to hang."""

    def __init__(self) -> None:
        self._since: float | None = None

    def reach(self) -> None:
        self._since = time.monotonic()

    def is_ignored(self) -> bool:
        """The tasks should have ended long ago."""
        return self._since is not None and time.monotonic() - self._since > _TASKS_SECONDS


def hung(over: Path) -> str | None:
    """Which rank hung, where an attempt was ended for that, by its file ``over``."""
    with suppress(OSError, ValueError):
        return str(json.loads(over.read_text(encoding="utf-8"))["why"])
    return None


@contextmanager
def watching(launch: Launch, heartbeats: Sequence[Path], end: Callable[[str], None]) -> Iterator[Verdict]:
    """While inside, call ``end`` with a line that says which, when one of the ranks that write ``heartbeats`` hangs."""
    verdict = Verdict()

    def watch(over: threading.Event) -> None:
        judge = heartbeat.Watch(launch)
        while not over.wait(heartbeat.interval(launch)):
            if why := judge.hung(heartbeat.read(heartbeats), time.monotonic()):
                with suppress(OSError):
                    end(why)
                    verdict.reach()
                    return

    with beside("watch", watch, patience=5):
        yield verdict
