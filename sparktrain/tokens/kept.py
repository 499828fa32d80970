"""What was decoded last and may be asked for again, bounded in bytes over all who share it."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Owner = TypeVar("Owner")
Value = TypeVar("Value")


class Kept(Generic[Owner, Value]):
    """Values by owner and number: those used last, up to ``limit`` bytes of them, or one. Safe from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[tuple[Owner, int], tuple[int, Value]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, owner: Owner, i: int, make: Callable[[], Value], size: Callable[[Value], int]) -> Value:
        """The value ``i`` of ``owner``, made if it is not there; ``size`` gives its bytes."""
        key = (owner, i)
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][1]
        # Not under the lock: others need not wait for a slow source. Two may make the same value; one of them is kept.
        value = make()
        with self._lock:
            self._values[key] = (size(value), value)
            while len(self._values) > 1 and sum(kept for kept, _ in self._values.values()) > self._limit:
                self._values.popitem(last=False)
        return value

    def find(self, owner: Owner, i: int) -> Value | None:
        """The value ``i`` of ``owner`` if it is there."""
        with self._lock:
            if (owner, i) not in self._values:
                return None
            self._values.move_to_end((owner, i))
            return self._values[owner, i][1]

    def drop(self, owner: Owner) -> None:
        """Forget what is ``owner``'s."""
        with self._lock:
            for key in [key for key in self._values if key[0] is owner]:
                del self._values[key]

    def numbers(self, owner: Owner) -> list[int]:
        """Those of the owner's values that are kept, in order."""
        with self._lock:
            return sorted(i for whose, i in self._values if whose is owner)
