"""Findings become JSON under the names of their fields (``autointerp/findings/shape.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from autointerp.findings.json_values import to_json
from autointerp.findings.shape import Histogram, Mean
from sae.common.estimate import UNKNOWN, Estimate


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Estimate(0.5, 0.4, 0.6), {"value": 0.5, "interval": [0.4, 0.6]}),
        (UNKNOWN, {"value": None, "interval": None}),
        (Mean(Estimate(0.5, 0.4, 0.6)), {"mean": 0.5, "interval": [0.4, 0.6]}),
        (Histogram([0, 1], [3]), {"edges": [0, 1], "counts": [3]}),
        ({1: np.float64("nan"), "b": np.int64(3)}, {"1": None, "b": 3}),
        ([pd.NA, np.bool_(True), (1, "x")], [None, True, [1, "x"]]),
        (np.array([0.5, np.inf]), [0.5, None]),
    ],
)
def test_values_become_plain_json(value: Any, expected: Any) -> None:
    assert to_json(value) == expected
