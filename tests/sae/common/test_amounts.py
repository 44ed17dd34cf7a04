"""How numbers are written: an interval says that it is not empty, however small its bounds."""

from __future__ import annotations

import pytest

from autointerp.report.numbers import percent, percent_interval
from sae.common.amounts import interval
from sae.common.estimate import proportion


@pytest.mark.parametrize(
    ("bounds", "of_percent", "of_decimal"),
    [
        ((0.0, 0.0), "[0.0, 0.0]", "[.000, .000]"),
        ((0.0, 0.002), "[0.0, 0.2]", "[.000, .002]"),
        ((0.00003, 0.0004), "[0.00, 0.04]", "[.0000, .0004]"),
        ((0.0, 0.00000291), "[0.0000, 0.0003]", "[.000000, .000003]"),
        ((1.0, 1.0), "[100.0, 100.0]", "[1.000, 1.000]"),
        ((0.9996, 1.0), "[99.96, 100.00]", "[.9996, 1.0000]"),
        ((0.4, 0.4), "[40.0, 40.0]", "[.400, .400]"),
        ((0.25, 0.29), "[25.0, 29.0]", "[.250, .290]"),
    ],
)
def test_an_interval_has_the_digits_that_it_needs(
    bounds: tuple[float, float], of_percent: str, of_decimal: str
) -> None:
    assert percent_interval(bounds) == of_percent
    assert interval(bounds) == of_decimal


@pytest.mark.parametrize("n", [10, 2048, 6144, 131_072, 1_000_000])
@pytest.mark.parametrize("cases", [0, 1, 5])
def test_no_upper_bound_is_written_as_zero(n: int, cases: int) -> None:
    for found in (proportion(cases, n), proportion(n - cases, n)):
        low, high = percent_interval(found[1:]).strip("[]").split(", ")
        assert float(high) > 0
        assert float(low) < 100


def test_a_percentage_is_zero_only_of_nothing() -> None:
    assert [percent(x) for x in (0.0, 1 / 6144, 0.264, 1 - 1 / 6144, 1.0, None)] == [
        *("0.0 %", "0.02 %", "26.4 %", "99.98 %", "100.0 %", "–"),
    ]


def test_differences_keep_their_sign() -> None:
    assert interval((-0.0001, 0.0002), sign=True) == "[−.0001, +.0002]"
