"""Whether values have one mode or more: Hartigan's dip.

The *dip* of a sample is the least distance, as the largest difference of distribution functions, from its empirical
distribution to any with a single mode (Hartigan & Hartigan, Annals of Statistics 13, 1985). It makes no assumption on
the modes' shapes or number. Two equal spikes have a dip of 1/4; a uniform's, the largest that a single mode gives rise
to, shrinks as 1/√n. Against that uniform the p-value is counted, so it errs on the side of one mode.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sae.estimate import UNKNOWN, Estimate

_compiled = numba.njit(cache=True, error_model="numpy")
_UNIFORMS = 2000  # made-up samples that the p-value counts among
_UNIFORM_SIZE = 1000  # of each: from here on √n · dip of a uniform hardly changes its distribution
_HALVES = 20, 200  # half samples, for the interval: at least and at most
_LOOKED_AT = 20_000_000  # values of all half samples: with more, a standard error to a sixth of itself must do
_FROM_HALVES = 1 / (2 ** (2 / 3) - 1)  # a bias, in units of how much larger it is for halves


class Dip(NamedTuple):
    value: Estimate
    """the dip of what the samples are drawn from, the mean over samples, with a 95 % interval"""
    of_sample: float
    """the samples' own, which chance makes larger"""
    p_value: float
    """that a sample with one mode has a dip as large; the largest of the samples' p-values"""


def dip(values: ArrayLike) -> float:
    """The dip of a sample [n] of any order, in units of probability: from 1/(2n) to 1/4. NaN for no values.

    Values that are the same number are tied, as the definition has it: a sample of one number has its dip 0, which is
    given as 1/(2n), the dip of n different ones.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if not len(x):
        return float("nan")
    if x[0] == x[-1]:
        return 0.5 / len(x)
    at, counts = np.unique(x, return_counts=True)
    reached = np.cumsum(counts) / len(x)
    return max(float(_dip(at, np.concatenate([[0.0], reached[:-1]]), reached)), 0.5 / len(x))


def dip_test(samples: Sequence[ArrayLike], seed: int = 0) -> Dip:
    """How far from one mode several samples are, and whether chance would do it: the mean of their dips.

    A sample's dip spreads about its expectation as those of random halves, drawn without replacement, do about the
    whole's (the delete-half jackknife; a bootstrap would repeat values, and repeated values are modes), and exceeds
    what it estimates by an amount that falls about as n^(-2/3): halves tell how much. ``value`` is corrected for that,
    ± 1.96 standard errors; of mixtures of two normals with dips of .03 and more, it covers the truth 90 to 95 % of the
    time, near .007 some 80 %. The p-value of a sample counts uniforms whose √n · dip is as large.
    """
    kept = [x for x in (np.asarray(sample, dtype=np.float64) for sample in samples) if len(x) >= 4]
    if not kept:
        return Dip(UNKNOWN, float("nan"), float("nan"))
    dips = np.array([dip(x) for x in kept])
    rng = np.random.default_rng(seed)
    n_halves = min(max(_HALVES[0], _LOOKED_AT // sum(map(len, kept))), _HALVES[1])
    halves = np.array([[dip(rng.choice(x, len(x) // 2, replace=False)) for x in kept] for _ in range(n_halves)])
    found, error = float(dips.mean()), float(halves.mean(axis=1).std(ddof=1))
    value = min(max(0.0, found - _FROM_HALVES * (float(halves.mean()) - found)), 0.25)
    p = max(_p_value(of, len(x)) for of, x in zip(dips, kept, strict=True))
    return Dip(Estimate(value, max(0.0, value - 1.96 * error), min(0.25, value + 1.96 * error)), found, p)


def _p_value(found: float, n: int) -> float:
    size = min(n, _UNIFORM_SIZE)
    null = _of_uniforms(size)
    larger = int((null * np.sqrt(size) >= found * np.sqrt(n)).sum())
    return (larger + 1) / (len(null) + 1)


@functools.lru_cache(maxsize=16)
def _of_uniforms(n: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    return np.array([dip(rng.random(n)) for _ in range(_UNIFORMS)])


@_compiled
def _dip(at: np.ndarray, below: np.ndarray, reached: np.ndarray) -> Any:
    """The dip of a distribution with a jump at each of ``at`` [n], from ``below`` to ``reached``.

    The best function with one mode is convex, then a straight line over an interval of modes, then concave. The
    interval is narrowed from both ends: within it, the greatest convex function below the distribution and the least
    concave one above it are apart by some distance at some place, and the next interval begins or ends there. What is
    then left outside fixes how far the convex and the concave part must be from the distribution.
    """
    n = len(at)
    low, high = 0, n - 1
    convex, concave = np.empty(n, np.int64), np.empty(n, np.int64)
    least = 0.0
    while low < high:  # a single place left is a mode whatever its jump
        size_g = _hull(at, below, low, high, convex, 1.0)
        size_l = _hull(at, reached, low, high, concave, -1.0)
        apart, new_low, new_high = 0.0, low, high
        # The distance is largest where one of the two bends.
        j = 0
        for i in range(size_g):
            x = convex[i]
            while j + 1 < size_l - 1 and concave[j + 1] <= x:
                j += 1
            distance = _line(at, reached, concave[j], concave[min(j + 1, size_l - 1)], x) - below[x]
            if distance > apart:
                apart, new_low = distance, x
                new_high = concave[j] if concave[j] >= x else concave[min(j + 1, size_l - 1)]
        j = 0
        for i in range(size_l):
            x = concave[i]
            while j + 1 < size_g - 1 and convex[j + 1] < x:
                j += 1
            distance = reached[x] - _line(at, below, convex[j], convex[min(j + 1, size_g - 1)], x)
            if distance > apart:
                apart, new_high = distance, x
                last = convex[min(j + 1, size_g - 1)]
                new_low = last if last <= x else convex[j]
        if apart <= least:
            return 0.5 * max(least, apart)
        for i in range(size_g - 1):
            for x in range(convex[i], min(convex[i + 1] - 1, new_low) + 1 if convex[i] < new_low else 0):
                least = max(least, reached[x] - _line(at, below, convex[i], convex[i + 1], x))
        for i in range(size_l - 1):
            for x in range(max(concave[i] + 1, new_high), concave[i + 1] + 1 if concave[i + 1] > new_high else 0):
                least = max(least, _line(at, reached, concave[i], concave[i + 1], x) - below[x])
        if new_low == low and new_high == high:
            return 0.5 * max(least, apart)
        low, high = new_low, new_high
    return 0.5 * least


@_compiled
def _line(at: np.ndarray, height: np.ndarray, left: int, right: int, x: int) -> Any:
    if left == right:
        return height[left]
    share = (at[x] - at[left]) / (at[right] - at[left])
    return height[left] + share * (height[right] - height[left])


@_compiled
def _hull(at: np.ndarray, height: np.ndarray, low: int, high: int, out: np.ndarray, sign: float) -> int:
    """Corners of the greatest convex function below the points (``sign`` 1), or the least concave above (-1)."""
    size = 0
    for x in range(low, high + 1):
        while size >= 2:
            a, b = out[size - 2], out[size - 1]
            turn = (at[b] - at[a]) * (height[x] - height[a]) - (height[b] - height[a]) * (at[x] - at[a])
            if sign * turn > 0:
                break
            size -= 1
        out[size] = x
        size += 1
    return size
