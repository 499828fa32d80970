"""Pulses: what a watcher adds up between two looks is what ranks recorded, whenever it looked."""

import math
import time
from pathlib import Path

import pytest

from sparktrain import pulse
from sparktrain.pulse import Pulse
from sparktrain.results import StepRecord


def record(step: int, **changes: float) -> StepRecord:
    values = {"loss_sum": 8.0, "tokens": 4, "lr": 0.1, "grad_norm": 1.0, "seconds": 2.0, "data_seconds": 0.5}
    values |= {"compute_seconds": 1.0, "communication_seconds": 0.5}
    values |= {"payload_bytes": 10, "bytes_sent": 10, "bytes_received": 10}
    return StepRecord(step=step, **(values | changes))  # type: ignore[arg-type]


def test_stretches_add_up_to_the_records_however_often_one_looks() -> None:
    steps = [[record(s, loss_sum=float(s + r), tokens=4 + r) for s in range(10)] for r in range(2)]
    looks = [(0, 0), (1, 2), (2, 1), (7, 9), (10, 10)]
    seen: dict[int, Pulse] = {}
    tokens = nats = count = 0.0
    for look in looks:
        now = {rank: Pulse(rank, "h").after(steps[rank][:n]) for rank, n in enumerate(look)}
        if stretch := pulse.between(seen, now):
            new = stretch.tokens - tokens
            tokens, nats, count, seen = stretch.tokens, nats + stretch.loss * new, count + stretch.steps, now
    assert tokens == sum(r.tokens for rank in steps for r in rank)
    assert nats == pytest.approx(sum(r.loss_sum for rank in steps for r in rank))
    assert count == 10


def test_the_slowest_rank_is_the_one_that_the_others_wait_for() -> None:
    quick = [record(0, compute_seconds=1.0, communication_seconds=3.0, data_seconds=0.0, seconds=4.0)]
    slow = [record(0, compute_seconds=3.5, communication_seconds=0.1, data_seconds=0.4, seconds=4.0)]
    now = {0: Pulse(0, "a").after(quick), 1: Pulse(1, "b").after(slow)}
    stretch = pulse.between({}, now)
    assert stretch is not None
    assert (stretch.slowest, stretch.slowest_host, stretch.behind) == (1, "b", 3.9)
    assert (stretch.compute, stretch.communication, stretch.data) == (4.5 / 8, 3.1 / 8, 0.4 / 8)
    assert stretch.tokens_per_second == 2.0
    assert str(stretch) == (
        "loss 2.0000, 2 tokens/s, 10B a step, 2 ranks, compute 56%, communication 39%, data 5%, "
        "slowest rank 1 on b (3.90 x the fastest)"
    )


def test_nothing_new_is_no_stretch_and_no_target_no_loss() -> None:
    one = {0: Pulse(0, "h").after([record(0, tokens=0, loss_sum=0.0)])}
    assert pulse.between(one, one) is None
    assert pulse.between({}, {}) is None
    stretch = pulse.between({}, one)
    assert stretch is not None
    assert math.isnan(stretch.loss)


def test_the_file_follows_the_list_and_has_its_end(tmp_path: Path) -> None:
    file = tmp_path / "pulse.json"
    assert pulse.read(file) is None
    with pulse.beating(file, 3) as records:
        records.append(record(40))
        while (found := pulse.read(file)) is None:
            time.sleep(0.05)
        assert (found.rank, found.step, found.steps, found.tokens) == (3, 41, 1, 4)
        records += [record(41), record(42)]
    last = pulse.read(file)
    assert last is not None
    assert (last.step, last.steps, last.loss_sum) == (43, 3, 24.0)
    file.write_text('{"rank": 0')
    assert pulse.read(file) is None
