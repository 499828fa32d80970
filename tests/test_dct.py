"""The transform: golden numbers, inverse, and that folding rows changes nothing."""

import pytest
import torch

from sparktrain.train.compression.dct import Dct, dct_matrix, stored_order

CPU = torch.device("cpu")


def test_golden_matrix_of_four():
    golden = [[0.5, 0.6533, 0.5, 0.2706], [0.5, 0.2706, -0.5, -0.6533], [0.5, -0.2706, -0.5, 0.6533]]
    golden.append([0.5, -0.6533, 0.5, -0.2706])
    torch.testing.assert_close(dct_matrix(4), torch.tensor(golden), atol=5e-5, rtol=0)


def test_golden_ramp_of_eight_and_back():
    golden = torch.tensor([9.8995, -6.4423, 0, -0.67345, 0, -0.2009, 0, -0.050702])
    ramp = torch.arange(8.0)
    torch.testing.assert_close(ramp @ dct_matrix(8), golden, atol=1e-4, rtol=0)
    torch.testing.assert_close(golden @ dct_matrix(8).T, ramp, atol=2e-4, rtol=0)


def test_the_identity_transforms_to_itself():
    dct = Dct(4, 4, 1, CPU)
    out = torch.zeros(4, 1, 4)
    dct.accumulate(torch.eye(4).unsqueeze(1), out, 0.0, 1.0)
    torch.testing.assert_close(out[:, 0], torch.eye(4)[stored_order(4)][:, stored_order(4)])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (3, 64), (1, 29), (31, 1), (2, 7), (1, 1), (6, 4)])
def test_both_directions_are_the_dense_formula(height, width):
    generator = torch.Generator().manual_seed(height * 100 + width)
    chunks = 5
    x = torch.randn(height, chunks, width, generator=generator)
    start = torch.randn(height, chunks, width, generator=generator)
    dct = Dct(height, width, chunks, CPU)
    got = start.clone()
    dct.accumulate(x, got, 0.9, 0.3)
    rows, columns = dct_matrix(height).double(), dct_matrix(width).double()
    full = torch.einsum("hcw,hb,wd->bcd", x.double(), rows, columns)
    full = full[stored_order(height)][:, :, stored_order(width)]
    torch.testing.assert_close(got, (0.9 * start + 0.3 * full).float(), atol=2e-6, rtol=1e-5)
    encoded = full.float().contiguous()
    torch.testing.assert_close(dct.inverse(encoded).clone(), x, atol=5e-6, rtol=1e-5)


def test_a_strided_gradient_needs_no_copy():
    matrix = torch.randn(64, 5 * 64 + 7, generator=torch.Generator().manual_seed(0))
    view = matrix[:, 3 : 3 + 5 * 64].view(64, 5, 64)
    dct = Dct(64, 64, 5, CPU)
    strided, packed = torch.zeros(64, 5, 64), torch.zeros(64, 5, 64)
    dct.accumulate(view, strided, 0.0, 1.0)
    dct.accumulate(view.contiguous(), packed, 0.0, 1.0)
    assert torch.equal(strided, packed)


def test_few_coefficients_are_a_sum_of_outer_products():
    generator = torch.Generator().manual_seed(1)
    dct = Dct(64, 64, 3, CPU)
    index = torch.stack([torch.randperm(4096, generator=generator)[:7] for _ in range(3)])
    value = torch.randn(3, 7, generator=generator)
    dense = torch.zeros(3, 4096).scatter_(1, index, value).view(3, 64, 64).transpose(0, 1).contiguous()
    sparse = dct.inverse_sparse(index, value).clone()
    torch.testing.assert_close(sparse, dct.inverse(dense).transpose(0, 1), atol=2e-6, rtol=1e-5)
