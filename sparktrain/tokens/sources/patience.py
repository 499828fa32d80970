"""How long to try: time-outs, and growing, jittered waits between attempts at what may pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Seconds, except where said.

    Args:
        attempts: attempts in all, then the error is the user's.
        first_wait: wait before the second attempt; doubles with each, plus up to as much again by chance, so that
            ranks that failed together do not come back together.
        longest_wait: where the doubling ends.
        longest_asked: the longest wait that a server's Retry-After may ask for.
        connect: until a connection stands.
        read: without a single byte.
        slowest: bytes per second under which an attempt is given up, whatever trickles in.
    """

    attempts: int = 6
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_asked: float = 300.0
    connect: float = 10.0
    read: float = 30.0
    slowest: int = 16 << 10


class Passing(Exception):
    """A failure worth another attempt, in words that follow the name of what failed. ``asked``: seconds to wait, from
    the other side."""

    def __init__(self, words: str, asked: float | None = None) -> None:
        super().__init__(words)
        self.asked = asked


def persist(patience: Patience, attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns, tried again while it raises :class:`Passing`; in the end the last of these."""
    grow = tenacity.wait_exponential_jitter(
        initial=patience.first_wait, max=patience.longest_wait, jitter=patience.first_wait
    )

    def wait(state: tenacity.RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.asked if isinstance(failure, Passing) and failure.asked else 0.0
        return max(grow(state), min(asked, patience.longest_asked))

    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(patience.attempts),
        wait=wait,
        retry=tenacity.retry_if_exception_type(Passing),
        reraise=True,
    )(attempt)
