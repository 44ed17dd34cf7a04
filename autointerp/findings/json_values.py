"""Convert findings to JSON values: no NaN, no NumPy, dataclasses as objects, estimates as value and interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

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
        found = {}
        for field in fields(value):
            held, interval = getattr(value, field.name), field.metadata.get("interval")
            if held is not None or "optional" not in field.metadata:
                found[field.name] = to_json(_part(held, "value") if interval else held)
            if interval:
                found[interval] = to_json(_part(held, "interval"))
        return found
    if isinstance(value, Mapping):
        return {str(key): to_json(held) for key, held in value.items()}
    return [to_json(held) for held in value]


def _part(held: Any, name: Literal["value", "interval"]) -> Any:
    """Return the values or the intervals of one or several estimates."""
    if isinstance(held, Estimate):
        return getattr(held, name)
    return {k: _part(v, name) for k, v in held.items()} if isinstance(held, Mapping) else [_part(v, name) for v in held]


def number(value: Any) -> float | None:
    """Return ``value`` as a float; ``None`` if it is missing, infinite or not a number."""
    if value is None or pd.isna(value):
        return None
    return float(value) if math.isfinite(value) else None
