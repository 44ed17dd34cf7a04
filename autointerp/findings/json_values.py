"""Convert findings to JSON values: no NaN, no NumPy, dataclasses as objects, estimates as value and interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd

from autointerp.findings.statistics.estimation import Estimator
from sae.common.estimate import Estimate


def to_json(value: Any) -> Any:
    """Return ``value`` as JSON has it; missing, infinite and undefined numbers become ``None``."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or value is pd.NA or isinstance(value, str | int):
        return None if value is pd.NA else value
    if isinstance(value, Estimate):
        return to_json({"value": value.value, "interval": value.interval})
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(held) for key, held in value.items()}
    return [to_json(held) for held in value]


def number(value: Any) -> float | None:
    """Return ``value`` as a float; ``None`` if it is missing, infinite or not a number."""
    if value is None or pd.isna(value):
        return None
    return float(value) if math.isfinite(value) else None


def mean_of(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.value, "interval": estimate.interval}


def histogram(values: pd.Series | np.ndarray, edges: np.ndarray, of: Estimator | None = None) -> dict[str, Any]:
    """Count values between ``edges``; values outside are counted in the first or last bin.

    With a sample, ``estimated`` is the number of eligible latents in each bin.
    """
    inside = np.clip(np.asarray(values, dtype=float), edges[0], edges[-1])
    known = np.isfinite(inside)
    counts, _ = np.histogram(inside[known], bins=edges)
    found = {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()}
    if of is not None and of.sample is not None and isinstance(values, pd.Series):
        estimated, _ = np.histogram(inside[known], bins=edges, weights=of.weights(values)[known])
        found["estimated"] = [round(float(n), 3) for n in estimated]
    return found
