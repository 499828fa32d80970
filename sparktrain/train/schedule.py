"""The learning rate as a function of the step."""

import math

from sparktrain.config import Schedule


def lr_at(step: int, schedule: Schedule, peak: float, total_steps: int) -> float:
    """Learning rate of 0-based ``step``: linear warm-up to ``peak``, then the schedule's shape down to
    ``final_ratio * peak`` at the last step, and that ever after."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    span = max(1, total_steps - 1 - warmup)
    done = min(1.0, (step - warmup) / span)
    match schedule.kind:
        case "constant":
            shape = 1.0
        case "linear":
            shape = 1.0 - done
        case "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * done))
        case "warmup-stable-decay":
            decay = schedule.decay_steps or max(1, total_steps // 5)
            shape = min(1.0, max(0.0, (total_steps - 1 - step) / decay))
    if schedule.kind == "constant":
        return peak
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * shape)
