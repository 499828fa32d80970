"""DisTrO as a strategy and as a plain optimizer: on real gloo ranks, with what can go wrong."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch

from sparktrain.config import Distro, Optimizer
from sparktrain.errors import ConfigError, Diverged
from sparktrain.train.compression.wire import ChunkCode
from sparktrain.train.strategies.distro import DisTrO, build, traffic_per_step
from sparktrain.train.strategies.distro.layout import layout_of
from sparktrain.train.strategies.distro.weights import digest, join_master, split_master

SIZES = [(130, 67), (64, 64), (101,), (3,)]


def parameters_of(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def give_gradients(parameters, rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(optimizer, parameters, rank, steps):
    for step in steps:
        give_gradients(parameters, rank, step)
        optimizer.step(0.01 / (1 + step))


def model_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(67, 130), torch.nn.Tanh(), torch.nn.Linear(130, 5))


@pytest.mark.parametrize("overlap", [False, True])
def test_it_learns_alone_without_a_process_group(overlap):
    model = model_of()
    x = torch.randn(64, 67, generator=torch.Generator().manual_seed(9))
    optimizer = DisTrO(model.parameters(), 1e-3, compression_decay=0.9, overlap=overlap)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :5]).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8", "1bit"])
def test_ranks_stay_bit_identical_and_send_what_the_closed_form_says(on_ranks, values):
    section = Distro(compression_topk=8, compression_decay=0.9, values=values, verify_every=3)

    def rank_main(rank, world):
        model = model_of()
        optimizer = build(dict(model.named_parameters()), section, Optimizer(), 4)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(4):
            optimizer.zero_grad()
            x = torch.randn(32, 67, generator=generator)
            (model(x) - x[:, :5]).square().mean().backward()
            optimizer.average_gradients()
            optimizer.step(1e-2)
        optimizer.sync()
        return [p.detach().numpy() for p in model.parameters()], optimizer.traffic, optimizer.numbers

    (zero, traffic, numbers), (one, _, _) = on_ranks(2, rank_main)
    assert all((a == b).all() for a, b in zip(zero, one, strict=True))
    shapes = [p.shape for p in model_of().parameters()]
    expected = traffic_per_step(shapes, section, 2)
    assert traffic.payload_bytes == 4 * expected.payload_bytes
    assert traffic.bytes_received == 4 * expected.bytes_received
    assert numbers.payload_bytes == numbers.received_bytes == expected.payload_bytes
    weights = sum(s.numel() for s in shapes)
    assert numbers.fewer_than_ring_fp32 == pytest.approx(4 * weights / expected.payload_bytes)
    assert numbers.fewer_than_ring_bf16 == pytest.approx(2 * weights / expected.payload_bytes)
    assert all(seconds > 0 for seconds in vars(numbers.seconds).values())
    initial = [p.detach().numpy() for p in model_of().parameters()]
    assert all((a != b).any() for a, b in zip(zero, initial, strict=True))


def test_no_dimension_is_bad():
    def payload(*shapes):
        return layout_of([[torch.Size(s) for s in shapes]], 64, 32, "1bit", "padded", 2**18).payload_bytes("1bit")

    per_weight = payload((32000, 64)) / (32000 * 64)
    for rows in (32001, 31991, 151643):
        assert payload((rows, 64)) / (rows * 64) < 1.001 * per_weight
    assert payload((2048, 2049)) / (2048 * 2049) < 1.001 * per_weight
    # Sixty-four norms share one chunk; alone, each would take as much as a matrix of 64 x 64.
    assert payload(*[(64,)] * 64) < 1.2 * payload((64, 64))
    # A few weights are sent as they are where that is smaller than a chunk.
    few = [[torch.Size((10,))]]
    assert layout_of(few, 64, 32, "fp32", "padded", 2**18).payload_bytes("fp32") == 10 + 40
    # Psyche's rule degrades: the prime dimension pays at least ten times as much.
    divisor = layout_of([[torch.Size((31991, 64))]], 64, 32, "1bit", "divisor", 2**18)
    assert divisor.payload_bytes("1bit") > 10 * payload((31991, 64))


def test_one_bit_payload_is_near_the_bound_for_a_whole_model():
    shapes = [torch.Size(s) for s in [(32001, 512), (512, 512), (1408, 512), (512,)]]
    weights = sum(s.numel() for s in shapes)
    section = Distro(compression_topk=8, values="1bit")
    bound = weights / 4096 * (math.log2(math.comb(4096, 8)) + 8) / 8
    assert traffic_per_step(shapes, section, 4).payload_bytes < 1.10 * bound


@pytest.mark.parametrize("overlap", [False, True])
def test_six_steps_are_three_then_save_load_and_three(on_ranks, overlap):
    def rank_main(rank, world):
        whole = parameters_of()
        optimizer = DisTrO(whole, 1.0, compression_topk=8, overlap=overlap)
        train(optimizer, whole, rank, range(6))
        first = parameters_of()
        before = DisTrO(first, 1.0, compression_topk=8, overlap=overlap)
        train(before, first, rank, range(3))
        before.sync()
        state = copy.deepcopy(before.state_dict())
        second = [torch.nn.Parameter(p.detach().clone()) for p in first]
        after = DisTrO(second, 1.0, compression_topk=8, overlap=overlap)
        after.load_state_dict(state)
        train(after, second, rank, range(3, 6))
        optimizer.sync(), after.sync()
        return all(torch.equal(a, b) for a, b in zip(whole, second, strict=True)) and after.steps == 6

    assert on_ranks(2, rank_main) == [True, True]


def test_state_loads_into_more_ranks_where_new_ones_start_from_zero_momentum(on_ranks):
    def save(rank, world):
        parameters = parameters_of()
        optimizer = DisTrO(parameters, 1.0, compression_topk=8, overlap=True)
        train(optimizer, parameters, rank, range(3))
        optimizer.sync()
        file = io.BytesIO()
        torch.save((optimizer.state_dict(), [p.detach() for p in parameters]), file)
        return file.getvalue()

    saved = [torch.load(io.BytesIO(data), weights_only=True) for data in on_ranks(2, save)]

    def go_on(rank, world):
        state, weights = saved[rank] if rank < 2 else ({"shared": saved[0][0]["shared"]}, saved[0][1])
        parameters = [torch.nn.Parameter(w.clone()) for w in weights]
        optimizer = DisTrO(parameters, 1.0, compression_topk=8, overlap=True, verify_every=1)
        optimizer.load_state_dict(state)
        momentum = sum(m.abs().sum().item() for m in optimizer.state_dict()["rank"]["momentum"])
        train(optimizer, parameters, rank, range(3, 6))
        optimizer.sync()
        return [p.detach().numpy() for p in parameters], momentum

    ranks = on_ranks(3, go_on)
    assert all((a == b).all() for rank in ranks for a, b in zip(rank[0], ranks[0][0], strict=True))
    assert [momentum > 0 for _, momentum in ranks] == [True, True, False]


def test_in_fewer_ranks_each_goes_on_with_its_own_momentum(on_ranks):
    def save(rank, world):
        parameters = parameters_of()
        optimizer = DisTrO(parameters, 1.0, compression_topk=8)
        train(optimizer, parameters, rank, range(3))
        optimizer.sync()
        file = io.BytesIO()
        torch.save((optimizer.state_dict(), [p.detach() for p in parameters]), file)
        return file.getvalue()

    saved = [torch.load(io.BytesIO(data), weights_only=True) for data in on_ranks(3, save)]

    def go_on(rank, world):
        state, weights = saved[rank]
        parameters = [torch.nn.Parameter(w.clone()) for w in weights]
        optimizer = DisTrO(parameters, 1.0, compression_topk=8, verify_every=1)
        optimizer.load_state_dict(state)
        kept = zip(optimizer.state_dict()["rank"]["momentum"], state["rank"]["momentum"], strict=True)
        own = all(torch.equal(a, b) for a, b in kept)
        train(optimizer, parameters, rank, range(3, 6))
        optimizer.sync()
        return own, [p.detach().numpy() for p in parameters]

    ranks = on_ranks(2, go_on)
    assert all(own for own, _ in ranks)
    assert all((a == b).all() for a, b in zip(ranks[0][1], ranks[1][1], strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_tied_weights_are_one_parameter(on_ranks, overlap):
    def rank_main(rank, world):
        torch.manual_seed(0)
        tied = torch.nn.ModuleDict({"embed": torch.nn.Embedding(50, 12), "head": torch.nn.Linear(12, 50, bias=False)})
        tied["head"].weight = tied["embed"].weight
        alone = torch.nn.Parameter(tied["embed"].weight.detach().clone())
        through_module = DisTrO(tied.named_parameters(), 0.01, compression_topk=8, overlap=overlap)
        by_hand = DisTrO([alone], 0.01, compression_topk=8, overlap=overlap)
        for step in range(5):
            ids = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(10 * step + rank))
            for weight, optimizer in ((tied["embed"].weight, through_module), (alone, by_hand)):
                weight.grad = None
                logits = torch.nn.functional.embedding(ids, weight) @ weight.T
                torch.nn.functional.cross_entropy(logits, ids.roll(1)).backward()
                optimizer.step()
        through_module.sync(), by_hand.sync()
        same = tied["head"].weight is tied["embed"].weight and torch.equal(tied["head"].weight, alone)
        return same, through_module.numbers.payload_bytes == by_hand.numbers.payload_bytes

    assert on_ranks(2, rank_main) == [(True, True)] * 2


def test_train_and_optimize_apart_are_step_whatever_carries_the_bytes():
    ranks = [parameters_of(), parameters_of()]
    optimizers = [DisTrO(p, 1.0, compression_topk=8, quantize_1bit=True) for p in ranks]
    alone = parameters_of()
    reference = DisTrO(alone, 1.0, compression_topk=8, quantize_1bit=True)
    for step in range(4):
        updates = []
        for rank, (optimizer, parameters) in enumerate(zip(optimizers, ranks, strict=True)):
            give_gradients(parameters, rank, step)
            updates.append(optimizer.train(0.01))
        for optimizer in optimizers:
            optimizer.optimize(updates, 0.01)
        assert len(updates[0]) == len(updates[1]) < 400
    extracted = [optimizer.extract() for optimizer in optimizers]
    assert all(torch.equal(extracted[0][name], extracted[1][name]) for name in extracted[0])
    for step in range(4):
        give_gradients(alone, 0, step)
        reference.optimize([reference.train(0.01)], 0.01)
    single = parameters_of()
    stepped = DisTrO(single, 1.0, compression_topk=8, quantize_1bit=True)
    for step in range(4):
        give_gradients(single, 0, step)
        stepped.step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(alone, single, strict=True))
    with pytest.raises(ValueError, match="update 0 has 3 bytes, expected"):
        stepped.optimize([b"abc"])


def test_bfloat16_sign_steps_do_not_vanish():
    steps, lr = 100, 1e-4
    parameter = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = DisTrO([parameter], lr, compression_topk=1, compression_decay=0.0)
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    # One step is a fortieth of an ulp: adding it to a bfloat16 would leave 1.
    assert (torch.ones((), dtype=torch.bfloat16) - lr).item() == 1
    torch.testing.assert_close(parameter.float(), torch.full((64, 64), 1 - steps * lr), atol=2e-3, rtol=0)
    assert (parameter != 1).all()


def test_bfloat16_follows_float32_to_half_an_ulp():
    exact, rounded = parameters_of(), parameters_of(torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(exact, rounded, strict=True):
            a.copy_(b)
    optimizers = [DisTrO(p, 1.0, compression_topk=8, weight_decay=0.1) for p in (exact, rounded)]
    for step in range(10):
        give_gradients(rounded, 0, step)
        for a, b in zip(exact, rounded, strict=True):
            a.grad = b.grad.float()
        for optimizer in optimizers:
            optimizer.step(1e-3)
    for a, b in zip(exact, rounded, strict=True):
        assert ((a - b.float()).abs() <= a.abs() * 2**-8 + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_look_ahead_is_undone_to_the_bit(dtype):
    parameters = parameters_of(dtype)
    optimizer = DisTrO(parameters, 1.0, compression_topk=8, overlap=True)
    train(optimizer, parameters, 0, range(3))
    base = [t.clone() for t in optimizer.extract().values()]
    seen = [p.detach().clone() for p in parameters]
    assert all((a != b).any() for a, b in zip(base, seen, strict=True))
    optimizer.sync()
    assert all(torch.equal(a, b) for a, b in zip(base, parameters, strict=True))
    optimizer.look_ahead()
    assert all(torch.equal(a, b) for a, b in zip(seen, parameters, strict=True))


def test_a_master_survives_the_split_to_the_bit():
    bits = torch.randint(-(2**31), 2**31 - 1, (10000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    master = bits.view(torch.float32)
    master = master[master.abs() < 1e38]
    upper, rest = torch.empty(len(master), dtype=torch.bfloat16), torch.empty(len(master), dtype=torch.int16)
    split_master(master, upper, rest)
    assert torch.equal(join_master(upper, rest), master)
    assert ((upper.float() - master).abs() <= (master.bfloat16().float() - master).abs()).all()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_gradient_that_is_not_finite_stops_all_ranks_together_and_loses_nothing(on_ranks, overlap):
    def rank_main(rank, world):
        parameters = parameters_of()
        optimizer = DisTrO(parameters, 1.0, compression_topk=8, overlap=overlap, max_refused=2)
        train(optimizer, parameters, rank, range(2))
        give_gradients(parameters, rank, 2)
        if rank == 1:
            parameters[0].grad[0, 0] = math.nan
        optimizer.step(0.01)
        before = [t.clone() for t in optimizer.extract().values()]
        if overlap:  # the messages of the refused step are read in the next one
            give_gradients(parameters, rank, 3)
            optimizer.step(0.01)
        same = all(torch.equal(a, b) for a, b in zip(before, optimizer.extract().values(), strict=True))
        train(optimizer, parameters, rank, range(4, 6))
        optimizer.sync()
        finite = all(bool(p.isfinite().all()) for p in parameters)
        try:
            for step in range(6, 10):
                give_gradients(parameters, rank, step)
                if rank == 1:
                    parameters[1].grad.fill_(math.inf)
                optimizer.step(0.01)
        except Diverged as error:
            return same if overlap else True, finite, optimizer.refused, str(error)

    zero, one = on_ranks(2, rank_main)
    for same, finite, refused, text in (zero, one):
        assert same
        assert finite
        assert refused == 3
        assert "not finite 2 steps in a row, the last time on rank 1" in text
    assert "here that of 1:" in one[3]


def test_a_refused_step_moves_nothing_and_keeps_what_was_sent():
    parameters = parameters_of()
    optimizer = DisTrO(parameters, 1.0, compression_topk=8, compression_decay=1.0)
    give_gradients(parameters, 0, 0)
    update = bytearray(optimizer.train(0.01))
    update[0] = 1  # as if another rank had failed
    before = [p.detach().clone() for p in parameters]
    optimizer.optimize([bytes(update)])
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    for parameter in parameters:
        parameter.grad.zero_()
    assert optimizer.train(0.01)[1:] == bytes(update)[1:]


def test_huge_but_finite_gradients_are_not_refused():
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = DisTrO([parameter], 1e-3)
    parameter.grad = torch.full((64, 64), 1e25)
    optimizer.step()
    assert optimizer.refused == 0
    assert (parameter < 0).all()


def test_a_parameter_without_gradient_is_left_alone_also_by_one_bit_values():
    used, unused = torch.nn.Parameter(torch.ones(70, 70)), torch.nn.Parameter(torch.ones(50, 50))
    optimizer = DisTrO([used, unused], 0.01, quantize_1bit=True, compression_topk=8, weight_decay=0.1)
    embedding = torch.nn.Parameter(torch.ones(128, 64))
    rows = DisTrO([embedding], 0.01, quantize_1bit=True, compression_topk=8)
    for step in range(3):
        give_gradients([used], 0, step)
        optimizer.step()
        embedding.grad = torch.zeros_like(embedding)
        embedding.grad[:64] = 1
        rows.step()
    assert (unused == 1).all()
    assert (used != 1).all()
    # A chunk of an embedding none of whose tokens came up: one bit has no zero, but nothing is sent.
    assert (embedding[64:] == 1).all()
    assert (embedding[:64] != 1).all()


def test_ranks_with_different_layouts_are_told_the_first_tensor_that_differs(on_ranks):
    def rank_main(rank, world, kind):
        columns = 5 if kind == "shape" and rank == 1 else 4
        named = [
            ("first", torch.nn.Parameter(torch.ones(3, 4))),
            ("second", torch.nn.Parameter(torch.ones(2, columns))),
        ]
        if kind == "more" and rank == 2:
            named.append(("third", torch.nn.Parameter(torch.ones(1))))
        topk = 9 if kind == "settings" and rank == 1 else 8
        optimizer = DisTrO(named, 0.1, compression_topk=topk)
        try:
            optimizer.step()
        except ConfigError as error:
            return str(error)

    for kind, words in {
        "shape": ("tensor 1 is second [2, 4]", "second [2, 5]", "on rank 1"),
        "more": ("tensor 2 is no such tensor", "third [1]", "on rank 2"),
        "settings": ("settings differ", "compression_topk 8", "rank 1 has compression_topk 9"),
    }.items():
        for text in on_ranks(3, rank_main, kind):
            assert all(word in text for word in words), text


def test_a_flipped_bit_is_noticed_and_its_rank_named(on_ranks):
    def rank_main(rank, world):
        parameters = parameters_of()
        optimizer = DisTrO(parameters, 1.0, compression_topk=8, verify_every=2)
        train(optimizer, parameters, rank, range(2))
        if rank == 2:
            with torch.no_grad():
                parameters[1].view(torch.int32)[5, 5] ^= 1
        for check in (optimizer.sync, lambda: train(optimizer, parameters, rank, range(2, 4))):
            with pytest.raises(Diverged, match="after step 2: rank 2 differ from rank 0"):
                check()
        return True

    assert on_ranks(3, rank_main) == [True] * 3


def test_digest_sees_one_bit_and_a_swap():
    tensor = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    swapped, flipped = tensor.clone(), tensor.clone()
    swapped[[7, 280_000]] = swapped[[280_000, 7]]
    flipped.view(torch.int32)[299_999] ^= 1
    assert len({digest([t]) for t in (tensor, swapped, flipped)}) == 3
    assert digest([tensor.clone()]) == digest([tensor])


def test_a_warning_once_where_a_ring_would_be_cheaper(on_ranks):
    def rank_main(rank, world, topk):
        parameters = [torch.nn.Parameter(torch.ones(64, 64))]
        optimizer = DisTrO(parameters, 1.0, compression_topk=topk)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(optimizer, parameters, rank, range(2))
        return [str(w.message) for w in caught if "ring all-reduce" in str(w.message)]

    # The same message, half of the gradient: what two ranks gain by it, four ranks lose.
    assert [len(messages) for messages in on_ranks(2, rank_main, 2048)] == [0, 0]
    assert [len(messages) for messages in on_ranks(4, rank_main, 2048)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compression_topk": 0}, "compression_topk is 0"),
        ({"compression_chunk": 0}, "compression_chunk is 0"),
        ({"compression_decay": 1.5}, "compression_decay is 1.5"),
        ({"compression_decay": -0.1}, "compression_decay is -0.1"),
        ({"compression_topk": 26, "compression_chunk": 5}, "more than a chunk of 5 x 5 holds: set it to at most 25"),
        ({"values": "fp8"}, "values is 'fp8'"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"lr": -1.0}, "lr is -1.0"),
    ],
)
def test_bad_settings_are_one_line_with_the_key(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        DisTrO(parameters_of(), **{"lr": 0.1, **settings})
    assert "\n" not in str(caught.value)


def test_bad_parameters_are_named():
    for tensor, words in (
        (torch.ones(3, dtype=torch.complex64), "parameter odd is complex64"),
        (torch.ones(3, dtype=torch.int32), "parameter odd is int32"),
        (torch.ones(3, dtype=torch.float16), "parameter odd is float16"),
        (torch.ones(3, device="meta"), "parameter odd is on meta, good on cpu"),
        (torch.ones(3, 4).T, "parameter odd is not contiguous"),
    ):
        odd = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        with pytest.raises(ValueError, match=words):
            DisTrO([("good", torch.nn.Parameter(torch.ones(2))), ("odd", odd)], 0.1)


def test_a_sparse_gradient_is_named():
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = DisTrO(embedding.named_parameters(), 0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradient of weight is sparse"):
        optimizer.step()


def test_mixed_types_train_together():
    parameters = [*parameters_of(), *parameters_of(torch.bfloat16), *parameters_of(torch.float64)]
    before = [p.detach().clone() for p in parameters]
    train(DisTrO(parameters, 1.0, compression_topk=8), parameters, 0, range(2))
    assert all((a != b).any() for a, b in zip(before, parameters, strict=True))


def test_dense_codes_cost_their_values_and_no_indices():
    assert ChunkCode(100, 100, "fp32").num_bytes(3) == 1200
    assert np.isclose(ChunkCode(4096, 32, "1bit").bits, 320)
