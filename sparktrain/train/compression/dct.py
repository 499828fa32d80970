"""The orthonormal two-dimensional discrete cosine transform (DCT-II) of many equal chunks at once.

    C, H, W     chunks, rows of a chunk, columns of a chunk (of samples or, in a transform, of frequencies)

Tensors are ``_HCW``: row h of every chunk lies together. So 64 rows of a weight matrix already are chunks side by
side, and either direction of the transform is one large matrix product. The cosine of frequency b is even around the
middle of its axis for even b and odd for odd b; folding that axis first halves the arithmetic of its direction. For
that, frequencies are stored evens first (:func:`stored_order`).
"""

import functools
import math

import torch
from torch import Tensor


@functools.cache
def dct_matrix(size: int, device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008
    """``D[sample, frequency]``, [size, size]: D[j, b] = a_b cos(pi (2j+1) b / 2 size); its inverse is its transpose."""
    sample = torch.arange(size, dtype=torch.float64).unsqueeze(1)
    frequency = torch.arange(size, dtype=torch.float64).unsqueeze(0)
    matrix = torch.cos(math.pi * (2 * sample + 1) * frequency / (2 * size)) * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix.to(torch.float32).to(device)


def stored_order(size: int) -> list[int]:
    """The frequency that is stored in each place: evens first where the size is even, else as they come."""
    return [*range(0, size, 2), *range(1, size, 2)] if size % 2 == 0 else [*range(size)]


class Dct:
    """The transform of chunks of ``height`` x ``width``, with buffers for at most ``most`` chunks at once."""

    def __init__(self, height: int, width: int, most: int, device: torch.device) -> None:
        self.height, self.width = height, width
        self.row_cosines = _stored_cosines(height, device)
        """[stored row, sample]"""
        self.column_cosines = _stored_cosines(width, device)
        """[stored column, sample]"""
        self._half, self._half_width = _half(height), _half(width)
        self._even = self.row_cosines[: self._half, : self._half].contiguous()
        self._odd = self.row_cosines[self._half :, : self._half].contiguous()
        self._mirror = torch.arange(height - 1, self._half - 1, -1, device=device)
        self._rows = torch.empty(height * most * width, device=device)
        self._views: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._folded = torch.empty(3, (height * most * width + 1) // 2, device=device)

    def accumulate(self, x_HCW: Tensor, into_HCW: Tensor, decay: float, scale: float) -> None:
        """``into = decay * into + scale * DCT(x)``, in place; ``x`` may be strided, C several dimensions."""
        chunks = into_HCW.shape[1]
        rows = self._rows[: into_HCW.numel()].view(self.height, chunks * self.width)
        if self._half:
            _, even, odd = self._parts(self._half, *x_HCW.shape[1:])
            mirrored = x_HCW[self._half :].flip(0)
            torch.add(x_HCW[: self._half], mirrored, out=even)
            torch.sub(x_HCW[: self._half], mirrored, out=odd)
            torch.mm(self._even, even.view(self._half, -1), out=rows[: self._half])
            torch.mm(self._odd, odd.view(self._half, -1), out=rows[self._half :])
        else:
            torch.mm(self.row_cosines, x_HCW.reshape(self.height, -1), out=rows)
        self._accumulate_columns(rows.view(-1, self.width), into_HCW.view(-1, self.width), decay, scale)

    def _accumulate_columns(self, rows: Tensor, into: Tensor, decay: float, scale: float) -> None:
        half = self._half_width
        if not half:
            torch.addmm(into, rows, self.column_cosines.T, beta=decay, alpha=scale, out=into)
            return
        _, even, odd = self._parts(len(rows), half)
        mirrored = rows[:, half:].flip(1)
        torch.add(rows[:, :half], mirrored, out=even)
        torch.sub(rows[:, :half], mirrored, out=odd)
        for folded, place in ((even, slice(half)), (odd, slice(half, None))):
            part = into[:, place]
            torch.addmm(part, folded, self.column_cosines[place, :half].T, beta=decay, alpha=scale, out=part)

    def inverse(self, coefficients_HCW: Tensor) -> Tensor:
        """Samples, [H, C, W], in a buffer that the next call overwrites. ``coefficients`` must be contiguous."""
        chunks = coefficients_HCW.shape[1]
        rows = self._rows[: coefficients_HCW.numel()].view(self.height, chunks * self.width)
        torch.mm(coefficients_HCW.view(-1, self.width), self.column_cosines, out=rows.view(-1, self.width))
        if not self._half:
            return torch.mm(self.row_cosines.T, rows).view(self.height, chunks, self.width)
        lower, even, odd = self._parts(self._half, chunks * self.width)
        torch.mm(self._even.T, rows[: self._half], out=even)
        torch.mm(self._odd.T, rows[self._half :], out=odd)
        torch.add(even, odd, out=rows[: self._half])
        torch.sub(even, odd, out=lower)
        rows.index_copy_(0, self._mirror, lower)
        return rows.view(self.height, chunks, self.width)

    def inverse_sparse(self, index_CK: Tensor, value_CK: Tensor) -> Tensor:
        """Samples, [C, H, W], of chunks that have only K coefficients each: a sum of K outer products."""
        chunks, number = index_CK.shape
        index = index_CK.reshape(-1)
        row = torch.div(index, self.width, rounding_mode="floor")
        left = self.row_cosines.index_select(0, row).mul_(value_CK.reshape(-1, 1))
        right = self.column_cosines.index_select(0, row.mul_(-self.width).add_(index))
        samples = self._rows[: chunks * self.height * self.width].view(chunks, self.height, self.width)
        left, right = left.view(chunks, number, self.height), right.view(chunks, number, self.width)
        return torch.bmm(left.transpose(1, 2), right, out=samples)

    def _parts(self, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """Three buffers; views are kept, for there are few shapes and making one costs as much as a small product."""
        if shape not in self._views:
            parts = self._folded[:, : math.prod(shape)].view(3, *shape)
            self._views[shape] = parts[0], parts[1], parts[2]
        return self._views[shape]


def _stored_cosines(size: int, device: torch.device) -> Tensor:
    return dct_matrix(size, device)[:, stored_order(size)].T.contiguous()


def _half(size: int) -> int:
    return size // 2 if size % 2 == 0 else 0
