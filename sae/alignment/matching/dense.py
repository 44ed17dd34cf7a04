"""Match small dictionaries with all cosines in memory, by SciPy; also the types that every matching has.

Shapes: n rows, m ≥ n columns, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

BLOCK = 256  # rows at a time: a block of a 32k-wide matrix is 64 MB
_MAX_PASSES = 50  # over the matrix while prices are sought; real pairs need about ten
EQUAL = 1e-12  # cosines that differ by less count as equal: the nearest must not depend on rounding
_TOLERANCE = 1e-12  # prices rise by more than this or not at all: below it lies rounding


@dataclass(frozen=True)
class Nearest:
    """The nearest latent of the other dictionary, matched or not; the lowest number among equals."""

    who: NDArray[np.int32]
    cosine: Array


@dataclass(frozen=True)
class Matching:
    """The matching, the prices that prove it, and the nearest of all rows and columns."""

    partner: NDArray[np.int32]  # [n]: the column of each row
    cosine: Array  # [n]
    u: Array  # [n]: the gain of each row after paying for its column
    v: Array  # [m]: prices, zero or more, zero for columns left over
    sum: float
    upper_bound: float  # no matching sums to more
    nearest: tuple[Nearest, Nearest]  # of each row [n], of each column [m]
    rounds: int = 1  # how often prices were checked for violations
    share_of_pairs: float = 1.0  # number of products formed, in multiples of n × m
    candidates: int = 0  # pairs that the exact matching chose from; 0 for all pairs

    @property
    def gap(self) -> float:
        """How far the sum can be below the best."""
        return self.upper_bound - self.sum


def match_all_pairs(cosines: Array) -> Matching:
    """Match every row of [n, m] cosines, n ≤ m, by the largest sum."""
    n = len(cosines)
    partner = match(cosines)
    v = compute_prices(cosines, partner)
    u = np.concatenate([(cosines[block] - v).max(axis=1) for block in blocks(n)])
    own = cosines[np.arange(n), partner]
    nearest = _nearest(cosines, 1), _nearest(cosines, 0)
    return Matching(partner.astype(np.int32), own, u, v, float(own.sum()), float(u.sum() + v.sum()), nearest)


def _nearest(cosines: Array, axis: int) -> Nearest:
    best = cosines.max(axis=axis, keepdims=True)
    # Equal rows are rounded differently at the edge of a product's block.
    return Nearest((cosines >= best - EQUAL).argmax(axis=axis).astype(np.int32), best.squeeze(axis))


def match(cosines: Array) -> NDArray[np.int64]:
    """Return the column of each row in the assignment with the largest sum; [n, m], n ≤ m, is unchanged on return."""
    from scipy.optimize import linear_sum_assignment  # readers of alignments do without SciPy

    # Negated in place and back, since SciPy copies the matrix to maximise.
    np.negative(cosines, out=cosines)
    try:
        return np.asarray(linear_sum_assignment(cosines)[1], dtype=np.int64)
    finally:
        np.negative(cosines, out=cosines)


def compute_prices(cosines: Array, partner: NDArray[np.int64], max_passes: float = _MAX_PASSES) -> Array:
    """Return column prices [m], zero or more, under which every row of [n, m] prefers its own partner.

    Row i prefers its partner p when v[j] ≥ v[p] + c[i, j] - c[i, p] for all j: the prices are the longest paths in the
    graph with these weights, found by relaxation from zero. Only rows whose partner's price rose are visited again
    (4,096 × 4,096: the work of 9 passes). If the matching is not optimal, prices rise without end; so the work is
    bounded by ``max_passes``. The prices reached are still valid bounds; all zeros are returned if those bound better.
    """
    n, m = cosines.shape
    prices = np.zeros(m)
    own = cosines[np.arange(n), partner]
    seen = np.full(n, -np.inf)
    budget = max_passes * n
    while budget > 0:
        stirred = np.flatnonzero(prices[partner] > seen + _TOLERANCE)
        if not len(stirred):
            return prices
        for start in range(0, len(stirred), BLOCK):
            rows = stirred[start : start + BLOCK]
            seen[rows] = prices[partner[rows]]
            offers = cosines[rows] + (seen[rows] - own[rows])[:, None]
            np.maximum(prices, offers.max(axis=0), out=prices)
        budget -= len(stirred)
    return min(prices, np.zeros(m), key=lambda v: upper_bound(cosines, v))


def upper_bound(cosines: Array, prices: Array) -> float:
    """Return a bound on every matching of [n, m] cosines, n ≤ m, from prices [m]; if m > n, negative ones count 0."""
    n, m = cosines.shape
    v = prices if n == m else np.maximum(prices, 0)
    return float(v.sum() + sum((cosines[block] - v).max(axis=1).sum() for block in blocks(n)))


def normalize_rows(weights: ArrayLike) -> Array:
    """Return [M, D] rows at unit length, in float64; rows of zeros stay zero."""
    rows = np.array(weights, dtype=np.float64)
    # Scaled first, so that very small and very large rows have a norm.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    np.divide(rows, largest, out=rows, where=largest > 0)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, length, out=rows, where=length > 0)
    return rows


def blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, BLOCK):
        yield slice(start, start + BLOCK)
