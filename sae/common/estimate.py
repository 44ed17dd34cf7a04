"""A number and how sure of it one may be: the form in which every measured fraction, mean and score is handed on."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A measured value with its 95 % interval (unless the maker was asked for another level).

    All three are NaN where nothing could be measured; ``low`` and ``high`` alone are NaN where there is a value but
    too little data to say how sure it is.
    """

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float] | None:
        """``[low, high]``; ``None`` if either is NaN."""
        return None if math.isnan(self.low) or math.isnan(self.high) else [self.low, self.high]

    def as_dict(self) -> dict[str, Any]:
        """Return ``{"value": …, "interval": [low, high]}`` for JSON, with ``None`` in place of NaN."""
        return {"value": None if math.isnan(self.value) else self.value, "interval": self.interval}


UNKNOWN = Estimate(math.nan, math.nan, math.nan)
FEW = 30
"""A fraction of fewer cases, or with fewer against it, has Wilson's interval and not that of resampling.

The percentiles of resamples are too narrow there: of one case in 6,144 a third of the resamples hold none at all."""


def proportion(successes: float, n: float, level: float = 0.95) -> Estimate:
    """A fraction with its Wilson score interval (Wilson 1927); NaN when ``n`` is 0."""
    if n <= 0:
        return UNKNOWN
    z = normal_quantile(level)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding may leave the bound a hair inside an observed 0 or 1.
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def fraction(value: float, variance: float, n: float, level: float = 0.95) -> Estimate:
    """A mean of fractions with Wilson's interval at its effective number of cases.

    That is the number of yes-or-no cases whose mean would vary as much (Korn and Graubard 1998, for surveys), or ``n``
    where the value does not vary at all.

    Args:
        value: the mean, from 0 to 1.
        variance: of the mean.
        n: how many observations the mean is of.
    """
    if math.isnan(value):
        return UNKNOWN
    effective = effective_number(value, variance, n)
    return proportion(value * effective, effective, level)


def effective_number(value: float, variance: float, n: float) -> float:
    """The number of yes-or-no cases whose mean is ``value`` and has the variance; ``n`` where there is none."""
    return value * (1 - value) / variance if variance > 0 and 0 < value < 1 else n


@functools.cache
def normal_quantile(level: float) -> float:
    """Return how many standard deviations a two-sided interval of ``level`` reaches: 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + level) / 2)
