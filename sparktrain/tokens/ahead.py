"""Reads ahead of who needs them, in order, by a bounded number of threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
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
    assert ahead > 0, "room for a result is needed"
    with closing(read_parts_ahead(((item,) for item in items), read, workers, ahead, 0)) as results:
        for (result,) in results:
            yield result


def read_parts_ahead(
    items: Iterable[Sequence[T]], read: Callable[[T], R], workers: int, ahead: int, parts: int
) -> Generator[list[R], None, None]:
    """The same for items of several parts, which are read side by side: for each item, ``read(part)`` of its parts.
    ``ahead`` items are held, and more while these have fewer than ``parts`` parts in all."""
    assert workers > 0, "a reader is needed"
    threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="read-ahead")
    waiting: deque[list[Future[R]]] = deque()
    held = 0
    try:
        for item in items:
            waiting.append([threads.submit(read, part) for part in item])
            held += len(waiting[-1])
            while len(waiting) > ahead and held - len(waiting[0]) >= parts:
                held -= len(waiting[0])
                yield [part.result() for part in waiting.popleft()]
        while waiting:
            yield [part.result() for part in waiting.popleft()]
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
