"""Something that goes on in a thread of its own while something else is done."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def beside(name: str, act: Callable[[threading.Event], None], patience: float | None = None) -> Iterator[None]:
    """Run ``act`` in a thread called ``name`` while inside. It is told by its event when that is over, and waited for,
    at most ``patience`` seconds."""
    over = threading.Event()
    thread = threading.Thread(target=act, args=(over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience)
