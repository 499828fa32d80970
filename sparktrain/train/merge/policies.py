"""How several models become one: pure functions of values, one column per coordinate.

N: candidates; K: coordinates. Everything is float64, so that equal models merge to themselves in any model's dtype
and the order of candidates is lost in rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_mean(values_NK: Tensor, weights_N: Tensor) -> Tensor:
    """sum(w x) / sum(w)."""
    return (weights_N / weights_N.sum()) @ values_NK


def clipped_mean(values_NK: Tensor, base_K: Tensor, weights_N: Tensor, scales_N: Tensor) -> Tensor:
    """Weighted mean of models whose way from the base was shortened by ``scales`` (:func:`clip_scales`)."""
    return base_K + weighted_mean((values_NK - base_K) * scales_N[:, None], weights_N)


def clip_scales(norms_N: Tensor, clip_norm: float) -> Tensor:
    """min(1, clip_norm / norm), norms being each whole model's distance from the base."""
    return torch.where(norms_N > clip_norm, clip_norm / norms_N, 1.0)


def trimmed_mean(values_NK: Tensor, trim_fraction: float) -> Tensor:
    """Mean of each coordinate without its ``floor(N trim_fraction)`` smallest and as many largest values."""
    count = values_NK.shape[0]
    trim = trimmed(count, trim_fraction)
    return values_NK.sort(dim=0).values[trim : count - trim].mean(dim=0)


def trimmed(count: int, trim_fraction: float) -> int:
    """How many values :func:`trimmed_mean` drops at each end; 1e-9 more, because 0.29 * 100 is 28.999999999999996."""
    return int(count * trim_fraction + 1e-9)


def coordinate_median(values_NK: Tensor) -> Tensor:
    """Median of each coordinate; of an even number of candidates the mean of the middle two."""
    ordered, middle = values_NK.sort(dim=0).values, values_NK.shape[0] // 2
    return ordered[middle] if values_NK.shape[0] % 2 else ordered[middle - 1 : middle + 1].mean(dim=0)


def moving_average(old_K: Tensor, new_K: Tensor, decay: float) -> Tensor:
    """decay * old + (1 - decay) * new: ``decay`` is the weight of the *old* model, as in ``torch.optim.swa_utils``.
    (burn_p2p's ``decay`` is the weight of the new one.)"""
    return decay * old_K + (1 - decay) * new_K if decay else new_K


def reconcile(local_K: Tensor, canonical_K: Tensor, canonical_weight: float) -> Tensor:
    """The local model pulled towards the canonical one; weight 1 replaces it."""
    return canonical_weight * canonical_K + (1 - canonical_weight) * local_K if canonical_weight < 1 else canonical_K


def quality_weights(metrics: Sequence[float], higher_is_better: bool) -> list[float]:
    """1 / (1 + how far a model is behind the best), and never below 0.01: the better model gets more, by a loss as by
    a score. (burn_p2p takes 1 / (1 + |metric|), which favours the worse model where the metric is a score.)"""
    best = max(metrics) if higher_is_better else min(metrics)
    return [max(0.01, 1 / (1 + abs(metric - best))) for metric in metrics]
