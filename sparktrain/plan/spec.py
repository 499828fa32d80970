"""What a plan is a function of, and its rows."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sparktrain.plan import mixture, skip
from sparktrain.plan.mixture import Source
from sparktrain.plan.order import Order
from sparktrain.plan.shuffle import ROUNDS, Ints
from sparktrain.plan.steps import Stretch, first_position, stretch_of, stretches_of
from sparktrain.plan.windows import count_microshards, stride_of, window_length
from sparktrain.tokens.shard import Shard


class Assignment(NamedTuple):
    """One row of the plan: where a microshard stands in the global order and where its tokens are.

    ``epoch`` counts that of the microshard's source; ``start`` and ``length`` count tokens within the shard at
    ``path``.
    """

    step: int
    slot: int
    pos: int
    epoch: int
    microshard_id: int
    path: str
    start: int
    length: int


@dataclass(frozen=True)
class PlanSpec:
    """Everything the plan is a function of; written as ``plan.json``, so that ranks can recompute any row.

    Args:
        shards: in the order of their microshards.
        sequence_length: S, the stride of windows.
        total_batch: B, sequences per step, until the ramp's first change.
        steps: optimizer steps.
        seed: of the order.
        window: the rule by which shards are cut, a key of ``WINDOWS``.
        order: ``shuffle``, ``sequential`` or ``psyche``; ``block``, ``psyche_seed`` (hexadecimal): see ``order.py``.
        ramp: (step, batch): from that step on a step has so many sequences.
        skipped: microshards that are in no epoch; ``skipped_places``: places of the order that are passed over.
        sources: the shards in groups that are mixed by weight; none: one group.
    """

    shards: tuple[Shard, ...]
    sequence_length: int
    total_batch: int
    steps: int
    seed: int
    rounds: int = ROUNDS
    version: str = "sparktrain-shuffle-v1"
    window: str = "overlap1"
    order: str = "shuffle"
    block: int = 1
    psyche_seed: str = ""
    ramp: tuple[tuple[int, int], ...] = ()
    skipped: skip.Ranges = ()
    skipped_places: skip.Ranges = ()
    sources: tuple[Source, ...] = ()

    # -- the data ------------------------------------------------------------------------------------------------

    @cached_property
    def first_microshards(self) -> Ints:
        """``[len(shards) + 1]``: number of the first microshard of each shard; the last entry is N."""
        counts = [count_microshards(shard, self.sequence_length) for shard in self.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def strides(self) -> Ints:
        """``[len(shards)]``: tokens from one microshard of a shard to the next."""
        return np.array([stride_of(shard, self.sequence_length) for shard in self.shards], dtype=np.int64)

    @cached_property
    def _buckets(self) -> tuple[int, Ints]:
        """A width, and the shard that has the first of each so many microshards."""
        width = max(1, self.num_microshards // (8 * len(self.shards)))
        firsts = np.arange(0, self.num_microshards, width)
        return width, np.searchsorted(self.first_microshards, firsts, side="right") - 1

    def shards_of(self, microshard: Ints) -> Ints:
        """The shard of each microshard. Most are looked up: a search takes ten times as long."""
        width, shards = self._buckets
        found, firsts = shards[microshard // width], self.first_microshards
        later = np.flatnonzero(microshard >= firsts[found + 1])
        found[later] = np.searchsorted(firsts, microshard[later], side="right") - 1
        return found

    @property
    def num_microshards(self) -> int:
        return int(self.first_microshards[-1])

    @property
    def window_length(self) -> int:
        """Tokens read per sequence; all but the first are targets."""
        return window_length(self.window, self.sequence_length)

    @property
    def packed(self) -> bool:
        """Whether rows may hold several documents, each attended to alone."""
        return any({"position_ids", "sequence_lengths"} & set(shard.columns) for shard in self.shards)

    @property
    def leaves_targets_out(self) -> bool:
        """Whether a step may have fewer targets than :meth:`target_tokens`: what comes with tokens says which."""
        return any(shard.columns for shard in self.shards)

    @cached_property
    def first_of_sources(self) -> list[int]:
        """Number of the first microshard of each source."""
        shards = np.cumsum([0, *(source.shards for source in self.sources[:-1])])
        return [int(first) for first in self.first_microshards[shards]]

    @cached_property
    def orders(self) -> list[Order]:
        """The order of each source, whose microshards are counted from its first."""
        ends = [*self.first_of_sources[1:], self.num_microshards]
        # Psyche shuffles a mixture's draws and leaves its sources as they are.
        kind = "sequential" if self.order == "psyche" and self.mixed else self.order
        found = []
        for source, (first, end) in enumerate(zip(self.first_of_sources, ends, strict=True)):
            skipped = skip.merge((max(first, a) - first, min(end, b) - first) for a, b in self.skipped)
            seeds = (self.seed, self.rounds, self.block, source)
            found.append(Order(kind, end - first, *seeds, skipped, bytes.fromhex(self.psyche_seed)))
        return found

    @property
    def mixed(self) -> bool:
        return len(self.sources) > 1

    @property
    def mixture(self) -> tuple[Ints, Ints, Ints]:
        """The pattern of a mixture: see ``mixture.py``."""
        weights = tuple(source.weight for source in self.sources)
        if self.order == "psyche":
            sizes = tuple(order.kept for order in self.orders)
            return mixture.psyche_pattern(weights, sizes, bytes.fromhex(self.psyche_seed))
        return mixture.pattern(weights)

    # -- steps ---------------------------------------------------------------------------------------------------

    @cached_property
    def stretches(self) -> list[Stretch]:
        return stretches_of(self.total_batch, self.ramp)

    def first_position(self, step: int) -> int:
        """The position at which ``step`` begins."""
        return first_position(self.stretches, step)

    def batch_of(self, step: int) -> int:
        """Sequences of ``step``."""
        return stretch_of(self.stretches, step).batch

    @property
    def smallest_batch(self) -> int:
        """As many ranks can take part."""
        return min(stretch.batch for stretch in self.stretches if stretch.first_step < self.steps)

    @property
    def num_positions(self) -> int:
        return self.first_position(self.steps)

    def target_tokens(self, step: int) -> int:
        """Tokens that are predicted in ``step``, over all ranks."""
        return self.batch_of(step) * (self.window_length - 1)

    # -- contents ------------------------------------------------------------------------------------------------

    def contents(self, position: Ints) -> tuple[Ints, Ints, Ints]:
        """Source, epoch of that source, and microshard of each position."""
        source, index = self.draws(skip.places_of(self.skipped_places, position))
        if not self.mixed:
            return source, *self.orders[0].at(index)
        epoch, microshard = np.empty_like(index), np.empty_like(index)
        for number, (order, first) in enumerate(zip(self.orders, self.first_of_sources, strict=True)):
            here = source == number
            epoch[here], found = order.at(index[here])
            microshard[here] = found + first
        return source, epoch, microshard

    def draws(self, place: Ints) -> tuple[Ints, Ints]:
        """The source that each place draws from, and how many draws of that source come before it."""
        return mixture.draws_of(self.mixture, place) if self.mixed else (np.zeros_like(place), place)

    def draws_before(self, position: int) -> list[int]:
        """How often each source is drawn from before ``position``, with the places that are passed over."""
        place = int(skip.places_of(self.skipped_places, np.array([position - 1]))[0]) + 1
        return mixture.draws_before(self.mixture, place) if self.mixed else [place]

    def sources_of(self, position: Ints) -> Ints:
        """The source of each position."""
        return self.draws(skip.places_of(self.skipped_places, position))[0]

    @cached_property
    def sequences_of_sources(self) -> list[int]:
        """How many sequences of each source are trained on."""
        if not self.mixed:
            return [self.num_positions]
        last = int(skip.places_of(self.skipped_places, np.array([self.num_positions - 1]))[0])
        ranges = [(0, last + 1), *((a, b) for a, b in self.skipped_places if a <= last)]
        whole, *passed = [
            mixture.places_before(self.mixture, b) - mixture.places_before(self.mixture, a) for a, b in ranges
        ]
        return [int(n) for n in whole - sum(passed)]

    @property
    def asked(self) -> tuple[tuple[str, float, int], ...]:
        """What is asked of each source of a mixture."""
        pairs = zip(self.sources, self.orders, strict=True) if self.mixed else ()
        return tuple((source.name, source.weight, order.kept) for source, order in pairs)

    @property
    def epochs_begun(self) -> list[int]:
        """Of each source."""
        drawn = self.draws_before(self.num_positions)
        return [-(-count // order.kept) for count, order in zip(drawn, self.orders, strict=True)]

    # -- as a file -----------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PlanSpec":
        ranges = {name: tuple(map(tuple, values[name])) for name in ("ramp", "skipped", "skipped_places")}
        made = {
            "shards": tuple(map(Shard.from_json, values["shards"])),
            "sources": tuple(Source(**source) for source in values["sources"]),
        }
        return cls(**{**values, **ranges, **made})
