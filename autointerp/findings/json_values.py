"""Values as the findings hold them, which are JSON: no NaN, no numpy, and an interval beside its figure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from autointerp.findings.statistics.correlation import quartiles
from autointerp.findings.statistics.estimation import Estimator
from sae.common.estimate import Estimate


def number(value: Any) -> float | None:
    """A float for JSON; ``None`` for what is missing, infinite or not a number."""
    if value is None or pd.isna(value):
        return None
    return float(value) if math.isfinite(value) else None


def mean_of(estimate: Estimate) -> dict[str, Any]:
    as_dict = estimate.as_dict()
    return {"mean": as_dict["value"], "interval": as_dict["interval"]}


def quartiles_of(values: pd.Series) -> list[float | None]:
    return [number(q) for q in quartiles(values)]


def quartile_figures(of: Estimator, values: pd.Series, error: pd.Series | None = None) -> dict[str, Any]:
    found = [quartile.as_dict() for quartile in of.quartiles(values, error)]
    return {"quartiles": [q["value"] for q in found], "quartile_intervals": [q["interval"] for q in found]}


def histogram(values: pd.Series | np.ndarray, edges: np.ndarray, of: Estimator | None = None) -> dict[str, Any]:
    """Counts between ``edges``; what lies outside is counted in the first or last bin.

    Of a sample also ``estimated``: how many of all eligible latents are in each bin.
    """
    inside = np.clip(np.asarray(values, dtype=float), edges[0], edges[-1])
    known = np.isfinite(inside)
    counts, _ = np.histogram(inside[known], bins=edges)
    found = {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()}
    if of is not None and of.sample is not None and isinstance(values, pd.Series):
        estimated, _ = np.histogram(inside[known], bins=edges, weights=of.weights(values)[known])
        found["estimated"] = [round(float(n), 3) for n in estimated]
    return found
