"""Reads ahead of who needs them, in order, by a bounded number of threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(items: Iterable[T], read: Callable[[T], R], workers: int, ahead: int) -> Generator[R, None, None]:
    """``read(item)`` for each of ``items``, in their order; up to ``workers`` of them run at a time.

    ``ahead`` results, waiting or under way, are held beyond the one in the consumer's hands: memory is bounded by it,
    and so is how far ``items``, which may be endless, is drawn. What ``read`` raises is raised at that item's turn,
    after all before it. Reading begins with the first ``next()``; closing the iterator waits for reads under way and
    starts no other.
    """
    assert workers > 0, "a reader is needed"
    assert ahead > 0, "room for a result is needed"
    threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="read-ahead")
    waiting: deque[Future[R]] = deque()
    source = iter(items)
    try:
        for item in source:
            waiting.append(threads.submit(read, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
