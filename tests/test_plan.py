"""plan.py: the order is a bijection, the same everywhere, and knows nothing of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktrain import plan
from sparktrain.plan import PlanSpec
from sparktrain.tokens import Shard


def spec_of(tokens: list[int], **changes: int) -> PlanSpec:
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


def test_a_spec_survives_its_file() -> None:
    spec = spec_of([100, 200])
    assert PlanSpec.from_json(spec.to_json()) == spec
