"""The keys of ``report --json``, the fields in ``autointerp/findings/shape.py``: others rely on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from small_study import findings

from autointerp.findings.json_values import to_json
from autointerp.findings.shape import Histogram, Mean
from sae.common.estimate import UNKNOWN, Estimate

KEYS = Path(__file__).with_name("report_keys.txt")


def shape_of(value: Any, path: str = "") -> set[str]:
    """Return every path with the kind of its value; list items share a path."""
    if isinstance(value, dict):
        return {line for key, held in value.items() for line in shape_of(held, f"{path}/{key}")} or {f"{path} {{}}"}
    if isinstance(value, list):
        return {line for held in value for line in shape_of(held, f"{path}[]")} or {f"{path} []"}
    kind = "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    return {f"{path} {kind}"}


def test_keys_of_the_report_stay(tmp_path: Path) -> None:
    small_study.whole(tmp_path, m=60, n_scored=20, nulls=True)
    found = findings(tmp_path, ["run_a", "run_b", "run_c"], contexts=small_study.contexts)
    assert sorted(shape_of(found)) == KEYS.read_text().splitlines()


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
