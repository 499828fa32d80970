"""The k coefficients of largest magnitude of each chunk, exactly.

    C, H, W     chunks, rows, columns of a chunk;  K the number chosen;  area = H * W

A coefficient's index is ``row * W + column``. Fewer than K are chosen where fewer are not zero: a zero is no
contribution. Such places hold the index ``area``, which stands for "absent", and the value 0. Indices ascend.

On a CPU a general top-k moves every element through a heap. Here a lower bound of the k-th largest comes first: the
k-th largest of the maxima of more than k groups. Few elements reach it, and only those are looked at again.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def select_largest(coefficients_HCW: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """``(index_CK, value_CK)``, int64 and float32. ``coefficients`` must be contiguous; they stay as they are."""
    height, chunks, width = coefficients_HCW.shape
    area = height * width
    groups = next((g for g in range(1, height + 1) if height % g == 0 and 2 * topk <= g * width), 0)
    if coefficients_HCW.device.type != "cpu" or not groups or groups == height:
        return _directly(coefficients_HCW.transpose(0, 1).reshape(chunks, area), topk)
    magnitude = coefficients_HCW.abs().numpy()
    position = _reaching(magnitude, _lower_bound(magnitude, groups, topk))
    index = _best(position, magnitude, topk)
    return torch.from_numpy(index), gather_values(coefficients_HCW, torch.from_numpy(index))


def storage_positions(index_CK: Tensor, height: int, width: int, absent: int = 0) -> Tensor:
    """Where in contiguous ``_HCW`` storage these coefficients lie; ``absent``: the position to give for absent ones."""
    chunks = index_CK.shape[0]
    row = index_CK // width
    chunk = torch.arange(chunks, device=index_CK.device).unsqueeze(1)
    position = (row * ((chunks - 1) * width)).add_(index_CK).add_(chunk, alpha=width)
    return position.masked_fill_(index_CK == height * width, absent)


def gather_values(coefficients_HCW: Tensor, index_CK: Tensor) -> Tensor:
    """The coefficients at these indices, 0 for absent ones."""
    height, _, width = coefficients_HCW.shape
    value = coefficients_HCW.view(-1)[storage_positions(index_CK, height, width)]
    return torch.where(index_CK < height * width, value, 0)


def _directly(flat_CA: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    index = flat_CA.abs().topk(topk, sorted=False).indices
    absent = flat_CA.gather(1, index) == 0
    index = index.masked_fill_(absent, flat_CA.shape[1]).sort(1).values
    value = torch.cat([flat_CA, flat_CA.new_zeros(len(flat_CA), 1)], 1).gather(1, index)
    return index, value


def _lower_bound(magnitude: Floats, groups: int, topk: int) -> Floats:
    """[C]: at least ``topk`` elements of the chunk reach it. A group: one column of one of ``groups`` bands of rows."""
    height, chunks, width = magnitude.shape
    maxima = magnitude.reshape(groups, height // groups, chunks, width).max(1)
    maxima = maxima.swapaxes(0, 1).reshape(chunks, groups * width)
    return np.partition(maxima, groups * width - topk, axis=1)[:, groups * width - topk]


def _reaching(magnitude: Floats, bound: Floats) -> Ints:
    """Positions, chunk * area + index and ascending, of the elements that reach their chunk's bound and are not 0."""
    tiny = np.finfo(np.float32).smallest_subnormal
    reached = magnitude >= np.maximum(bound, tiny)[:, None]
    return np.flatnonzero(np.ascontiguousarray(reached.swapaxes(0, 1)))


def _best(position: Ints, magnitude: Floats, topk: int) -> Ints:
    """Of these candidates the ``topk`` largest of each chunk; of equals, those of lower index."""
    height, chunks, width = magnitude.shape
    area = height * width
    chunk, index = np.divmod(position, area)
    row, column = np.divmod(index, width)
    counts = np.bincount(chunk, minlength=chunks)
    place = np.arange(len(position)) - (np.cumsum(counts) - counts)[chunk]
    most = max(int(counts.max(initial=0)), topk)
    candidates: Floats = np.zeros((chunks, most), np.float32)
    candidates[chunk, place] = magnitude[row, chunk, column]
    indices: Ints = np.full((chunks, most), area)
    indices[chunk, place] = index
    if most == topk:
        return indices
    least = np.partition(candidates, most - topk, axis=1)[:, most - topk, None]
    keep: Any = candidates >= least
    if keep.sum() != chunks * topk:
        equal = candidates == least
        room = topk - (candidates > least).sum(1, keepdims=True)
        keep &= ~equal | (equal.cumsum(1) <= room)
    best: Ints = indices[keep].reshape(chunks, topk)
    return best
