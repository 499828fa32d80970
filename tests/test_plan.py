"""plan.py: the order is a bijection, the same everywhere, and knows nothing of ranks."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparktrain import plan
from sparktrain.plan import Order, PlanSpec, Source, files, mixture, psyche, shuffle, skip
from sparktrain.tokens import Shard


def spec_of(tokens: list[int], **changes: object) -> PlanSpec:
    values: dict[str, object] = {"sequence_length": 16, "total_batch": 5, "steps": 7, "seed": 3} | changes
    shards = tuple(Shard(f"/shards/{i}.ds", n, 2) for i, n in enumerate(tokens))
    return PlanSpec(shards=shards, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "epoch", "i", "expected"),
    [(1009, 0, [0, 1, 2, 1008], [386, 755, 825, 126]), (1009, 1, [0, 1], [890, 744])]
    + [(10**9 + 7, 0, [0, 1, 10**9], [9098269, 184025002, 934476079])],
)
def test_the_bijection_gives_the_published_numbers(n: int, epoch: int, i: list[int], expected: list[int]) -> None:
    keys = shuffle.round_keys(7, epoch, rounds=4)
    assert shuffle.permute(np.array(i), n, keys).tolist() == expected


def test_a_file_of_the_plan_has_its_rows(tmp_path: Path) -> None:
    """Over several row groups, of shards of very different sizes, in two sources."""
    sources = (Source("a", 1, 0.25), Source("b", 203, 0.75))
    spec = spec_of([16 * 70_000 + 1, *[17] * 200, 16 * 3000, 17, 999], steps=14_000, sources=sources)
    files.write_part(spec, 11, 66_000, tmp_path / "part-0.parquet")
    file = pq.ParquetFile(tmp_path / "part-0.parquet", page_checksum_verification=True)
    assert (file.num_row_groups, file.schema_arrow.names) == (2, list(plan.Assignment._fields))
    rows = [plan.Assignment(*row) for row in zip(*file.read().to_pydict().values(), strict=True)]
    assert rows == plan.rows(spec, 11, 66_000)
    firsts = spec.first_microshards
    for row in (*rows[:500], *rows[-500:]):
        shard = int(np.searchsorted(firsts, row.microshard_id, side="right")) - 1
        assert (row.path, row.start) == (f"/shards/{shard}.ds", 16 * (row.microshard_id - int(firsts[shard])))
    assert [p.name for p in tmp_path.iterdir()] == ["part-0.parquet"]


@pytest.mark.parametrize("n", [*range(1, 41), 97, 99, 100, 101, 255, 256, 257, 1009, 4096, 4097])
@pytest.mark.parametrize("rounds", [3, 4, 6])
def test_every_microshard_comes_once_per_epoch(n: int, rounds: int) -> None:
    order = shuffle.permute(np.arange(n), n, shuffle.round_keys(1, 2, rounds))
    assert sorted(order.tolist()) == list(range(n))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**62), rounds=st.integers(2, 7))
def test_walkers_are_exactly_the_inputs_whose_first_step_leaves_the_range(n: int, seed: int, rounds: int) -> None:
    keys = shuffle.round_keys(seed, 0, rounds)
    once = shuffle._feistel(np.arange(n), n, keys)
    assert shuffle.walkers(n, keys).tolist() == np.flatnonzero(once >= n).tolist()


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
    assert spec.target_tokens(0) == 5 * targets


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
    spec = replace(spec, shards=(*spec.shards, labelled), ramp=((3, 9),), skipped=((1, 2),), skipped_places=((0, 4),))
    spec = replace(spec, sources=(Source("a", 1, 0.5), Source("b", 2, 0.5)))
    assert PlanSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_step_begins_where_the_one_before_it_ended_whatever_their_sizes() -> None:
    spec = spec_of([1000], total_batch=3, steps=12, ramp=((2, 5), (3, 4), (10, 1)))
    sizes = [3, 3, 5, *[4] * 7, 1, 1]
    assert [spec.batch_of(step) for step in range(12)] == sizes
    assert [spec.first_position(step) for step in range(13)] == [sum(sizes[:step]) for step in range(13)]
    rows = plan.rows(spec, 0, spec.num_positions)
    assert [(r.step, r.slot) for r in rows] == [(step, slot) for step, size in enumerate(sizes) for slot in range(size)]
    constant = plan.rows(spec_of([1000], total_batch=1, steps=41), 0, 41)
    assert [(r.path, r.start) for r in rows] == [(r.path, r.start) for r in constant]  # only cut otherwise
    assert [spec.target_tokens(step) for step in (0, 2, 11)] == [48, 80, 16]
    assert spec.smallest_batch == 1
    assert list(plan.runs_of_steps(spec.stretches, 1, 12, 5)) == [
        (1, 2, 3),
        (2, 3, 5),
        (3, 8, 4),
        (8, 10, 4),
        (10, 12, 1),
    ]


@given(n=st.integers(1, 400), block=st.integers(1, 40), epoch=st.integers(0, 9))
def test_blocks_hold_every_microshard_once_and_stay_together(n: int, block: int, epoch: int) -> None:
    order = Order("shuffle", n, seed=4, block=block)
    found = order.in_epoch(epoch, np.arange(n))
    assert sorted(found.tolist()) == list(range(n))
    for first in range(0, n - n % block, block):
        piece = found[first : first + block]
        assert ((piece - piece[0]) % n).tolist() == list(range(block))


@given(
    n=st.integers(2, 300),
    ranges=st.lists(st.tuples(st.integers(0, 299), st.integers(1, 40)), max_size=5),
    block=st.sampled_from([1, 7]),
    kind=st.sampled_from(["shuffle", "sequential", "psyche"]),
)
def test_skipping_moves_no_more_than_what_fills_the_gaps(
    n: int, ranges: list[tuple[int, int]], block: int, kind: str
) -> None:
    skipped = skip.merge((a, min(n, a + length)) for a, length in ranges if a < n)
    whole = Order(kind, n, 5, block=block, psyche_seed=bytes(32))
    left = replace(whole, skipped=skipped)
    if not left.kept:
        return
    before, after = (order.in_epoch(1, np.arange(left.kept)) for order in (whole, left))
    gone = set(skip.members(skipped).tolist())
    assert sorted(after.tolist()) == sorted(set(range(n)) - gone)
    assert {i for i in range(left.kept) if before[i] != after[i]} == {i for i in range(left.kept) if before[i] in gone}
    places, found = left.replaced(1)
    assert places.tolist() == np.flatnonzero(before != after).tolist()
    assert found.tolist() == after[places].tolist()


@given(ranges=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 20)), max_size=6))
def test_places_that_are_passed_over_move_up_what_comes_after_them(ranges: list[tuple[int, int]]) -> None:
    merged = skip.merge((a, a + length) for a, length in ranges)
    left = [place for place in range(300) if not any(a <= place < b for a, b in merged)]
    assert skip.places_of(merged, np.arange(len(left))).tolist() == left


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=12), more=st.integers(0, 60))
def test_any_weights_share_the_slots_and_no_other_share_is_done_sooner(weights: list[float], more: int) -> None:
    batch, world = len(weights) + more, len(weights)
    shares = [range(*plan.slots_of(rank, world, batch, weights)) for rank in range(world)]
    assert [slot for share in shares for slot in share] == list(range(batch))
    assert all(shares)
    if len(set(weights)) > 1:
        slowest = max(len(share) / weight for share, weight in zip(shares, weights, strict=True))
        # Were all done sooner, one would have no slot at all, or some slots would be left.
        sooner = [math.ceil(slowest * weight * (1 - 1e-9)) - 1 for weight in weights]
        assert min(sooner) < 1 or sum(sooner) < batch


def test_shares_follow_speed() -> None:
    assert [plan.slots_of(rank, 2, 8, [7.0, 1.0]) for rank in range(2)] == [(0, 7), (7, 8)]
    assert [plan.slots_of(rank, 3, 12, [1.0, 2.0, 3.0]) for rank in range(3)] == [(0, 2), (2, 6), (6, 12)]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.05, 0.25, 0.7), (0.001, 0.999)])
def test_a_mixture_keeps_its_weights_in_every_stretch_of_it(weights: tuple[float, ...]) -> None:
    tokens = [16 * 40 + 1, 16 * 200 + 1, 16 * 90 + 1][: len(weights)]
    sources = tuple(Source(str(i), 1, w) for i, w in enumerate(weights))
    spec = spec_of(tokens, total_batch=64, steps=300, sources=sources)
    source, epoch, microshard = spec.contents(np.arange(spec.num_positions))
    drawn = np.stack([np.cumsum(source == k) for k in range(len(weights))])
    expected = np.outer(weights, np.arange(1, spec.num_positions + 1))
    assert np.abs(drawn - expected).max() <= 2 + spec.num_positions * 2**-14
    assert drawn[:, -1].tolist() == spec.draws_before(spec.num_positions)
    assert (np.searchsorted(spec.first_microshards, microshard, side="right") - 1 == source).all()
    assert len(set(zip(epoch.tolist(), microshard.tolist(), strict=True))) == spec.num_positions
    for k, order in enumerate(spec.orders):  # each source's epochs are whole
        whole = microshard[(source == k) & (epoch == 0)]
        assert len(set(whole.tolist())) == min(order.n, drawn[k, -1])


SEEDS = {"bytes 1..=32": bytes(range(1, 33)), "--seed 42": psyche.seed_bytes(42)}


@pytest.mark.parametrize(
    ("shuffle_", "seed", "n", "first", "digest"),
    [
        (psyche.permutation, "bytes 1..=32", 10, [3, 1, 2, 6, 7, 9, 8, 4, 5, 0], 0xC7E70E4676D419A4),
        (psyche.permutation, "bytes 1..=32", 1000, [581, 162, 361, 287, 15, 801], 0x010369D6E4A3CCF5),
        (psyche.permutation, "bytes 1..=32", 200_000, [103261, 105133, 1993, 157987], 0x4457A8BD2EE4DBE5),
        (psyche.permutation, "--seed 42", 10, [3, 6, 2, 5, 4, 0, 1, 9, 8, 7], 0xDC0187DE1E488A44),
        (psyche.permutation, "--seed 42", 200_000, [147719, 93787, 27103, 107619], 0xAD999F82F7CD597D),
        (psyche.shuffle_of_mixture, "bytes 1..=32", 1000, [382, 203, 969, 11, 248, 560], 0xCB7169FFD93C32ED),
        (psyche.shuffle_of_mixture, "--seed 42", 100, [37, 19, 42, 84, 52, 58, 41], 0x57D398CE47E481C5),
    ],
)
def test_psyches_shuffles_give_its_numbers(
    shuffle_: Callable[[int, bytes], np.ndarray], seed: str, n: int, first: list[int], digest: int
) -> None:
    """Numbers that Psyche's own code gave; the digest is FNV-1a of the order as little-endian u64."""
    order, found = shuffle_(n, SEEDS[seed]), 0xCBF29CE484222325
    assert order[: len(first)].tolist() == first
    for byte in order.astype("<u8").tobytes():
        found = (found ^ byte) * 0x100000001B3 % 2**64
    assert found == digest


def test_psyches_mixture_draws_from_the_source_that_lags_most() -> None:
    """Its own test: sizes 5 and 20 with equal weights: 12 or 13 draws of the first, its five and then repeats."""
    source, draw, _ = mixture.psyche_pattern((0.5, 0.5), (5, 20), bytes(32))
    assert len(source) == 25
    assert 12 <= (source == 0).sum() <= 13
    assert sorted(draw[source == 1].tolist()) == list(range((source == 1).sum()))


def quality(order: np.ndarray, files: int = 100, batch: int = 256) -> tuple[float, float, float]:
    """chi-squared per step of the mix of equal files (99 for a uniform permutation), pairs of neighbours that stay
    neighbours (1), and the largest autocorrelation over small lags and those near a
    Feistel network's radix (0)."""
    n = len(order)
    lags = [*range(1, 9), *(shuffle.radices(n)[1] + i for i in (-1, 0, 1))]
    counts = np.stack([np.bincount(b * files // n, minlength=files) for b in order[: n - n % batch].reshape(-1, batch)])
    chi = float((((counts - batch / files) ** 2) / (batch / files)).sum(axis=1).mean())
    neighbours = float(np.mean(np.abs(np.diff(order)) == 1) * n / 2)
    return chi, neighbours, max(abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) for lag in lags)


def test_the_order_is_as_random_as_numpys_where_cheaper_ones_are_not() -> None:
    n = 256_000
    passes = {
        "numpy": np.random.default_rng(0).permutation(n),
        "four rounds": shuffle.permute(np.arange(n), n, shuffle.round_keys(0, 0, 4)),
        "six rounds": shuffle.permute(np.arange(n), n, shuffle.round_keys(0, 0)),
        "psyche": psyche.permutation(n, bytes(32)),
    }
    for name, order in passes.items():
        chi, neighbours, correlation = quality(order)
        assert 97.5 < chi < 100.5, name
        assert neighbours < 4, name
        assert correlation < 0.01, name
    fails = {
        "two rounds": shuffle.permute(np.arange(n), n, shuffle.round_keys(0, 0, 2)),
        "affine": (np.arange(n) * 158_217 + 7) % n,
        "blocks": Order("shuffle", n, 0, block=16).in_epoch(0, np.arange(n)),
    }
    for name, order in fails.items():
        chi, neighbours, correlation = quality(order)
        assert not 97.5 < chi < 100.5 or neighbours > 4 or correlation > 0.1, name
