"""A number and how sure of it one may be: the form in which every measured fraction, mean and score is handed on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A measured value with its 95 % interval (unless the maker was asked for another level).

    All three are NaN where nothing could be measured; ``low`` and ``high`` alone are NaN where there is a value but
    too little data to say how sure it is.
    """

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """``{"value": …, "interval": [low, high]}`` for JSON; NaN, which JSON does not have, becomes ``None``."""
        value, low, high = (None if math.isnan(x) else x for x in self)
        return {"value": value, "interval": None if low is None or high is None else [low, high]}


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def proportion(successes: float, n: float, level: float = 0.95) -> Estimate:
    """A fraction with its Wilson score interval (Wilson 1927); NaN when ``n`` is 0."""
    if n <= 0:
        return UNKNOWN
    from scipy import special  # here, since what only shows an estimate does without

    z = float(special.ndtri((1 + level) / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding may leave the bound a hair inside an observed 0 or 1.
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))
