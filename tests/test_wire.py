"""The wire: what is decoded is what was encoded, and it takes hardly more bits than it must."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktrain.train.compression.index_code import code_name
from sparktrain.train.compression.wire import ChunkCode, pack_bits, unpack_bits


def draw_chunks(area, topk, chunks, seed, values):
    """Ascending indices, some absent, with values that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.full((chunks, topk), area)
    for row in index:
        count = int(torch.randint(0, topk + 1, (), generator=generator)) if seed % 2 else topk
        row[:count] = torch.randperm(area, generator=generator)[:count].sort().values
    value = torch.randn(chunks, topk, generator=generator)
    value = value.sign() if values == "1bit" else value
    return index, torch.where(index < area, value, 0)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["fp32", "bf16", "int8", "2bit", "1bit"]),
    st.sampled_from([1, 2, 7, 29, 64, 256, 4095, 4096]),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.data(),
)
def test_round_trip(values, area, chunks, seed, data):
    topk = data.draw(st.integers(1, min(area, 600)) | st.just(min(area, 1400)))
    code = ChunkCode(area, topk, values)
    index, value = draw_chunks(area, topk, chunks, seed, values)
    payload = code.encode(index, value)
    assert payload.dtype == torch.uint8
    assert len(payload) == code.num_bytes(chunks)
    got_index, got_value = code.decode(payload, chunks)
    if code.dense:
        index, value = torch.arange(area).expand(chunks, -1), torch.zeros(chunks, area + 1).scatter_(1, index, value)
        value = value[:, :area]
    assert torch.equal(got_index, index)
    if values == "bf16":
        assert torch.equal(got_value, value.bfloat16().float())
    elif values == "int8":
        # Half a level, and the rounding of the scale to eight bits.
        largest = value.abs().amax(1, keepdim=True)
        assert ((got_value - value).abs() <= largest * (0.5 / 127 + 1 / 256)).all()
    elif values == "2bit":
        assert torch.equal(got_value.sign(), value.sign())
        assert (got_value.unique(dim=1).abs() <= 1.01 * value.abs().max()).all()
        # Sizes are the means of those above and below the mean, rounded to eight bits: no worse than that mean for all.
        sent, squares = value != 0, value.square().sum(1)
        mean = value.abs().sum(1, keepdim=True) / sent.sum(1, keepdim=True).clamp(min=1)
        spread = ((value.abs() - mean) * sent).square().sum(1)
        assert ((got_value - value).square().sum(1) <= spread + 1e-4 * squares).all()
    else:
        assert torch.equal(got_value, value)


@pytest.mark.parametrize("topk", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_signs_and_indices_take_at_most_a_tenth_more_than_the_entropy(topk):
    bound = math.log2(math.comb(4096, topk)) + topk
    bits = 8 * ChunkCode(4096, topk, "1bit").num_bytes(8000) / 8000
    print(f"wire: k {topk}: {bits / topk:.3f} bits per coefficient, bound {bound / topk:.3f}, x {bits / bound:.4f}")
    assert bits <= 1.10 * bound


def test_every_k_from_4_to_seven_tenths_of_a_chunk_stays_within_a_tenth():
    for topk in range(4, 2868):
        bound = math.log2(math.comb(4096, topk)) + topk
        assert ChunkCode(4096, topk, "1bit").bits <= 1.10 * bound, topk


def test_the_code_follows_k():
    assert [code_name(4096, k) for k in (1, 6, 7, 256, 300, 500, 600, 4096)] == [
        "enumeration",
        "enumeration",
        "elias-fano",
        "elias-fano",
        "groups of 11",
        "groups of 5",
        "groups of 3",
        "bitmap",
    ]


@given(st.lists(st.integers(0, 1), max_size=100))
def test_bits_pack_and_unpack(bits):
    tensor = torch.tensor(bits, dtype=torch.uint8)
    packed = pack_bits(tensor)
    assert len(packed) == -(-len(bits) // 8)
    assert torch.equal(unpack_bits(packed, len(bits)), tensor)


def test_one_bit_is_the_sign_of_what_is_not_zero():
    code = ChunkCode(8, 5, "1bit")
    value = torch.tensor([[51.0, -35.0, 5.0, -13.0, 6.0]]).bfloat16().float()
    _, decoded = code.decode(code.encode(torch.tensor([[0, 1, 3, 6, 7]]), value), 1)
    assert torch.equal(decoded, value.sign())


def test_two_bits_are_the_sign_and_which_of_two_sizes():
    code = ChunkCode(8, 5, "2bit")
    value = torch.tensor([[4.0, -8.0, 1.0, -12.0, 0.0]])
    _, decoded = code.decode(code.encode(torch.tensor([[0, 1, 3, 6, 8]]), value), 1)
    assert torch.equal(decoded, torch.tensor([[2.5, -10.0, 2.5, -10.0, 0.0]]))
    assert code.num_bytes(4) == 4 * 4 + -(-4 * code.bits // 8)


def test_damaged_bytes_are_refused_not_misread():
    code = ChunkCode(4096, 32, "1bit")
    index, value = draw_chunks(4096, 32, 10, 0, "1bit")
    payload = code.encode(index, value)
    payload[:40] ^= 0xFF
    with pytest.raises(ValueError, match="update is damaged"):
        code.decode(payload, 10)
