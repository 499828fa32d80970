"""The training loop of one rank, from the run directory to its result. It names no strategy.

Shapes: B_ = sequences of this rank in a step, M_ = of one micro-batch, S = sequence length, V = vocabulary.
"""

import math
import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sparktrain.config import RunConfig, Train
from sparktrain.errors import ConfigError, DataError, Diverged
from sparktrain.plan import PlanSpec
from sparktrain.results import RankResult, StepRecord
from sparktrain.rundir import RunDir
from sparktrain.tokens.sources.reach import known, opener
from sparktrain.train import models
from sparktrain.train.batch import Batch, check_separates
from sparktrain.train.batches import Batches
from sparktrain.train.evaluate import heldout_loss, token_losses
from sparktrain.train.schedule import lr_at
from sparktrain.train.strategies import STRATEGIES, Strategy
from sparktrain.train.world import World, start_world


def train(directory: RunDir, config: RunConfig, spec: PlanSpec) -> RankResult:
    """Train by the plan ``spec`` in ``directory``; rank 0 also writes the trained model there."""
    with start_world(max(1, config.launch.threads), config.launch.collective_timeout) as world:
        if world.size > spec.total_batch:
            raise ConfigError(
                f"{world.size} ranks share train.total_batch {spec.total_batch}: start at most {spec.total_batch} ranks"
            )
        model = models.build(config, world)
        if spec.packed:
            check_separates(model)
        kind = STRATEGIES[config.strategy.kind]
        strategy = kind.build(dict(model.named_parameters()), config.strategy, config.optimizer)
        before = heldout_loss(model, config, world)
        _say(world, f"{model.num_parameters():,} parameters, {config.strategy.kind}, held-out loss {_number(before)}")
        records, first_step_at = [], 0.0
        for record in _steps(directory, config, spec, world, model, strategy):
            records.append(record)
            first_step_at = first_step_at or time.time()
            if record.step == 0 or (record.step + 1) % config.run.log_every == 0:
                _say(world, _line(record, spec))
        strategy.sync()
        after = heldout_loss(model, config, world)
        digest = models.digest(model)
        if world.rank == 0:
            models.save(model, config, directory.model)
        _say(world, f"finished: held-out loss {_number(after)}, parameters {digest[:16]}")
        return RankResult(
            rank=world.rank,
            world=world.size,
            host=world.host,
            records=records,
            digest=digest,
            num_parameters=model.num_parameters(),
            heldout_before=before,
            heldout_after=after,
            first_step_at=first_step_at,
        )


def _steps(
    directory: RunDir, config: RunConfig, spec: PlanSpec, world: World, model: PreTrainedModel, strategy: Strategy
) -> Iterator[StepRecord]:
    """One record per step of the plan."""
    shards = opener(config.data, known(spec.shards))
    batches = iter(Batches(directory, spec, world.rank, world.size, opener=shards))
    for step in range(spec.steps):
        began = time.perf_counter()
        batch = next(batches)
        loaded, traffic_before = time.perf_counter(), vars(strategy.traffic).copy()
        lr = lr_at(step, config.schedule, config.optimizer.lr, spec.steps)
        # The mean over ranks of gradients scaled so is the gradient of the global batch's mean token loss.
        scale = world.size / _targets(batch, step, spec, world)
        loss_sum = _accumulate_gradients(model, batch.to(world.device), scale, config.train)
        strategy.average_gradients()
        norm = _clip(model, config.train.max_grad_norm)
        if not math.isfinite(loss_sum):
            raise Diverged(
                f"loss is {loss_sum} in step {step} on rank {world.rank}: lower optimizer.lr or check the data"
            )
        strategy.step(lr)
        ended = time.perf_counter()
        moved = {name: value - traffic_before[name] for name, value in vars(strategy.traffic).items()}
        yield StepRecord(
            step=step,
            loss_sum=loss_sum,
            tokens=batch.num_targets,
            lr=lr,
            grad_norm=norm,
            seconds=ended - began,
            data_seconds=loaded - began,
            compute_seconds=ended - loaded - moved["seconds"],
            communication_seconds=moved["seconds"],
            payload_bytes=int(moved["payload_bytes"]),
            bytes_sent=int(moved["bytes_sent"]),
            bytes_received=int(moved["bytes_received"]),
        )


def _targets(batch: Batch, step: int, spec: PlanSpec, world: World) -> int:
    """Targets of the global batch. Known from the plan where every token is one, which all ranks see alike; else the
    ranks' counts are added up."""
    if not spec.leaves_targets_out:
        return spec.target_tokens_per_step
    targets = int(world.sum(batch.num_targets)[0])
    if not targets:
        raise DataError(f"the batch of step {step} has no target, labels leave all its tokens out: use other data")
    return targets


def _accumulate_gradients(model: PreTrainedModel, batch: Batch, scale: float, settings: Train) -> float:
    """Leave in ``.grad`` the gradient of ``scale`` times the summed token losses; returns the sum of losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=batch.tokens.device)
    exact = [torch.zeros_like(p, dtype=torch.float32) for p in parameters] if settings.accumulate_fp32 else []
    for part in batch.split(settings.micro_batch):
        loss = token_losses(model, part, settings.autocast)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        for sum_so_far, parameter in zip(exact, parameters, strict=False):
            if parameter.grad is not None:
                sum_so_far += parameter.grad
                parameter.grad = None
    for sum_so_far, parameter in zip(exact, parameters, strict=False):
        parameter.grad = sum_so_far.to(parameter.dtype)
    return float(total)


def _clip(model: PreTrainedModel, max_norm: float) -> float:
    """Global norm of the gradient, which is then clipped to ``max_norm`` (0: not)."""
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf))


def _line(record: StepRecord, spec: PlanSpec) -> str:
    loss, rate = record.loss_sum / record.tokens, record.tokens / record.seconds
    return (
        f"step {record.step + 1}/{spec.steps}  loss {loss:.4f}  lr {record.lr:.2e}  grad norm {record.grad_norm:.3f}  "
        f"{rate:,.0f} tokens/s of this rank  {record.payload_bytes:,} bytes"
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)
