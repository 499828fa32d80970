"""The order of one source's microshards, epoch after epoch.

``shuffle`` is the keyed bijection. With ``block`` c > 1 it moves blocks of c microshards that follow one another in
their shard, which are then read in one piece; where the blocks begin differs by epoch, and the fewer than c that are
left over come last. ``sequential`` is the order of the shards. ``psyche`` is Psyche's, the same in every epoch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparktrain.plan import psyche, skip
from sparktrain.plan.shuffle import ROUNDS, Ints, hash_of, invert, permute, round_keys


@dataclass(frozen=True)
class Order:
    """The microshards 0..n-1 of one source without the ``skipped``, over and over, each time in another order.

    Args:
        kind: ``shuffle``, ``sequential`` or ``psyche``.
        n: microshards of the source, at least one of them not skipped.
        seed: of ``shuffle``.
        source: number of the source: each has keys of its own.
        psyche_seed: 32 bytes, of ``psyche``.
    """

    kind: str
    n: int
    seed: int
    rounds: int = ROUNDS
    block: int = 1
    source: int = 0
    skipped: skip.Ranges = ()
    psyche_seed: bytes = b""

    @property
    def kept(self) -> int:
        """Microshards of an epoch."""
        return self.n - skip.total(self.skipped)

    @property
    def num_blocks(self) -> int:
        """Whole blocks of an epoch: what the bijection moves."""
        return self.n // self.block

    def keys(self, epoch: int) -> list[int]:
        return round_keys(self.seed, epoch, self.rounds, self.source)

    def rotation(self, epoch: int) -> int:
        """The microshard at which the first block of an epoch begins."""
        return hash_of(self.seed, epoch, "rotation", self.source) % self.n if self.block > 1 else 0

    def at(self, index: Ints) -> tuple[Ints, Ints]:
        """Epoch and microshard of the ``index``-th that is taken from this source."""
        epoch, i = np.divmod(index, self.kept)
        if len(i) and (one := int(epoch.min())) == epoch.max():
            return epoch, self.in_epoch(one, i)
        microshard = np.empty_like(i)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            microshard[here] = self.in_epoch(e, i[here])
        return epoch, microshard

    def in_epoch(self, epoch: int, i: Ints) -> Ints:
        """The microshard of each place in [0, kept) of an epoch."""
        found = self._whole(epoch, i)
        # Places of skipped ones are taken by what the places from kept on hold, of which there are as many; where
        # that is a skipped one too, by what is at the place that this one is matched with in turn.
        while ((rank := skip.rank_in(self.skipped, found)) >= 0).any():
            bad = rank >= 0
            found[bad] = self._whole(epoch, self.kept + rank[bad])
        return found

    def replaced(self, epoch: int) -> tuple[Ints, Ints]:
        """The places of an epoch that would hold a skipped microshard, and what they hold: as many as are skipped."""
        places = self._places(epoch, skip.members(self.skipped))
        places = np.sort(places[places < self.kept])
        return places, self.in_epoch(epoch, places)

    def _whole(self, epoch: int, i: Ints) -> Ints:
        """The order with nothing skipped."""
        if self.kind == "sequential":
            return i.copy()
        if self.kind == "psyche":
            return _psyche(self.n, self.psyche_seed)[i]
        block, within = np.divmod(i, self.block)
        moved = block < self.num_blocks
        block[moved] = permute(block[moved], self.num_blocks, self.keys(epoch)) if moved.any() else block[moved]
        return (block * self.block + within + self.rotation(epoch)) % self.n

    def _places(self, epoch: int, microshards: Ints) -> Ints:
        """The inverse of :meth:`_whole`."""
        if self.kind == "sequential":
            return microshards
        if self.kind == "psyche":
            return np.argsort(_psyche(self.n, self.psyche_seed))[microshards]
        block, within = np.divmod((microshards - self.rotation(epoch)) % self.n, self.block)
        moved = block < self.num_blocks
        block[moved] = invert(block[moved], self.num_blocks, self.keys(epoch)) if moved.any() else block[moved]
        return block * self.block + within


@lru_cache(maxsize=4)
def _psyche(n: int, seed: bytes) -> Ints:
    return psyche.permutation(n, seed)
