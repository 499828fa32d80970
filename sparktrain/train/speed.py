"""How fast ranks are, for shares of the batch that take them all the same time.

Measured by the ranks themselves, where they are about to train, with the model and all at once: what a probe before
the launch finds out is true of an executor that need not get the same rank, and of one that is otherwise idle.
"""

import time

import torch
from transformers import PreTrainedModel

from sparktrain.config import RunConfig
from sparktrain.plan import PlanSpec
from sparktrain.train.world import World

_WARM_UP, _MEASURED = 2, 4


def of_ranks(model: PreTrainedModel, config: RunConfig, spec: PlanSpec, world: World) -> tuple[float, ...]:
    """The speed of each rank by ``launch.weights``, the same numbers on every rank; none where all share equally."""
    weights = config.launch.weights
    if weights == "measured":
        mine = [0.0] * world.size
        mine[world.rank] = _sequences_per_second(model, config, spec, world)
        return tuple(world.sum(*mine))
    # After a restart with fewer ranks it is not known whose numbers these were.
    return weights if not isinstance(weights, str) and len(weights) == world.size else ()


def _sequences_per_second(model: PreTrainedModel, config: RunConfig, spec: PlanSpec, world: World) -> float:
    """Forward and backward passes over a micro-batch; leaves neither gradients nor other random numbers behind."""
    devices = [world.device] if world.device.type == "cuda" else []
    batch = torch.zeros(config.train.micro_batch, spec.window_length, dtype=torch.int64, device=world.device)
    low_precision = torch.autocast(world.device.type, torch.bfloat16, enabled=config.train.autocast == "bfloat16")
    began = 0.0
    with torch.random.fork_rng(devices):
        for i in range(_WARM_UP + _MEASURED):
            if i == _WARM_UP:
                began = _now(world)
            with low_precision:
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
    model.zero_grad(set_to_none=True)
    return _MEASURED * len(batch) / (_now(world) - began)


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
