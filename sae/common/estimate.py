"""A measured value with its confidence interval: the form of every fraction, mean and score."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A measured value with its interval (95 % by default); NaN if nothing was measured or there is too little data."""

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
FEW = 30  # fewer cases for or against get Wilson's interval: bootstrap percentiles would be too narrow


def proportion(successes: float, n: float, level: float = 0.95) -> Estimate:
    """Return a fraction with its Wilson score interval (Wilson 1927); NaN if ``n`` is 0."""
    if n <= 0:
        return UNKNOWN
    z = normal_quantile(level)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # min and max: rounding may put a bound slightly inside an observed 0 or 1.
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def fraction(value: float, variance: float, n: float, level: float = 0.95) -> Estimate:
    """Return a mean of ``n`` fractions, with Wilson's interval at its effective number (Korn and Graubard 1998)."""
    if math.isnan(value):
        return UNKNOWN
    effective = effective_number(value, variance, n)
    return proportion(value * effective, effective, level)


def effective_number(value: float, variance: float, n: float) -> float:
    """Return the number of yes-or-no cases with this mean and variance of the mean; ``n`` if there is no variance."""
    return value * (1 - value) / variance if variance > 0 and 0 < value < 1 else n


@functools.cache
def normal_quantile(level: float) -> float:
    """Return the half-width of a two-sided normal interval in standard deviations: 1.96 for level 0.95."""
    return NormalDist().inv_cdf((1 + level) / 2)
