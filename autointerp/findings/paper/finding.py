"""One row of the findings table: what the paper found, measured here, and what the interval allows one to say of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sae.common.estimate import UNKNOWN, Estimate

Verdict = Literal["agrees in direction", "disagrees", "cannot tell"]
AGREES: Verdict = "agrees in direction"
DISAGREES: Verdict = "disagrees"
UNDECIDED: Verdict = "cannot tell"

Unit = Literal["number", "signed"]
NUMBER: Unit = "number"
SIGNED: Unit = "signed"


@dataclass(frozen=True)
class Finding:
    """A row. As JSON (:meth:`as_dict`) what is not known is ``None``."""

    id: str
    finding: str
    """what the paper found, in one line"""
    value: float
    low: float
    high: float
    """the value that decides, and its 95 % interval; NaN where it could not be measured"""
    reference: str
    """the paper's own figures, in words"""
    verdict: Verdict
    why: str
    """by what the verdict was reached, or what is missing"""
    measure: str
    """what ``value`` is, in words"""
    unit: Unit = NUMBER
    command: str | None = None
    """where data are missing, what would provide them"""

    def as_dict(self) -> dict[str, Any]:
        """``{id, finding, value, low, high, reference, verdict, why, measure, unit, command}``."""
        row = asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


@dataclass(frozen=True)
class About:
    """What is the same of a finding however it comes out; makes its rows."""

    id: str
    finding: str
    reference: str
    measure: str
    unit: Unit = NUMBER

    def row(self, found: Estimate, verdict: Verdict, why: str) -> Finding:
        return Finding(self.id, self.finding, *found, self.reference, verdict, why, self.measure, self.unit)

    def missing(self, why: str, command: str | None) -> Finding:
        """Nothing was measured; ``command`` would provide it."""
        return replace(self.row(UNKNOWN, UNDECIDED, why), command=command)


def against(estimate: Estimate, level: float = 0.0, direction: int = 1) -> Verdict:
    """What an interval says of a claim that the value lies above ``level`` (``direction`` 1) or below it (-1).

    It agrees where the whole interval lies on the claimed side, disagrees where it lies wholly on the other, and
    cannot tell where it holds the level, or where there is no interval.
    """
    value, low, high = estimate
    if any(math.isnan(x) for x in (value, low, high, level)):
        return UNDECIDED
    if low > level:
        return AGREES if direction > 0 else DISAGREES
    if high < level:
        return DISAGREES if direction > 0 else AGREES
    return UNDECIDED


def every(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim of several parts: it agrees where all do, disagrees where all do, and otherwise cannot tell."""
    return verdicts[0] if verdicts and len(set(verdicts)) == 1 else UNDECIDED


def estimate_of(value: float | None, interval: Any) -> Estimate:
    """An :class:`Estimate` out of its JSON form."""
    if value is None:
        return UNKNOWN
    low, high = interval or (math.nan, math.nan)
    return Estimate(value, math.nan if low is None else low, math.nan if high is None else high)
