"""The training loop of one rank, from the run directory to its result. It names no strategy.

Shapes: B_ = sequences of this rank in a step, M_ = of one micro-batch, S = sequence length, V = vocabulary.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from sparktrain import failpoints, heartbeat, pulse
from sparktrain.config import RunConfig
from sparktrain.errors import Changed, ConfigError
from sparktrain.plan import PlanSpec
from sparktrain.receipts import Receipts
from sparktrain.results import RankResult, StepRecord
from sparktrain.rundir import RunDir
from sparktrain.tokens.sources.reach import known, opener
from sparktrain.train import checkpoint, models, pipelines, speed
from sparktrain.train.batch import Batch, check_separates
from sparktrain.train.batches import Batches
from sparktrain.train.by_source import by_source
from sparktrain.train.evaluate import heldout_loss, sequence_losses
from sparktrain.train.external_rounds import Rounds, hand_over
from sparktrain.train.gradients import accumulate, clip, skip, targets_of
from sparktrain.train.live import Live
from sparktrain.train.nonfinite import NonFinite
from sparktrain.train.requests import Requests
from sparktrain.train.schedule import lr_at
from sparktrain.train.strategies import STRATEGIES, Strategy
from sparktrain.train.strategies.contract import BYTES, told
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
    live: Live
    requests: Requests
    nonfinite: NonFinite
    rounds: Rounds | None = None


def train(directory: RunDir, config: RunConfig, spec: PlanSpec, generation: int) -> RankResult:
    """:func:`train_in` the world that this process's environment names."""
    with start_world(max(1, config.launch.threads), config.launch.collective_timeout) as world:
        if world.size > (most := spec.smallest_batch):
            raise ConfigError(f"{world.size} ranks share train.total_batch {most}: start at most {most} ranks")
        return train_in(world, directory, config, spec, generation)


def train_in(world: World, directory: RunDir, config: RunConfig, spec: PlanSpec, generation: int) -> RankResult:
    """Train by the plan ``spec`` in ``directory``, from the newest checkpoint there, as attempt ``generation``; rank 0
    also writes the trained model."""
    heartbeat.at("loads")
    failpoints.reach("start", rank=world.rank, generation=generation)
    start = checkpoint.choose(directory, world)
    first_step = start.step if start else 0
    live = Live(directory.path, config, world, first_step)
    config = live.at(first_step)
    model = models.build(config, world, directory.checkpoints.directory(start.name) if start else None)
    if spec.packed:
        check_separates(model)
    kind = STRATEGIES[config.strategy.kind]
    strategy = kind.build(dict(model.named_parameters()), config.strategy, config.optimizer, spec.steps)
    rounds = hand_over(model, strategy, config, spec, directory.run_id, world)
    _say(world, f"{model.num_parameters():,} parameters, {config.strategy.kind}")
    if start is None:
        before = heldout_loss(model, config, world)
        _say(world, f"held-out loss {_number(before)}")
    else:
        before = start.values["heldout_before"]
        checkpoint.restore(directory, start, strategy, world)
        strategy.retune(config.optimizer, config.strategy)  # a change may count from this very step on
        _say(world, f"going on from checkpoint {start.name}, saved by {start.world} ranks")
    failpoints.reach("loaded", rank=world.rank, generation=generation)
    alone = strategy.local and not rounds
    saver = checkpoint.Checkpointer(directory, config, world, generation, start, {"heldout_before": before})
    nonfinite = NonFinite(directory, world, live, alone, strategy.refuses, saver.newest)
    requests = Requests(directory, world, alone, live.waits, nonfinite.skips_loss)
    training = Training(directory, config, spec, world, model, strategy, live, requests, nonfinite, rounds)
    with saver, pulse.beating(directory.pulse(generation, world.rank), world.rank) as records:
        first_step_at = _run(training, saver, first_step, records)
    if requests.asked.stop:
        raise requests.stopped(records[-1].step + 1, spec.steps)
    heartbeat.at("saves", spec.steps)
    failpoints.reach("trained", rank=world.rank, generation=generation)
    _sync(strategy, records)
    after = heldout_loss(model, config, world)
    digest = models.digest(model)
    heartbeat.at("saves")
    if world.rank == 0:
        directory.check_newest(generation)
        models.save(model, config, directory.model)
    failpoints.reach("saved", rank=world.rank, generation=generation)
    _say(world, f"finished: held-out loss {_number(after)}, parameters {digest[:16]}")
    resumed_from, size = start.name if start else None, model.num_parameters()
    where = (world.rank, world.size, world.host)
    return RankResult(*where, records, digest, size, before, after, first_step_at, resumed_from)


def _run(training: Training, saver: checkpoint.Checkpointer, first_step: int, records: list[StepRecord]) -> float:
    """Every step from ``first_step`` on, with checkpoints, or until it is to stop, appended to ``records``; when the
    first one ended."""
    spec, live, requests, first_step_at = training.spec, training.live, training.requests, 0.0
    with requests.heeding_sigterm(training.config.launch.grace), requests.looking_ahead():
        for turn in _turns(training, first_step, saver.receipts):
            first_step_at = first_step_at or time.time()
            begun, done = turn[0].step, turn[-1].step + 1
            config = live.at(done - 1)
            if done < spec.steps and _due(config.eval.every, begun, done):
                turn[-1] = _measured(training, turn[-1])
            records += turn
            again = requests.asked.change and live.take(done)
            if begun == first_step or _due(config.run.log_every, begun, done):
                _say(training.world, _line(turn[-1], spec))
            heartbeat.at("saves")
            every = config.checkpoint.every
            if requests.asked.save or again or _due(every, begun, done) or (every and done == spec.steps):
                saver.save(done, training.model, training.strategy, records)
            if requests.asked.save:
                saver.wait()
                requests.met()
            if requests.asked.stop:
                break
            if again:
                saver.wait()
                raise Changed(f"settings changed after step {done}: ranks start again with them")
    return first_step_at


def _turns(training: Training, first_step: int, receipts: Receipts) -> Iterator[list[StepRecord]]:
    """Records of the steps after which there is a state to save: of every one, or of all in a program's round."""
    if training.rounds is None:
        yield from ([record] for record in _steps(training, first_step, receipts))
    else:
        speeds, batches = _batches(training, first_step, receipts)
        yield from training.rounds.records(first_step, batches, speeds, training.live.at, training.requests.agree)


def _due(every: int, begun: int, done: int) -> bool:
    """Whether what is done every so many steps, or never, is due after step ``begun`` and those up to ``done``."""
    return every > 0 and done // every > begun // every


def _batches(
    training: Training, first_step: int, receipts: Receipts | None
) -> tuple[tuple[float, ...], Iterator[Batch]]:
    """What ranks' shares are by, and this rank's batches from ``first_step`` on, with ``receipts`` for each."""
    config, spec, world = training.config, training.spec, training.world
    shards = opener(config.data, known(spec.shards))
    speeds = speed.of_ranks(training.model, config, spec, world)
    made = pipelines.planned(config, training.model.config.vocab_size, spec)
    place = (world.rank, world.size, first_step, speeds)
    batches = Batches(training.directory, spec, *place, shards, receipts, config.data.cache_dir is not None, made)
    return speeds, iter(batches)


def _sync(strategy: Strategy, records: list[StepRecord]) -> None:
    """Bring ranks together at the end of the run, at the cost of the last step."""
    before = vars(strategy.traffic).copy()
    strategy.sync()
    if records:
        last, now = records[-1], vars(strategy.traffic)
        records[-1] = last._replace(**{name: getattr(last, name) + now[name] - before[name] for name in BYTES})


def _measured(training: Training, record: StepRecord) -> StepRecord:
    """``record`` with the held-out loss of the weights that all ranks share; none of them changes."""
    loss = heldout_loss(training.model, training.config, training.world, training.strategy.extract())
    _say(training.world, f"step {record.step + 1}/{training.spec.steps}  held-out loss {_number(loss)}")
    return record._replace(heldout_loss=loss)


def _steps(training: Training, first_step: int = 0, receipts: Receipts | None = None) -> Iterator[StepRecord]:
    """One record per step of the plan from ``first_step`` on, and ``receipts`` for what it read."""
    config, spec, world, model = training.config, training.spec, training.world, training.model
    strategy, live, requests, nonfinite = training.strategy, training.live, training.requests, training.nonfinite
    speeds, batches = _batches(training, first_step, receipts)
    for step in range(first_step, spec.steps):
        if (now := live.at(step)) is not config:
            config = now
            strategy.retune(config.optimizer, config.strategy)
        began = time.perf_counter()
        heartbeat.at("reads", step)
        batch = next(batches)
        failpoints.reach("batch", rank=world.rank, step=step)
        loaded, traffic_before = time.perf_counter(), vars(strategy.traffic).copy()
        lr = lr_at(step, config.schedule, config.optimizer.lr, spec.steps)
        # What a strategy makes of gradients scaled so is in its contract.
        scale = 1 / max(1, batch.num_targets) if strategy.local else world.size / targets_of(batch, step, spec, world)
        losses_B = accumulate(model, batch.to(world.device), scale, config.train, sequence_losses)
        loss_sum = float(losses_B.sum())
        failpoints.reach("gradient", rank=world.rank, step=step)
        asked = requests.agree(step, loss_sum, config.train.leaves_out(step))
        updating = time.perf_counter()
        heartbeat.at("updates")
        norm = math.nan if asked.skip else clip(model, strategy, config.train.max_grad_norm)
        skipped = asked.skip or nonfinite.skips_gradient(step, norm)
        skip(model, strategy, lr) if skipped else strategy.step(lr, batch.num_targets)
        failpoints.reach("updated", rank=world.rank, step=step)
        ended = time.perf_counter()
        moved = {name: value - traffic_before[name] for name, value in vars(strategy.traffic).items()}
        optimizer_seconds = ended - updating - moved["seconds"]
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
            **told(strategy, moved, skipped),
            optimizer_seconds=optimizer_seconds,
            examples=len(batch.tokens),
            sources=by_source(spec, step, world, speeds, batch, losses_B),
        )


def _line(record: StepRecord, spec: PlanSpec) -> str:
    loss, rate = record.loss_sum / max(1, record.tokens), record.tokens / record.seconds
    return (
        f"step {record.step + 1}/{spec.steps}  loss {loss:.4f}  lr {record.lr:.2e}  grad norm {record.grad_norm:.3f}  "
        f"{rate:,.0f} tokens/s of this rank  {record.payload_bytes:,} bytes"
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)
