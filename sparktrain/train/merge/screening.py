"""Which candidates may take part, judged by what they really changed: non-finite values, size and direction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparktrain.errors import ModelError
from sparktrain.train.merge.sources import Source, pieces


@dataclass(frozen=True)
class Measured:
    """How N candidates lie to the base. ``gram``: inner products of their deltas [N, N], float64, over all tensors;
    ``damage``: per candidate, what is not a number in it, or nothing."""

    gram: torch.Tensor
    damage: tuple[str, ...]

    @property
    def norms(self) -> torch.Tensor:
        """L2 norms of the deltas [N]."""
        return self.gram.diagonal().sqrt()

    def cosine(self, i: int, others: Sequence[int]) -> float | None:
        """Median cosine of candidate i's delta to the others' (the upper one of an even number): None where it or all
        others changed nothing. A median, because the mean of three directions is no direction once one is reversed."""
        norms = self.norms
        near = [j for j in others if j != i and norms[j] > 0]
        if not near or not norms[i] > 0:
            return None
        cosines = sorted(float(self.gram[i, j] / (norms[i] * norms[j])) for j in near)
        return cosines[len(cosines) // 2]


@dataclass(frozen=True)
class Verdict:
    """``reason``: why the candidate was rejected; empty where it takes part."""

    norm: float
    cosine: float | None
    reason: str


def measure(base: Source, candidates: Sequence[Source]) -> Measured:
    """One pass over all models. Raises :class:`ModelError` where the base itself is not finite."""
    count = len(candidates)
    gram = torch.zeros(count, count, dtype=torch.float64)
    bad, where = [0] * count, [""] * count
    for name, base_K, models_NK in pieces(base, candidates):
        if not base_K.isfinite().all():
            raise ModelError(f"the base {base.path} has values that are not finite in {name}: give another base")
        finite_NK = models_NK.isfinite()
        for i in (~finite_NK.all(dim=1)).nonzero().flatten().tolist():
            bad[i] += int((~finite_NK[i]).sum())
            where[i] = where[i] or name
        delta_NK = torch.where(finite_NK, models_NK - base_K, 0.0)
        gram += delta_NK @ delta_NK.T
    damage = tuple(f"{n} values are not finite, first in {w}" if n else "" for n, w in zip(bad, where, strict=True))
    return Measured(gram, damage)


def judge(
    measured: Measured, metrics: Sequence[float], max_norm_ratio: float, min_cosine: float
) -> tuple[Verdict, ...]:
    """A verdict per candidate. Each rule looks only at candidates that passed the one before, so that a broken one
    does not set the scale for the others.

    Args:
        metrics: each candidate's loss or score, or nothing.
        max_norm_ratio: how many times the median norm a delta may have; 0: any.
        min_cosine: least :meth:`Measured.cosine`; -1: any.
    """
    reasons = list(measured.damage)
    for i, metric in enumerate(metrics):
        if not reasons[i] and not math.isfinite(metric):
            reasons[i] = f"its loss or score is {metric}"
    norms = measured.norms.tolist()
    passed = [i for i, reason in enumerate(reasons) if not reason]
    typical = sorted(norms[i] for i in passed)[(len(passed) - 1) // 2] if passed else 0.0
    for i in passed:
        if max_norm_ratio and typical > 0 and norms[i] > max_norm_ratio * typical:
            reasons[i] = (
                f"its delta's norm {norms[i]:.3g} is more than max_norm_ratio {max_norm_ratio:g} times the median "
                f"{typical:.3g}"
            )
    passed = [i for i in passed if not reasons[i]]
    cosines = {i: measured.cosine(i, passed) for i in passed}
    for i, cosine in cosines.items():
        if cosine is not None and cosine < min_cosine:
            reasons[i] = (
                f"its delta's median cosine to the others' is {cosine:.3f}, less than min_cosine {min_cosine:g}"
            )
    return tuple(Verdict(norms[i], cosines.get(i), reason) for i, reason in enumerate(reasons))
