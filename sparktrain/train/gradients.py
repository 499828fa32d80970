"""A rank's gradient of its share of the batch, in micro-batches, and what it is divided by."""

import math
from collections.abc import Callable

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
) -> float:
    """Leave in ``.grad`` the gradient of ``scale`` times the summed token losses; returns the sum of losses.

    Args:
        losses: of a micro-batch, see ``token_losses``.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64, device=batch.tokens.device)
    exact = [torch.zeros_like(p, dtype=torch.float32) for p in parameters] if settings.accumulate_fp32 else []
    for part in batch.split(settings.micro_batch):
        heartbeat.at("computes")
        loss = losses(model, part, settings.autocast)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        for sum_so_far, parameter in zip(exact, parameters, strict=False):
            if parameter.grad is not None:
                sum_so_far += parameter.grad
                parameter.grad = None
    for sum_so_far, parameter in zip(exact, parameters, strict=False):
        parameter.grad = sum_so_far.to(parameter.dtype)
    return float(total)


def clip(model: PreTrainedModel, max_norm: float) -> float:
    """Global norm of the gradient, which is then clipped to ``max_norm`` (0: not)."""
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf))


def skip(model: PreTrainedModel, strategy: Strategy, lr: float) -> float:
    """Leave out an update; the norm of its gradient, which is not a number."""
    model.zero_grad(set_to_none=True)
    if strategy.local:  # the step counts, or this rank would come late to every sync; without gradients it does nothing
        strategy.step(lr, 0)
    return math.nan
