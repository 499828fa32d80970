"""Vectors in few bits: what is decoded is near what was encoded, in as many bytes as the length says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktrain.train.compression.vector_code import BLOCK, VectorCode


def coded(vector, codec):
    code = VectorCode(codec)
    data = torch.empty(code.num_bytes(len(vector)), dtype=torch.uint8)
    code.encode(vector, data)
    return code.decode(data, len(vector))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["int8", "int4"]), st.integers(1, 3000), st.integers(0, 10**6), st.integers(-30, 30))
def test_an_error_is_at_most_half_a_level_of_its_block(codec, length, seed, exponent):
    vector = torch.randn(length, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    got = coded(vector, codec)
    assert got.dtype == torch.float32
    for begin in range(0, length, BLOCK):
        block, there = vector[begin : begin + BLOCK], got[begin : begin + BLOCK]
        level = block.abs().max() / (127 if codec == "int8" else 7)
        assert (block - there).abs().max() <= 0.5001 * level


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_zeros_stay_zeros_and_the_largest_stays_itself(codec):
    vector = torch.zeros(2 * BLOCK + 3)
    assert torch.equal(coded(vector, codec), vector)
    vector[5], vector[BLOCK], vector[-1] = 3.0, -0.25, 1e-40
    got = coded(vector, codec)
    assert got[5] == 3.0
    assert got[BLOCK] == -0.25
    assert abs(got[-1]) <= 1e-40


def test_bytes_are_two_one_and_a_half_per_number_and_a_scale_per_block():
    assert VectorCode("bf16").num_bytes(1000) == 2000
    assert VectorCode("int8").num_bytes(1024) == 1024 + 8
    assert VectorCode("int4").num_bytes(1025) == 768 + 12


def test_bfloat16_is_rounding():
    vector = torch.randn(777)
    assert torch.equal(coded(vector, "bf16"), vector.bfloat16().float())
