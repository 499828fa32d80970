"""The optimizer of one rank's own steps, the same for every strategy that has one."""

import torch

from sparktrain.config import Optimizer


def adamw(parameters: dict[str, torch.nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """``torch.optim.AdamW``, fused where torch has it, on the parameters that are trained; matrices alone decay."""
    trained = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def retune(made: torch.optim.Optimizer, settings: Optimizer) -> None:
    """The same optimizer, with its state, by other settings; the learning rate comes with each step."""
    for group in made.param_groups:
        group["betas"], group["eps"] = settings.betas, settings.eps
        group["weight_decay"] = settings.weight_decay if group["params"][0].ndim >= 2 else 0.0
