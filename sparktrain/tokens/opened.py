"""Things that are open, by name: those used last, up to a number of them."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    def close(self) -> None:
        """Let go of it."""


Thing = TypeVar("Thing", bound=Closable)


@dataclass
class _Place(Generic[Thing]):
    users: int = 0
    thing: Thing | None = None
    lock: Lock = field(default_factory=Lock)


class _Use(Generic[Thing]):
    """A generator would cost three times this, for each window that is read."""

    def __init__(self, opened: "Opened[Thing]", name: str) -> None:
        self._opened, self._name = opened, name

    def __enter__(self) -> Thing:
        return self._opened.take(self._name)

    def __exit__(self, *error: object) -> None:
        self._opened.give_back(self._name)


class Opened(Generic[Thing]):
    """At most ``most`` things that ``open`` opened, or as many as are in use. Safe from several threads."""

    def __init__(self, open: Callable[[str], Thing], most: int) -> None:
        self._open, self._most = open, most
        self._places: OrderedDict[str, _Place[Thing]] = OrderedDict()
        self._lock = Lock()

    def use(self, name: str) -> "_Use[Thing]":
        """``with`` it: the thing called ``name``, open at least until the end of the block."""
        return _Use(self, name)

    def take(self, name: str) -> Thing:
        """The thing called ``name``, until it is given back."""
        with self._lock:
            place = self._places.setdefault(name, _Place())
            self._places.move_to_end(name)
            place.users += 1
        try:
            with place.lock:  # not the one of all: others need not wait for a server that is slow to open
                if place.thing is None:
                    place.thing = self._open(name)
                return place.thing
        except BaseException:
            self.give_back(name)
            raise

    def give_back(self, name: str) -> None:
        """What was taken."""
        with self._lock:
            self._places[name].users -= 1
            self._close_down_to(self._most)

    def close(self) -> None:
        """Close what is not in use."""
        with self._lock:
            self._close_down_to(0)

    def _close_down_to(self, most: int) -> None:
        if len(self._places) <= most:
            return
        idle = [name for name, place in self._places.items() if not place.users]
        for name in idle[: max(0, len(self._places) - most)]:
            thing = self._places.pop(name).thing
            if thing is not None:
                thing.close()
