"""DisTrO on real gloo ranks."""

import torch

from sparktrain.config import Distro, Optimizer
from sparktrain.train.strategies.distro import DisTrO, build, traffic_per_step


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(67, 130), torch.nn.Tanh(), torch.nn.Linear(130, 5))


def _train(rank: int, steps: int, optimizer: DisTrO, model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(32, 67, generator=generator)
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.average_gradients()
        optimizer.step(1e-2)


def test_ranks_stay_bit_identical_and_send_what_the_closed_form_says(on_ranks):
    section = Distro(compression_topk=8, compression_decay=0.9)

    def rank_main(rank, world):
        model = _model()
        optimizer = build(dict(model.named_parameters()), section, Optimizer())
        _train(rank, 10, optimizer, model)
        return [p.detach().numpy() for p in model.parameters()], optimizer.traffic

    (zero, traffic), (one, _) = on_ranks(2, rank_main)
    assert all((a == b).all() for a, b in zip(zero, one, strict=True))
    expected = traffic_per_step([p.shape for p in _model().parameters()], section, 2)
    assert traffic.payload_bytes == 10 * expected.payload_bytes
    assert traffic.bytes_received == 10 * expected.bytes_received
    initial = [p.detach().numpy() for p in _model().parameters()]
    assert all((a != b).any() for a, b in zip(zero, initial, strict=True))


def test_it_learns_alone_without_a_process_group():
    model = _model()
    x = torch.randn(64, 67, generator=torch.Generator().manual_seed(9))
    loss = lambda: (model(x) - x[:, :5]).square().mean()  # noqa: E731
    before = loss().item()
    _train(0, 60, DisTrO(model.parameters(), 1e-3, compression_decay=0.9), model)
    assert loss().item() < 0.8 * before
