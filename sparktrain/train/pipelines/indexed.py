"""A map-style dataset of the user's: ``len(data)`` items, ``data[i]`` is the i-th, as PyTorch and datasets have them.

``data.dataset`` is such an object, or a class or function that makes one of ``data.arguments``. Where it has
``__getitems__``, the items of a batch are asked for together.
"""

from typing import Any

from sparktrain.config import RunConfig
from sparktrain.errors import DataError
from sparktrain.plan import Share
from sparktrain.tokens.sequences import Sequences
from sparktrain.train.pipelines.user import Items, call, find


class Indexed:
    """See :class:`sparktrain.train.pipelines.Pipeline`."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        name = config.data.dataset
        found = find(name)
        if isinstance(found, type) or not hasattr(found, "__getitem__"):
            found = call(name, found, **config.data.arguments)
        if not (hasattr(found, "__getitem__") and hasattr(found, "__len__")):
            kind = type(found).__name__
            raise DataError(f"{name} gives a {kind}, which has no items by number: give it __len__ and __getitem__")
        self._data, self._name, self._items = found, name, Items.of(name, config, vocab_size)
        count = call(f"the length of {name}", len, found)
        if not count:
            raise DataError(f"{name} has no items: give it some to train on")
        self.shard = self._items.shard("indexed", count, self._get([0])[0])

    def read(self, share: Share) -> Sequences:
        numbers = (share.start // share.window_length).tolist()
        return self._items.sequences(self._get(numbers), numbers, self.shard.columns)

    def _get(self, numbers: list[int]) -> list[Any]:
        if hasattr(self._data, "__getitems__"):
            found = list(call(f"{self._name}.__getitems__({numbers[:3]}...)", self._data.__getitems__, numbers))
            if len(found) != len(numbers):
                raise DataError(
                    f"{self._name}.__getitems__ gives {len(found)} items for {len(numbers)}: it must give all"
                )
            return found
        return [call(f"item {number} of {self._name}", self._data.__getitem__, number) for number in numbers]
