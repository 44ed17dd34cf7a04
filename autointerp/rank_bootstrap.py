"""Rank correlations, and what is made of them, over resamples: the intervals that no formula gives.

A resample is a weight for each value, how often it is held, and a rank correlation under weights is that of the sample
in which each value stands so often. So nothing is copied or sorted again for a resample. Whole groups of values are
drawn together: a latent and its partners in the other seeds are one observation, and were each drawn by itself, the
intervals would be too narrow.

R resamples, N values. Row 0 of every result is the sample itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sae.estimate import Estimate

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 1000
_CELLS = 1_000_000  # of a resample × value matrix held at a time


class Resamples:
    """Which values each resample holds, and how often; the same units and seed give the same ones.

    Args:
        units: [N] the group that each value belongs to, of any type that can be compared.
    """

    def __init__(self, units: ArrayLike, resamples: int | None = None, seed: int = 0) -> None:
        resamples = RESAMPLES if resamples is None else resamples
        _, self.unit = np.unique(np.asarray(units), return_inverse=True)
        self.n_units = int(self.unit.max(initial=-1)) + 1
        rng = np.random.default_rng(seed)
        self._held = np.ones((resamples + 1, self.n_units), dtype=np.uint8)
        for row in self._held[1:]:
            row[:] = np.bincount(rng.integers(self.n_units, size=self.n_units), minlength=self.n_units)

    def __len__(self) -> int:
        return len(self._held)

    def weights(self, kept: Bools | None = None) -> Iterator[Floats]:
        """The weights of the values (``kept`` [N] of them) in pieces [r, n], which together have R + 1 rows."""
        unit = self.unit if kept is None else self.unit[kept]
        step = max(1, _CELLS // max(1, len(unit)))
        for start in range(0, len(self), step):
            yield self._held[start : start + step].astype(np.float64)[:, unit]

    def count(self, kept: Bools) -> int:
        """How many units the values ``kept`` [N] are of."""
        return len(np.unique(self.unit[kept]))

    def means(self, values: ArrayLike, kept: Bools | None = None) -> Floats:
        """[R + 1] the mean of the values [N] (of those ``kept``); NaN where a resample holds none of them."""
        x = np.asarray(values, dtype=np.float64)
        x = x if kept is None else x[kept]
        with np.errstate(invalid="ignore"):
            return np.concatenate([(w @ x) / w.sum(1) for w in self.weights(kept)])

    def correlations(self, columns: Sequence[ArrayLike], kept: Bools | None = None) -> Floats:
        """[R + 1, C, C] Spearman's correlations of C columns [N]; NaN where one is constant in a resample."""
        table = [np.asarray(c, dtype=np.float64) if kept is None else np.asarray(c, float)[kept] for c in columns]
        orders = [_Order.of(column) for column in table]
        return np.concatenate([_correlate(orders, w) for w in self.weights(kept)])


class _Order:
    """A column sorted once: where each group of equal values ends, and which group each value is in."""

    def __init__(self, order: NDArray[np.intp], ends: NDArray[np.intp], group: NDArray[np.intp]) -> None:
        self.order, self.ends, self.group = order, ends, group

    @classmethod
    def of(cls, values: Floats) -> _Order:
        order = np.argsort(values, kind="stable")
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        return cls(order, np.cumsum(counts) - 1, group)

    def ranks(self, weights: Floats) -> Floats:
        """[r, n] the mean rank of each value in the sample in which it stands ``weights`` [r, n] times."""
        upto = np.cumsum(weights[:, self.order], axis=1)[:, self.ends]
        before = np.concatenate([np.zeros((len(upto), 1)), upto[:, :-1]], axis=1)
        return ((before + upto + 1) / 2)[:, self.group]


def _correlate(orders: Sequence[_Order], weights: Floats) -> Floats:
    total = weights.sum(1, keepdims=True)
    centred = []
    for order in orders:
        ranks = order.ranks(weights)
        centred.append(ranks - (weights * ranks).sum(1, keepdims=True) / total)
    found = np.ones((len(weights), len(orders), len(orders)))
    spread = [np.sqrt((weights * c * c).sum(1)) for c in centred]
    with np.errstate(invalid="ignore", divide="ignore"):
        for i in range(len(orders)):
            for j in range(i, len(orders)):
                r = (weights * centred[i] * centred[j]).sum(1) / (spread[i] * spread[j])
                found[:, i, j] = found[:, j, i] = np.clip(r, -1, 1)
    return found


def partial(xy: Floats, xz: Floats, yz: Floats) -> Floats:
    """The correlation of x and y with z held fixed, out of the three plain ones; NaN where z leaves nothing over."""
    with np.errstate(invalid="ignore", divide="ignore"):
        left = (1 - xz**2) * (1 - yz**2)
        return np.where(left > 1e-12, np.clip((xy - xz * yz) / np.sqrt(np.maximum(left, 1e-12)), -1, 1), np.nan)


def interval_of(draws: Floats, n: int | None = None, level: float = 0.95) -> Estimate:
    """The sample's value, first of the draws, with the percentile interval of the resamples that follow.

    Percentiles alone are too narrow for few observations, as the normal distribution is in place of Student's. With
    ``n`` independent observations they are moved outwards by as much (the expanded percentiles of Hesterberg 2015).
    No interval where more than a tenth of the resamples give no value: those that do would not be a fair sample.
    """
    value, known = float(draws[0]), draws[1:][~np.isnan(draws[1:])]
    if np.isnan(value) or len(known) < 0.9 * (len(draws) - 1) or not len(known) or n == 1:
        return Estimate(value, float("nan"), float("nan"))
    tail = (1 - level) / 2
    if n is not None:
        tail = float(stats.norm.cdf((n / (n - 1)) ** 0.5 * stats.t.ppf(tail, n - 1)))
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(value, min(float(low), value), max(float(high), value))
