"""Resampled rank correlations against the plain ones of the resample written out, and intervals against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from autointerp.findings.statistics.correlation import partial_spearman
from autointerp.findings.statistics.resampling import Resamples, interval_of, partial


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@given(st.data(), st.integers(3, 40))
def test_a_weighted_correlation_equals_the_expanded_sample(data: st.DataObject, n: int) -> None:
    few = st.lists(st.integers(0, 6), min_size=n, max_size=n)  # with ties
    x, y, units = (np.array(data.draw(few), dtype=float) for _ in range(3))
    resamples = Resamples(units, resamples=20, seed=1)
    found = resamples.correlations([x, y])
    means = resamples.means(x)
    for weights, r, mean in zip(np.concatenate(list(resamples.weights())), found, means, strict=True):
        held = np.repeat(np.arange(n), weights.astype(int))
        assert set(weights[units == units[0]]) == {weights[0]}  # whole groups
        assert mean == pytest.approx(x[held].mean())
        expected = stats.spearmanr(x[held], y[held]).statistic
        assert r[0, 1] == pytest.approx(expected, nan_ok=True, abs=1e-9)
        assert r[0, 1] == pytest.approx(r[1, 0], nan_ok=True)


@pytest.mark.parametrize("weights", [None, np.linspace(0.5, 3, 50)], ids=["plain", "weighted"])
def test_pieces_change_no_bit(weights: np.ndarray | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 50))

    def found() -> np.ndarray:
        return Resamples(np.arange(50), weights=weights).correlations([x, y], x > -1)

    whole = found()
    monkeypatch.setattr("autointerp.findings.statistics.resampling._CELLS", 120)  # weights are not kept
    assert np.array_equal(whole, found())
    monkeypatch.setattr("autointerp.findings.statistics.resampling._NEAR", 1 << 30)  # and worked on in one piece
    assert np.array_equal(whole, found())


def test_partial_is_that_of_the_regressed_ranks() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=80)
    x, y = z + rng.normal(size=80), z + rng.normal(size=80)
    r = Resamples(np.arange(80), resamples=3).correlations([x, y, z])
    assert partial(r[:, 0, 1], r[:, 0, 2], r[:, 1, 2])[0] == pytest.approx(partial_spearman(x, y, z).value)
    assert np.isnan(partial(np.array([0.5]), np.array([1.0]), np.array([0.5])))[0]


def test_no_interval_when_most_resamples_have_no_value() -> None:
    draws = np.array([0.3, *[0.2] * 80, *[np.nan] * 20])
    assert np.isnan(interval_of(draws).low)
    assert interval_of(draws).value == 0.3
    assert interval_of(np.array([0.3, *[0.2] * 95, *[np.nan] * 5])).low == pytest.approx(0.2)


def test_the_interval_of_few_values_matches_students() -> None:
    rng = np.random.default_rng(0)
    draws = np.array([0.0, *rng.normal(size=200_000)])
    assert interval_of(draws).high == pytest.approx(1.96, abs=0.02)
    assert interval_of(draws, 10).high == pytest.approx(stats.t.ppf(0.975, 9) * np.sqrt(10 / 9), abs=0.05)
    assert np.isnan(interval_of(draws, 1).low)


@pytest.mark.parametrize("size", [1, 3])
def test_intervals_cover_when_groups_are_drawn_together(size: int) -> None:
    """Members of a group are alike: drawn one by one, as if they were independent, the interval is too narrow."""
    rng = np.random.default_rng(5)
    truth, n_units, rounds = 0.4, 60, 300
    covered, covered_alone = 0, 0
    population = 6 / np.pi * np.arcsin(truth / 2)
    for _ in range(rounds):
        units = np.repeat(np.arange(n_units), size)
        x, y = rng.multivariate_normal([0, 0], [[1, truth], [truth, 1]], size=n_units).T
        # Copies with a little of their own, at the same marginal distribution.
        own = rng.multivariate_normal([0, 0], [[1, truth], [truth, 1]], size=n_units * size).T
        a, b = (np.sqrt(0.9) * v[units] + np.sqrt(0.1) * o for v, o in zip((x, y), own, strict=True))
        together = interval_of(Resamples(units, 300).correlations([a, b])[:, 0, 1])
        alone = interval_of(Resamples(np.arange(len(a)), 300).correlations([a, b])[:, 0, 1])
        covered += together.low <= population <= together.high
        covered_alone += alone.low <= population <= alone.high
    assert covered / rounds > 0.9
    if size > 1:
        assert covered_alone / rounds < 0.85
