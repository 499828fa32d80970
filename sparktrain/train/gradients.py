"""A rank's gradient of its share of the batch, in micro-batches, and what it is divided by."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from sparktrain import heartbeat
from sparktrain.config import Train
from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec
from sparktrain.train.batch import Batch
from sparktrain.train.strategies.contract import Strategy
from sparktrain.train.world import World


def targets_of(batch: Batch, step: int, spec: PlanSpec, world: World) -> int:
    """Targets of the global batch. Known from the plan where every token is one, which all ranks see alike; else the
    ranks' counts are added up."""
    if not spec.leaves_targets_out:
        return spec.target_tokens(step)
    heartbeat.at("agrees")
    targets = int(world.sum(batch.num_targets)[0])
    if not targets:
        raise DataError(f"the batch of step {step} has no target, labels leave all its tokens out: use other data")
    return targets


def accumulate(
    model: PreTrainedModel,
    batch: Batch,
    scale: float,
    settings: Train,
    losses: Callable[[PreTrainedModel, Batch, str], torch.Tensor],
) -> npt.NDArray[np.float64]:
    """Leave in ``.grad`` the gradient of ``scale`` times the summed token losses; returns the sum of losses of each
    sequence, ``[B_]``.

    Args:
        losses: of each sequence of a micro-batch, see ``sequence_losses``.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    found: list[torch.Tensor] = []
    exact = [torch.zeros_like(p, dtype=torch.float32) for p in parameters] if settings.accumulate_fp32 else []
    for part in batch.split(settings.micro_batch):
        heartbeat.at("computes")
        losses_M = losses(model, part, settings.autocast)
        (losses_M.sum() * scale).backward()  # type: ignore[no-untyped-call]
        found.append(losses_M.detach())
        for sum_so_far, parameter in zip(exact, parameters, strict=False):
            if parameter.grad is not None:
                sum_so_far += parameter.grad
                parameter.grad = None
    for sum_so_far, parameter in zip(exact, parameters, strict=False):
        parameter.grad = sum_so_far.to(parameter.dtype)
    return torch.cat(found).cpu().double().numpy()


def clip(model: PreTrainedModel, strategy: Strategy, max_norm: float) -> float:
    """Global norm of the gradient that the strategy trains on, which is then clipped to ``max_norm`` (0: not)."""
    strategy.average_gradients()
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf))


def skip(model: PreTrainedModel, strategy: Strategy, lr: float) -> None:
    """Leave out an update."""
    model.zero_grad(set_to_none=True)
    if strategy.local:  # the step counts, or this rank would come late to every sync; without gradients it does nothing
        strategy.step(lr, 0)
