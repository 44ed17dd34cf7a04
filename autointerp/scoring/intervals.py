"""Compute balanced accuracy and AUROC with intervals, in NumPy and SciPy alone.

A detection score rests on some fifty contexts of each kind, so its interval is about ten points wide. These methods
were chosen for their coverage at such sizes and near perfect scores, where the textbook (Wald) intervals collapse; the
tests measure the coverage by simulation. NaN raises ``ValueError``: callers must count what failed. The result is NaN
if nothing can be measured.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sae.common.estimate import UNKNOWN, Estimate, normal_quantile, proportion

Array = NDArray[np.float64]


def balanced_accuracy(truth: ArrayLike, label: ArrayLike, level: float = 0.95) -> Estimate:
    """Return (TPR + TNR) / 2 of yes/no answers, with an interval that keeps its width at a perfect score.

    The two rates come from different contexts, so they are independent; their Wilson intervals are joined by MOVER (Zou
    and Donner 2008; Newcombe 1998 for a difference of proportions). NaN if either class is missing.

    Args:
        truth: [N] whether the latent fires in the context.
        label: [N] whether the judge predicted it.
    """
    positive, said = _answers(truth, label, bool)
    tpr = proportion(float(np.sum(said & positive)), float(np.sum(positive)), level)
    tnr = proportion(float(np.sum(~said & ~positive)), float(np.sum(~positive)), level)
    if math.isnan(tpr.value) or math.isnan(tnr.value):
        return UNKNOWN
    value = (tpr.value + tnr.value) / 2
    below = math.hypot(tpr.value - tpr.low, tnr.value - tnr.low) / 2
    above = math.hypot(tpr.high - tpr.value, tnr.high - tnr.value) / 2
    return Estimate(value, max(0.0, value - below), min(1.0, value + above))


def auroc(truth: ArrayLike, p: ArrayLike, level: float = 0.95) -> Estimate:
    """Return the probability that an activating context gets a higher P(active) than a silent one; ties count half.

    Variance after DeLong et al. (1988), by midranks (Sun and Xu 2014), on the logit scale so that the interval stays
    within 0 and 1. If that variance is zero (classes completely separated, or all answers equal), the interval is
    Wilson's for a fraction of the smaller class's number of contexts. NaN if either class is missing.

    Args:
        truth: [N] whether the latent fires in the context.
        p: [N] the judge's P(active), or any score that rises with it.
    """
    positive, score = _answers(truth, p, float)
    n1, n0 = int(np.sum(positive)), int(np.sum(~positive))
    if n1 == 0 or n0 == 0:
        return UNKNOWN
    ranks = mean_ranks(score)
    # Per context: the share of the other class that it beats.
    beats = (ranks[positive] - mean_ranks(score[positive])) / n0
    beaten = 1 - (ranks[~positive] - mean_ranks(score[~positive])) / n1
    value = float(np.mean(beats))
    variance = sum(float(np.var(part, ddof=1)) / len(part) if len(part) > 1 else 0.25 for part in (beats, beaten))
    if variance < 1e-12 or not 0 < value < 1:
        smaller = min(n1, n0)
        return Estimate(value, *proportion(value * smaller, smaller, level)[1:])
    logit = math.log(value / (1 - value))
    half = normal_quantile(level) * math.sqrt(variance) / (value * (1 - value))
    return Estimate(value, float(_expit(logit - half)), float(_expit(logit + half)))


def check_finite(values: ArrayLike) -> Array:
    """Return ``values`` as float64; raise ValueError for NaN and infinity."""
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError("values are NaN or infinite: drop and count the failures first")
    return x


def mean_ranks(values: ArrayLike) -> Array:
    """Return the ranks [N] of [N] values, from 1; equal values share the mean of theirs."""
    _, of, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[of]


def _answers(truth: ArrayLike, answer: ArrayLike, kind: type) -> tuple[NDArray[np.bool_], NDArray]:
    positive, given = check_finite(truth), check_finite(answer)
    if len(positive) != len(given):
        raise ValueError(f"{len(positive)} truths and {len(given)} answers")
    for name, values, checked in (("truth", positive, True), ("label", given, kind is bool)):
        if checked and not np.isin(values, (0.0, 1.0)).all():
            raise ValueError(f"{name} must hold only true and false (1 and 0)")
    return positive.astype(bool), given.astype(kind)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
