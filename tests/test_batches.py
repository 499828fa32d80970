"""Batches: the same global batch for any number of ranks, and only by the plan that was promised."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparktrain import cli, plan, tokens
from sparktrain.config import Data, RunConfig
from sparktrain.digests import file_of
from sparktrain.errors import DataError
from sparktrain.plan import Assignment, PlanSpec, Share
from sparktrain.rundir import RunDir
from sparktrain.tokens import ds
from sparktrain.tokens.opened import Opened
from sparktrain.tokens.sequences import IGNORED
from sparktrain.tokens.sources.reach import known, opener
from sparktrain.train import models
from sparktrain.train.batch import Batch
from sparktrain.train.batches import Batches
from sparktrain.train.evaluate import heldout_loss, token_losses
from sparktrain.train.shares import Shares
from sparktrain.train.world import World
from tests.conftest import tiny_argv
from tests.web import Web, serve


@pytest.fixture
def planned(data: Path, tmp_path: Path) -> tuple[RunDir, PlanSpec]:
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=10, steps=40, seed=5)  # straddles an epoch
    assert spec.epochs_begun == [2]
    write(tmp_path, plan.rows(spec, 0, spec.num_positions))
    return RunDir(tmp_path), spec


def write(directory: Path, rows: list[Assignment]) -> None:
    (directory / "plan").mkdir(exist_ok=True)
    table = pa.Table.from_pylist([row._asdict() for row in rows])
    pq.write_table(table, directory / "plan" / "part-0.parquet", row_group_size=100)


def test_the_global_batch_of_a_step_does_not_depend_on_the_number_of_ranks(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    alone = list(Batches(directory, spec, 0, 1))
    assert len(alone) == 40
    assert alone[0].tokens.shape == (10, 33)
    for world in (2, 3, 4, 10):
        shares = [list(Batches(directory, spec, rank, world)) for rank in range(world)]
        for step, whole in enumerate(alone):
            assert torch.equal(torch.cat([share[step].tokens for share in shares]), whole.tokens)


def test_a_batch_holds_the_tokens_that_its_rows_name(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    batch = next(iter(Batches(directory, spec, 0, 1, first_step=3))).tokens
    for row, window in zip(plan.rows(spec, 30, 40), batch, strict=True):
        shard = np.fromfile(row.path, dtype="<u2")
        assert window.tolist() == shard[row.start : row.start + row.length].tolist()


def test_the_order_goes_on_where_it_is_resumed(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    whole = list(Batches(directory, spec, 1, 3))
    assert all(
        torch.equal(a.tokens, b.tokens) for a, b in zip(whole[17:], Batches(directory, spec, 1, 3, 17), strict=True)
    )


def test_a_plan_of_another_order_is_refused_before_the_first_token(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    rows = plan.rows(spec, 0, spec.num_positions)
    swapped = [rows[0]._replace(start=rows[1].start, path=rows[1].path), *rows[1:]]
    write(directory.path, swapped)
    with pytest.raises(DataError, match="is not what the run's seed gives"):
        next(iter(Batches(directory, spec, 0, 2)))


def test_a_plan_with_a_row_missing_is_refused(planned: tuple[RunDir, PlanSpec]) -> None:
    directory, spec = planned
    rows = plan.rows(spec, 0, spec.num_positions)
    write(directory.path, rows[:200] + rows[201:])
    with pytest.raises(DataError, match="holds 399 rows for steps 0 to 39 of this rank, expected 400"):
        next(iter(Batches(directory, spec, 0, 1)))


def test_a_slow_server_is_read_ahead_of_the_loop_and_gives_the_same_batches(
    planned: tuple[RunDir, PlanSpec], tmp_path: Path
) -> None:
    directory, spec = planned
    local = list(Batches(directory, spec, 0, 2))
    with serve() as web:
        web.files = {f"/{Path(s.path).name}": Path(s.path).read_bytes() for s in spec.shards}
        web.fault = lambda n, path: "slow"
        shards = tuple(replace(s, path=f"{web.url}/{Path(s.path).name}") for s in spec.shards)
        there = replace(spec, shards=shards)
        write(tmp_path, plan.rows(there, 0, there.num_positions))
        batches = iter(Batches(directory, there, 0, 2))
        first = next(batches)
        until = time.monotonic() + 60
        # While the loop is busy with the first batch of 5, its opening requests and windows of later batches come in.
        while len(web.asked) < 3 + 5 + 10 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(web.asked) >= 3 + 5 + 10
        assert web.busiest > 1
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip([first, *batches], local, strict=True))


def served(web: Web, spec: PlanSpec) -> PlanSpec:
    """The same plan over the same shards, side files too, on ``web``."""
    for shard in spec.shards:
        for file in Path(shard.path).parent.glob(f"{Path(shard.path).name}*"):
            web.files[f"/{file.name}"] = file.read_bytes()
    return replace(spec, shards=tuple(replace(s, path=f"{web.url}/{Path(s.path).name}") for s in spec.shards))


@pytest.mark.parametrize(("block", "world", "most"), [(1, 1, 40), (8, 1, 8), (8, 2, 10), (8, 3, 12)])
def test_windows_that_follow_one_another_are_one_request(
    planned: tuple[RunDir, PlanSpec], tmp_path: Path, block: int, world: int, most: int
) -> None:
    """40 windows of a step, shared by ranks: a block that ranks share is read by each of them."""
    _, spec = planned
    spec = replace(spec, total_batch=40, steps=6, block=block)
    write(tmp_path, plan.rows(spec, 0, spec.num_positions))
    local = list(Batches(RunDir(tmp_path), spec, 0, 1))
    with serve() as web:
        there = served(web, spec)
        rows = plan.rows(there, 0, there.num_positions)
        write(tmp_path, rows)
        shares = [list(Batches(RunDir(tmp_path), there, rank, world)) for rank in range(world)]
        for step, whole in enumerate(local):
            assert torch.equal(torch.cat([share[step].tokens for share in shares]), whole.tokens)
        asked = sum(range_ != "bytes=0-0" for _, range_, _ in web.asked)
    expected = 0
    for step in range(6):
        for rank in range(world):
            first, last = plan.slots_of(rank, world, 40)
            mine = {(row.path, row.start) for row in rows if row.step == step and first <= row.slot < last}
            expected += sum((path, start - 32) not in mine for path, start in mine)
    assert asked == expected <= 6 * most


def elsewhere(spec: PlanSpec) -> tuple[tokens.Shard, ...]:
    """The shards of ``spec`` by a scheme that counts as another machine's, with what a manifest says of them."""
    return tuple(
        replace(s, path=f"local://{s.path}", num_bytes=len(raw), sha256=sha256(raw).hexdigest())
        for s in spec.shards
        for raw in [Path(s.path).read_bytes()]
    )


def test_shards_that_come_through_a_cache_give_the_same_batches(
    planned: tuple[RunDir, PlanSpec], tmp_path: Path
) -> None:
    directory, spec = planned
    local = list(Batches(directory, spec, 1, 2))
    far = elsewhere(spec)
    there = replace(spec, shards=far)
    write(tmp_path, plan.rows(there, 0, there.num_positions))
    open_ = opener(Data(cache_dir=tmp_path / "cache"), known(far))
    found = list(Batches(RunDir(tmp_path), there, 1, 2, opener=open_, cached=True))
    assert len(list((tmp_path / "cache").glob("*"))) == 3 + 1  # and a lock
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, local, strict=True))


def promise(directory: RunDir, spec: PlanSpec) -> None:
    """Digests of all windows, as executors write them down."""
    directory.digests.mkdir()
    for number, shard in enumerate(spec.shards):
        stored = np.fromfile(shard.path.removeprefix("local://"), dtype="<u2")
        starts = 32 * np.arange(np.diff(spec.first_microshards)[number])
        found = [crc32(stored[start : start + spec.window_length].tobytes()) for start in starts.tolist()]
        file_of(directory.digests, number).write_bytes(np.array(found, dtype="<u4").tobytes())


@pytest.mark.parametrize("window", ["overlap1", "psyche"])
@pytest.mark.parametrize(
    ("batch", "changes"), [(10, {}), (100, {"block": 7}), (3, {"order": "sequential"}), (1300, {"order": "sequential"})]
)
def test_promised_windows_are_those_of_the_plan_in_any_order(
    planned: tuple[RunDir, PlanSpec], tmp_path: Path, window: Any, batch: int, changes: dict[str, Any]
) -> None:
    """Many steps are read at once, and windows that follow one another by one system call, 1,024 at most."""
    spec = replace(planned[1], window=window, total_batch=batch, steps=30 if batch < 1000 else 2, **changes)
    write(tmp_path, plan.rows(spec, 0, spec.num_positions))
    promise(RunDir(tmp_path), spec)
    found = list(Batches(RunDir(tmp_path), spec, 0, 1))
    stored = {shard.path: np.fromfile(shard.path, dtype="<u2") for shard in spec.shards}
    for step, got in enumerate(found):
        rows = plan.rows(spec, step * batch, step * batch + batch)
        assert got.tokens.tolist() == [stored[row.path][row.start : row.start + row.length].tolist() for row in rows]
    assert len(found) == spec.steps


def test_many_steps_are_read_at_once_but_not_more_windows_than_may_be(data: Path, tmp_path: Path) -> None:
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=2, steps=40, seed=5, ramp=((30, 50),))
    write(tmp_path, plan.rows(spec, 0, spec.num_positions))
    found = list(Shares(tmp_path / "plan", spec, 0, 1, 0, (), 100).read())
    assert [share.num_steps for share in found] == [1, 2, 4, 8, 15, 2, 2, 2, 2, 2]
    assert [len(share) for share in found] == [2, 4, 8, 16, 30, 100, 100, 100, 100, 100]
    assert [share.step for share in found] == [0, 1, 3, 7, 15, 30, 32, 34, 36, 38]


@pytest.mark.parametrize("shape", [(-1,), (-1, 33)])
def test_a_digest_is_of_the_bytes_whatever_the_shape_of_an_array(tmp_path: Path, shape: tuple[int, ...]) -> None:
    ids = np.random.default_rng(0).integers(0, 512, 330).astype("<u2").reshape(shape)
    np.save(tmp_path / "a.npy", ids)
    file = tokens.TokenFile(tokens.inspect(str(tmp_path / "a.npy")))
    assert tokens.is_bare(file.shard)
    assert file.digest_of(file.window(66, 33)) == crc32(ids.reshape(-1)[66:99].tobytes())


def test_a_window_that_decayed_in_the_cache_is_fetched_again(planned: tuple[RunDir, PlanSpec], tmp_path: Path) -> None:
    _, spec = planned
    far = elsewhere(spec)
    there, directory = replace(spec, shards=far), RunDir(tmp_path)
    write(tmp_path, plan.rows(there, 0, there.num_positions))
    promise(directory, there)
    open_ = opener(Data(cache_dir=tmp_path / "cache"), known(far))
    fresh = list(Batches(directory, there, 0, 1, opener=open_, cached=True))
    entry, at = tmp_path / "cache" / far[1].sha256, 2 * 32 * 40 + 9
    content = entry.read_bytes()
    entry.chmod(0o600)
    entry.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    again = list(Batches(directory, there, 0, 1, opener=open_, cached=True))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(fresh, again, strict=True))
    assert entry.read_bytes() == content


def test_joined_windows_keep_their_labels(tmp_path: Path) -> None:
    tokens_ = np.random.default_rng(0).integers(0, 512, 1000)
    ds.write(tmp_path / "a.ds", [tokens_], 512, "random")
    (tmp_path / "a.ds.loss").write_bytes((tokens_ % 3 > 0).astype(np.uint8).tobytes())
    spec = PlanSpec((tokens.inspect(str(tmp_path / "a.ds")),), 32, total_batch=31, steps=2, seed=5, block=7)
    write(tmp_path, plan.rows(spec, 0, spec.num_positions))
    for step, batch in enumerate(Batches(RunDir(tmp_path), spec, 0, 1)):
        starts = np.array([row.start for row in plan.rows(spec, 31 * step, 31 * step + 31)])
        expected = tokens_[starts[:, None] + np.arange(33)]
        assert batch.tokens.tolist() == expected.tolist()
        assert batch.labels is not None
        assert batch.labels.tolist() == np.where(expected % 3 > 0, expected, IGNORED).tolist()


@pytest.mark.parametrize("block", [1, 9])
def test_joined_rows_keep_their_documents_and_a_row_group_is_decoded_once(tmp_path: Path, block: int) -> None:
    rng = np.random.default_rng(0)
    ids, cuts = rng.integers(0, 512, (90, 33)), rng.integers(1, 33, 90)
    lengths = [[cut, 33 - cut] if cut % 3 else [33] for cut in cuts.tolist()]
    table = pa.table({"input_ids": list(ids), "sequence_lengths": lengths, "labels": list(ids)})
    with serve() as web:
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
        web.files["/a.parquet"] = (tmp_path / "a.parquet").read_bytes()
        spec = PlanSpec((tokens.inspect(f"{web.url}/a.parquet"),), 32, total_batch=45, steps=2, seed=5, block=block)
        write(tmp_path, plan.rows(spec, 0, spec.num_positions))
        web.asked.clear()
        for step, batch in enumerate(Batches(RunDir(tmp_path), spec, 0, 1)):
            rows = [row.microshard_id for row in plan.rows(spec, 45 * step, 45 * step + 45)]
            assert batch.tokens.tolist() == ids[rows].tolist()
            assert batch.position_ids is not None
            expected = [[i for length in lengths[row] for i in range(length)] for row in rows]
            assert batch.position_ids.tolist() == expected
        parts = [range_ for _, range_, _ in web.asked if range_ != "bytes=0-0"]
        assert len(parts) == len(set(parts))


def test_ranges_cover_windows_once_whatever_joins_them() -> None:
    rng = np.random.default_rng(0)
    for length, most in ((33, 1), (33, 200), (32, 1 << 20)):
        path, start = rng.integers(0, 3, 200), 32 * rng.integers(0, 90, 200)
        at = np.arange(200)
        share = Share(0, at, at, at, at, path, start, ["a", "b", "c"], length)
        found = {}
        for range_ in share.ranges(most):
            assert range_.length <= max(most, length)
            for place, offset in zip(range_.places, range_.offsets, strict=True):
                found[place] = (range_.path, range_.start + offset)
                assert 0 <= offset <= range_.length - length
        assert found == {i: ("abc"[path[i]], start[i]) for i in range(200)}
        assert [(row.path, row.start) for row in share.rows()] == [found[i] for i in range(200)]


def test_a_reading_error_comes_at_its_batch_and_not_before(planned: tuple[RunDir, PlanSpec], tmp_path: Path) -> None:
    directory, spec = planned
    copies = tuple(replace(s, path=shutil.copy(s.path, tmp_path)) for s in spec.shards)
    spec = replace(spec, shards=copies)
    write(tmp_path, plan.rows(spec, 0, spec.num_positions))
    torn = copies[0].path
    os.truncate(torn, 64)
    first_bad = next(i for i in range(spec.steps) if any(r.path == torn for r in plan.rows(spec, i * 10, i * 10 + 10)))
    batches = iter(Batches(directory, spec, 0, 1))
    for _ in range(first_bad):
        next(batches)
    with pytest.raises(DataError, match="ends at byte 64, expected at least .* it was truncated"):
        next(batches)


def test_few_files_are_open_at_a_time_and_none_in_use_is_closed() -> None:
    class Thing:
        def __init__(self, name: str) -> None:
            opened.append(name)
            self.name, self.closed = name, False

        def close(self) -> None:
            closed.append(self.name)
            self.closed = True

    opened: list[str] = []
    closed: list[str] = []
    files = Opened(Thing, 2)
    with files.use("a") as a:
        for name in "bcdb":
            with files.use(name) as other:
                assert not other.closed
        assert not a.closed
        assert (opened, closed) == (["a", "b", "c", "d", "b"], ["b", "c", "d"])

    def work(seed: int) -> None:
        for i in range(300):
            with files.use("uvwxyz"[(seed * 7 + i * i) % 6]) as thing:
                assert not thing.closed

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    files.close()
    assert sorted(opened) == sorted(closed)


def test_psyches_windows_give_the_loss_that_psyche_has_of_them(data: Path, tmp_path: Path) -> None:
    """Psyche hands the model S tokens and lets it shift: the mean over S-1 targets of each window."""
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=10, steps=2, seed=5, window="psyche")
    write(tmp_path, plan.rows(spec, 0, spec.num_positions))
    batch = next(iter(Batches(RunDir(tmp_path), spec, 0, 1))).to(torch.device("cpu")).tokens
    assert (batch.shape, batch.dtype) == ((10, 32), torch.int64)
    config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models.model_config(config)).eval()
    with torch.no_grad():
        ours = float(token_losses(model, Batch(batch))) / spec.target_tokens(0)
        theirs = float(model(input_ids=batch, labels=batch).loss)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_heldout_loss_is_a_mean_over_the_targets_of_either_window(
    on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path
) -> None:
    argv = tiny_argv(data, tmp_path / "run", "--data.heldout", str(data / "heldout"))

    def measure(rank: int, size: int, window: str) -> tuple[float, float]:
        config = cli.parse(RunConfig, [*argv, "--data.window", window])
        world = World(rank, size, torch.device("cpu"), "host")
        model = models.build(config, world)
        (shard,) = (tokens.inspect(path) for path in tokens.find_shards(data / "heldout"))
        length = 33 if window == "overlap1" else 32
        rows_ = torch.tensor([tokens.TokenFile(shard).read(32 * i, length).tolist() for i in range(124)])
        with torch.no_grad():
            expected = float(model(input_ids=rows_, labels=rows_).loss)
        loss = heldout_loss(model, config, world)
        assert loss is not None
        return loss, expected

    for window in ("overlap1", "psyche"):
        for found, expected in on_ranks(2, measure, window):
            assert found == pytest.approx(expected, rel=1e-5)


def test_heldout_windows_are_spread_over_all_shards(data: Path) -> None:
    shards = [tokens.inspect(path) for path in tokens.find_shards(data / "train")]
    windows = plan.spread_windows(shards, 32, 12)
    assert len(windows) == 12
    assert {shard for shard, _ in windows} == set(shards)
    assert len(plan.spread_windows(shards, 32, 10**6)) == 3 * 124
