"""The plan's rows, computed: in columns, one by one, and those of a few windows."""

from collections.abc import Sequence

import numpy as np

from sparktrain.plan.shuffle import Ints
from sparktrain.plan.spec import Assignment, PlanSpec
from sparktrain.plan.steps import steps_and_slots
from sparktrain.plan.windows import stride_of
from sparktrain.tokens.shard import Shard


def columns(spec: PlanSpec, first_pos: int, last_pos: int) -> dict[str, Ints]:
    """The plan's rows for positions [first_pos, last_pos) as the fields of :class:`Assignment`, ``[rows]`` each;
    ``path`` as an index into ``spec.shards``."""
    pos = np.arange(first_pos, last_pos, dtype=np.int64)
    step, slot = steps_and_slots(spec.stretches, pos)
    _, epoch, microshard = spec.contents(pos)
    shard = spec.shards_of(microshard)
    start = (microshard - spec.first_microshards[shard]) * spec.strides[shard]
    length = np.full(len(pos), spec.window_length)
    return dict(zip(Assignment._fields, (step, slot, pos, epoch, microshard, shard, start, length), strict=True))


def rows(spec: PlanSpec, first_pos: int, last_pos: int) -> list[Assignment]:
    """The plan's rows for positions [first_pos, last_pos): what the Parquet files must hold."""
    found = {name: column.tolist() for name, column in columns(spec, first_pos, last_pos).items()}
    found["path"] = [spec.shards[shard].path for shard in found["path"]]
    return [Assignment(*row) for row in zip(*found.values(), strict=True)]


def spread_windows(shards: list[Shard], sequence_length: int, limit: int) -> list[tuple[Shard, int]]:
    """At most ``limit`` windows over ``shards``, evenly spaced: the same for every rank and number of ranks."""
    spec = PlanSpec(tuple(shards), sequence_length, total_batch=1, steps=1, seed=0)
    chosen = np.unique(np.linspace(0, spec.num_microshards - 1, min(limit, spec.num_microshards)).astype(np.int64))
    return windows_at(shards, sequence_length, chosen)


def windows_at(shards: Sequence[Shard], sequence_length: int, microshards: Ints) -> list[tuple[Shard, int]]:
    """The shard and first token of each of ``microshards``, counted through ``shards``."""
    firsts = PlanSpec(tuple(shards), sequence_length, total_batch=1, steps=1, seed=0).first_microshards
    which = np.searchsorted(firsts, microshards, side="right") - 1
    nth = microshards - firsts[which]
    return [
        (shards[s], i * stride_of(shards[s], sequence_length))
        for s, i in zip(which.tolist(), nth.tolist(), strict=True)
    ]
