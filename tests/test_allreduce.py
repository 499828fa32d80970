"""AdamW with all-reduce: ranks that share a batch do what one process does with all of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparktrain.config import AdamW, Optimizer
from sparktrain.train.strategies.allreduce import AllReduceAdamW, traffic_per_step

SETTINGS = Optimizer(lr=0.01, weight_decay=0.1)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def train(rank: int, world: int, shares: list[slice]) -> dict[str, Any]:
    net = model()
    strategy = AllReduceAdamW(dict(net.named_parameters()), SETTINGS)
    for step in range(5):
        net.zero_grad()
        mine = batch(step)[shares[rank]]
        (net(mine).square().sum() * world / 8).backward()
        strategy.average_gradients()
        strategy.step(0.01, 1)
    return {"state": net.state_dict(), "traffic": vars(strategy.traffic)}


@pytest.mark.parametrize("shares", [[slice(0, 4), slice(4, 8)], [slice(0, 7), slice(7, 8)]])
def test_uneven_shares_of_a_batch_give_the_gradient_of_the_whole(
    on_ranks: Callable[..., list[Any]], shares: list[slice]
) -> None:
    net = model()
    decayed = [p for p in net.parameters() if p.ndim >= 2]
    plain = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        net.zero_grad()
        (net(batch(step)).square().sum() / 8).backward()
        reference.step()
    first, second = on_ranks(2, train, shares)
    for name, expected in net.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name])
        torch.testing.assert_close(first["state"][name], expected, rtol=1e-5, atol=1e-7)


def test_the_bytes_counted_are_the_closed_form(on_ranks: Callable[..., list[Any]]) -> None:
    shapes = [p.shape for p in model().parameters()]
    shares = [slice(0, 4), slice(4, 6), slice(6, 8)]
    for result in on_ranks(3, train, shares):
        per_step = traffic_per_step(shapes, AdamW(), 3)
        for name in ("payload_bytes", "bytes_sent", "bytes_received"):
            assert result["traffic"][name] == 5 * getattr(per_step, name)
    assert per_step.payload_bytes == 4 * sum(s.numel() for s in shapes)
    assert traffic_per_step(shapes, AdamW(), 1).bytes_sent == 0
