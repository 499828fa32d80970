"""The training loop of one rank, from the run directory to its result. It names no strategy.

Shapes: B_ = sequences of this rank in a step, M_ = of one micro-batch, S = sequence length, V = vocabulary.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparktrain import failpoints, pulse
from sparktrain.config import RunConfig, Train
from sparktrain.errors import ConfigError, DataError, Stopped
from sparktrain.plan import PlanSpec
from sparktrain.results import RankResult, StepRecord
from sparktrain.rundir import RunDir
from sparktrain.tokens.sources.reach import known, opener
from sparktrain.train import checkpoint, models, speed
from sparktrain.train.batch import Batch, check_separates
from sparktrain.train.batches import Batches
from sparktrain.train.evaluate import heldout_loss, token_losses
from sparktrain.train.requests import Requests
from sparktrain.train.schedule import lr_at
from sparktrain.train.strategies import STRATEGIES, Strategy
from sparktrain.train.world import World, start_world


@dataclass(frozen=True)
class Training:
    """A rank that is ready for its steps."""

    directory: RunDir
    config: RunConfig
    spec: PlanSpec
    world: World
    model: PreTrainedModel
    strategy: Strategy
    requests: Requests


def train(directory: RunDir, config: RunConfig, spec: PlanSpec, generation: int) -> RankResult:
    """:func:`train_in` the world that this process's environment names."""
    with start_world(max(1, config.launch.threads), config.launch.collective_timeout) as world:
        if world.size > (most := spec.smallest_batch):
            raise ConfigError(f"{world.size} ranks share train.total_batch {most}: start at most {most} ranks")
        return train_in(world, directory, config, spec, generation)


def train_in(world: World, directory: RunDir, config: RunConfig, spec: PlanSpec, generation: int) -> RankResult:
    """Train by the plan ``spec`` in ``directory``, from the newest checkpoint there, as attempt ``generation``; rank 0
    also writes the trained model."""
    failpoints.reach("start", rank=world.rank, generation=generation)
    start = checkpoint.choose(directory, world)
    model = models.build(config, world, directory.checkpoints.directory(start.name) if start else None)
    if spec.packed:
        check_separates(model)
    kind = STRATEGIES[config.strategy.kind]
    strategy = kind.build(dict(model.named_parameters()), config.strategy, config.optimizer, spec.steps)
    _say(world, f"{model.num_parameters():,} parameters, {config.strategy.kind}")
    if start is None:
        before = heldout_loss(model, config, world)
        _say(world, f"held-out loss {_number(before)}")
    else:
        before = start.values["heldout_before"]
        checkpoint.restore(directory, start, strategy, world)
        _say(world, f"going on from checkpoint {start.name}, saved by {start.world} ranks")
    failpoints.reach("loaded", rank=world.rank, generation=generation)
    training = Training(directory, config, spec, world, model, strategy, Requests(directory, world, strategy.local))
    with (
        checkpoint.Checkpointer(directory, config, world, generation, start, {"heldout_before": before}) as saver,
        pulse.beating(directory.pulse(generation, world.rank), world.rank) as records,
    ):
        first_step_at = _run(training, saver, start.step if start else 0, records)
    if training.requests.asked.stop:
        done = records[-1].step + 1
        raise Stopped(f"stopped after step {done} of {spec.steps}, as asked; the same command goes on from there")
    failpoints.reach("trained", rank=world.rank, generation=generation)
    strategy.sync()
    after = heldout_loss(model, config, world)
    digest = models.digest(model)
    if world.rank == 0:
        models.save(model, config, directory.model)
    failpoints.reach("saved", rank=world.rank, generation=generation)
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
        resumed_from=start.name if start else None,
    )


def _run(training: Training, saver: checkpoint.Checkpointer, first_step: int, records: list[StepRecord]) -> float:
    """Every step from ``first_step`` on, with checkpoints, or until it is to stop, appended to ``records``; when the
    first one ended."""
    config, spec, requests = training.config, training.spec, training.requests
    first_step_at, every = 0.0, config.checkpoint.every
    with requests.heeding_sigterm(config.launch.grace):
        for record in _steps(training, first_step):
            records.append(record)
            first_step_at = first_step_at or time.time()
            done = record.step + 1
            if record.step == first_step or done % config.run.log_every == 0:
                _say(training.world, _line(record, spec))
            if requests.asked.save or (every and (done % every == 0 or done == spec.steps)):
                saver.save(done, training.model, training.strategy, records)
            if requests.asked.save:
                saver.wait()
                requests.met()
            if requests.asked.stop:
                break
    return first_step_at


def _steps(training: Training, first_step: int = 0) -> Iterator[StepRecord]:
    """One record per step of the plan from ``first_step`` on."""
    config, spec, world, model = training.config, training.spec, training.world, training.model
    strategy, requests = training.strategy, training.requests
    shards = opener(config.data, known(spec.shards))
    speeds = speed.of_ranks(model, config, spec, world)
    batches = iter(Batches(training.directory, spec, world.rank, world.size, first_step, speeds, shards))
    for step in range(first_step, spec.steps):
        began = time.perf_counter()
        batch = next(batches)
        failpoints.reach("batch", rank=world.rank, step=step)
        loaded, traffic_before = time.perf_counter(), vars(strategy.traffic).copy()
        lr = lr_at(step, config.schedule, config.optimizer.lr, spec.steps)
        # What a strategy makes of gradients scaled so is in its contract.
        scale = 1 / max(1, batch.num_targets) if strategy.local else world.size / _targets(batch, step, spec, world)
        loss_sum = _accumulate_gradients(model, batch.to(world.device), scale, config.train)
        failpoints.reach("gradient", rank=world.rank, step=step)
        asked = requests.agree(step, loss_sum)
        strategy.average_gradients()
        norm = _clip(model, config.train.max_grad_norm)
        strategy.step(lr, batch.num_targets)
        failpoints.reach("updated", rank=world.rank, step=step)
        ended = time.perf_counter()
        moved = {name: value - traffic_before[name] for name, value in vars(strategy.traffic).items()}
        moved["seconds"] += asked.seconds
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
        return spec.target_tokens(step)
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
