"""Signals that end the driver."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM unwind the driver, so that ranks are stopped and the run directory is released.

    pyspark's own SIGINT handler calls into the JVM from inside the handler, which fails where the interrupted code
    was a call into the JVM itself. And spark-submit's JVM, which gets a terminal's Ctrl-C too, sends SIGTERM when it
    goes: while the driver unwinds already, that must not end it half-way.
    """
    begun = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal begun
        if number == signal.SIGINT:
            begun = True
            raise KeyboardInterrupt
        if not begun:
            begun = True
            sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
