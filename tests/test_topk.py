"""Selection is exact: the same set as sorting everything, whatever the shape, ties and zeros."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparktrain.train.compression.topk import Selector, storage_positions


def select(chunks_HCW, topk):
    height, chunks, width = chunks_HCW.shape
    index, position, value = Selector(height, width, topk, chunks + 1, torch.device("cpu"))(chunks_HCW)
    index = index.long()
    assert torch.equal(torch.where(index < height * width, chunks_HCW.reshape(-1)[position], 0), value)
    return index, value


def by_sorting(chunks_HCW, topk):
    height, chunks, width = chunks_HCW.shape
    flat = chunks_HCW.transpose(0, 1).reshape(chunks, -1)
    order = torch.argsort(flat.abs(), dim=1, descending=True, stable=True)[:, :topk]
    index = torch.where(flat.gather(1, order) != 0, order, height * width).sort(1).values
    return index, torch.cat([flat, torch.zeros(chunks, 1)], 1).gather(1, index)


@pytest.mark.parametrize("topk", [1, 2, 8, 32, 64, 100, 1000, 4096])
def test_the_fast_way_finds_what_sorting_finds(topk):
    chunks = torch.randn(64, 6, 64, generator=torch.Generator().manual_seed(topk))
    chunks[:, 2] *= torch.exp(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 3)
    chunks[:, 3] = 0
    chunks[:, 4] = 0
    chunks[10, 4, 5:8] = torch.tensor([3.0, -2.0, 1e-40])
    chunks[:, 5] = torch.eye(64)
    for part in (chunks[:, :2].contiguous(), chunks[:, 2:3].contiguous(), chunks):
        index, value = select(part, topk)
        expected_index, expected_value = by_sorting(part, topk)
        assert torch.equal(index[:5], expected_index[:5])
        assert torch.equal(value, expected_value)


def test_golden_rows():
    row = torch.tensor([0.5223, 0.9625, 0.5487, 0.2152, 0.2161, 0.0363, 0.4944, 0.0974]).view(1, 1, 8)
    index, value = select(row, 2)
    assert index.tolist() == [[1, 2]]
    torch.testing.assert_close(value, torch.tensor([[0.9625, 0.5487]]))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.data())
def test_small_shapes_with_many_ties(height, width, chunks, data):
    topk = data.draw(st.integers(1, height * width))
    size = height * width * chunks
    numbers = data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    blocks = torch.tensor(numbers, dtype=torch.float32).view(height, chunks, width)
    index, value = select(blocks, topk)
    _, expected = by_sorting(blocks, topk)
    assert torch.equal(value.abs().sort(1).values, expected.abs().sort(1).values)
    assert (index.diff(dim=1) >= 0).all()
    present = index < height * width
    assert torch.equal(present, value != 0)
    at = blocks.reshape(-1)[storage_positions(index, height, width)]
    assert torch.equal(torch.where(present, at, 0), value)
