"""Sequences that a function makes of random numbers: ``data.dataset(rng, length, vocab_size, **data.arguments)``.

``rng`` is a ``numpy.random.Generator`` of its own for each sequence, seeded by ``run.seed`` and the sequence's number;
what the function gives is an item (``user.py``) of ``length`` tokens.
"""

from typing import Any

import numpy as np

from sparktrain.config import RunConfig
from sparktrain.plan import Share, steps
from sparktrain.tokens.sequences import Ints, Sequences
from sparktrain.train.pipelines.user import Items, call, find


class Generated:
    """See :class:`sparktrain.train.pipelines.Pipeline`."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self._name = config.data.dataset or "random tokens"
        self._make = find(config.data.dataset) if config.data.dataset else random_tokens
        self._arguments, self._seed = config.data.arguments, config.run.seed
        self._items = Items.of(self._name, config, vocab_size)
        self.shard = self._items.shard("generated", count(config), self._item(0))

    def read(self, share: Share) -> Sequences:
        numbers = (share.start // share.window_length).tolist()
        return self._items.sequences([self._item(number) for number in numbers], numbers, self.shard.columns)

    def _item(self, number: int) -> Any:
        rng = np.random.Generator(np.random.Philox(key=np.array([self._seed, number], dtype=np.uint64)))
        length, vocab_size = self._items.length, self._items.vocab_size
        return call(f"item {number} of {self._name}", self._make, rng, length, vocab_size, **self._arguments)


def random_tokens(rng: np.random.Generator, length: int, vocab_size: int) -> Ints:
    """Any token as likely as any other: nothing to learn, for trying out models and clusters."""
    return rng.integers(0, vocab_size, length)


def count(config: RunConfig) -> int:
    """Sequences of an epoch: as set, or as many as the run's steps take, with those that are passed over."""
    stretches = steps.stretches_of(config.train.total_batch, config.train.batch_ramp)
    taken = [(0, config.train.steps), *(entry.steps for entry in config.data.skip if entry.steps)]
    sequences = (
        steps.first_position(stretches, last) - steps.first_position(stretches, first) for first, last in taken
    )
    return config.data.sequences or sum(sequences)
