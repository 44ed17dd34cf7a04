"""Every finding's rule on made-up dictionaries whose answer is known, and its intervals against enumeration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.findings.json_values import to_json
from autointerp.findings.paper.dictionaries import Dictionaries, findings_of_dictionaries
from autointerp.findings.paper.finding import AGREES, DISAGREES, UNDECIDED, Finding, Verdict, against, every
from autointerp.findings.paper.intervals import jackknife, wider, without_each
from autointerp.findings.paper.scores import ScoreEvidence, findings_of_scores
from autointerp.findings.shape import Mean
from sae.alignment.alignment import align
from sae.alignment.dip import Dip
from sae.common.estimate import UNKNOWN, Estimate

M, D = 200, 48
MORE = dict.fromkeys(("pair", "seed", "harvest", "score", "partners"), "python cli.py …")


def dictionaries(
    shares: Sequence[float], *, seeds: int = 3, frequent_shared: bool | None = None, dip: Dip | None = None
) -> Dictionaries:
    """``seeds`` runs; run i has the first ``shares[i]`` of the directions that all runs with as many have.

    ``frequent_shared``: whether latents that return fire more (True), less (False), or as often as others (None).
    """
    core, runs = np.random.default_rng(7).normal(size=(2, M, D)), [f"run_{'abcdefg'[i]}" for i in range(seeds)]
    weights, frequency = {}, {}
    for i, run in enumerate(runs):
        rng = np.random.default_rng(100 + i)
        inside = np.arange(M) < shares[i % len(shares)] * M
        rows = np.where(inside[:, None], core + 0.2 * rng.normal(size=core.shape), rng.normal(size=core.shape))
        weights[run] = rows
        ahead = 0 if frequent_shared is None else (3.0 if frequent_shared else -3.0)
        frequency[run] = np.exp(rng.normal(size=M) + ahead * inside)
    tables = {}
    for a, b in combinations(runs, 2):
        found = align(*weights[a], *weights[b])
        tables[a, b], tables[b, a] = found.a, found.b
    alive = {run: np.ones(M, bool) for run in runs}
    return Dictionaries(runs, tables, alive, frequency, dip, MORE)


def rows_of(of: Dictionaries) -> dict[str, Finding]:
    return {row.id: row for row in findings_of_dictionaries(of)}


# --- what an interval allows -----------------------------------------------------------------------------------


@given(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(-1, 1), st.sampled_from([-1, 1]))
def test_a_verdict_needs_the_whole_interval(x: float, below: float, above: float, level: float, direction: int) -> None:
    found = Estimate(x, x - below, x + above)
    verdict = against(found, level, direction)
    if x - below <= level <= x + above:
        assert verdict == UNDECIDED
    else:
        assert verdict == (AGREES if (x > level) == (direction > 0) else DISAGREES)
    mirrored = Estimate(-x, -x - above, -x + below)
    assert against(mirrored, -level, -direction) == verdict


def test_without_an_interval_nothing_is_decided() -> None:
    assert against(UNKNOWN) == UNDECIDED
    assert against(Estimate(3.0, math.nan, math.nan)) == UNDECIDED
    assert every([AGREES, DISAGREES]) == UNDECIDED
    assert every([DISAGREES, DISAGREES]) == DISAGREES
    assert every([AGREES, UNDECIDED]) == UNDECIDED


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_leave_one_out_is_the_other_pairs_mean(values: list[float]) -> None:
    runs = "abcd"
    pairs = {f"{a}--{b}": v for (a, b), v in zip(combinations(runs, 2), values, strict=True)}
    found = without_each(pairs)
    for left in runs:
        rest = [v for pair, v in pairs.items() if left not in pair]
        assert found[left] == pytest.approx(sum(rest) / 3)
    # a mean over pairs is the mean of the means without each run: the jackknife has no bias to correct
    assert np.mean(list(found.values())) == pytest.approx(np.mean(values))


def test_two_runs_leave_nothing_to_leave_out() -> None:
    assert without_each({"a--b": 0.5}) == {}
    assert math.isnan(jackknife(0.5, [0.5]).low)


@pytest.mark.parametrize("seeds", [3, 4, 6])
def test_the_jackknife_covers_as_stated(seeds: int) -> None:
    """Pairs that share a seed are alike: a seed that shares much does so with every other."""
    rng, held, n = np.random.default_rng(seeds), 0, 2000
    for _ in range(n):
        own = rng.normal(size=seeds)
        pairs = {f"{a}--{b}": own[a] + own[b] + rng.normal() for a, b in combinations(range(seeds), 2)}
        found = jackknife(float(np.mean(list(pairs.values()))), list(without_each(pairs).values()))
        held += found.low <= 0 <= found.high
    assert held / n >= 0.93


def test_the_wider_interval_has_the_outer_bounds() -> None:
    assert wider(Estimate(0.5, 0.4, 0.6), Estimate(0.5, 0.45, 0.9)) == Estimate(0.5, 0.4, 0.9)
    assert wider(Estimate(0.5, math.nan, math.nan), Estimate(0.5, 0.1, 0.9)) == Estimate(0.5, 0.1, 0.9)


# --- dictionaries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.5, AGREES), (1.0, DISAGREES), (0.0, UNDECIDED)], ids=["half", "all", "none"]
)
def test_shared(share: float, verdict: Verdict) -> None:
    row = rows_of(dictionaries([share]))["shared"]
    assert row.verdict == verdict
    assert row.value == pytest.approx(share, abs=0.01)
    assert row.low <= row.value <= row.high


def test_where_matchings_disagree_the_cosine_is_low() -> None:
    row = rows_of(dictionaries([0.5]))["disagree"]
    assert row.verdict == AGREES
    assert row.value > 0.3


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [((0.6, 0.6, 0.6), AGREES), ((0.5, 0.5, 0.0), DISAGREES)],
    ids=["a core of all", "none of the third's"],
)
def test_retained(shares: tuple[float, ...], verdict: Verdict) -> None:
    assert rows_of(dictionaries(shares))["retained"].verdict == verdict


def test_third_seed_cannot_tell_what_does_not_fall() -> None:
    """What two share, the third shares too, and nobody else has the rest: no fraction falls."""
    row = rows_of(dictionaries([0.5]))["third-seed"]
    assert row.value == pytest.approx(0, abs=0.01)
    assert row.verdict == UNDECIDED
    row = rows_of(dictionaries([0.9, 0.5, 0.9]))["third-seed"]
    assert row.verdict == AGREES
    assert row.value == pytest.approx(
        0.4 / 3, abs=0.03
    )  # of run b nothing falls, of a and c where b came first: half of .4


@pytest.mark.parametrize(("frequent", "verdict"), [(True, AGREES), (False, DISAGREES), (None, UNDECIDED)])
def test_frequency(frequent: bool | None, verdict: Verdict) -> None:
    row = rows_of(dictionaries([0.5], frequent_shared=frequent))["frequency"]
    assert row.verdict == verdict


@pytest.mark.parametrize(
    ("value", "p", "verdict"),
    [
        (Estimate(0.05, 0.03, 0.07), 0.001, AGREES),
        (Estimate(0.002, 0.0, 0.006), 0.6, DISAGREES),
        (Estimate(0.01, 0.0, 0.03), 0.2, UNDECIDED),
        (Estimate(0.01, 0.0, 0.03), math.nan, UNDECIDED),
    ],
)
def test_bimodal(value: Estimate, p: float, verdict: Verdict) -> None:
    assert rows_of(dictionaries([0.5], seeds=2, dip=Dip(value, value.value, p)))["bimodal"].verdict == verdict


def test_with_two_seeds_intervals_are_over_latents() -> None:
    rows = rows_of(dictionaries([0.5], seeds=2))
    assert "says nothing of other seeds" in rows["shared"].why
    assert rows["third-seed"].verdict == rows["retained"].verdict == UNDECIDED
    assert rows["retained"].command
    assert "jackknife over seeds" in rows_of(dictionaries([0.5]))["shared"].why


def test_one_seed_has_no_finding_and_says_why() -> None:
    for row in findings_of_dictionaries(dictionaries([0.5], seeds=1)):
        assert row.verdict == UNDECIDED
        assert row.command
        assert to_json(row)["value"] is None


def test_an_interval_over_seeds_is_never_narrower() -> None:
    """Three seeds that happen to share exactly alike say nothing of the latents' own chance."""
    three, two = (rows_of(dictionaries([0.5], seeds=n))["shared"] for n in (3, 2))
    assert three.high - three.low > 0.5 * (two.high - two.low)


# --- scores ------------------------------------------------------------------------------------------------------


def scores(
    *,
    mean: tuple[float, float, float] = (0.7, 0.69, 0.71),
    above: tuple[float, float, float] | None = (0.2, 0.19, 0.21),
) -> Any:
    control = above and SimpleNamespace(above_control=Mean(Estimate(*above)))
    return SimpleNamespace(n_scored=100, mean=Estimate(*mean), control=control, quartiles=[UNKNOWN] * 3)


def told(**given: Any) -> dict[str, Finding]:
    empty: dict[str, Any] = {"scores": None, "relation": None, "table": None, "pairs": None, "judge": "ngram"}
    empty |= {"n_aligned": None, "most_latents": 1000, "explain_more": "python cli.py explain --latents {}".format}
    return {row.id: row for row in findings_of_scores(ScoreEvidence(**{**empty, **given}, more=MORE))}


@pytest.mark.parametrize(
    ("of", "verdict"),
    [
        (scores(), AGREES),
        (scores(mean=(0.45, 0.4, 0.49)), DISAGREES),
        (scores(above=(-0.1, -0.2, -0.05)), DISAGREES),
        (scores(above=(0.01, -0.02, 0.04)), UNDECIDED),
        (scores(above=None), UNDECIDED),
    ],
    ids=["above both", "below chance", "below the control", "like the control", "no control"],
)
def test_interp(of: Any, verdict: Verdict) -> None:
    assert told(scores=of)["interp"].verdict == verdict


@pytest.mark.parametrize(
    ("bounds", "verdict"), [([0.1, 0.3], AGREES), ([-0.3, -0.1], DISAGREES), ([-0.1, 0.1], UNDECIDED)]
)
def test_relation(bounds: list[float], verdict: Verdict) -> None:
    relation = SimpleNamespace(spearman=Estimate(sum(bounds) / 2, *bounds), n=9, partial=UNKNOWN, pooled=None)
    assert told(relation=relation)["relation"].verdict == verdict
    relation.pooled = SimpleNamespace(spearman=Estimate(0.9, 0.8, 0.95), n=9, partial=UNKNOWN)
    assert told(relation=relation)["relation"].verdict == AGREES  # of all runs, where there are


@pytest.mark.parametrize(("slope", "verdict"), [(-0.1, AGREES), (0.1, DISAGREES), (0.0, UNDECIDED)])
def test_frequent_low(slope: float, verdict: Verdict) -> None:
    rng = np.random.default_rng(0)
    frequency = rng.normal(size=400)
    score = 0.7 + slope * (frequency > np.quantile(frequency, 0.9)) + 0.05 * rng.normal(size=400)
    table = pd.DataFrame({"score": score, "frequency": frequency, "unshared": rng.random(400) < 0.5})
    assert told(table=table)["frequent-low"].verdict == verdict
    few = told(table=table[:150])["frequent-low"]
    assert "15 are of the tenth" in few.why
    assert few.command is not None
    assert "--latents 250" in few.command
    assert "--latents 180" in (told(table=table[:150], most_latents=180)["frequent-low"].command or "")
    assert told(table=table[:150], most_latents=150)["frequent-low"].command is None


def test_the_low_frequency_share_covers_all_latents() -> None:
    """Rare latents were drawn twice as often: the tenth of all that fires most is a smaller part of those scored."""
    rng = np.random.default_rng(0)
    frequency = np.sort(rng.normal(size=2000))
    drawn = rng.random(2000) < np.where(np.arange(2000) < 1000, 0.8, 0.4)
    score = 0.7 + 0.3 * np.arange(2000) / 2000 + 0.01 * rng.normal(size=2000)
    table = pd.DataFrame({"score": score, "frequency": frequency, "unshared": False})
    rare = np.arange(2000) < 1000
    sample = table.assign(weight=np.where(rare, 1.25, 2.5), stratum=(~rare).astype(int), known=0.3)[drawn]
    truth = score[1800:].mean() - score[:1800].mean()
    found, plain = told(table=sample)["frequent-low"], told(table=table[drawn])["frequent-low"]
    assert found.low < truth < found.high
    assert abs(found.value - truth) < abs(plain.value - truth) / 2


@pytest.mark.parametrize(("alike", "verdict"), [(1.0, AGREES), (-1.0, DISAGREES), (0.0, UNDECIDED)])
def test_both_scored(alike: float, verdict: Verdict) -> None:
    rng = np.random.default_rng(0)
    one, noise = rng.normal(size=(2, 200))
    pairs = pd.DataFrame(
        {
            "score": 0.7 + 0.1 * one,
            "score_there": 0.7 + 0.1 * (alike * one + noise),
            "aligned": np.arange(200) < 150,
            "unit": np.arange(200),
        }
    )
    assert told(pairs=pairs)["both-scored"].verdict == verdict
    few = told(pairs=pairs.assign(aligned=np.arange(200) < 10))["both-scored"]
    assert few.verdict == UNDECIDED
    assert "10 aligned pairs" in few.why
    assert few.command
    none = told(pairs=pairs[:0], n_aligned=3)["both-scored"]
    assert none.command is None
    assert "only 3 latents" in none.why


def test_nothing_scored_says_what_to_run() -> None:
    for row in told().values():
        assert row.verdict == UNDECIDED
        assert row.command
