"""Statistics against SciPy and plain counting, and their intervals against simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from autointerp.findings.statistics.correlation import (
    METHODS,
    bootstrap_mean,
    mean_fraction,
    partial_spearman,
    quantiles,
    spearman,
    stratified_spearman,
)
from autointerp.scoring.intervals import auroc, balanced_accuracy
from sae.common.estimate import Estimate, proportion

ANSWERS = st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.9, 1.0])), min_size=1)


def unknown(found: Estimate) -> bool:
    return all(math.isnan(x) for x in found)


@given(ANSWERS)
def test_auroc_counts_pairs(answers: list[tuple[bool, float]]) -> None:
    truth, p = (np.array(x) for x in zip(*answers, strict=True))
    found = auroc(truth, p)
    if truth.all() or not truth.any():
        assert unknown(found)
        return
    above, below = p[truth][:, None], p[~truth][None, :]
    assert found.value == pytest.approx(np.mean((above > below) + 0.5 * (above == below)))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_auroc_variance_is_delongs() -> None:
    """Against the definition: the variances of each class's placement values, by all pairs."""
    rng = np.random.default_rng(0)
    truth = np.arange(60) < 25
    p = np.round(rng.normal(truth * 1.0), 1)
    win = (p[truth][:, None] > p[~truth]) + 0.5 * (p[truth][:, None] == p[~truth])
    value = win.mean()
    variance = win.mean(axis=1).var(ddof=1) / 25 + win.mean(axis=0).var(ddof=1) / 35
    half = 1.959964 * math.sqrt(variance) / (value * (1 - value))
    logit = math.log(value / (1 - value))
    assert auroc(truth, p) == pytest.approx(
        (value, 1 / (1 + math.exp(half - logit)), 1 / (1 + math.exp(-half - logit)))
    )


def test_perfect_and_constant_answers_keep_an_interval() -> None:
    truth = np.arange(100) < 50
    for found in (auroc(truth, truth), balanced_accuracy(truth, truth)):
        assert found.value == found.high == 1
        assert 0.9 < found.low < 0.96
    for found in (auroc(truth, ~truth), balanced_accuracy(truth, ~truth)):
        assert found.value == found.low == 0
        assert 0.04 < found.high < 0.1
    flat = auroc(truth, np.zeros(100))
    assert flat.value == 0.5
    assert flat.low == pytest.approx(1 - flat.high)
    always = balanced_accuracy(truth, np.ones(100))
    assert always.low < always.value == 0.5 < always.high


@given(ANSWERS)
def test_balanced_accuracy_is_the_mean_of_the_rates(answers: list[tuple[bool, float]]) -> None:
    truth, p = (np.array(x) for x in zip(*answers, strict=True))
    label = p >= 0.5
    found = balanced_accuracy(truth, label)
    if truth.all() or not truth.any():
        assert unknown(found)
        return
    assert found.value == pytest.approx((label[truth].mean() + (~label[~truth]).mean()) / 2)
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(st.integers(0, 50), st.integers(1, 50))
def test_proportion_is_wilsons(successes: int, more: int) -> None:
    n = successes + more
    want = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert proportion(successes, n) == pytest.approx((successes / n, want.low, want.high), abs=1e-12)
    assert unknown(proportion(0, 0))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_spearman_is_scipys(points: list[tuple[int, int]]) -> None:
    x, y = np.array(points, float).T
    found = spearman(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert unknown(found)
        return
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    if len(x) >= 5:
        assert -1 <= found.low <= found.value <= found.high <= 1
    else:
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_partial_spearman_matches_the_textbook() -> None:
    rng = np.random.default_rng(1)
    cause = rng.normal(size=400)
    x, y = np.exp(cause + rng.normal(size=400)), cause + rng.normal(size=400)
    plain, partial = spearman(x, y), partial_spearman(x, y, cause)
    xy, xc, yc = (float(stats.spearmanr(*pair).statistic) for pair in ((x, y), (x, cause), (y, cause)))
    want = (xy - xc * yc) / math.sqrt((1 - xc**2) * (1 - yc**2))
    assert partial.value == pytest.approx(want)
    assert plain.low > 0.3
    assert partial.low < 0 < partial.high
    assert partial_spearman(x, y, [cause, rng.normal(size=400)]).value == pytest.approx(partial.value, abs=0.02)
    assert unknown(partial_spearman(x, cause, cause))  # nothing of y is left
    assert partial_spearman(x, y, np.ones(400)) == pytest.approx(plain, abs=1e-3)


def test_stratified_spearman_removes_a_nonmonotone_cause() -> None:
    rng = np.random.default_rng(2)
    cause = rng.uniform(-1, 1, size=2000)
    x, y = cause**2 + 0.1 * rng.normal(size=2000), cause**2 + 0.1 * rng.normal(size=2000)
    assert partial_spearman(x, y, cause).low > 0.5
    found = stratified_spearman(x, y, cause, n_strata=20)
    assert len(found.strata) == 20
    assert sum(stratum.n for stratum in found.strata) == 2000
    assert abs(found.pooled.value) < 0.25
    assert found.pooled.low < found.pooled.value < found.pooled.high
    single = stratified_spearman(x, y, np.zeros(2000))
    assert len(single.strata) == 1
    assert single.pooled == pytest.approx(spearman(x, y))
    assert unknown(stratified_spearman([], [], []).pooled)
    assert unknown(stratified_spearman([1, 2], [1, 2], [1, 2]).pooled)


def test_bootstrap_mean() -> None:
    x = np.random.default_rng(0).gamma(2, size=200)
    found = bootstrap_mean(x)
    assert found == bootstrap_mean(x)
    assert found != bootstrap_mean(x, seed=1)
    want = stats.bootstrap((x,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert found == pytest.approx((x.mean(), want.low, want.high), abs=0.03)
    assert unknown(bootstrap_mean([]))
    alone = bootstrap_mean([0.5])
    assert alone.value == 0.5
    assert math.isnan(alone.low)
    assert bootstrap_mean(np.full(50, 0.1)) == pytest.approx((0.1, 0.1, 0.1))
    many = np.random.default_rng(0).normal(size=50_000)  # several chunks
    assert bootstrap_mean(many, resamples=100).high - many.mean() == pytest.approx(1.96 / math.sqrt(50_000), rel=0.3)


@given(st.integers(0, 30), st.integers(1, 30))
def test_mean_fraction_of_yes_and_no_is_wilsons(ones: int, zeros: int) -> None:
    found = mean_fraction([1.0] * ones + [0.0] * zeros)
    assert found == pytest.approx(proportion(ones, ones + zeros))


def test_mean_fraction_knows_how_alike_the_fractions_are() -> None:
    alike, apart = mean_fraction([0.4, 0.6] * 20), mean_fraction([0.0, 1.0] * 20)
    assert alike.value == apart.value == 0.5
    assert alike.high - alike.low < (apart.high - apart.low) / 3
    assert math.isnan(mean_fraction([]).value)
    assert mean_fraction([0.0] * 100).high > 0.03


@pytest.mark.parametrize("rate", [0.002, 0.02, 0.3])
def test_mean_fraction_interval_covers(rate: float) -> None:
    """Each latent is asked twice and mostly answers alike; a percentile bootstrap covers .002 in 69 % of cases."""

    def once(rng: np.random.Generator) -> Estimate:
        first = rng.random(500) < rate
        second = np.where(rng.random(500) < 0.8, first, rng.random(500) < rate)
        return mean_fraction(np.mean([first, second], axis=0))

    assert 0.93 <= coverage(once, rate, 1500) <= 0.99


def test_quartiles() -> None:
    assert quantiles([4, 1, 3, 2, 5]).tolist() == [2, 3, 4]
    assert all(math.isnan(x) for x in quantiles([]))


def test_nan_is_refused_not_dropped() -> None:
    for call in (
        lambda: auroc([1, 0], [0.5, math.nan]),
        lambda: balanced_accuracy([1, 0], [1, math.nan]),
        lambda: spearman([1, 2, math.nan], [1, 2, 3]),
        lambda: bootstrap_mean([1, math.inf]),
        lambda: quantiles([math.nan]),
    ):
        with pytest.raises(ValueError, match="count the failures"):
            call()
    with pytest.raises(ValueError, match="only true and false"):
        balanced_accuracy([1, 0], [0.7, 0.2])
    with pytest.raises(ValueError, match="only true and false"):
        auroc([1, 2], [0.7, 0.2])
    with pytest.raises(ValueError, match="2 truths and 3 answers"):
        auroc([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="3 values against 2"):
        spearman([1, 2, 3], [1, 2])


def test_as_dict_has_no_nan() -> None:
    assert Estimate(0.5, 0.25, 0.75).as_dict() == {"value": 0.5, "interval": [0.25, 0.75]}
    assert Estimate(0.5, math.nan, math.nan).as_dict() == {"value": 0.5, "interval": None}
    assert set(METHODS) >= {"balanced_accuracy", "auroc", "spearman", "bootstrap_mean"}


def coverage(make: Callable[[np.random.Generator], Estimate], truth: float, trials: int) -> float:
    rng = np.random.default_rng(0)
    found = [make(rng) for _ in range(trials)]
    return float(np.mean([x.low <= truth <= x.high for x in found]))


@pytest.mark.parametrize("n", [5, 20, 50, 100])
def test_proportion_interval_covers(n: int) -> None:
    """Exactly, over all outcomes: on average over rates as asked, and never far from it at 20 contexts and more."""
    every = [proportion(successes, n) for successes in range(n + 1)]
    rates = np.linspace(0.02, 0.98, 97)
    held = [
        sum(stats.binom.pmf(k, n, p) for k, found in enumerate(every) if found.low <= p <= found.high) for p in rates
    ]
    assert 0.94 <= np.mean(held) <= 0.965
    assert min(held) > (0.83 if n < 20 else 0.89)


@pytest.mark.parametrize(("tpr", "tnr", "n"), [(0.7, 0.74, 50), (0.95, 0.6, 50), (0.98, 0.99, 50), (0.8, 0.5, 20)])
def test_balanced_accuracy_interval_covers(tpr: float, tnr: float, n: int) -> None:
    truth = np.arange(2 * n) < n

    def once(rng: np.random.Generator) -> Estimate:
        return balanced_accuracy(truth, rng.random(2 * n) < np.where(truth, tpr, 1 - tnr))

    assert 0.93 <= coverage(once, (tpr + tnr) / 2, 1500) <= 0.99


@pytest.mark.parametrize(("shift", "n"), [(0.0, 50), (0.8, 50), (0.8, 20), (2.0, 50), (3.5, 50)])
def test_auroc_interval_covers(shift: float, n: int) -> None:
    truth = np.arange(2 * n) < n

    def once(rng: np.random.Generator) -> Estimate:
        return auroc(truth, rng.normal(size=2 * n) + shift * truth)

    assert 0.925 <= coverage(once, float(stats.norm.cdf(shift / math.sqrt(2))), 1200) <= 0.995


@pytest.mark.parametrize(("r", "n"), [(0.0, 30), (0.4, 100), (0.8, 50)])
def test_spearman_interval_covers(r: float, n: int) -> None:
    def once(rng: np.random.Generator) -> Estimate:
        x, e = rng.normal(size=(2, n))
        return spearman(x, r * x + math.sqrt(1 - r * r) * e)

    # Of a normal pair Spearman's correlation is this (a little less in a small sample: n = 30 has r = 0).
    assert 0.925 <= coverage(once, 6 / math.pi * math.asin(r / 2), 1000) <= 0.98


def test_bootstrap_interval_covers() -> None:
    def once(rng: np.random.Generator) -> Estimate:
        return bootstrap_mean(rng.beta(6, 2, size=100), resamples=400, seed=int(rng.integers(2**31)))

    assert 0.92 <= coverage(once, 0.75, 600) <= 0.98
