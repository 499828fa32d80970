"""DisTrO, the one strategy that is more than a file: ``optimizer.py`` is the class and says what it does; here is its
row of the strategy table."""

from collections.abc import Sequence

import torch

from sparktrain.config import Distro, Optimizer
from sparktrain.train.strategies.contract import Traffic
from sparktrain.train.strategies.distro.layout import layout_of
from sparktrain.train.strategies.distro.optimizer import TILE_WEIGHTS, DisTrO

__all__ = ["DisTrO", "build", "traffic_per_step"]


def build(parameters: dict[str, torch.nn.Parameter], section: Distro, optimizer: Optimizer, steps: int) -> DisTrO:
    trained = {id(p): (name, p) for name, p in reversed(parameters.items()) if p.requires_grad}
    ordered = list(reversed(trained.values()))
    groups = [
        {"params": [(n, p) for n, p in ordered if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
        {"params": [(n, p) for n, p in ordered if p.ndim < 2], "weight_decay": 0.0},
    ]
    members = [group for group in groups if group["params"]]
    return DisTrO(members, optimizer.lr, **section.model_dump(exclude={"kind"}))


def traffic_per_step(shapes: Sequence[torch.Size], section: Distro, world: int, element_bytes: int = 4) -> Traffic:
    groups = [[s for s in shapes if len(s) >= 2], [s for s in shapes if len(s) < 2]]
    chunk, topk = section.compression_chunk, section.compression_topk
    layout = layout_of([g for g in groups if g], chunk, topk, section.values, section.cut, TILE_WEIGHTS["cuda"])
    traffic = Traffic()
    traffic.add_all_gather(layout.payload_bytes(section.values), world)
    return traffic
