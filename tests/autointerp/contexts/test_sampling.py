"""Stratified samples of latents: what a draw promises, and that weighted figures are those of the population."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from autointerp.contexts.sampling import allocate, compute_weights, draw_sample, make_strata
from autointerp.findings.statistics.correlation import quantiles
from autointerp.findings.statistics.estimation import Estimator, known_of_quantile
from autointerp.findings.statistics.resampling import Resamples

sizes = st.integers(1, 120)


def population(size: int, seed: int = 0, *, aligned: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """Frequencies and similarities that go together, with ties, and a few latents without a partner."""
    rng = np.random.default_rng(seed)
    frequency = np.exp(np.round(rng.normal(size=size), 1))
    similarity = np.tanh(np.log(frequency) + rng.normal(size=size))
    similarity[rng.random(size) < 0.05] = np.nan
    return frequency, similarity if aligned else None


def sample(size: int, n: int | None, seed: int = 0, *, aligned: bool = True) -> pd.DataFrame:
    return draw_sample(range(size), make_strata(*population(size, seed, aligned=aligned)), n, seed)


@given(sizes, st.integers(1, 140), st.integers(1, 140), st.integers(0, 99), st.booleans())
def test_a_larger_sample_holds_the_smaller(size: int, a: int, b: int, seed: int, aligned: bool) -> None:
    few, many = (sample(size, n, seed, aligned=aligned) for n in sorted((a, b)))
    assert few["drawn"].sum() == min(a, b, size)
    assert many["drawn"].sum() == min(max(a, b), size)
    assert not (few["drawn"] & ~many["drawn"]).any()
    assert sample(size, min(a, b), seed, aligned=aligned).equals(few)


@given(sizes, st.integers(1, 140), st.integers(0, 99), st.floats(0, 1))
def test_weights_sum_to_the_population_whatever_is_done(size: int, n: int, seed: int, share: float) -> None:
    table = sample(size, n, seed)
    counts = table.groupby("stratum").agg(held=("latent", "size"), n=("drawn", "sum"))
    of = counts.loc[table["stratum"]].reset_index(drop=True)
    assert np.allclose(table["probability"], of["n"] / of["held"])
    assert np.allclose(table["weight"], np.where(table["drawn"], of["held"] / of["n"].clip(lower=1), 0))
    rng = np.random.default_rng(seed)
    chosen = set(table["latent"][table["drawn"]])
    done = {latent for latent in chosen if rng.random() < share} | {size + 5}
    weights = compute_weights(table, done)
    assert set(weights.index) == done & chosen
    if len(weights):
        assert weights["weight"].sum() == pytest.approx(size)
        assert np.allclose(weights["fraction"] * weights["weight"], 1)
    assert (compute_weights(sample(size, None, seed), set(range(size)))["weight"] == 1).all()


def test_small_cells_are_sampled_at_a_higher_rate() -> None:
    table = sample(2000, 200)
    cells = table.groupby("stratum").agg(held=("latent", "size"), n=("drawn", "sum"), p=("probability", "first"))
    assert len(cells) > 16  # quartiles by quartiles, and those without a partner
    assert (cells["n"] >= np.minimum(cells["held"], 2)).all()
    assert np.corrcoef(np.log(cells["held"]), np.log(cells["p"]))[0, 1] < -0.9
    assert table.loc[table["similarity_cell"] == -1, "drawn"].any()
    alone = sample(2000, 200, aligned=False)
    assert sorted(alone["stratum"].unique()) == [0, 1, 2, 3]
    assert set(alone["similarity_cell"]) == {-1}


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.data())
def test_no_stratum_ever_loses_one(held: list[int], data: st.DataObject) -> None:
    of = np.array(held)
    start = np.array([data.draw(st.integers(0, min(n, 3))) for n in held])
    before = allocate(of, int(start.sum()), start)
    assert (before == start).all()
    for n in range(int(start.sum()) + 1, int(of.sum()) + 1):
        taken = allocate(of, n, start)
        assert taken.sum() == n
        assert (before <= taken).all()
        assert (taken <= of).all()
        before = taken


# --- what is estimated ----------------------------------------------------------------------------------------------

FIGURES = 5


def figures(values: np.ndarray, other: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    resamples = Resamples(np.arange(len(values)), 0, weights=weights)
    middle = resamples.quantiles(values, [0.25, 0.5, 0.75])[0]
    return np.array([resamples.means(values)[0], *middle, resamples.correlations([values, other])[0, 0, 1]])


@pytest.mark.parametrize("n", [20, pytest.param(40, marks=pytest.mark.slow), pytest.param(150, marks=pytest.mark.slow)])
def test_figures_are_unbiased_over_draws(n: int) -> None:
    """Scores go with similarity and frequency, so that the unweighted sample is far off."""
    frequency, similarity = population(600, 1)
    similarity = np.nan_to_num(np.asarray(similarity, float))
    rng = np.random.default_rng(1)
    score = 0.6 + 0.2 * similarity**2 + 0.03 * np.log(frequency) + rng.normal(0, 0.05, 600)
    truth = figures(score, similarity)
    cells, rounds = make_strata(frequency, similarity), 300
    weighted, plain = np.empty((rounds, FIGURES)), np.empty((rounds, FIGURES))
    for seed in range(rounds):
        table = draw_sample(range(600), cells, n, seed)
        weights = compute_weights(table, set(range(600)))
        chosen = weights.index.to_numpy()
        weighted[seed] = figures(score[chosen], similarity[chosen], weights["weight"].to_numpy())
        plain[seed] = figures(score[chosen], similarity[chosen])
    error = weighted.std(0) / np.sqrt(rounds)
    bias = weighted.mean(0) - truth
    assert abs(bias[0]) < 3 * error[0]
    # Correlations and, more so, quartiles of few latents are not unbiased: by order 1 / n, well inside their noise.
    assert (np.abs(bias) < 3 * error + 0.6 * weighted.std(0) * np.sqrt(20 / n) * [0, 1, 1, 1, 0.5]).all()
    if n > 100:
        assert np.abs(plain.mean(0) - truth)[0] > 8 * np.abs(bias[0])


@pytest.mark.parametrize("seed", range(3))
def test_latents_are_drawn_with_their_stated_probability(seed: int) -> None:
    cells = make_strata(*population(80, seed))
    rounds, n = 600, 30
    counted, promised = np.zeros(80), np.zeros(80)
    for draw in range(rounds):
        table = draw_sample(range(80), cells, n, 1000 * seed + draw)
        counted += table["drawn"]
        promised += table["probability"]
    assert np.allclose(counted / rounds, promised / rounds, atol=4.5 * np.sqrt(0.25 / rounds))


@given(st.data(), st.integers(3, 30), st.floats(0.01, 100))
def test_integer_weights_equal_repeated_rows(data: st.DataObject, n: int, scale: float) -> None:
    few = st.lists(st.integers(0, 6), min_size=n, max_size=n)
    x, y = (np.array(data.draw(few), dtype=float) for _ in range(2))
    w = np.array(data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)), dtype=float)
    held = np.repeat(np.arange(n), w.astype(int))
    of = Resamples(np.arange(n), 3, weights=w)
    assert of.means(x)[0] == pytest.approx(x[held].mean())
    written = Resamples(np.arange(len(held)), 0).correlations([x[held], y[held]])[0]
    assert of.correlations([x, y])[0] == pytest.approx(written, nan_ok=True, abs=1e-9)
    scaled = Resamples(np.arange(n), 3, weights=w * scale)
    assert scaled.means(x) == pytest.approx(of.means(x))
    assert scaled.correlations([x, y]) == pytest.approx(of.correlations([x, y]), nan_ok=True, abs=1e-9)
    at = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert quantiles(x, at, w * scale) == pytest.approx(quantiles(x, at, w))
    assert quantiles(x, at, np.full(n, scale)) == pytest.approx(np.quantile(x, at))
    found = quantiles(x, at, w)
    assert (np.diff(found) >= 0).all()
    assert found[[0, -1]] == pytest.approx([x.min(), x.max()])
    # Of rows written out, a quantile differs by how far the outermost rows reach: between its neighbours at most.
    for q, value in zip(at, found, strict=True):
        low, high = (np.quantile(x[held], np.clip(q + d, 0, 1)) for d in (-4 / w.sum(), 4 / w.sum()))
        assert low - 1e-9 <= value <= high + 1e-9


def of_table(table: pd.DataFrame, done: set[int]) -> Estimator:
    return Estimator(compute_weights(table, done))


def test_a_census_equals_the_unweighted_figure() -> None:
    rng = np.random.default_rng(0)
    score = pd.Series(rng.random(300), name="score")
    census = of_table(sample(300, None), set(range(300)))
    exact = census.mean(score, pd.Series(np.zeros(300)))
    assert exact.value == exact.low == exact.high == pytest.approx(score.mean())
    assert [q.value for q in census.quartiles(score)] == pytest.approx(np.quantile(score, [0.25, 0.5, 0.75]))
    assert census.quartiles(score, pd.Series(np.zeros(300)))[1].low == pytest.approx(score.median())
    # Measured with an error: what is left is the error of a mean of 300, whichever latents they are.
    noisy = census.mean(score, pd.Series(np.full(300, 0.04)))
    assert (noisy.high - noisy.low) / 2 == pytest.approx(1.96 * 0.2 / np.sqrt(300), rel=0.12)
    unknown = census.mean(score)
    assert (unknown.high - unknown.low) / 2 == pytest.approx(1.96 * score.std() / np.sqrt(300), rel=0.12)


@pytest.mark.parametrize(
    ("n", "noise"),
    [
        (60, 0.1),
        (400, 0.1),
        pytest.param(200, 0.0, marks=pytest.mark.slow),
        pytest.param(200, 0.1, marks=pytest.mark.slow),
    ],
)
def test_intervals_hold_what_all_latents_would_give(n: int, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400: the mean of true scores, its mean over a class, and the correlation of measured ones, over all."""
    monkeypatch.setattr("autointerp.findings.statistics.resampling.RESAMPLES", 250)
    rng = np.random.default_rng(n)
    frequency, similarity = population(400, 2)
    similarity = np.nan_to_num(np.asarray(similarity, float))
    true = 0.65 + 0.1 * similarity + 0.02 * np.log(frequency) + rng.normal(0, 0.07, 400)
    shared = similarity > 0.3
    cells, rounds = make_strata(frequency, similarity), 200
    again = [rank_correlation(true + rng.normal(0, noise, 400), similarity) for _ in range(200)]
    truths = true.mean(), true[shared].mean(), float(np.mean(again))
    covered, width = np.zeros(3), np.zeros(3)
    for seed in range(rounds):
        measured = pd.Series(true + rng.normal(0, noise, 400))
        weights = compute_weights(draw_sample(range(400), cells, n, seed), set(range(400)))
        of, chosen = Estimator(weights), weights.index
        error = pd.Series(np.full(400, noise**2))
        inside = chosen[shared[chosen]]
        found = [of.mean(measured[chosen], error), of.mean(measured[inside], error)]
        found.append(correlation(measured[chosen], similarity[chosen], noise**2, weights))
        # In a census measured without error nothing is unknown, and an end may lie a rounding off the truth.
        ends = zip(found, truths, strict=True)
        covered += [e.low - 1e-9 <= truth <= e.high + 1e-9 for e, truth in ends]
        width += [e.high - e.low for e in found]
    # 200 trials of .95: from .91 to .98 in 19 of 20; rescaled correlations are a little short of it.
    assert (covered / rounds >= 0.9).all(), covered / rounds
    assert (covered / rounds <= 0.995).all(), covered / rounds
    if n == 400:
        assert width[0] / rounds == pytest.approx(2 * 1.96 * noise / np.sqrt(400), rel=0.2)


@pytest.mark.parametrize(
    ("n", "noise"),
    [
        (60, 0.05),
        (400, 0.05),
        pytest.param(260, 0.05, marks=pytest.mark.slow),
        pytest.param(400, 0.02, marks=pytest.mark.slow),
    ],
)
def test_intervals_hold_the_quartiles_of_all_measured_scores(
    n: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 400: what quartiles of all measured scores are on average. A mean's share would cover .75 in a census."""
    monkeypatch.setattr("autointerp.findings.statistics.resampling.RESAMPLES", 250)
    rng = np.random.default_rng(n)
    frequency, similarity = population(400, 2)
    true, cells, rounds = 0.7 + rng.normal(0, 0.1, 400), make_strata(frequency, similarity), 200
    at = [0.25, 0.5, 0.75]
    truths = np.mean([np.quantile(true + rng.normal(0, noise, 400), at) for _ in range(1000)], axis=0)
    covered = np.zeros(3)
    for seed in range(rounds):
        weights = compute_weights(draw_sample(range(400), cells, n, seed), set(range(400)))
        measured = pd.Series(true + rng.normal(0, noise, 400))[weights.index]
        found = Estimator(weights).quartiles(measured, pd.Series(noise**2, weights.index))
        covered += [e.low <= truth <= e.high for e, truth in zip(found, truths, strict=True)]
    assert (covered / rounds >= 0.89).all(), covered / rounds
    assert covered.mean() / rounds >= 0.92
    assert (covered / rounds <= 0.995).all(), covered / rounds


@given(st.floats(0, 1), st.floats(0.05, 0.95))
def test_a_quantile_is_less_certain_than_a_mean(rho: float, p: float) -> None:
    known = known_of_quantile(rho, p)
    assert 0 <= known <= rho + 1e-9
    assert known_of_quantile(rho, 0.5) == pytest.approx(2 / np.pi * np.arcsin(rho), abs=1e-9)
    both = stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]], allow_singular=True).cdf([stats.norm.ppf(p)] * 2)
    assert known == pytest.approx((both - p * p) / (p * (1 - p)), abs=1e-4)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(Resamples(np.arange(len(x)), 0).correlations([x, y])[0, 0, 1])


def correlation(score: pd.Series, similarity: np.ndarray, error: float, weights: pd.DataFrame):  # type: ignore[no-untyped-def]
    from autointerp.findings.statistics.estimation import real_share
    from autointerp.findings.statistics.resampling import interval_of

    kept = np.ones(len(score), bool)
    rho = real_share(score.to_numpy(), kept, np.full(len(score), error), weights)
    of = Resamples(score.index, weights=weights["weight"], strata=weights["stratum"], known=rho * weights["fraction"])
    return interval_of(of.correlations([score, similarity])[:, 0, 1], of.n_free)


def test_of_one_latent_nothing_is_sure() -> None:
    table = sample(100, 40)
    one = int(table["latent"][table["drawn"]].iloc[0])
    found = of_table(table, set(range(100))).mean(pd.Series({one: 0.7}), pd.Series({one: 0.01}))
    assert found.value == pytest.approx(0.7)
    assert np.isnan(found.low)
    nothing = of_table(table, set(range(100))).mean(pd.Series(dtype=float))
    assert np.isnan(nothing.value)


def test_failures_take_their_place_with_them() -> None:
    """A latent that failed counts for its stratum, and the mean is of those that can be scored."""
    score = pd.Series(np.linspace(0.4, 1.0, 500))
    can = pd.Series(np.arange(500) % 3 > 0)
    means = []
    for seed in range(200):
        table = draw_sample(range(500), make_strata(np.arange(500) ** 2.0 + 1), 60, seed)
        of = of_table(table, set(range(500)))
        good = score[of.sample.index][can[of.sample.index]]  # type: ignore[union-attr]
        means.append(of.mean(good).value if seed < 3 else of.plain_mean(good))
    assert np.mean(means) == pytest.approx(score[can].mean(), abs=0.005)
