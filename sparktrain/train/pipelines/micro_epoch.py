"""Sequences that a function makes of a lease: ``data.dataset(lease, **data.arguments)`` gives an item (``user.py``) for
each microshard of the lease, in their order.

A lease is what a rank has of a step::

    lease_id        of the run's seed, the step and the microshards: the same wherever they are taken again
    step            counted from 0
    microshard_ids  numbers; ``epochs``: how often each was taken before
    ordinals        where each is in the batch of all ranks
    sequence_length, window_length, vocab_size, seed
    payload         ``data.payload``, any JSON

How microshards come together in leases depends on the number of ranks, so what is made of one must not depend on the
others.
"""

import copy
import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import numpy as np

from sparktrain.config import RunConfig
from sparktrain.errors import DataError
from sparktrain.plan import Share
from sparktrain.tokens.sequences import Sequences
from sparktrain.train.pipelines.generated import count
from sparktrain.train.pipelines.user import Items, call, find


class MicroEpoch:
    """See :class:`sparktrain.train.pipelines.Pipeline`."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self._name, self._arguments = config.data.dataset, config.data.arguments
        self._make, self._items = find(self._name), Items.of(self._name, config, vocab_size)
        self._common = {
            "sequence_length": config.data.sequence_length,
            "window_length": self._items.length,
            "vocab_size": vocab_size,
            "seed": config.run.seed,
            "payload": config.data.payload,
        }
        # Before there is a plan: what the function gives for the first microshard says what it gives.
        none = np.zeros(1, dtype=np.int64)
        first = Share(0, none, none, none, none, none, none, [self._name], self._items.length)
        self.shard = self._items.shard("micro-epoch", count(config), self._made(first)[0])

    def read(self, share: Share) -> Sequences:
        return self._items.sequences(self._made(share), share.microshard_id.tolist(), self.shard.columns)

    def _made(self, share: Share) -> list[Any]:
        numbers, epochs = share.microshard_id.tolist(), share.epoch.tolist()
        named = json.dumps([self._common["seed"], share.step, epochs, numbers]).encode()
        lease = copy.deepcopy(self._common) | {
            "lease_id": sha256(named).hexdigest(),
            "step": share.step,
            "microshard_ids": numbers,
            "epochs": epochs,
            "ordinals": share.slot.tolist(),
        }
        what = f"{self._name} of the lease of step {share.step}"
        found = call(what, self._make, lease, **self._arguments)
        if not isinstance(found, Iterable):
            raise DataError(f"{self._name} gives a {type(found).__name__}: expected an item for each microshard")
        items: list[Any] = call(what, list, found)
        if len(items) != len(numbers):
            raise DataError(f"{self._name} gives {len(items)} items for a lease of {len(numbers)}: give one for each")
        return items
