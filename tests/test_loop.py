"""The loop: what it computes does not depend on how the batch is cut, over ranks or micro-batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparktrain import cli, plan, tokens
from sparktrain.config import RunConfig, Train
from sparktrain.plan import PlanSpec
from sparktrain.results import StepRecord
from sparktrain.results.records import PHASES
from sparktrain.results.windows import windows
from sparktrain.rundir import RunDir
from sparktrain.train import gradients, models
from sparktrain.train.batch import Batch
from sparktrain.train.evaluate import sequence_losses, token_losses
from tests.conftest import take_steps, tiny_argv


@pytest.fixture
def trained(on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """``trained(world, *flags)``: [(records, digest) of each rank] of a run of 6 steps of 8 sequences, or as set."""
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    directory = RunDir(tmp_path)
    directory.plan.mkdir()

    def rank(rank: int, size: int, config: RunConfig, spec: PlanSpec) -> tuple[list[StepRecord], str]:
        records, model, _ = take_steps(directory, config, spec, rank, size)
        return records, models.digest(model)

    def run(world: int, *flags: str) -> list[Any]:
        config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run", *flags))
        spec = PlanSpec(
            shards, sequence_length=32, total_batch=8, steps=config.train.steps, seed=5, ramp=config.train.batch_ramp
        )
        rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
        pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
        return on_ranks(world, rank, config, spec)

    return run


def losses(ranks: list[Any]) -> list[float]:
    """Loss of each step, over all ranks."""
    steps = zip(*(records for records, _ in ranks), strict=True)
    return [sum(r.loss_sum for r in records) / sum(r.tokens for r in records) for records in steps]


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_has_the_losses_of_one(trained: Callable[..., list[Any]], world: int) -> None:
    alone, together = trained(1), trained(world)
    assert losses(together) == pytest.approx(losses(alone), rel=2e-5)
    assert len({digest for _, digest in together}) == 1
    norms = [[record.grad_norm for record in records] for records, _ in together]
    assert norms[0] == norms[-1] == pytest.approx([record.grad_norm for record in alone[0][0]], rel=1e-3)


def test_a_batch_that_changes_is_the_mean_of_its_own_tokens(trained: Callable[..., list[Any]]) -> None:
    ramp = ("--train.batch-ramp", "[[1, 5], [4, 11]]")
    alone, together = trained(1, *ramp), trained(3, *ramp)
    assert [record.tokens for record in alone[0][0]] == [size * 32 for size in (8, 5, 5, 5, 11, 11)]
    assert losses(together) == pytest.approx(losses(alone), rel=2e-5)
    norms = [[record.grad_norm for record in records] for records, _ in together]
    assert norms[0] == norms[-1] == pytest.approx([record.grad_norm for record in alone[0][0]], rel=1e-3)


@pytest.mark.parametrize("weights", ["[1, 5.5]", "measured"])
def test_shares_by_speed_have_the_losses_of_equal_ones(trained: Callable[..., list[Any]], weights: str) -> None:
    equal, weighted = trained(2), trained(2, "--launch.weights", weights)
    assert losses(weighted) == pytest.approx(losses(equal), rel=2e-5)
    shares = [[record.tokens // 32 for record in records] for records, _ in weighted]
    assert [sum(step) for step in zip(*shares, strict=True)] == [8] * 6
    if weights != "measured":
        assert shares == [[1] * 6, [7] * 6]


def test_the_size_of_micro_batches_does_not_matter(trained: Callable[..., list[Any]]) -> None:
    whole, pieces = trained(1, "--train.micro-batch", "8"), trained(1, "--train.micro-batch", "1")
    assert losses(pieces) == pytest.approx(losses(whole), rel=2e-5)


def test_fp32_accumulation_loses_nothing_of_bf16_gradients(data: Path, tmp_path: Path) -> None:
    """64 micro-batches of one sequence: a sum in bf16 forgets each that is under 1/256 of it."""
    model = AutoModelForCausalLM.from_config(
        models.model_config(cli.parse(RunConfig, tiny_argv(data, tmp_path))), dtype=torch.bfloat16
    )
    batch = torch.randint(0, 512, (64, 33), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for one in batch.split(1):
        model.zero_grad()
        (token_losses(model, Batch(one)) / 2048).backward()
        for total, parameter in zip(exact, parameters, strict=True):
            assert parameter.grad is not None
            total += parameter.grad

    def error(accumulate_fp32: bool) -> float:
        settings = Train(total_batch=64, micro_batch=1, accumulate_fp32=accumulate_fp32)
        gradients.accumulate(model, Batch(batch), 1 / 2048, settings, sequence_losses)
        pairs = zip(exact, parameters, strict=True)
        return sum(float((p.grad.double() - e).square().sum()) for e, p in pairs if p.grad is not None) ** 0.5

    assert error(True) < error(False) / 2


def test_the_gradient_is_clipped_and_its_norm_reported(trained: Callable[..., list[Any]]) -> None:
    free, clipped = trained(2, "--train.max-grad-norm", "0"), trained(2, "--train.max-grad-norm", "0.01")
    assert free[0][0][0].grad_norm == clipped[0][0][0].grad_norm > 0.01
    assert free[0][1] != clipped[0][1]


def test_distro_learns_with_equal_parameters_on_all_ranks(trained: Callable[..., list[Any]]) -> None:
    flags = ("--strategy.kind", "distro", "--strategy.compression-decay", "0.9", "--optimizer.lr", "2e-3")
    ranks = trained(3, *flags)
    assert len({digest for _, digest in ranks}) == 1
    assert losses(ranks)[-1] < losses(ranks)[0] - 0.05
    for record in ranks[0][0]:
        parts = [getattr(record, f"{name}_seconds") for name in PHASES]
        assert min(parts) > 0
        assert sum(parts) <= record.optimizer_seconds <= record.compute_seconds
    assert 0 < sum(r.payload_bytes for r in ranks[0][0]) < sum(r.payload_bytes for r in trained(3)[0][0]) / 10


def test_steps_by_oneself_end_within_a_seventh_of_the_baseline(trained: Callable[..., list[Any]]) -> None:
    """Three hundred steps of two ranks, in mechanism and equal parameters; the loss is no claim of parity."""
    long = ("--train.steps", "301", "--train.micro-batch", "8")
    baseline = trained(2, *long)
    last, sent = (sum(losses(baseline)[-20:]) / 20, sum(r.payload_bytes for r in baseline[0][0]))
    # A walk over the vocabulary moves all embeddings alike, so that the few largest say little.
    dense, sparse = ("diloco",), ("sparseloco", "--strategy.compression-topk", "1024")
    for kind, every, less in ((dense, "10", 9.9), (sparse, "2", 20)):
        ranks = trained(2, *long, "--strategy.kind", *kind, "--strategy.sync-every", every)
        assert len({digest for _, digest in ranks}) == 1
        assert losses(ranks)[0] == pytest.approx(losses(baseline)[0])
        assert sum(losses(ranks)[-20:]) / 20 <= 1.15 * last
        # Without the last step, which ends in mid-round.
        assert sum(r.payload_bytes for r in ranks[0][0]) < sent / less


def test_the_same_run_twice_is_the_same_to_the_bit(trained: Callable[..., list[Any]]) -> None:
    first, second = trained(2), trained(2)
    assert [digest for _, digest in first] == [digest for _, digest in second]
    assert losses(first) == losses(second)


def test_every_second_is_accounted_for(trained: Callable[..., list[Any]]) -> None:
    for record in trained(2)[1][0]:
        parts = record.data_seconds + record.compute_seconds + record.communication_seconds
        assert parts == pytest.approx(record.seconds)
        assert min(record.data_seconds, record.compute_seconds, record.communication_seconds) >= 0
        assert record.tokens == 4 * 32


def test_rounds_are_windows_with_the_norm_of_what_a_rank_changed(trained: Callable[..., list[Any]]) -> None:
    flags = ("--train.steps", "7", "--strategy.kind", "diloco", "--strategy.sync-every", "3")
    ranks = trained(2, *flags)
    steps = [{"rank": rank} | record._asdict() for rank, (records, _) in enumerate(ranks) for record in records]
    rows = windows(steps)
    assert [(row.window, row.rank, row.first_step, row.steps, row.examples) for row in rows] == [
        (0, 0, 0, 3, 12),
        (0, 1, 0, 3, 12),
        (1, 0, 3, 3, 12),
        (1, 1, 3, 3, 12),
        (2, 0, 6, 1, 4),
        (2, 1, 6, 1, 4),
    ]
    assert rows[0].delta_norm is not None
    assert rows[1].delta_norm is not None
    assert 0 < rows[0].delta_norm != rows[1].delta_norm > 0  # each rank has gone its own way
    assert rows[4].delta_norm is rows[5].delta_norm is None  # the end of a run is no end of a round
    assert [row.steps for row in windows([{"rank": 0} | r._asdict() for r in trained(2)[0][0]])] == [6]
