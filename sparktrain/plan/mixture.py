"""Several sources in one order: which source a place draws from, and which of its draws that is.

The places are cut into rounds of ``ROUND``. In each, a source of weight w has the same round(w * ROUND) places, spread
evenly: so the share of a source in a batch never strays by more than a few sequences, where drawing by chance would
stray by the batch's square root. A source that is drawn from more often than it has microshards begins its next epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparktrain.plan import psyche
from sparktrain.plan.shuffle import Ints

# Weights are met to half of 1/ROUND.
ROUND = 1 << 14


@dataclass(frozen=True)
class Source:
    """``shards`` shards of the plan that follow one another, and their part of all sequences."""

    name: str
    shards: int
    weight: float


@lru_cache(maxsize=4)
def pattern(weights: tuple[float, ...]) -> tuple[Ints, Ints, Ints]:
    """The places of a round: the source of each, and how many draws of that source come before it; and the draws of
    each source in a whole round. Weights sum to one."""
    counts = _counts(weights)
    source = np.repeat(np.arange(len(weights)), counts)
    draw = np.concatenate([np.arange(count) for count in counts])
    # The j-th of c draws stands at (j + 1/2) / c of the round.
    order = np.lexsort((source, (2 * draw + 1) / (2 * counts[source])))
    return source[order], draw[order], counts


def draws_of(round_: tuple[Ints, Ints, Ints], place: Ints) -> tuple[Ints, Ints]:
    """The source of each place, and how many draws of that source come before it; ``round_``: a pattern."""
    source, draw, counts = round_
    number, within = np.divmod(place, len(source))
    return source[within], number * counts[source[within]] + draw[within]


def draws_before(round_: tuple[Ints, Ints, Ints], place: int) -> list[int]:
    """How often each source is drawn from before ``place``."""
    source, _, counts = round_
    number, within = divmod(place, len(source))
    return [int(n) for n in number * counts + np.bincount(source[:within], minlength=len(counts))]


def places_before(round_: tuple[Ints, Ints, Ints], place: int) -> Ints:
    """How many of the places before ``place`` draw from each source."""
    source, _, counts = round_
    number, within = divmod(place, len(source))
    return number * np.bincount(source, minlength=len(counts)) + np.bincount(source[:within], minlength=len(counts))


def normalised(weights: Sequence[float]) -> list[float]:
    """``weights``, of which one is above 0, as parts of one."""
    largest = max(weights)  # so that their sum is finite
    total = math.fsum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]


@lru_cache(maxsize=4)
def psyche_pattern(weights: tuple[float, ...], sizes: tuple[int, ...], seed: bytes) -> tuple[Ints, Ints, Ints]:
    """Psyche's rule, as :func:`pattern`: a round has as many places as all sources have microshards, each drawn from
    the source that lags most behind its weight, then shuffled. Draws beyond a source's size repeat it from its start,
    and every round begins all sources anew."""
    total, drawn = sum(sizes), [0] * len(sizes)
    source, draw = np.empty(total, np.int64), np.empty(total, np.int64)
    for i in range(total):
        lag = [w * max(i, 1) - d for w, d in zip(weights, drawn, strict=True)]
        chosen = lag.index(max(lag))
        source[i], draw[i] = chosen, drawn[chosen]
        drawn[chosen] += 1
    order = psyche.shuffle_of_mixture(total, seed)
    whole = [-(-count // size) * size for count, size in zip(drawn, sizes, strict=True)]
    return source[order], draw[order], np.array(whole, dtype=np.int64)


def _counts(weights: tuple[float, ...]) -> Ints:
    """Places of each source in a round, by largest remainders; at least one each."""
    exact = np.array(weights) * ROUND
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    by_need = np.argsort(counts - exact, kind="stable")
    counts[by_need[: max(0, ROUND - int(counts.sum()))]] += 1
    while counts.sum() > ROUND:
        counts[np.argmax(counts)] -= 1
    return np.asarray(counts)
