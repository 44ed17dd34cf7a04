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

_Z_95 = 1.959963984540054
"""the normal distribution's 97.5th percentile"""


def rule_of_none(n: int) -> float:
    """The largest fraction, at 95 %, of what none of ``n`` independent cases showed (Wilson 1927 at a count of 0).

    Resampling cases none of which shows it never shows it either: a bootstrap would be sure of 0.
    """
    return _Z_95**2 / (n + _Z_95**2)
