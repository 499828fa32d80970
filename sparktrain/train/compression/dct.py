"""The orthonormal two-dimensional discrete cosine transform (DCT-II) of many equal chunks at once.

    C, H, W     chunks, rows of a chunk, columns of a chunk (of samples or, in a transform, of frequencies)

Tensors are ``_HCW``: row h of every chunk lies together. So 64 rows of a weight matrix already are chunks side by
side, and either direction of the transform is one large matrix product. The cosine of frequency b is even around the
middle of its axis for even b and odd for odd b; folding the rows first halves the arithmetic of that direction. For
that, row frequencies are stored evens first (:func:`row_order`).
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


def row_order(height: int) -> list[int]:
    """The frequency that is stored in each row: evens first where the height is even, else as they come."""
    return [*range(0, height, 2), *range(1, height, 2)] if height % 2 == 0 else [*range(height)]


class Dct:
    """The transform of chunks of ``height`` x ``width``, with buffers for at most ``most`` chunks at once."""

    def __init__(self, height: int, width: int, most: int, device: torch.device) -> None:
        self.height, self.width = height, width
        rows = dct_matrix(height, device)[:, row_order(height)]
        self.row_cosines = rows.T.contiguous()
        """[stored row, sample]"""
        self.column_cosines = dct_matrix(width, device).T.contiguous()
        """[frequency, sample]"""
        self._half = height // 2 if height % 2 == 0 else 0
        self._even = self.row_cosines[: self._half, : self._half].contiguous()
        self._odd = self.row_cosines[self._half :, : self._half].contiguous()
        self._mirror = torch.arange(height - 1, self._half - 1, -1, device=device)
        self._rows = torch.empty(height * most * width, device=device)
        self._folded = torch.empty(3, max(self._half, 1) * most * width, device=device)

    def accumulate(self, x_HCW: Tensor, into_HCW: Tensor, decay: float, scale: float) -> None:
        """``into = decay * into + scale * DCT(x)``, in place; ``x`` may be strided."""
        chunks = x_HCW.shape[1]
        rows = self._rows[: into_HCW.numel()].view(self.height, chunks * self.width)
        if self._half:
            mirrored, even, odd = self._halves(chunks)
            torch.index_select(x_HCW, 0, self._mirror, out=mirrored)
            torch.add(x_HCW[: self._half], mirrored, out=even)
            torch.sub(x_HCW[: self._half], mirrored, out=odd)
            torch.mm(self._even, even.view(self._half, -1), out=rows[: self._half])
            torch.mm(self._odd, odd.view(self._half, -1), out=rows[self._half :])
        else:
            torch.mm(self.row_cosines, x_HCW.reshape(self.height, -1), out=rows)
        flat = into_HCW.view(-1, self.width)
        torch.addmm(flat, rows.view(-1, self.width), self.column_cosines.T, beta=decay, alpha=scale, out=flat)

    def inverse(self, coefficients_HCW: Tensor) -> Tensor:
        """Samples, [H, C, W], in a buffer that the next call overwrites. ``coefficients`` must be contiguous."""
        chunks = coefficients_HCW.shape[1]
        rows = self._rows[: coefficients_HCW.numel()].view(self.height, chunks * self.width)
        torch.mm(coefficients_HCW.view(-1, self.width), self.column_cosines, out=rows.view(-1, self.width))
        if not self._half:
            return torch.mm(self.row_cosines.T, rows).view(self.height, chunks, self.width)
        lower, even, odd = (part.view(self._half, -1) for part in self._halves(chunks))
        torch.mm(self._even.T, rows[: self._half], out=even)
        torch.mm(self._odd.T, rows[self._half :], out=odd)
        torch.add(even, odd, out=rows[: self._half])
        torch.sub(even, odd, out=lower)
        rows.index_copy_(0, self._mirror, lower)
        return rows.view(self.height, chunks, self.width)

    def inverse_sparse(self, row_CK: Tensor, column_CK: Tensor, value_CK: Tensor) -> Tensor:
        """Samples, [C, H, W], of chunks that have only K coefficients each: a sum of K outer products."""
        left = self.row_cosines[row_CK].mul_(value_CK.unsqueeze(2))
        return torch.bmm(left.transpose(1, 2), self.column_cosines[column_CK])

    def _halves(self, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
        parts = self._folded[:, : self._half * chunks * self.width].view(3, self._half, chunks, self.width)
        return parts[0], parts[1], parts[2]
