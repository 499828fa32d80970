"""The orthonormal discrete cosine transform (DCT-II) as a matrix: two matrix products transform a block.

Rows are samples and columns are frequencies, ``coefficients = samples @ D``; the inverse is the transpose.
"""

import functools
import math

import torch
from torch import Tensor


@functools.cache
def dct_matrix(size: int, device: torch.device | None = None) -> Tensor:
    """``D[size, size]`` in float32, computed in float64: D[j, b] = a_b cos(pi (2j+1) b / 2 size)."""
    sample = torch.arange(size, dtype=torch.float64).unsqueeze(1)
    frequency = torch.arange(size, dtype=torch.float64).unsqueeze(0)
    matrix = torch.cos(math.pi * (2 * sample + 1) * frequency / (2 * size)) * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix.to(torch.float32).to(device or torch.device("cpu"))
