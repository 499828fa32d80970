"""Merge models trained from one base into one: screen them, weigh them, combine them, write the result."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sparktrain.config import Section
from sparktrain.errors import ConfigError, ModelError
from sparktrain.train.merge import policies
from sparktrain.train.merge.screening import Measured, Verdict, judge, measure
from sparktrain.train.merge.sources import Source, check_same, open_source, write_merged

_WEIGHED = ("weighted-mean", "norm-clipped-weighted-mean")


class Merge(Section):
    """Merge models that were trained from one base."""

    base: Path
    """Model that all candidates were trained from: a run directory, Hugging Face directory or parameter pack."""
    candidates: list[Path] = Field(min_length=1)
    """Models to merge, of the base's kind and shapes: --candidates A --candidates B."""
    output: Path
    """Directory to write the merged model to, with the base's configuration, tokenizer and dtypes."""
    policy: Literal["weighted-mean", "norm-clipped-weighted-mean", "trimmed-mean", "coordinate-median"] = (
        "weighted-mean"
    )
    """How candidates become one. The last two withstand outliers and take no weights."""
    weights: list[float] = []
    """Weight of each candidate, such as the tokens it was trained on; none: all the same."""
    losses: list[float] = []
    """Loss of each candidate on the same held-out data: the lower, the more it weighs."""
    scores: list[float] = []
    """Score of each candidate, instead of a loss: the higher, the more it weighs."""
    clip_norm: float = Field(0, ge=0, allow_inf_nan=False)
    """norm-clipped-weighted-mean: longest way a candidate may go from the base (L2); 0: the candidates' median."""
    trim_fraction: float = Field(0.25, gt=0, lt=0.5)
    """trimmed-mean: part of the candidates to drop at each end of each coordinate, rounded down."""
    ema_decay: float = Field(0, ge=0, le=1)
    """Weight of the base, the old model, in the result: ema_decay * base + (1 - ema_decay) * merged."""
    local: Path | None = None
    """Write this model, pulled towards the merged one, instead of the merged one itself."""
    canonical_weight: float = Field(0.25, gt=0, le=1)
    """How far local is pulled; 1 replaces it."""
    max_norm_ratio: float = Field(10, ge=0)
    """Reject a candidate that went more than so many times as far from the base as the median one; 0: never."""
    min_cosine: float = Field(-0.1, ge=-1, le=1)
    """Reject a candidate whose median cosine to the others' ways from the base is less; -1: never."""

    @model_validator(mode="after")
    def _lists_fit(self) -> "Merge":
        for key in ("weights", "losses", "scores"):
            values = getattr(self, key)
            if values and len(values) != len(self.candidates):
                raise ValueError(
                    f"{key} has {len(values)} numbers for {len(self.candidates)} candidates: give one each"
                )
            if values and self.policy not in _WEIGHED:
                raise ValueError(f"policy {self.policy} takes no {key}: remove them, or use {_WEIGHED[1]}")
        if self.losses and self.scores:
            raise ValueError("losses and scores are both set: give one of them")
        for weight in self.weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weights has {weight}: expected numbers above 0; leave a candidate out instead")
        twice = [path for i, path in enumerate(self.candidates) if path in self.candidates[:i]]
        if twice:
            raise ValueError(f"candidates has {twice[0]} twice: give it once, and a weight of 2 if it shall count so")
        return self


@dataclass(frozen=True)
class Merged:
    """What was merged. ``weights``: each candidate's share of the mean, 0 where rejected; equal where the policy takes
    no weights."""

    settings: Merge
    verdicts: tuple[Verdict, ...]
    weights: tuple[float, ...]

    def report(self) -> str:
        """One line per candidate, and where the result is."""
        lines = []
        for path, verdict, weight in zip(self.settings.candidates, self.verdicts, self.weights, strict=True):
            cosine = "-" if verdict.cosine is None else f"{verdict.cosine:.3f}"
            fate = f"rejected: {verdict.reason}" if verdict.reason else f"weight {weight:.4f}"
            lines.append(f"{path}: delta norm {verdict.norm:.4g}, cosine {cosine}, {fate}")
        count = sum(not verdict.reason for verdict in self.verdicts)
        return "\n".join([*lines, f"{self.settings.policy} of {count} models: {self.settings.output}"])


def merge(settings: Merge) -> Merged:
    """Merge as ``settings`` say. Reads every model twice, a piece at a time: once to screen, once to combine.

    Raises :class:`ModelError` where a model cannot be read or has other tensors than the base, or where all are
    rejected; :class:`ConfigError` where the output is taken or the policy has too few candidates.
    """
    if settings.output.exists():
        raise ConfigError(f"output {settings.output} exists: choose another, or remove it")
    base, local = open_source(settings.base), open_source(settings.local) if settings.local else None
    candidates = [open_source(path) for path in settings.candidates]
    for other in [*candidates, *([local] if local else [])]:
        check_same(base, other)
    measured = measure(base, candidates)
    metrics = settings.losses or settings.scores
    verdicts = judge(measured, metrics, settings.max_norm_ratio, settings.min_cosine)
    accepted = [i for i, verdict in enumerate(verdicts) if not verdict.reason]
    if not accepted:
        why = "; ".join(f"{p}: {v.reason}" for p, v in zip(settings.candidates, verdicts, strict=True))
        raise ModelError(f"all {len(candidates)} candidates were rejected, nothing was merged: {why}")
    weights = _weights(settings, accepted)
    combine = _combine(settings, measured, accepted, weights)
    models: list[Source] = [candidates[i] for i in accepted]
    if local:
        write_merged(
            settings.output,
            base,
            [*models, local],
            lambda b, m: policies.reconcile(m[-1], combine(b, m[:-1]), settings.canonical_weight),
        )
    else:
        write_merged(settings.output, base, models, combine)
    shares = dict(zip(accepted, (weights / weights.sum()).tolist(), strict=True))
    return Merged(settings, verdicts, tuple(shares.get(i, 0.0) for i in range(len(candidates))))


def _weights(settings: Merge, accepted: Sequence[int]) -> Tensor:
    """Weight times quality of each accepted candidate [N], float64."""
    weights = torch.tensor([settings.weights[i] if settings.weights else 1.0 for i in accepted], dtype=torch.float64)
    metrics = settings.losses or settings.scores
    if metrics:
        quality = policies.quality_weights([metrics[i] for i in accepted], bool(settings.scores))
        weights *= torch.tensor(quality, dtype=torch.float64)
    return weights


def _combine(
    settings: Merge, measured: Measured, accepted: Sequence[int], weights_N: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The policy, and the moving average after it, as one function of (base [K], candidates [N, K])."""
    norms_N = measured.norms[list(accepted)]
    scales_N = policies.clip_scales(norms_N, settings.clip_norm or float(policies.coordinate_median(norms_N)))
    if settings.policy == "trimmed-mean" and not policies.trimmed(len(accepted), settings.trim_fraction):
        raise ConfigError(
            f"trim_fraction {settings.trim_fraction:g} of {len(accepted)} candidates drops none: "
            "raise it, give more candidates, or use coordinate-median"
        )

    def combine(base_K: Tensor, values_NK: Tensor) -> Tensor:
        if settings.policy == "weighted-mean":
            merged = policies.weighted_mean(values_NK, weights_N)
        elif settings.policy == "norm-clipped-weighted-mean":
            merged = policies.clipped_mean(values_NK, base_K, weights_N, scales_N)
        elif settings.policy == "trimmed-mean":
            merged = policies.trimmed_mean(values_NK, settings.trim_fraction)
        else:
            merged = policies.coordinate_median(values_NK)
        return policies.moving_average(base_K, merged, settings.ema_decay)

    return combine
