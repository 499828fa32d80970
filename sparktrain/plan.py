"""Which sequence is trained on when, and by whom: pure arithmetic on arrays, the same in driver, ranks and tests.

A **microshard** is one sequence's window of tokens in a shard. The window rule says how a shard of N tokens is cut:
``overlap1`` reads S+1 tokens at stride S, all but the first are predicted, and as windows overlap by one token only a
shard's first token is never a target; ``psyche`` reads S tokens at stride S, of which S-1 are predicted, as Psyche's
local provider does. Both find floor((N-1)/S) windows. A file of rows was cut by whoever wrote it: a row is a window.

Microshards are numbered 0..N-1 through the shards in order. **Positions** p = 0, 1, 2, ... are the order of training:
p belongs to epoch ``p // N`` and holds microshard ``permute(p % N)``, a keyed bijection of that epoch. **Step** s is
positions [s*B, (s+1)*B); **slot** j is its j-th. Rank r of W takes slots [r*B//W, (r+1)*B//W). Nothing here but
``slots_of`` knows the number of ranks, so the global batch of a step cannot depend on it, and the loader's whole state
is one integer.

The bijection (``sparktrain-shuffle-v1``) is a Feistel network over the mixed radix a*b >= N with a = ceil(sqrt(N)),
whose round function is Spark's ``xxhash64(right, key) pmod 2^31-1``, so that ``spark/planner.py`` computes the same
numbers in SQL; values >= N walk on along their cycle. Four rounds already pass every test of shuffle quality that
NumPy's own permutation passes, two do not; six are the margin.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparktrain.tokens.shard import Shard

Ints = npt.NDArray[np.int64]

ROUNDS = 6
# Window rules: tokens read beyond S.
WINDOWS = {"overlap1": 1, "psyche": 0}
_MODULUS = 2**31 - 1
_P1, _P2, _P3 = (np.uint64(p) for p in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
_P4, _P5 = (np.uint64(p) for p in (0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5))


class Assignment(NamedTuple):
    """One row of the plan: where a microshard stands in the global order and where its tokens are.

    ``start`` and ``length`` count tokens within the shard at ``path``.
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
        total_batch: B, sequences per step.
        steps: optimizer steps.
        seed: of the order.
        window: the rule by which shards are cut, a key of ``WINDOWS``.
    """

    shards: tuple[Shard, ...]
    sequence_length: int
    total_batch: int
    steps: int
    seed: int
    rounds: int = ROUNDS
    version: str = "sparktrain-shuffle-v1"
    window: str = "overlap1"

    @property
    def first_microshards(self) -> Ints:
        """``[len(shards) + 1]``: number of the first microshard of each shard; the last entry is N."""
        counts = [count_microshards(shard, self.sequence_length) for shard in self.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @property
    def num_microshards(self) -> int:
        return int(self.first_microshards[-1])

    @property
    def num_positions(self) -> int:
        return self.steps * self.total_batch

    @property
    def num_epochs(self) -> int:
        return -(-self.num_positions // self.num_microshards)

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
        """Whether a step may have fewer targets than ``target_tokens_per_step``: what comes with tokens says which."""
        return any(shard.columns for shard in self.shards)

    @property
    def target_tokens_per_step(self) -> int:
        """Where no token is left out."""
        return self.total_batch * (self.window_length - 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PlanSpec":
        return cls(**{**values, "shards": tuple(map(Shard.from_json, values["shards"]))})


def window_length(window: str, sequence_length: int) -> int:
    """Tokens of a window under the rule ``window``."""
    return sequence_length + WINDOWS[window]


def stride_of(shard: Shard, sequence_length: int) -> int:
    """Tokens from one window of ``shard`` to the next."""
    return shard.row_length or sequence_length


def count_microshards(shard: Shard, sequence_length: int) -> int:
    """Windows in ``shard``, by either rule."""
    if shard.row_length:
        return shard.num_tokens // shard.row_length
    return max(0, (shard.num_tokens - 1) // sequence_length)


def slots_of(rank: int, world: int, total_batch: int) -> tuple[int, int]:
    """Half-open range of slots of ``rank``: together the ranks cover [0, total_batch) once, for any world size."""
    return rank * total_batch // world, (rank + 1) * total_batch // world


def rows(spec: PlanSpec, first_pos: int, last_pos: int) -> list[Assignment]:
    """The plan's rows for positions [first_pos, last_pos): what the Parquet files must hold."""
    n, firsts = spec.num_microshards, spec.first_microshards
    pos = np.arange(first_pos, last_pos, dtype=np.int64)
    ids = np.empty_like(pos)
    for epoch in np.unique(pos // n):
        here = pos // n == epoch
        ids[here] = permute(pos[here] % n, n, round_keys(spec.seed, int(epoch), spec.rounds))
    shard = np.searchsorted(firsts, ids, side="right") - 1
    strides = np.array([stride_of(s, spec.sequence_length) for s in spec.shards], dtype=np.int64)
    start = (ids - firsts[shard]) * strides[shard]
    batch, length = spec.total_batch, spec.window_length
    columns = (pos // batch, pos % batch, pos, pos // n, ids, shard, start)
    return [
        Assignment(step, slot, p, epoch, m, spec.shards[s].path, first, length)
        for step, slot, p, epoch, m, s, first in zip(*(c.tolist() for c in columns), strict=True)
    ]


def spread_windows(shards: list[Shard], sequence_length: int, limit: int) -> list[tuple[Shard, int]]:
    """At most ``limit`` windows over ``shards``, evenly spaced: the same for every rank and number of ranks."""
    spec = PlanSpec(tuple(shards), sequence_length, total_batch=1, steps=1, seed=0)
    chosen = np.unique(np.linspace(0, spec.num_microshards - 1, min(limit, spec.num_microshards)).astype(np.int64))
    which = np.searchsorted(spec.first_microshards, chosen, side="right") - 1
    nth = chosen - spec.first_microshards[which]
    return [
        (shards[s], i * stride_of(shards[s], sequence_length))
        for s, i in zip(which.tolist(), nth.tolist(), strict=True)
    ]


def round_keys(seed: int, epoch: int, rounds: int = ROUNDS) -> list[int]:
    """55-bit keys of the bijection of one epoch: SHA-256 of ``sparktrain-shuffle-v1|seed|epoch|round``."""
    names = (f"sparktrain-shuffle-v1|{seed}|{epoch}|{r}" for r in range(rounds))
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little") >> 1 for name in names]


def radices(n: int) -> tuple[int, int]:
    """The mixed radix (a, b) of the Feistel network over [0, n): a*b >= n with a*b - n < sqrt(n) + 1."""
    a = math.isqrt(n)
    a += a * a < n
    return a, -(-n // a)


def permute(i: Ints, n: int, keys: Sequence[int]) -> Ints:
    """The bijection of [0, n) under ``keys``, elementwise; ``i`` and the result are int64 in [0, n)."""
    out = _feistel(i, n, keys)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], n, keys)
    return out


def walkers(n: int, keys: Sequence[int]) -> Ints:
    """The fewer than sqrt(n) + 1 inputs in [0, n) whose first step leaves it, found by inverting [n, a*b).

    SQL computes one Feistel step and takes these few from a table: cycle walking in SQL is 3 to 10 times slower.
    """
    a, b = radices(n)
    inputs = _feistel_inverse(np.arange(n, a * b, dtype=np.int64), n, keys)
    return np.sort(inputs[inputs < n])


def _feistel(i: Ints, n: int, keys: Sequence[int]) -> Ints:
    a, b = radices(n)
    left, right = np.divmod(i, b)
    for key in keys:
        left, right, a, b = right, (left + _round(right, key)) % a, b, a
    return left * b + right


def _feistel_inverse(i: Ints, n: int, keys: Sequence[int]) -> Ints:
    a, b = radices(n) if len(keys) % 2 == 0 else radices(n)[::-1]
    left, right = np.divmod(i, b)
    for key in reversed(keys):
        a, b = b, a
        left, right = (right - _round(left, key)) % a, left
    return left * b + right


def _round(right: Ints, key: int) -> Ints:
    """Spark SQL's ``pmod(xxhash64(right, key), 2^31 - 1)`` of two bigint columns."""
    seed = np.full(right.shape, 42, dtype=np.uint64)
    hashed = _xxh64_long(np.uint64(key), _xxh64_long(right.astype(np.uint64), seed))
    return hashed.astype(np.int64) % _MODULUS


def _xxh64_long(value: Any, seed: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """XXH64 of one 8-byte value, as Spark chains it over columns (the hash so far is the next seed)."""
    with np.errstate(over="ignore"):
        mixed = _rotl(value * _P2, 31) * _P1
        h = _rotl((seed + _P5 + np.uint64(8)) ^ mixed, 27) * _P1 + _P4
        h = (h ^ (h >> np.uint64(33))) * _P2
        h = (h ^ (h >> np.uint64(29))) * _P3
    return np.asarray(h ^ (h >> np.uint64(32)))


def _rotl(x: Any, bits: int) -> Any:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))
