"""One row of the findings table: a finding of the paper, measured here, and the verdict that its interval allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from autointerp.findings.shape import Finding, Unit, Verdict
from sae.common.estimate import UNKNOWN, Estimate

AGREES: Verdict = "agrees in direction"
DISAGREES: Verdict = "disagrees"
UNDECIDED: Verdict = "cannot tell"

NUMBER: Unit = "number"
SIGNED: Unit = "signed"


@dataclass(frozen=True)
class About:
    """The parts of a finding that do not depend on the data; makes its rows."""

    id: str
    finding: str
    reference: str
    measure: str
    unit: Unit = NUMBER

    def row(self, found: Estimate, verdict: Verdict, why: str) -> Finding:
        return Finding(self.id, self.finding, *found, self.reference, verdict, why, self.measure, self.unit)

    def missing(self, why: str, command: str | None) -> Finding:
        """Return the row of a finding that was not measured; ``command`` would provide its data."""
        return replace(self.row(UNKNOWN, UNDECIDED, why), command=command)


def against(estimate: Estimate, level: float = 0.0, direction: int = 1) -> Verdict:
    """Return the verdict on the claim that the value is above ``level`` (``direction`` 1) or below it (-1).

    Agrees if the whole interval is on the claimed side, disagrees if it is wholly on the other, and cannot tell if it
    contains the level or there is no interval.
    """
    if any(math.isnan(x) for x in (*estimate, level)) or estimate.low <= level <= estimate.high:
        return UNDECIDED
    return AGREES if (estimate.low > level) == (direction > 0) else DISAGREES


def every(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on a claim of several parts: theirs if they are all equal, else cannot tell."""
    return verdicts[0] if verdicts and len(set(verdicts)) == 1 else UNDECIDED


def estimate_of(value: float | None, interval: Any) -> Estimate:
    """Return the :class:`Estimate` with this JSON form."""
    if value is None:
        return UNKNOWN
    low, high = interval or (math.nan, math.nan)
    return Estimate(value, math.nan if low is None else low, math.nan if high is None else high)
