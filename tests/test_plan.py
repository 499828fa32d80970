"""plan.py: the order is a bijection, the same everywhere, and knows nothing of ranks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktrain import plan
from sparktrain.plan import PlanSpec
from sparktrain.tokens import Shard


def spec_of(tokens: list[int], **changes: int | str) -> PlanSpec:
    values = {"sequence_length": 16, "total_batch": 5, "steps": 7, "seed": 3} | changes
    shards = tuple(Shard(f"/shards/{i}.ds", n, 2) for i, n in enumerate(tokens))
    return PlanSpec(shards=shards, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "epoch", "i", "expected"),
    [(1009, 0, [0, 1, 2, 1008], [386, 755, 825, 126]), (1009, 1, [0, 1], [890, 744])]
    + [(10**9 + 7, 0, [0, 1, 10**9], [9098269, 184025002, 934476079])],
)
def test_the_bijection_gives_the_published_numbers(n: int, epoch: int, i: list[int], expected: list[int]) -> None:
    keys = plan.round_keys(7, epoch, rounds=4)
    assert plan.permute(np.array(i), n, keys).tolist() == expected


@pytest.mark.parametrize("n", [*range(1, 41), 97, 99, 100, 101, 255, 256, 257, 1009, 4096, 4097])
@pytest.mark.parametrize("rounds", [3, 4, 6])
def test_every_microshard_comes_once_per_epoch(n: int, rounds: int) -> None:
    order = plan.permute(np.arange(n), n, plan.round_keys(1, 2, rounds))
    assert sorted(order.tolist()) == list(range(n))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**62), rounds=st.integers(2, 7))
def test_walkers_are_exactly_the_inputs_whose_first_step_leaves_the_range(n: int, seed: int, rounds: int) -> None:
    keys = plan.round_keys(seed, 0, rounds)
    once = plan._feistel(np.arange(n), n, keys)
    assert plan.walkers(n, keys).tolist() == np.flatnonzero(once >= n).tolist()


def test_the_order_passes_for_random_where_a_sorted_one_does_not() -> None:
    """chi-squared of the mix of 100 equal files per batch of 256: 99 expected for a uniform permutation."""
    n, batch, files = 256_000, 256, 100

    def mix(order: np.ndarray) -> float:
        counts = np.stack([np.bincount(b * files // n, minlength=files) for b in order.reshape(-1, batch)])
        expected = batch / files
        return float((((counts - expected) ** 2) / expected).sum(axis=1).mean())

    shuffled = plan.permute(np.arange(n), n, plan.round_keys(0, 0))
    assert 97 < mix(shuffled) < 101
    assert mix(np.arange(n)) > 1000
    neighbours = np.mean(np.abs(np.diff(shuffled)) == 1) * n / 2
    assert neighbours < 6  # one in expectation
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.01


@given(world=st.integers(1, 64), batch=st.integers(1, 64))
def test_ranks_share_the_slots_disjointly_and_completely(world: int, batch: int) -> None:
    if world > batch:
        world, batch = batch, world
    shares = [range(*plan.slots_of(rank, world, batch)) for rank in range(world)]
    assert [slot for share in shares for slot in share] == list(range(batch))
    assert all(shares)


def test_rows_cover_each_epoch_and_steps_straddle_it() -> None:
    spec = spec_of([16 * 3 + 1, 16 * 4 + 1, 16 * 2 + 9], total_batch=4, steps=9)  # 3 + 4 + 2 microshards
    assert spec.num_microshards == 9
    rows = plan.rows(spec, 0, spec.num_positions)
    assert [r.pos for r in rows] == list(range(36))
    assert [(r.step, r.slot) for r in rows] == [(p // 4, p % 4) for p in range(36)]
    for epoch in range(4):
        here = [r for r in rows if r.epoch == epoch]
        assert sorted((r.path, r.start) for r in here) == sorted(
            [("/shards/0.ds", 16 * i) for i in range(3)]
            + [("/shards/1.ds", 16 * i) for i in range(4)]
            + [("/shards/2.ds", 16 * i) for i in range(2)]
        )
    assert {r.epoch for r in rows if r.step == 2} == {0, 1}  # nothing dropped at the end of an epoch
    assert plan.rows(spec, 10, 20) == rows[10:20]


def test_windows_overlap_by_one_token_and_stay_inside_the_shard() -> None:
    for tokens in range(60):
        count = plan.count_microshards(Shard("a.ds", tokens, 2), 16)
        assert count == len([start for start in range(0, tokens, 16) if start + 17 <= tokens])


@pytest.mark.parametrize(
    ("tokens", "sequence_length", "count"),
    [(20_481, 2048, 10), (6144, 2048, 2), (3 * 16, 16, 2), (3 * 16 + 1, 16, 3), (16, 16, 0), (15, 16, 0), (1, 16, 0)],
)
def test_psyche_cuts_as_many_windows_of_s_tokens_as_its_provider(tokens: int, sequence_length: int, count: int) -> None:
    """Counts of Psyche's local provider: byte offsets from 0 below the file's size less a window, a window apart."""
    size, window = 2 * tokens, 2 * sequence_length
    assert count == len(range(0, size - window, window))
    both = [
        spec_of([tokens], sequence_length=sequence_length, total_batch=max(1, count), steps=1, window=window)
        for window in ("psyche", "overlap1")
    ]
    assert [spec.num_microshards for spec in both] == [count, count]
    if count:
        starts = [sequence_length * i for i in range(count)]
        for spec, length in zip(both, (sequence_length, sequence_length + 1), strict=True):
            rows = plan.rows(spec, 0, count)
            assert sorted(r.start for r in rows) == starts
            assert {r.length for r in rows} == {length}
            assert max(r.start + r.length for r in rows) <= tokens


@pytest.mark.parametrize(("window", "targets"), [("overlap1", 16), ("psyche", 15)])
def test_target_tokens_are_all_but_the_first_of_each_window(window: str, targets: int) -> None:
    spec = spec_of([100], window=window)
    assert spec.window_length == targets + 1
    assert spec.target_tokens_per_step == 5 * targets


def test_rows_are_planned_whole_beside_streams() -> None:
    """A row is a window: 3 rows of 17 tokens and 4 windows of 17 at stride 16."""
    shards = (Shard("a.npy", 51, 2, "npy", row_length=17), Shard("b.ds", 16 * 4 + 1, 2))
    spec = PlanSpec(shards, sequence_length=16, total_batch=7, steps=1, seed=3)
    found = sorted((r.path, r.start, r.length) for r in plan.rows(spec, 0, 7))
    assert found == [("a.npy", 17 * i, 17) for i in range(3)] + [("b.ds", 16 * i, 17) for i in range(4)]
    windows = plan.spread_windows(list(shards), 16, 7)
    assert [(shard.path, start) for shard, start in windows] == [(path, start) for path, start, _ in found]


def test_a_spec_survives_its_file() -> None:
    spec = spec_of([100, 200], window="psyche")
    labelled = Shard("/c.parquet", 34, 4, "parquet", row_length=17, columns=("labels", "sequence_lengths"))
    spec = replace(spec, shards=(*spec.shards, labelled))
    assert PlanSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
