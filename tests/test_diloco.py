"""DiLoCo and what it shares with SparseLoCo: on real gloo ranks, against the formulas, with what can go wrong."""

import contextlib
import copy
import io
import re
import time

import pytest
import torch

from sparktrain.config import Diloco, Optimizer, Sparseloco
from sparktrain.errors import ConfigError, Diverged
from sparktrain.train.strategies import diloco, sparseloco
from sparktrain.train.strategies.diloco import DiLoCo
from sparktrain.train.strategies.replicas.cadence import choose_every
from sparktrain.train.strategies.replicas.flat import Flat
from sparktrain.train.strategies.sparseloco import SparseLoCo

SIZES = [(130, 67), (3,), (64, 64), (101,)]
WEIGHTS = 130 * 67 + 3 + 64 * 64 + 101
AVERAGE = {"outer_lr": 1.0, "outer_momentum": 0.0, "nesterov": False}
STREAMING = {"num_fragments": 2, "fragment_sync_delay": 1, "fragment_update_alpha": 0.5}
SPARSE = {"compression_chunk": 16, "compression_topk": 8}


def parameters_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def give_gradients(parameters, rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def train(strategy, parameters, rank, steps, tokens=1):
    for step in steps:
        give_gradients(parameters, rank, step)
        strategy.step(tokens=tokens)


def values(parameters):
    return torch.cat([p.detach().float().view(-1) for p in parameters]).numpy()


def put(parameters, vector):
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.data.copy_(part.view_as(parameter))


def simulated(world, inner, steps, every, lr, momentum, fragments=1, delay=0, alpha=0.0, tokens=None):
    """The formulas of the module, all ranks in this process, a weight at a time where it matters."""
    ranks = [parameters_of() for _ in range(world)]
    inners = [inner(parameters) for parameters in ranks]
    theta, velocity = torch.from_numpy(values(ranks[0])).clone(), torch.zeros(WEIGHTS)
    share = torch.tensor(tokens or [1] * world, dtype=torch.float32)
    bounds = [WEIGHTS * f // fragments // 2 * 2 for f in range(fragments)] + [WEIGHTS]
    interval, told = every // fragments, None
    for step in range(steps):
        for rank, parameters in enumerate(ranks):
            give_gradients(parameters, rank, step)
            inners[rank].step()
        number, since = divmod(step, interval)
        part = slice(bounds[number % fragments], bounds[number % fragments + 1])
        local = [torch.from_numpy(values(parameters)) for parameters in ranks]
        if since == interval - 1 - delay:
            told = sum(s * (theta - x)[part] for s, x in zip(share, local, strict=True)) / share.sum()
        if since == interval - 1:
            velocity[part] = momentum * velocity[part] + told
            theta[part] -= lr * (told + momentum * velocity[part])
            for parameters, x in zip(ranks, local, strict=True):
                x[part] = alpha * x[part] + (1 - alpha) * theta[part]
                put(parameters, x)
    return [values(parameters) for parameters in ranks]


@pytest.mark.parametrize("world", [1, 3])
def test_rounds_of_one_step_without_momentum_average_the_parameters(on_ranks, world):
    def rank_main(rank, world):
        parameters = parameters_of()
        train(DiLoCo(parameters, adamw(parameters), sync_every=1, **AVERAGE), parameters, rank, range(5))
        return values(parameters)

    alone = [parameters_of() for _ in range(world)]
    inners = [adamw(parameters) for parameters in alone]
    for step in range(5):
        for rank, parameters in enumerate(alone):
            give_gradients(parameters, rank, step)
            inners[rank].step()
        mean = sum(torch.from_numpy(values(p)) for p in alone) / world
        for parameters in alone:
            put(parameters, mean)
    for result in on_ranks(world, rank_main):
        torch.testing.assert_close(torch.from_numpy(result), mean, rtol=1e-5, atol=1e-6)


def test_rounds_of_one_step_of_sgd_are_all_reduced_sgd_whatever_the_shares(on_ranks):
    """The mean over ranks is weighed by tokens: a rank with three quarters of the batch counts three times as much."""

    def rank_main(rank, world):
        torch.manual_seed(0)
        model, x = torch.nn.Linear(7, 3), torch.randn(16, 7)
        mine = x[:12] if rank == 0 else x[12:]
        strategy = DiLoCo(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), sync_every=1, **AVERAGE)
        for _ in range(4):
            model.zero_grad()
            model(mine).square().sum(1).mean().backward()
            strategy.step(tokens=len(mine))
        return values(model.parameters())

    torch.manual_seed(0)
    model, x = torch.nn.Linear(7, 3), torch.randn(16, 7)
    whole = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        model.zero_grad()
        model(x).square().sum(1).mean().backward()
        whole.step()
    zero, one = on_ranks(2, rank_main)
    assert (zero == one).all()
    torch.testing.assert_close(torch.from_numpy(zero), torch.from_numpy(values(model.parameters())))


@pytest.mark.parametrize(("lr", "momentum", "nesterov"), [(0.7, 0.9, True), (0.4, 0.9, False), (0.7, 0.0, False)])
def test_the_outer_step_is_torch_sgds_to_the_bit(on_ranks, lr, momentum, nesterov):
    settings = {"outer_lr": lr, "outer_momentum": momentum, "nesterov": nesterov}

    def rank_main(rank, world):
        parameters = parameters_of()
        strategy = DiLoCo(parameters, adamw(parameters), sync_every=3, **settings)
        # The same steps on both ranks: the mean of their progress is the progress.
        train(strategy, parameters, 0, range(12), tokens=77)
        return values(parameters)

    theta, parameters = parameters_of(), parameters_of()
    outer = torch.optim.SGD(theta, lr=lr, momentum=momentum, nesterov=nesterov)
    inner = adamw(parameters)
    for step in range(12):
        give_gradients(parameters, 0, step)
        inner.step()
        if step % 3 == 2:
            for shared, own in zip(theta, parameters, strict=True):
                shared.grad = shared.detach() - own.detach()
            outer.step()
            for shared, own in zip(theta, parameters, strict=True):
                own.data.copy_(shared.data)
    for result in on_ranks(2, rank_main):
        assert (result == values(theta)).all()


@pytest.mark.parametrize(
    ("fragments", "delay", "alpha"), [(1, 0, 0.0), (1, 2, 0.0), (2, 0, 0.0), (3, 1, 0.5), (6, 0, 0.25)]
)
def test_fragments_delay_and_mixing_follow_the_formulas(on_ranks, fragments, delay, alpha):
    def rank_main(rank, world):
        parameters = parameters_of()
        strategy = DiLoCo(
            parameters,
            sgd(parameters),
            sync_every=6,
            num_fragments=fragments,
            fragment_sync_delay=delay,
            fragment_update_alpha=alpha,
        )
        train(strategy, parameters, rank, range(24), tokens=1 + rank)
        return values(parameters)

    expected = simulated(2, sgd, 24, 6, 0.7, 0.9, fragments, delay, alpha, tokens=[1, 2])
    for result, wanted in zip(on_ranks(2, rank_main), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(result), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)


def test_fragments_cover_every_weight_once_per_round_and_divide_the_traffic(on_ranks):
    def rank_main(rank, world):
        parameters = parameters_of()
        strategy = DiLoCo(parameters, sgd(parameters), sync_every=8, num_fragments=4, compression="int8")
        changes, payloads = torch.zeros(WEIGHTS), []
        for step in range(8):
            before, sent = strategy._flat.shared[:WEIGHTS].clone(), strategy.traffic.payload_bytes
            train(strategy, parameters, rank, [step])
            changes += strategy._flat.shared[:WEIGHTS] != before
            payloads.append(strategy.traffic.payload_bytes - sent)
        return changes.tolist(), payloads

    for changes, payloads in on_ranks(2, rank_main):
        # int8 says nothing of a weight that has moved by less than a 254th of the most moved one near it.
        assert max(changes) == 1
        assert sum(changes) > 0.95 * WEIGHTS
        assert payloads[::2] == [0, 0, 0, 0]
        assert max(payloads[1::2]) - min(payloads[1::2]) < 600
    whole = diloco.traffic_per_step([torch.Size(s) for s in SIZES], Diloco(sync_every=1, compression="int8"), 2)
    assert max(payloads) < whole.payload_bytes / 4 + 600


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "section",
    [
        Diloco(sync_every=2),
        Diloco(sync_every=2, compression="bf16"),
        Diloco(sync_every=2, compression="int8", outer="average"),
        Diloco(sync_every=4, compression="int4", num_fragments=2, fragment_sync_delay=1),
        Sparseloco(sync_every=2, **SPARSE),
        Sparseloco(sync_every=2, quantize_bits=8),
    ],
)
def test_ranks_stay_bit_identical_and_send_what_the_closed_form_says(on_ranks, world, section):
    module = diloco if section.kind == "diloco" else sparseloco

    def rank_main(rank, world):
        parameters = {str(number): p for number, p in enumerate(parameters_of())}
        strategy = module.build(parameters, section, Optimizer(lr=0.01), 400)
        for step in range(8):
            give_gradients(parameters.values(), rank, step)
            strategy.average_gradients()
            strategy.step(0.01, 100 + rank)
        shared, traffic = strategy._flat.shared.numpy().copy(), copy.copy(strategy.traffic)
        strategy.sync()
        return values(parameters.values()), shared, traffic

    results = on_ranks(world, rank_main)
    for own, shared, traffic in results:
        assert (own == results[0][0]).all()
        assert (shared == results[0][1]).all()
        per_step = module.traffic_per_step([torch.Size(s) for s in SIZES], section, world)
        for name in ("payload_bytes", "bytes_sent", "bytes_received"):
            assert 0 <= 8 * getattr(per_step, name) - getattr(traffic, name) < 8
    assert (results[0][0] != values(parameters_of())).mean() > 0.1
    nothing = module.traffic_per_step([torch.Size(s) for s in SIZES], section, 1)
    assert nothing.payload_bytes == nothing.bytes_received == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_tiles_end_does_not_show(dtype):
    parameters = parameters_of(dtype)
    theta = torch.from_numpy(values(parameters))
    for tile_weights, fragments in [(64, 1), (100, 3), (4096, 1), (WEIGHTS + 1, 2)]:
        flat = Flat(parameters, fragments, tile_weights)
        tiles = flat.all_tiles()
        assert torch.cat([torch.arange(WEIGHTS)[t.weights] for t in tiles]).tolist() == list(range(WEIGHTS))
        assert max(tile.length for tile in tiles) <= tile_weights
        assert torch.equal(flat.shared[:WEIGHTS], theta)
        flat.shared += 1
        local = torch.from_numpy(values(parameters))
        told = torch.cat([flat.progress(tile, torch.empty(tile.length)) for tile in tiles])
        assert torch.equal(told, flat.shared[:WEIGHTS].to(dtype).float() - local)
        for tile in tiles:
            flat.take(tile, 0.25)
        mixed = torch.lerp(theta + 1, theta, 0.25).to(dtype).float()
        torch.testing.assert_close(
            torch.from_numpy(values(parameters)), mixed, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6
        )
        digests = [flat.digest(f) for f in range(fragments)]
        flat.shared[WEIGHTS - 1] = torch.nextafter(flat.shared[WEIGHTS - 1], torch.tensor(9.0))
        assert [flat.digest(f) for f in range(fragments)][:-1] == digests[:-1]
        assert flat.digest(fragments - 1) != digests[-1]
        put(parameters, theta)


@pytest.mark.parametrize(("compression", "levels"), [(None, 10**6), ("int8", 127), ("int4", 7)])
def test_a_large_parameter_is_told_in_pieces(on_ranks, compression, levels):
    """More weights than a tile holds, and no whole number of coded blocks."""

    def rank_main(rank, world):
        parameter = torch.nn.Parameter(torch.zeros(703, 401))
        strategy = DiLoCo([parameter], sgd([parameter]), sync_every=2, compression=compression, outer="average")
        parameter.grad = torch.randn(703, 401, generator=torch.Generator().manual_seed(rank))
        strategy.step()
        strategy.step()
        return parameter.grad.numpy(), parameter.detach().numpy()

    (first, zero), (second, one) = on_ranks(2, rank_main)
    assert (zero == one).all()
    largest = 0.02 * max(abs(first).max(), abs(second).max())
    assert abs(zero + 0.01 * (first + second)).max() <= 0.51 * largest / levels


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DiLoCo, {"compression": "int4"} | AVERAGE),
        (SparseLoCo, {"error_decay": 1.0} | SPARSE),
        (SparseLoCo, {"error_decay": 1.0, "quantize_bits": 8} | SPARSE),
    ],
)
def test_error_feedback_loses_nothing(kind, settings):
    """All that was sent and the residual together are all the progress there was."""
    parameters = parameters_of()
    strategy = kind(parameters, sgd(parameters), sync_every=2, **settings)
    begun, progress = torch.from_numpy(values(parameters)), torch.zeros(WEIGHTS)
    for step in range(20):
        train(strategy, parameters, 0, [step])
        progress += 0.01 * torch.cat([p.grad.view(-1) for p in parameters])
    sent = begun - torch.from_numpy(values(parameters))
    residual = strategy.state_dict()["rank"]["residual"]
    torch.testing.assert_close(sent + residual, progress, rtol=1e-4, atol=1e-5)
    assert 0 < residual.norm() < progress.norm()


CASES = [
    (DiLoCo, {}, torch.float32),
    (DiLoCo, {"compression": "int4"}, torch.bfloat16),
    (DiLoCo, STREAMING, torch.float32),
    (DiLoCo, {"compression": "int8", "fragment_sync_delay": 2}, torch.float32),
    (SparseLoCo, SPARSE, torch.float32),
]


@pytest.mark.parametrize(("kind", "settings", "dtype"), CASES)
def test_six_steps_are_three_and_saved_in_mid_round_and_three(on_ranks, kind, settings, dtype):
    def rank_main(rank, world):
        whole = parameters_of(dtype)
        train(kind(whole, adamw(whole), sync_every=4, **settings), whole, rank, range(13), tokens=5 + rank)
        half = parameters_of(dtype)
        strategy = kind(half, adamw(half), sync_every=4, **settings)
        train(strategy, half, rank, range(7), tokens=5 + rank)
        saved = strategy.state_dict()
        kept = copy.deepcopy(saved)
        again = parameters_of(dtype)
        resumed = kind(again, adamw(again), sync_every=4, **settings)
        resumed.load_state_dict(saved)
        train(strategy, half, rank, range(7, 13), tokens=5 + rank)
        train(resumed, again, rank, range(7, 13), tokens=5 + rank)
        other = parameters_of(dtype)
        once_more = kind(other, adamw(other), sync_every=4, **settings)
        once_more.load_state_dict(kept)
        train(once_more, other, rank, range(7, 13), tokens=5 + rank)
        return [values(p) for p in (whole, half, again, other)]

    for whole, *others in on_ranks(2, rank_main):
        assert all((whole == other).all() for other in others)


@pytest.mark.parametrize("new_world", [1, 3])
@pytest.mark.parametrize(("kind", "settings"), [(DiLoCo, STREAMING), (DiLoCo, {}), (SparseLoCo, SPARSE)])
def test_a_world_of_another_size_goes_on(on_ranks, kind, settings, new_world):
    def first(rank, world):
        parameters = parameters_of()
        strategy = kind(parameters, adamw(parameters), sync_every=4, **settings)
        train(strategy, parameters, rank, range(7))
        return copy.deepcopy(strategy.state_dict())

    states = on_ranks(2, first)

    def second(rank, world):
        parameters = parameters_of()
        strategy = kind(parameters, adamw(parameters), sync_every=4, **settings)
        parts = {"shared": states[0]["shared"]} | ({"rank": states[rank]["rank"]} if rank < 2 else {})
        strategy.load_state_dict(parts)
        before = values(parameters)
        train(strategy, parameters, rank, range(7, 13))
        strategy.sync()
        return before, values(parameters)

    results = on_ranks(new_world, second)
    assert all((after == results[0][1]).all() for _, after in results)
    if new_world == 3:
        assert (results[2][0] == states[0]["shared"]["theta"][:WEIGHTS].numpy()).all()


def test_sync_in_mid_round_is_the_weighted_mean_and_the_round_goes_on(on_ranks):
    def rank_main(rank, world):
        parameters = parameters_of()
        strategy = DiLoCo(parameters, adamw(parameters), sync_every=4)
        train(strategy, parameters, rank, range(6), tokens=1 + rank)
        before, sent, theta = values(parameters), strategy.traffic.payload_bytes, strategy._flat.shared.clone()
        strategy.sync()
        first = strategy.traffic.payload_bytes - sent
        mean = values(parameters)
        strategy.sync()
        again = strategy.traffic.payload_bytes - sent - first
        unmoved = torch.equal(theta, strategy._flat.shared)
        train(strategy, parameters, rank, range(6, 8), tokens=1 + rank)
        at_end, sent = values(parameters), strategy.traffic.payload_bytes
        strategy.sync()
        free = strategy.traffic.payload_bytes - sent
        return before, mean, [first, again, free], unmoved, at_end, values(parameters)

    zero, one = on_ranks(2, rank_main)
    mean = (torch.from_numpy(zero[0]) + 2 * torch.from_numpy(one[0])) / 3
    for before, after, (first, again, free), unmoved, at_end, at_last in (zero, one):
        assert (after == zero[1]).all()
        torch.testing.assert_close(torch.from_numpy(after), mean, rtol=1e-5, atol=1e-6)
        assert (before != after).any()
        assert first == 4 * (WEIGHTS + 50)
        assert again == free == 0
        assert unmoved
        assert (at_end == at_last).all()
        assert (at_end == zero[4]).all()


def test_alone_and_averaging_it_is_adamw():
    parameters, plain = parameters_of(), parameters_of()
    strategy, inner = DiLoCo(parameters, adamw(parameters), sync_every=3, **AVERAGE), adamw(plain)
    train(strategy, parameters, 0, range(10))
    strategy.sync()
    for step in range(10):
        give_gradients(plain, 0, step)
        inner.step()
    torch.testing.assert_close(values(parameters), values(plain), rtol=1e-5, atol=1e-6)
    assert strategy.traffic.payload_bytes == 0


def test_bfloat16_rounds_what_a_rank_trains_not_what_all_share():
    parameters = parameters_of(torch.bfloat16)
    strategy = DiLoCo(parameters, torch.optim.SGD(parameters, lr=0.0), sync_every=1)
    strategy._flat.shared[:WEIGHTS].add_(1e-5)
    shared = strategy._flat.shared.clone()
    strategy._flat.take(strategy._flat.all_tiles()[0], 0.0)
    train(strategy, parameters, 0, range(5))
    assert torch.equal(strategy._flat.shared, shared)
    # A thousand steps that bfloat16 cannot hold one by one.
    small = parameters_of(torch.bfloat16)
    outer = DiLoCo(small, torch.optim.SGD(small, lr=1.0), sync_every=1, outer_lr=1e-3, outer_momentum=0, nesterov=False)
    begun = outer._flat.shared.clone()
    for _ in range(1000):
        for parameter in small:
            parameter.grad = parameter.detach() * 0 + 0.5
        outer.step()
    moved = (begun - outer._flat.shared)[:WEIGHTS]
    assert moved.mean() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("compression", [None, "int8"])
def test_a_rank_that_begins_with_other_parameters_is_named(on_ranks, compression):
    def rank_main(rank, world):
        parameters = parameters_of()
        if rank == 1:
            parameters[2].data[5, 5] = torch.nextafter(parameters[2].data[5, 5], torch.tensor(9.0))
        with pytest.raises(Diverged, match="rank 1 differ"):
            train(DiLoCo(parameters, adamw(parameters), sync_every=1, compression=compression), parameters, rank, [0])

    on_ranks(3, rank_main)


@pytest.mark.parametrize("compression", [None, "int8"])
def test_a_rank_that_drifts_is_named_at_the_next_sync(on_ranks, compression):
    def rank_main(rank, world):
        parameters = parameters_of()
        strategy = DiLoCo(parameters, adamw(parameters), sync_every=2, compression=compression)
        train(strategy, parameters, rank, range(2))
        if rank == 1:
            strategy.outer_lr = 0.7000001
        train(strategy, parameters, rank, range(2, 4))
        with pytest.raises(Diverged, match="rank 1 differ"):
            train(strategy, parameters, rank, range(4, 6))

    on_ranks(3, rank_main)


@pytest.mark.parametrize(("kind", "settings"), [(DiLoCo, {}), (DiLoCo, {"compression": "int4"}), (SparseLoCo, SPARSE)])
def test_a_rank_that_is_no_longer_finite_is_named_on_all(on_ranks, kind, settings):
    def rank_main(rank, world):
        parameters = parameters_of()
        strategy = kind(parameters, sgd(parameters), sync_every=1, **settings)
        give_gradients(parameters, rank, 0)
        if rank == 1:
            parameters[1].grad[1] = float("inf")
        with pytest.raises(Diverged, match="no longer finite on rank 1: lower optimizer.lr"):
            strategy.step()

    on_ranks(2, rank_main)


def test_ranks_that_took_unequal_steps_are_named_unless_that_is_meant(on_ranks):
    def rank_main(rank, world, exact):
        parameters = parameters_of()
        strategy = DiLoCo(parameters, sgd(parameters), sync_every=8, require_exact_steps=exact)
        train(strategy, parameters, rank, range(3 + rank))
        if exact:
            with pytest.raises(Diverged, match="rank 0 took 3 inner steps in this round, rank 1 4: call step"):
                strategy.sync()
        else:
            strategy.sync()
        return values(parameters)

    on_ranks(2, rank_main, True)
    zero, one = on_ranks(2, rank_main, False)
    assert (zero == one).all()


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        (DiLoCo, {"compression": "int8"}, {"compression": "int4"}),
        (DiLoCo, {"sync_every": 4}, {"sync_every": 5}),
        (DiLoCo, {"outer_lr": 0.7}, {"outer_lr": 0.6}),
        (SparseLoCo, {"error_decay": 0.9}, {"error_decay": 0.8}),
    ],
)
def test_ranks_with_other_settings_are_told(on_ranks, kind, one, other):
    def rank_main(rank, world):
        parameters = parameters_of()
        strategy = kind(parameters, sgd(parameters), **({"sync_every": 2} | [one, other][rank]))
        texts = [str(next(iter(settings.values()))) for settings in (one, other)]
        name = kind.__name__
        with pytest.raises(ConfigError, match=f"{name}'s settings differ .* {texts[0]}.*, rank 1 has .* {texts[1]}"):
            strategy.step()

    on_ranks(2, rank_main)


def test_rounds_are_so_long_that_communication_is_under_a_twentieth():
    every, reason = choose_every([0.1, 0.1], [0.21, 0.5], 1, 0, diloco.BOUNDS)
    assert every == 42
    assert "communication is 4.8% of the time" in reason
    assert choose_every([0.1], [1e-6], 1, 0, diloco.BOUNDS)[0] == 10
    assert choose_every([0.1], [99.0], 1, 0, diloco.BOUNDS)[0] == 500
    # Enough rounds for a short run; as many steps as fragments can share.
    assert choose_every([0.1], [99.0], 1, 600, diloco.BOUNDS)[0] == 20
    assert choose_every([0.1], [99.0], 1, 600, sparseloco.BOUNDS)[0] == 12
    assert choose_every([0.1], [0.21], 4, 0, diloco.BOUNDS)[0] == 44


@pytest.mark.parametrize(
    ("planned", "outer"),
    [(500, "average: .* rounds"), (1000, "average: .* rounds"), (10**6, "SGD, lr 0.7, momentum 0.9: .*")],
)
def test_auto_is_the_same_choice_on_all_ranks_said_once(on_ranks, planned, outer):
    def rank_main(rank, world):
        parameters, said = parameters_of(), io.StringIO()
        strategy = DiLoCo(parameters, sgd(parameters), sync_every="auto", outer="auto", planned_steps=planned)
        with contextlib.redirect_stdout(said):
            for step in range(22):
                time.sleep(0.002 * rank)
                train(strategy, parameters, rank, [step])
        settled = copy.deepcopy(strategy.state_dict())
        again = parameters_of()
        resumed = DiLoCo(again, sgd(again), sync_every="auto", outer="auto", planned_steps=planned)
        resumed.load_state_dict(settled)
        choice = strategy.cadence.every, strategy._averages
        assert choice == (resumed.cadence.every, resumed._averages)
        assert resumed.cadence.settled
        return choice, said.getvalue()

    (zero, text), (one, silence) = on_ranks(2, rank_main)
    assert zero == one
    assert zero[1] == (planned < 10**6)
    assert silence == ""
    start, chosen = text.splitlines()
    assert start == "sync_every auto: rounds of 10 steps until two are measured"
    assert re.match(f"sync_every {zero[0]}: a step takes .* communication is .*; outer {outer}", chosen)


@pytest.mark.parametrize(
    ("world", "said"), [(3, ""), (5, "compression bf16 brings each of 5 ranks more bytes than an ")]
)
def test_compression_that_is_in_vain_is_told(on_ranks, world, said):
    def rank_main(rank, world):
        parameters, out = parameters_of(), io.StringIO()
        with contextlib.redirect_stdout(out):
            train(DiLoCo(parameters, sgd(parameters), sync_every=2, compression="bf16"), parameters, rank, range(1))
        return out.getvalue()

    texts = on_ranks(world, rank_main)
    assert texts[0].startswith(said)
    assert bool(texts[0]) == bool(said)
    assert not any(texts[1:])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DiLoCo, {"sync_every": 0}, "sync_every is 0: expected a number of steps of at least 1, or auto"),
        (DiLoCo, {"sync_every": "often"}, "sync_every is 'often'"),
        (DiLoCo, {"num_fragments": 3}, "num_fragments is 3, which does not divide sync_every 4: set sync_every to 6"),
        (DiLoCo, {"num_fragments": 0}, "num_fragments is 0: expected at least 1"),
        (DiLoCo, {"compression": "int3"}, "compression is 'int3': expected none, bf16, int8 or int4"),
        (DiLoCo, {"outer_momentum": 0.0}, "nesterov is on but outer_momentum is 0: set outer_momentum above 0, or"),
        (DiLoCo, {"outer_lr": 0.0}, "outer_lr is 0.0: expected a number above 0"),
        (DiLoCo, {"outer_momentum": 1.0}, r"outer_momentum is 1.0: expected a number in \[0, 1\)"),
        (
            DiLoCo,
            {"num_fragments": 2, "fragment_sync_delay": 2},
            "is synchronised every 2 steps .*: set it to at",
        ),
        (DiLoCo, {"fragment_update_alpha": 1.5}, r"fragment_update_alpha is 1.5: expected a number in \[0, 1\]"),
        (SparseLoCo, {"compression_topk": 5000}, "compression_topk is 5000: expected 1 to 4096, what a chunk holds"),
        (SparseLoCo, {"quantize_bits": 4}, "quantize_bits is 4: expected 2 or 8"),
        (SparseLoCo, {"error_decay": -1.0}, "error_decay is -1.0"),
    ],
)
def test_a_setting_out_of_range_is_named(kind, settings, message):
    parameters = parameters_of()
    with pytest.raises(ConfigError, match=message):
        kind(parameters, sgd(parameters), **({"sync_every": 4} | settings))


def test_parameters_that_cannot_be_shared_are_named():
    with pytest.raises(ConfigError, match="there is no parameter to train"):
        DiLoCo([], sgd(parameters_of()), sync_every=1)
    parameters = parameters_of()
    with pytest.raises(ConfigError, match=r"the inner optimizer trains a parameter of shape \[101\] that params lack"):
        DiLoCo(parameters[:3], sgd(parameters), sync_every=1)
    double = [torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))]
    with pytest.raises(ConfigError, match=r"parameter 0 of shape \[4\] is float64: expected float32, bfloat16 or"):
        DiLoCo(double, sgd(double), sync_every=1)
    turned = [torch.nn.Parameter(torch.zeros(4, 3).T)]
    with pytest.raises(ConfigError, match=r"of shape \[3, 4\] is not contiguous"):
        DiLoCo(turned, sgd(turned), sync_every=1)
    other = parameters_of()
    state = DiLoCo(parameters, sgd(parameters), sync_every=1).state_dict()
    coded = DiLoCo(other, sgd(other), sync_every=1, compression="int8")
    with pytest.raises(ConfigError, match=r"state was saved with .* compression none, this run has .* int8: use the"):
        coded.load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "more"),
    [(DiLoCo, {}), (DiLoCo, {"compression": "int4"}), (DiLoCo, {"num_fragments": 2}), (SparseLoCo, SPARSE)],
)
def test_the_norm_of_a_rounds_progress_is_that_of_the_pseudo_gradient(on_ranks, make, more):
    def rank_norms(rank, world):
        parameters, other = parameters_of(), parameters_of()
        strategy, inner = make(parameters, sgd(parameters), sync_every=4, **more), sgd(other)
        norms = []
        for step in range(4):
            train(strategy, parameters, rank, [step])
            norms.append(strategy.delta_norm)
            give_gradients(other, rank, step)
            inner.step()
        return norms, float((torch.cat([p.view(-1) for p in parameters_of()]) - torch.from_numpy(values(other))).norm())

    for norms, expected in on_ranks(2, rank_norms):
        assert norms[:3] == [None] * 3
        # The second fragment leaves at the end of the round; the first left halfway.
        assert norms[3] == pytest.approx(expected, rel=1e-5) if "num_fragments" not in more else 0 < norms[3] < expected
