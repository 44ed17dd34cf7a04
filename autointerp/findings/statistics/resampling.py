"""Compute rank correlations, means and quantiles over bootstrap resamples.

A resample is a weight for each value: how often it is drawn. A rank correlation under weights is that of the sample
with each value repeated that often, so nothing is copied or sorted again. Whole groups of values are drawn together: a
latent and its partners in other seeds are one observation, and intervals would otherwise be too narrow.

In a stratified sample, values have weights of their own (:mod:`autointerp.contexts.sampling`), which a resample
multiplies. Units are then drawn within strata, n - 1 of n, and the factors are shrunk towards 1 for the finite
population (the rescaling bootstrap of Rao and Wu 1988, in the weights as in Rao, Wu and Yue 1992):

    factor = 1 - c + c n / (n - 1) times held,    c = sqrt(1 - known)

``known`` is the fraction of the sampling variance that vanishes: the stratum's sampling fraction if values are known
without error; else see :mod:`autointerp.findings.statistics.estimation`.

R resamples, N values. Row 0 of every result is the sample itself. Internally, weights are [n, r]: sums over the n
values run along whole rows, in pieces small enough for the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from autointerp.findings.statistics.correlation import sorted_quantiles
from sae.common.estimate import Estimate

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RESAMPLES = 1000
_CELLS = 1_000_000  # of a resample × value matrix in memory at a time
_NEAR = 1 << 16  # of them processed at a time if a piece is read many times


class Resamples:
    """How often each resample holds each value; the same units and seed give the same resamples.

    Args:
        units: [N] the group of each value, of any comparable type.
        weights: [N] the number of values of the population that each represents; only ratios matter.
        strata: [N] numbers; a unit is in the stratum of its first value. A stratum with one unit joins the next.
        known: [N] the fraction of each stratum's sampling variance that vanishes.
    """

    def __init__(
        self,
        units: ArrayLike,
        resamples: int | None = None,
        seed: int = 0,
        *,
        weights: ArrayLike | None = None,
        strata: ArrayLike | None = None,
        known: ArrayLike | None = None,
    ) -> None:
        resamples = RESAMPLES if resamples is None else resamples
        _, first, self.unit = np.unique(np.asarray(units), return_index=True, return_inverse=True)
        self.n_units = int(self.unit.max(initial=-1)) + 1
        self.own = None if weights is None else np.asarray(weights, dtype=np.float64)
        self._times, self._plus = np.ones(self.n_units), np.zeros(self.n_units)
        self.n_strata = 1
        if strata is None:
            self._held = _drawn(self.n_units, resamples, seed)
            return
        of = _without_single_units(np.asarray(strata)[first])
        c = np.sqrt(1 - (np.zeros(self.n_units) if known is None else np.clip(np.asarray(known, float)[first], 0, 1)))
        self.n_strata = int(of.max(initial=0)) + 1
        self._held = _drawn_within(of.tobytes(), resamples, seed)
        for stratum in range(self.n_strata):
            inside = np.flatnonzero(of == stratum)
            n = len(inside)
            if n > 1:
                self._times[inside], self._plus[inside] = c[inside] * n / (n - 1), 1 - c[inside]

    def __len__(self) -> int:
        return len(self._held)

    @property
    def n_free(self) -> int:
        """The number of units with the same degrees of freedom without strata."""
        return self.n_units - self.n_strata + 1

    def weights(self, kept: Bools | None = None) -> Iterator[Floats]:
        """Yield the weights of the values (``kept`` [N] of them) in pieces [r, n] of R + 1 rows together."""
        step = max(1, _CELLS // max(1, len(self.unit) if kept is None else int(kept.sum())))
        for start in range(0, len(self), step):
            yield self._piece(start, start + step, kept).T

    def _piece(self, start: int, stop: int, kept: Bools | None) -> Floats:
        """Return the weights [n, r] of the values ``kept`` in the resamples from ``start`` to ``stop``."""
        if self._whole is not None:
            chosen = self._whole[:, start:stop]
            return np.ascontiguousarray(chosen if kept is None else chosen[kept])
        return self._weights_of(start, stop, slice(None) if kept is None else kept)

    @functools.cached_property
    def _whole(self) -> Floats | None:
        """All weights [N, R + 1]; ``None`` if they are too many for memory."""
        return self._weights_of(0, len(self), slice(None)) if len(self) * len(self.unit) <= _CELLS else None

    def _weights_of(self, start: int, stop: int, chosen: slice | Bools) -> Floats:
        factors = self._held[start:stop].astype(np.float64) * self._times + self._plus
        if start == 0:
            factors[0] = 1.0  # the sample itself
        found = np.take(factors.T, self.unit[chosen], axis=0)
        return found if self.own is None else found * self.own[chosen][:, None]

    def quantiles(self, values: ArrayLike, at: ArrayLike, kept: Bools | None = None) -> Floats:
        """Return the quantiles ``at`` [Q] of the values [N], [R + 1, Q]; see ``correlation.quantiles``."""
        x = np.asarray(values, dtype=np.float64)
        x = x if kept is None else x[kept]
        order, at = np.argsort(x, kind="stable"), np.asarray(at, dtype=np.float64)
        if not len(x):
            return np.full((len(self), len(at)), np.nan)
        return np.concatenate([sorted_quantiles(x[order], w[:, order], at) for w in self.weights(kept)])

    def count(self, kept: Bools) -> int:
        """Return the number of units of the values ``kept`` [N]."""
        return len(np.unique(self.unit[kept]))

    def means(self, values: ArrayLike, kept: Bools | None = None) -> Floats:
        """Return the mean [R + 1] of the values [N] that are ``kept``; NaN if a resample holds none of them."""
        x = np.asarray(values, dtype=np.float64)
        x = x if kept is None else x[kept]
        with np.errstate(invalid="ignore"):
            return np.concatenate([(w @ x) / w.sum(1) for w in self.weights(kept)])

    def correlations(self, columns: Sequence[ArrayLike], kept: Bools | None = None) -> Floats:
        """Return Spearman's correlations [R + 1, C, C] of C columns [N]; NaN if one is constant in a resample."""
        table = [np.asarray(c, dtype=np.float64) if kept is None else np.asarray(c, float)[kept] for c in columns]
        orders = [_Order.of(column) for column in table]
        # At least two resamples at a time: NumPy sums a single row in another order.
        n_pieces = max(1, min(len(self) * len(orders[0].order) // _NEAR, len(self) // 2))
        ends = np.linspace(0, len(self), n_pieces + 1).astype(int)
        return np.concatenate([_correlate(orders, self._piece(i, j, kept)) for i, j in pairwise(ends)])


@functools.lru_cache(maxsize=8)
def _drawn(n_units: int, resamples: int, seed: int) -> NDArray[np.uint8]:
    """Return how often each resample holds each unit, [R + 1, n_units]; cached, because a report asks many times."""
    rng = np.random.default_rng(seed)
    held = np.ones((resamples + 1, n_units), dtype=np.uint8)
    for row in held[1:]:
        row[:] = np.bincount(rng.integers(n_units, size=n_units), minlength=n_units)
    held.setflags(write=False)
    return held


@functools.lru_cache(maxsize=8)
def _drawn_within(strata: bytes, resamples: int, seed: int) -> NDArray[np.uint8]:
    """Return the same drawn within strata, n - 1 of n; ``strata`` are the bytes of the ``intp`` array of strata."""
    of = np.frombuffer(strata, np.intp)
    rng = np.random.default_rng(seed)
    held = np.ones((resamples + 1, len(of)), dtype=np.uint8)
    for stratum in range(int(of.max(initial=0)) + 1):
        inside = np.flatnonzero(of == stratum)
        n = len(inside)
        if n > 1:
            held[1:, inside] = rng.multinomial(n - 1, np.full(n, 1 / n), size=resamples)
    held.setflags(write=False)
    return held


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
        """Return the mean rank [n, r] of each value in the sample that repeats it ``weights`` [n, r] times."""
        upto = np.cumsum(weights[self.order], axis=0)[self.ends]
        mean = np.zeros_like(upto)
        mean[1:] = upto[:-1]
        mean += upto
        mean += 1
        mean /= 2
        return mean[self.group]


def _correlate(orders: Sequence[_Order], weights: Floats) -> Floats:
    """Return the correlations [r, C, C] of C columns under ``weights`` [n, r]."""
    total = weights.sum(0)
    centred, weighted, spread = [], [], []
    found = np.ones((weights.shape[1], len(orders), len(orders)))
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold none of the values
        for i, order in enumerate(orders):
            ranks = order.ranks(weights)
            product = weights * ranks
            centre = product.sum(0) / total
            product *= ranks
            of_all = product.sum(0)
            ranks -= centre
            np.multiply(weights, ranks, out=product)
            left = (product * ranks).sum(0)
            centred.append(ranks)
            weighted.append(product)
            # Fractional weights leave a rounding error in the spread of a constant.
            spread.append(np.sqrt(np.where(left > 1e-18 * of_all, left, np.nan)))
            found[:, i, i] = np.clip(left / (spread[i] * spread[i]), -1, 1)
        for i in range(len(orders)):
            for j in range(i + 1, len(orders)):
                r = (weighted[i] * centred[j]).sum(0) / (spread[i] * spread[j])
                found[:, i, j] = found[:, j, i] = np.clip(r, -1, 1)
    return found


def _without_single_units(strata: NDArray) -> NDArray[np.intp]:
    """Number the strata from 0, joining those with one member to the next."""
    names, of, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    joined, number, waiting = np.zeros(len(names), np.intp), 0, 0
    for i, size in enumerate(sizes):
        joined[i] = number
        waiting += size
        if waiting > 1:
            number, waiting = number + 1, 0
    if waiting and number:
        joined[joined == number] = number - 1
    return joined[of.reshape(-1)]


def partial(xy: Floats, xz: Floats, yz: Floats) -> Floats:
    """Return the correlation of x and y with z held fixed, from the plain ones; NaN if z explains x or y fully."""
    with np.errstate(invalid="ignore", divide="ignore"):
        left = (1 - xz**2) * (1 - yz**2)
        return np.where(left > 1e-12, np.clip((xy - xz * yz) / np.sqrt(np.maximum(left, 1e-12)), -1, 1), np.nan)


def interval_of(draws: Floats, n: int | None = None, level: float = 0.95) -> Estimate:
    """Return the sample's value, first of the draws, with the percentile interval of the resamples that follow.

    Percentiles are too narrow for few observations, like a normal interval in place of Student's. With ``n``
    independent observations they are expanded accordingly (Hesterberg 2015). No interval if more than a tenth of the
    resamples give no value.
    """
    value, known = float(draws[0]), draws[1:][~np.isnan(draws[1:])]
    if np.isnan(value) or len(known) < 0.9 * (len(draws) - 1) or not len(known) or n == 1:
        return Estimate(value, float("nan"), float("nan"))
    tail = (1 - level) / 2
    if n is not None:
        tail = float(special.ndtr((n / (n - 1)) ** 0.5 * special.stdtrit(n - 1, tail)))
    low, high = np.quantile(known, [tail, 1 - tail])
    return Estimate(value, min(float(low), value), max(float(high), value))
