"""The k coefficients of largest magnitude of each chunk, exactly.

    C, H, W     chunks, rows, columns of a chunk;  K the number chosen;  area = H * W

A coefficient's index is ``row * W + column``. Fewer than K are chosen where fewer are not zero: a zero is no
contribution. Such places hold the index ``area``, which stands for "absent", and the value 0. Indices ascend.

On a CPU a general top-k moves every element through a heap. Here a lower bound of the k-th largest comes first: the
k-th largest of the maxima of at least 2k groups. Few elements reach it, and only those are looked at again.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Selected(NamedTuple):
    """[C, K] each: indices in the chunk, positions in contiguous ``_HCW`` storage (int32), values (float32)."""

    indices: Tensor
    positions: Tensor
    values: Tensor


class Selector:
    """Chooses ``topk`` of chunks of ``height`` x ``width``, with buffers for at most ``most`` chunks at once."""

    def __init__(self, height: int, width: int, topk: int, most: int, device: torch.device) -> None:
        self.height, self.width, self.topk = height, width, topk
        # A group is one column of one of so many bands of rows.
        fits = (g for g in range(1, height) if height % g == 0 and 2 * topk <= g * width)
        self.bands = next(fits, 0) if device.type == "cpu" else 0
        size = most * height * width if self.bands else 0
        self._magnitude: Floats = np.empty(size, np.float32)
        self._reached = np.empty((2, size), np.bool_)

    def __call__(self, coefficients_HCW: Tensor) -> Selected:
        """``coefficients`` must be contiguous; they stay as they are."""
        if self.bands:
            chosen = self._by_bound(coefficients_HCW.numpy())
            if chosen is not None:
                return chosen
        return select_directly(coefficients_HCW, self.topk)

    def _by_bound(self, coefficients: Floats) -> Selected | None:
        """None where some chunk has too few coefficients that are not zero, or equal ones compete for the last place.
        Neither happens twice: the momentum of such a chunk has just begun."""
        height, chunks, width = coefficients.shape
        magnitude = self._magnitude[: coefficients.size].reshape(coefficients.shape)
        np.abs(coefficients, out=magnitude)
        candidate = self._reaching(magnitude, self._lower_bound(magnitude))
        chunk = candidate // (height * width)
        index = candidate - chunk * (height * width)
        row = index // width
        position = row * ((chunks - 1) * width) + index + chunk * width
        size = magnitude.reshape(-1).take(position)
        counts = np.bincount(chunk, minlength=chunks)
        if counts.min() < self.topk:
            return None
        last = np.repeat(_kth_largest(size, counts, self.topk), counts)
        keep = np.flatnonzero(size >= last)
        if len(keep) != chunks * self.topk:
            return None
        position = position.take(keep)
        chosen = (index.take(keep), position, coefficients.reshape(-1).take(position))
        return Selected(*(torch.from_numpy(part.reshape(chunks, self.topk)) for part in chosen))

    def _lower_bound(self, magnitude: Floats) -> Floats:
        """[C]: at least ``topk`` elements of the chunk reach it."""
        height, chunks, width = magnitude.shape
        maxima = magnitude.reshape(self.bands, height // self.bands, chunks, width).max(1)
        maxima = maxima.swapaxes(0, 1).reshape(chunks, self.bands * width)
        last = self.bands * width - self.topk
        return np.partition(maxima, last, axis=1)[:, last]

    def _reaching(self, magnitude: Floats, bound: Floats) -> Ints:
        """chunk * area + index, ascending, of the elements that reach their chunk's bound and are not zero."""
        height, chunks, width = magnitude.shape
        reached, by_chunk = self._reached[:, : magnitude.size]
        reached, by_chunk = reached.reshape(height, chunks, width), by_chunk.reshape(chunks, height, width)
        # One bound per element of a row: comparing chunk by chunk would be as slow as sixty-four times the calls.
        bounds = np.maximum(bound, np.finfo(np.float32).smallest_subnormal).repeat(width).reshape(chunks, width)
        np.greater_equal(magnitude, bounds, out=reached)
        np.copyto(by_chunk, reached.swapaxes(0, 1))
        return np.flatnonzero(by_chunk).astype(np.int32)


def select_directly(coefficients_HCW: Tensor, topk: int) -> Selected:
    """The same by sorting out every element, wherever the tensor lives."""
    height, chunks, width = coefficients_HCW.shape
    flat = coefficients_HCW.transpose(0, 1).reshape(chunks, height * width)
    index = flat.abs().topk(topk, sorted=False).indices
    index = index.masked_fill_(flat.gather(1, index) == 0, height * width).sort(1).values
    value = torch.cat([flat, flat.new_zeros(chunks, 1)], 1).gather(1, index)
    return Selected(index.int(), storage_positions(index, height, width).int(), value)


def storage_positions(index_CK: Tensor, height: int, width: int, absent: int = 0) -> Tensor:
    """Where in contiguous ``_HCW`` storage these coefficients lie; ``absent``: the position to give for absent ones."""
    chunks = index_CK.shape[0]
    row = torch.div(index_CK, width, rounding_mode="floor")
    chunk = torch.arange(chunks, device=index_CK.device).unsqueeze(1)
    position = row.mul_((chunks - 1) * width).add_(index_CK).add_(chunk, alpha=width)
    return position.masked_fill_(index_CK == height * width, absent)


def _kth_largest(size: Floats, counts: Any, topk: int) -> Floats:
    """[C]: of each chunk's candidates, which lie one chunk after the other."""
    chunks, most = len(counts), int(counts.max())
    padded: Floats = np.zeros(chunks * most, np.float32)
    begins = np.cumsum(counts) - counts
    padded[np.arange(len(size)) + np.repeat(np.arange(chunks) * most - begins, counts)] = size
    return np.partition(padded.reshape(chunks, most), most - topk, axis=1)[:, most - topk]
