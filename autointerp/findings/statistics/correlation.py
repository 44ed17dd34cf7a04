"""Compute correlations, quantiles and means with their intervals, in NumPy and SciPy alone.

Each method was chosen for its coverage with some fifty contexts of each kind and near perfect scores, where the
textbook (Wald) intervals collapse; the tests measure the coverage by simulation.

NaN raises ``ValueError``: callers must count what failed. The result is NaN if nothing can be measured (no value, a
constant variable).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autointerp.scoring.intervals import Array, check_finite, mean_ranks
from sae.common.estimate import UNKNOWN, Estimate, fraction, normal_quantile

METHODS = {
    "proportion": "Wilson score interval",
    "balanced_accuracy": "MOVER of the Wilson intervals of the true positive and true negative rates (Clopper-Pearson "
    "intervals, and rates corrected for stopping, where contexts were judged in rounds to a precision)",
    "auroc": "DeLong variance on the logit scale; Wilson with n of the smaller class where that variance is zero",
    "spearman": "Fisher z with Bonett and Wright's variance",
    "partial_spearman": "Fisher z with Bonett and Wright's variance, one degree of freedom less per covariate",
    "stratified_spearman": "Fisher z of the strata, weighted by n - 3",
    "bootstrap_mean": "percentile bootstrap of the mean, 2000 resamples, seeded",
}
"""How each interval is computed, for the report."""


def mean_fraction(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Return the mean of fractions [N] with Wilson's interval at their effective number.

    See :func:`sae.common.estimate.fraction`; the number is N if all are 0 or 1, or all are equal.
    """
    x = check_finite(values)
    if len(x) == 0:
        return UNKNOWN
    return fraction(float(x.mean()), float(x.var()) / len(x), len(x), level)


def spearman(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> Estimate:
    """Return Spearman's correlation of [N] and [N]; Fisher's z with the variance of Bonett and Wright (2000).

    NaN if a variable is constant or N < 3; no interval if N < 5.
    """
    return partial_spearman(x, y, (), level)


def partial_spearman(x: ArrayLike, y: ArrayLike, covariates: ArrayLike, level: float = 0.95) -> Estimate:
    """Return Spearman's correlation of x [N] and y [N] with the ranks of the covariates ([N] or [C, N]) held fixed.

    Correlates the residuals of the ranks after regression; the interval loses one degree of freedom per covariate.
    """
    a, b = check_finite(x), check_finite(y)
    held = np.asarray(covariates, dtype=np.float64)
    held = check_finite(held).reshape(-1, len(a)) if held.size else np.empty((0, len(a)))
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}")
    if len(a) - len(held) < 3:
        return UNKNOWN
    left = np.stack([mean_ranks(a), mean_ranks(b)])
    spread = left.std(axis=1)
    design = np.vstack([np.ones(len(a)), *(mean_ranks(row)[None] for row in held)])
    left = left - (np.linalg.lstsq(design.T, left.T, rcond=None)[0].T @ design)
    kept = left.std(axis=1)
    # Residuals of a variable that the covariates explain fully are only rounding errors.
    if np.any(spread == 0) or np.any(kept <= 1e-9 * spread):
        return UNKNOWN
    r = float(np.clip(np.mean(left[0] * left[1]) / (kept[0] * kept[1]), -1, 1))
    return _fisher(r, len(a), len(held), level)


class Stratum(NamedTuple):
    """One quantile of the covariate: its range, its number of points, and the correlation within it."""

    low: float
    high: float
    n: int
    correlation: Estimate


class Stratified(NamedTuple):
    """A correlation within strata of a covariate, and the strata's weighted mean."""

    pooled: Estimate
    strata: list[Stratum]


def stratified_spearman(
    x: ArrayLike, y: ArrayLike, covariate: ArrayLike, n_strata: int = 5, level: float = 0.95
) -> Stratified:
    """Return Spearman's correlation of x [N] and y [N] within quantiles of a covariate [N].

    Unlike a partial correlation, assumes no monotonic effect. Equal covariates share a stratum, so there may be fewer
    strata than requested. Pooled: the mean of Fisher's z weighted by n - 3.
    """
    a, b, c = check_finite(x), check_finite(y), check_finite(covariate)
    if not len(a) == len(b) == len(c):
        raise ValueError(f"{len(a)}, {len(b)} and {len(c)} values")
    if not len(a):
        return Stratified(UNKNOWN, [])
    stratum = strata_of(c, n_strata)
    strata, weights, scores, variances = [], [], [], []
    for number in np.unique(stratum):
        inside = stratum == number
        found = spearman(a[inside], b[inside], level)
        n = int(inside.sum())
        strata.append(Stratum(float(c[inside].min()), float(c[inside].max()), n, found))
        if not math.isnan(found.low):
            r = float(short_of_one(found.value, n))
            weights.append(n - 3)
            scores.append(math.atanh(r))
            variances.append(_variance(r, n, 0))
    if not weights:
        return Stratified(UNKNOWN, strata)
    share = np.asarray(weights) / sum(weights)
    z, half = float(share @ scores), normal_quantile(level) * math.sqrt(float(share**2 @ variances))
    return Stratified(Estimate(math.tanh(z), math.tanh(z - half), math.tanh(z + half)), strata)


def strata_of(covariate: ArrayLike, n_strata: int, weights: ArrayLike | None = None) -> NDArray[np.intp]:
    """Return the quantile, from 0, that each value of a covariate [N] is in; equal values are in the same.

    With ``weights`` [N], the quantiles are those of the sampled population.
    """
    c = check_finite(covariate)
    edges = np.unique(quantiles(c, np.linspace(0, 1, n_strata + 1)[1:-1], weights))
    return np.searchsorted(edges, c, side="left")


def short_of_one(r: ArrayLike, n: int) -> Array:
    """Move rank correlations of ±1 inwards by half a step, because Fisher's z is infinite there.

    A step is the effect of exchanging two neighbouring ranks of n points, 12 / (n³ - n).
    """
    limit = 1 - 6 / (n**3 - n)
    return np.clip(np.asarray(r, dtype=np.float64), -limit, limit)


def bootstrap_mean(values: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean of [N] values with its percentile-bootstrap interval; NaN for none, no interval for one."""
    x = check_finite(values)
    if len(x) == 0:
        return UNKNOWN
    mean = float(x.mean())
    if len(x) == 1:
        return Estimate(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(x))  # bounds the memory at some tens of MB
    means = np.concatenate(
        [
            x[rng.integers(len(x), size=(min(chunk, resamples - done), len(x)))].mean(axis=1)
            for done in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, min(float(low), mean), max(float(high), mean))


QUARTILES = (0.25, 0.5, 0.75)


def quantiles(values: ArrayLike, at: ArrayLike = QUARTILES, weights: ArrayLike | None = None) -> Array:
    """Return the quantiles ``at`` [Q] of [N] values, interpolated linearly; NaN if there is no value.

    With ``weights`` [N], the k-th value in order is the quantile C_k: the weight before the middle of its own, scaled
    to run from 0 for the first value to 1 for the last. Equal weights give NumPy's ``linear`` quantiles.
    """
    x, at = check_finite(values), np.asarray(at, dtype=np.float64)
    if not len(x):
        return np.full(at.shape, math.nan)
    if weights is None:
        return np.quantile(x, at)
    order = np.argsort(x, kind="stable")
    return sorted_quantiles(x[order], check_finite(weights)[order], at)


def sorted_quantiles(x: Array, weights: Array, at: Array) -> Array:
    """Return the :func:`quantiles` [Q] of sorted values [N]; [R, Q] for weights [R, N]."""
    rows = np.atleast_2d(weights)
    found = np.tile(np.quantile(x, at), (len(rows), 1))  # correct for equal weights
    if len(x) > 1:
        middle = np.cumsum(rows, axis=1) - rows / 2
        with np.errstate(invalid="ignore"):  # of a row of zeros
            place = (middle - middle[:, :1]) / (middle[:, -1:] - middle[:, :1])
        for i in np.flatnonzero(np.ptp(rows, axis=1)):
            found[i] = np.interp(at, place[i], x)
    return found.reshape(*weights.shape[:-1], len(at))


def _fisher(r: float, n: int, covariates: int, level: float) -> Estimate:
    if n - covariates < 5:
        return Estimate(r, math.nan, math.nan)
    inside = float(short_of_one(r, n))
    z, half = math.atanh(inside), normal_quantile(level) * math.sqrt(_variance(inside, n, covariates))
    return Estimate(r, min(r, math.tanh(z - half)), max(r, math.tanh(z + half)))


def _variance(r: float, n: int, covariates: int) -> float:
    """Return the variance of Fisher's z of a rank correlation (Bonett and Wright 2000)."""
    return (1 + r * r / 2) / (n - 3 - covariates)
