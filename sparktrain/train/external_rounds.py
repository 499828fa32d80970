"""The loop's other half: rounds in which a program takes the steps, and the rank reads, waits, and meets the others.

Nothing of a round exists before it is over, so requests, checkpoints and records come in rounds, too.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from sparktrain import failpoints, heartbeat
from sparktrain.config import RunConfig
from sparktrain.plan import PlanSpec, rows, slots_of
from sparktrain.results import StepRecord
from sparktrain.train.batch import Batch
from sparktrain.train.external import InnerResult, StepData, Trainer, command_of
from sparktrain.train.schedule import lr_at
from sparktrain.train.strategies.contract import Strategy, Traffic
from sparktrain.train.strategies.replicas.local_steps import LocalSteps
from sparktrain.train.world import World


def hand_over(
    model: PreTrainedModel,
    strategy: Strategy,
    config: RunConfig,
    spec: PlanSpec,
    run_id: Callable[[], str],
    world: World,
) -> "Rounds | None":
    """Have the program of ``config``, if there is one, take the steps of ``strategy``."""
    settings = config.inner_loop
    if not settings.command:
        return None
    assert isinstance(strategy, LocalSteps), "the settings were checked"
    trainer = Trainer(model, command_of(settings), run_id(), world.rank)
    strategy.hand_over(trainer, settings.require_exact_steps)
    return Rounds(trainer, strategy, config, spec, world)


@dataclass(frozen=True)
class Rounds:
    """The rounds of a rank."""

    trainer: Trainer
    strategy: LocalSteps
    config: RunConfig
    spec: PlanSpec
    world: World

    def records(
        self,
        first_step: int,
        batches: Iterator[Batch],
        weights: Sequence[float],
        settings: Callable[[int], RunConfig],
        agree: Callable[[int, float], Any],
    ) -> Iterator[list[StepRecord]]:
        """Those of the steps of each round, up to the plan's end.

        Args:
            batches: of this rank, from ``first_step`` on.
            weights: ranks' shares of a step are by these.
            settings: those of a step, see ``Live.at``.
            agree: told the last step of a round and a loss, see ``Requests.agree``.
        """
        strategy, config = self.strategy, self.config
        while first_step < self.spec.steps:
            steps = range(first_step, min(first_step + strategy.due, self.spec.steps))
            if (now := settings(first_step)) is not config:
                config = now
                strategy.retune(config.optimizer, config.strategy)
            began = time.perf_counter()
            work, read, seconds = self._read(steps, batches, weights, config)
            result = self.trainer.train(work)
            tokens = _consumed(read, result.steps_completed)
            before = vars(strategy.traffic).copy()
            # What it returned is finite; whether a loss that is not ends the run is as for a step.
            loss = _metric(result, "loss", "train_loss", missing=0.0)
            asked = agree(steps[-1], loss if config.train.on_nonfinite == "stop" else 0.0)
            heartbeat.at("updates")
            strategy.advance(len(steps), result.steps_completed, sum(tokens))
            failpoints.reach("updated", rank=self.world.rank, step=steps[-1])
            moved = {name: value - before[name] for name, value in vars(strategy.traffic).items()}
            moved["seconds"] += asked.seconds
            compute = time.perf_counter() - began - sum(seconds) - moved["seconds"]
            records = [
                _record(result, data, count, reading, compute / len(steps))
                for data, count, reading in zip(work, tokens, seconds, strict=True)
            ]
            records[-1] = _with_sync(records[-1], Traffic(**moved), strategy.delta_norm)
            yield records
            first_step = steps.stop

    def _read(
        self, steps: Sequence[int], batches: Iterator[Batch], weights: Sequence[float], config: RunConfig
    ) -> tuple[list[StepData], list[int], list[float]]:
        """Each step's data, its targets, and the seconds it took to come by."""
        work, targets, seconds = [], [], []
        for step in steps:
            began = time.perf_counter()
            heartbeat.at("reads", step)
            batch = next(batches)
            failpoints.reach("batch", rank=self.world.rank, step=step)
            slots = slots_of(self.world.rank, self.world.size, self.spec.batch_of(step), weights)
            first, last = (self.spec.first_position(step) + slot for slot in slots)
            lr = lr_at(step, config.schedule, config.optimizer.lr, self.spec.steps)
            microshards = [row.microshard_id for row in rows(self.spec, first, last)]
            work.append(StepData(step, lr, microshards, batch.arrays()))
            targets.append(batch.num_targets)
            seconds.append(time.perf_counter() - began)
        return work, targets, seconds


def _record(result: InnerResult, data: StepData, tokens: int, reading: float, computing: float) -> StepRecord:
    """A step of a round, as far as it is known: a program tells a loss of all of them."""
    return StepRecord(
        step=data.step,
        loss_sum=_metric(result, "loss", "train_loss") * tokens,
        tokens=tokens,
        lr=data.learning_rate,
        grad_norm=_metric(result, "grad_norm"),
        seconds=reading + computing,
        data_seconds=reading,
        compute_seconds=computing,
        communication_seconds=0.0,
        payload_bytes=0,
        bytes_sent=0,
        bytes_received=0,
        examples=len(data.microshards),
    )


def _with_sync(record: StepRecord, moved: Traffic, delta_norm: float | None) -> StepRecord:
    return record._replace(
        seconds=record.seconds + moved.seconds,
        communication_seconds=moved.seconds,
        payload_bytes=moved.payload_bytes,
        bytes_sent=moved.bytes_sent,
        bytes_received=moved.bytes_received,
        delta_norm=delta_norm,
    )


def _consumed(read: Sequence[int], steps: int) -> list[int]:
    """Targets of each step of a round, where the program took ``steps`` of them; where that is fewer or more than there
    are, it cycled through the batches, and which of its steps was which is not known."""
    if steps == len(read):
        return list(read)
    total = sum(read[i % len(read)] for i in range(steps))
    ends = [total * (i + 1) // len(read) for i in range(len(read))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _metric(result: InnerResult, *names: str, missing: float = math.nan) -> float:
    """The first of these metrics that the program told as a number."""
    told = (result.metrics.get(name) for name in names)
    return next((float(value) for value in told if isinstance(value, int | float)), missing)
