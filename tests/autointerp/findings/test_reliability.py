"""Reliability and corrected correlations, on latents whose true scores are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made_scores import SHAPES, Made, rank_correlation, score

from autointerp.findings.reliability import LEAST, Halves, corrected_spearman
from autointerp.findings.statistics.resampling import Resamples, interval_of
from sae.common.estimate import proportion


def reliability(verdicts: pd.DataFrame, n: int) -> float:
    return float(Halves.of(verdicts, range(n), splits=12).draws(Resamples(np.arange(n), 1))[0])


def test_halves_are_halves() -> None:
    rng = np.random.default_rng(0)
    made = Made.draw(20, 0.5, "even", rng)
    verdicts = made.verdicts(30, rng)
    halves = Halves.of(verdicts, range(20), splits=7)
    assert halves.scores.shape == (7, 2, 20)
    assert halves.n == 20
    # With as many contexts of each kind in both, the halves' mean is the whole.
    assert np.allclose(halves.scores.mean(1), score(verdicts))
    assert len(np.unique(halves.scores[:, 0, 0])) > 1  # another split each time
    assert np.array_equal(halves.scores, Halves.of(verdicts, range(20), splits=7).scores)
    backwards = Halves.of(verdicts, range(19, -1, -1), splits=7)
    assert np.allclose(backwards.scores.mean(1), score(verdicts)[::-1])


def test_a_latent_without_two_halves_is_left_out() -> None:
    rng = np.random.default_rng(0)
    verdicts = Made.draw(30, 0.5, "even", rng).verdicts(20, rng)
    lacking = verdicts[(verdicts["latent"] != 3) | ~verdicts["truth"]]
    halves = Halves.of(lacking, range(31))  # of the last there is nothing at all
    assert np.isnan(halves.scores[:, :, [3, 30]]).all()
    assert halves.n == 29
    draws = halves.draws(Resamples(np.arange(31), 50))
    assert np.isfinite(draws).all()
    few = verdicts[verdicts["latent"] < 5]
    assert np.isnan(Halves.of(few, range(5)).draws(Resamples(np.arange(5), 5))[0])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "a third unexplained"])
@pytest.mark.parametrize("n", [10, 50])
def test_reliability_is_the_correlation_with_another_draw(shape: str, n: int) -> None:
    """Estimated from one set of verdicts; held against two independent sets."""
    rng = np.random.default_rng(1)
    size = 5000
    made = Made.draw(size, 0.5, shape, rng)
    retest = rank_correlation(score(made.verdicts(n, rng)), score(made.verdicts(n, rng)))
    assert reliability(made.verdicts(n, rng), size) == pytest.approx(retest, abs=0.04)


def test_equal_true_scores_make_it_slightly_too_large() -> None:
    rng = np.random.default_rng(1)
    made = Made.draw(4000, 0.5, "a third unexplained", rng)
    retest = rank_correlation(score(made.verdicts(25, rng)), score(made.verdicts(25, rng)))
    assert retest < reliability(made.verdicts(25, rng), 4000) < retest + 0.05


def test_scores_of_nothing_but_noise_have_none() -> None:
    rng = np.random.default_rng(0)
    made = Made.draw(300, 0.5, "even", rng)
    noise = Made(np.full(300, 0.5), np.full(300, 0.5), np.full(300, 0.5), made.similarity, made.frequency)
    verdicts = noise.verdicts(50, rng)
    halves, resamples = Halves.of(verdicts, range(300)), Resamples(np.arange(300))
    told = interval_of(halves.draws(resamples), 300)
    assert abs(told.value) < 0.25  # of 300 latents: three standard errors
    assert told.low < 0.2
    found = corrected_spearman(score(verdicts), made.similarity, made.frequency, halves, resamples)
    assert np.isnan(found.spearman.value)
    assert np.isnan(found.partial.value)
    assert found.reliability == told


def test_shared_request_errors_are_no_agreement() -> None:
    """Kept together, what a request shares is noise, as it is in another draw; taken apart, it looks like reliability.

    The noise is only seen where it differs between latents, so there are few requests and they are often spoilt.
    """
    rng = np.random.default_rng(2)
    size = 3000
    made = Made.draw(size, 0.5, "even", rng)
    first, second = (made.verdicts(20, rng, by_request=0.3) for _ in range(2))
    retest = rank_correlation(score(first), score(second))
    assert reliability(first, size) == pytest.approx(retest, abs=0.05)
    assert reliability(first.drop(columns="request"), size) > retest + 0.1
    shuffled = first.sample(frac=1, random_state=0)  # the order of the rows says nothing
    assert reliability(shuffled, size) == pytest.approx(retest, abs=0.05)
    alone = first.assign(request=np.arange(len(first)))
    assert reliability(alone, size) == reliability(first.drop(columns="request"), size)


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_a_planted_correlation_is_recovered_from_noise(correlation: float) -> None:
    rng = np.random.default_rng(3)
    size = 1500
    made = Made.draw(size, correlation, "paper", rng)
    verdicts = made.verdicts(10, rng)
    resamples = Resamples(np.arange(size))
    measured = score(verdicts)
    halves = Halves.of(verdicts, range(size))
    found = corrected_spearman(measured, made.similarity, made.frequency, halves, resamples)
    truth = rank_correlation(made.true, made.similarity)
    raw = interval_of(resamples.correlations([measured, made.similarity])[:, 0, 1])
    assert found.spearman.low <= truth <= found.spearman.high
    perfect = Halves(np.broadcast_to(made.true, (4, 2, size)))
    noiseless = corrected_spearman(made.true, made.similarity, made.frequency, perfect, resamples)
    assert noiseless.reliability.value == pytest.approx(1)
    assert found.partial.low <= noiseless.partial.value <= found.partial.high
    if correlation:
        assert raw.high < truth
        assert raw.value / truth == pytest.approx(np.sqrt(found.reliability.value), abs=0.05)
        assert found.spearman.high - found.spearman.low > raw.high - raw.low


@pytest.mark.parametrize(
    ("correlation", "shape", "n"), [(0.0, "paper", 10), (0.5, "even", 10), (0.5, "ceiling", 25), (0.8, "narrow", 50)]
)
def test_intervals_hold_the_truth(correlation: float, shape: str, n: int) -> None:
    """Coverage over repeated studies of 150 latents, of the corrected correlation and of the reliability."""
    rng = np.random.default_rng(4)
    size, rounds = 150, 100
    large = Made.draw(100_000, correlation, shape, rng)
    truth = rank_correlation(large.true, large.similarity)
    part = Made.draw(20_000, correlation, shape, rng)
    retest = rank_correlation(score(part.verdicts(n, rng)), score(part.verdicts(n, rng)))
    covered = np.zeros(3)
    for _ in range(rounds):
        made = Made.draw(size, correlation, shape, rng)
        verdicts = made.verdicts(n, rng)
        halves, resamples = Halves.of(verdicts, range(size), splits=6), Resamples(np.arange(size), 200)
        found = corrected_spearman(score(verdicts), made.similarity, made.frequency, halves, resamples)
        raw = interval_of(resamples.correlations([score(verdicts), made.similarity])[:, 0, 1])
        estimates = (found.spearman, truth), (found.reliability, retest), (raw, truth)
        covered += [e.low <= value <= e.high for e, value in estimates]
    assert proportion(covered[0], rounds).high >= 0.95
    assert covered[0] / rounds > 0.88
    assert covered[1] / rounds > 0.86
    if correlation >= 0.5 and n == 10:
        assert covered[2] / rounds < 0.8  # the raw one's does not: it is sure of a figure that noise has weakened


# --- what the correction does not mend ------------------------------------------------------------------------------


def corrected_of(made: Made, kept: np.ndarray, n: int, rng: np.random.Generator) -> float:
    part = made.only(kept)
    verdicts, size = part.verdicts(n, rng), int(kept.sum())
    halves, resamples = Halves.of(verdicts, range(size)), Resamples(np.arange(size), 1)
    return corrected_spearman(score(verdicts), part.similarity, part.frequency, halves, resamples).spearman.value


def test_failures_of_hard_latents_bias_it() -> None:
    rng = np.random.default_rng(5)
    made = Made.draw(6000, 0.6, "even", rng)
    truth = rank_correlation(made.true, made.similarity)
    by_chance = rng.random(6000) < 0.5
    hard = rng.random(6000) < np.clip(1.5 * (made.true - 0.5) / 0.5, 0, 1)  # the worse, the likelier to fail
    assert corrected_of(made, by_chance, 25, rng) == pytest.approx(truth, abs=0.03)
    biased = corrected_of(made, hard, 25, rng)
    assert 0.4 < biased / truth < 0.95
    # It is right about those that are left, and only about them.
    assert biased == pytest.approx(rank_correlation(made.true[hard], made.similarity[hard]), abs=0.03)


def test_a_limited_range_biases_it() -> None:
    rng = np.random.default_rng(6)
    made = Made.draw(8000, 0.6, "even", rng)
    truth = rank_correlation(made.true, made.similarity)
    alike = made.similarity > np.median(made.similarity)
    found = corrected_of(made, alike, 25, rng)
    assert 0.4 < found / truth < 0.85
    assert found == pytest.approx(rank_correlation(made.true[alike], made.similarity[alike]), abs=0.03)


def test_too_little_reliability_is_not_corrected() -> None:
    rng = np.random.default_rng(7)
    made = Made.draw(800, 0.6, "even", rng)
    true = 0.7 + 0.02 * made.true
    close = Made(true, true, true, made.similarity, made.frequency)
    verdicts = close.verdicts(20, rng)
    assert reliability(verdicts, 800) < LEAST
    assert np.isnan(corrected_of(close, np.ones(800, bool), 20, rng))
