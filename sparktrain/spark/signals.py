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
    was a call into the JVM itself."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: leave}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
