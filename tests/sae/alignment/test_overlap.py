"""Overlap against enumeration of every subset of runs, and against hand-made alignments whose answer is plain."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sae.alignment.alignment import align
from sae.alignment.bootstrap import LatentBootstrap, estimate, mean_over
from sae.alignment.dip import Dip
from sae.alignment.nulls import add_null, read_null
from sae.alignment.overlap import (
    DEFINITIONS,
    build_latent_table,
    find_range,
    find_shared,
    measure_overlap,
    sweep_thresholds,
)
from sae.common.errors import BadInput, NotFound
from sae.common.estimate import proportion
from sae.common.files import read_table, write_table

Tables = dict[tuple[str, str], pd.DataFrame]


def table(partners: list[tuple[int, float, int, float]]) -> pd.DataFrame:
    """An alignment from (encoder partner, cosine, decoder partner, cosine) per latent."""
    columns = ["encoder_partner", "encoder_cosine", "decoder_partner", "decoder_cosine"]
    made = pd.DataFrame(partners, columns=columns)
    made["max_encoder_cosine"], made["max_decoder_cosine"] = made["encoder_cosine"], made["decoder_cosine"]
    return made


def study(n_runs: int, width: int, seed: int, widths: list[int] | None = None) -> tuple[list[str], Tables, dict]:
    """Random dictionaries with a common core, aligned in full; some latents dead."""
    rng = np.random.default_rng(seed)
    runs = [f"run_{'abcdefghij'[i]}" for i in range(n_runs)]
    core = rng.normal(size=(2, width, 16))
    weights = {}
    for i, run in enumerate(runs):
        size = widths[i] if widths else width
        noise = rng.uniform(0, 2, size=(1, width, 1)) * rng.normal(size=(2, width, 16))
        rows = np.concatenate([core + noise, rng.normal(size=(2, max(0, size - width), 16))], axis=1)
        weights[run] = rows[:, rng.permutation(rows.shape[1])[:size]]
    tables: Tables = {}
    for a, b in combinations(runs, 2):
        found = align(*weights[a], *weights[b])
        tables[a, b], tables[b, a] = found.a, found.b
    alive = {run: rng.random(len(weights[run][0])) < 0.9 for run in runs}
    return runs, tables, alive


def enumerated(runs: list[str], tables: Tables, members: dict, definition: str) -> dict[str, list[float]]:
    """The figures over n by going through every subset of runs and every anchor in it."""
    only, every = [], []
    for n in range(1, len(runs) + 1):
        parts: dict[str, list[float]] = {"only": [], "every": []}
        for subset in combinations(runs, n):
            for anchor in subset:
                held = [find_shared(tables[anchor, x], definition)[members[anchor]] for x in subset if x != anchor]
                count = np.sum(held, axis=0) if held else np.zeros(members[anchor].sum())
                parts["only"].append(float(np.mean(count == 0)))
                parts["every"].append(float(np.mean(count == n - 1)))
        only.append(float(np.mean(parts["only"])))
        every.append(float(np.mean(parts["every"])))
    total = {
        run: np.sum([find_shared(tables[run, x], definition)[members[run]] for x in runs if x != run], axis=0)
        for run in runs
    }
    exact = [float(np.mean([np.mean(total[run] == n) for run in runs])) for n in range(len(runs))]
    return {"only_one": only, "all_of_n": every, "exactly_n": exact}


@pytest.mark.parametrize(("n_runs", "widths"), [(2, None), (3, None), (5, None), (4, [30, 45, 25, 45])])
def test_closed_form_equals_enumeration(n_runs: int, widths: list[int] | None) -> None:
    runs, tables, alive = study(n_runs, 40, seed=n_runs, widths=widths)
    found = measure_overlap(runs, tables, alive, resamples=50)
    everyone = {run: np.ones_like(alive[run]) for run in runs}
    for population, members in ((found.alive, alive), (found.all, everyone)):
        for definition in DEFINITIONS:
            got = population[definition]
            for name, values in enumerated(runs, tables, members, definition).items():
                np.testing.assert_allclose([x.value for x in getattr(got, name)], values, atol=1e-12)
            fractions = {
                (a, b): find_shared(tables[a, b], definition)[members[a]].mean() for a in runs for b in runs if a != b
            }
            assert got.value.value == pytest.approx(np.mean(list(fractions.values())))
            for a, b in combinations(runs, 2):
                assert got.pairs[f"{a}--{b}"].value == pytest.approx((fractions[a, b] + fractions[b, a]) / 2)
            assert got.only_one[0].value == got.all_of_n[0].value == 1
            assert got.only_one[1].value == pytest.approx(1 - got.value.value)
            assert sum(x.value for x in got.exactly_n) == pytest.approx(1)
            for split in got.regions.values():
                assert sum(fraction for _, fraction in split) == pytest.approx(1)


def test_the_four_definitions() -> None:
    here = table(
        [
            (0, 0.9, 0, 0.9),  # all four
            (1, 0.9, 2, 0.9),  # partners differ: both, decoder
            (2, 0.5, 1, 0.9),  # decoder alone
            (3, 0.2, 3, 0.2),  # the same partner, far: lenient alone
            (4, 0.9, 4, 0.5),  # encoder alone does not count: lenient alone
            (5, 0.7, 5, 0.7),  # at the threshold is not above it: lenient alone
            (-1, np.nan, -1, np.nan),  # no partner: none, though both partners are 'the same'
            (-1, np.nan, 6, 0.9),
        ]
    )
    want = {
        "strict": [1, 0, 0, 0, 0, 0, 0, 0],
        "both": [1, 1, 0, 0, 0, 0, 0, 0],
        "decoder": [1, 1, 1, 0, 0, 0, 0, 1],
        "lenient": [1, 0, 0, 1, 1, 1, 0, 0],
    }
    for stored in (here, here.astype({"encoder_cosine": np.float32, "decoder_cosine": np.float32})):
        for definition, values in want.items():
            np.testing.assert_array_equal(find_shared(stored, definition), np.array(values, bool), err_msg=definition)
    assert find_shared(here, "strict", threshold=0.1).sum() == 4
    with pytest.raises(BadInput, match="'loose'; there are strict, both, decoder, lenient"):
        find_shared(here, "loose")


def test_a_study_worked_by_hand() -> None:
    """Three runs of four latents: 0 in all, 1 in a and b, 2 in a and c, 3 in a alone (and dead there)."""
    identity = [(i, 0.1, i, 0.1) for i in range(4)]

    def sharing(*latents: int) -> pd.DataFrame:
        return table([(i, 0.9, i, 0.8) if i in latents else identity[i] for i in range(4)])

    runs = ["a", "b", "c"]
    tables = {("a", "b"): sharing(0, 1), ("a", "c"): sharing(0, 2), ("b", "c"): sharing(0)}
    tables |= {(b, a): held for (a, b), held in tables.items()}
    alive = {"a": np.array([1, 1, 1, 0], bool), "b": np.ones(4, bool), "c": np.ones(4, bool)}
    found = measure_overlap(runs, tables, alive, resamples=200)
    strict = found.alive["strict"]
    assert strict.regions["a"] == [(("b",), 1 / 3), (("b", "c"), 1 / 3), (("c",), 1 / 3)]
    assert strict.regions["b"] == [((), 1 / 2), (("a",), 1 / 4), (("a", "c"), 1 / 4)]
    assert strict.pairs["a--b"].value == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert strict.pairs["b--c"].value == pytest.approx(1 / 4)
    assert strict.only_one[2].value == pytest.approx((0 + 1 / 2 + 1 / 2) / 3)
    assert strict.all_of_n[2].value == pytest.approx((1 / 3 + 1 / 4 + 1 / 4) / 3)
    # Of the shares (a: 0b 0c 1b 2c, b: 0a 0c 1a, c: 0a 0b 2a), weighed by run, those with a further share.
    assert strict.retained.value == pytest.approx((2 / 3 + 2 / 4 + 2 / 4) / (4 / 3 + 3 / 4 + 3 / 4))
    assert found.all["strict"].pairs["a--b"].value == pytest.approx(1 / 2)
    assert found.n_alive == {"a": 3, "b": 4, "c": 4}
    assert found.same_partner.value == 1
    assert found.histogram["mean_differ"] is None
    assert sum(found.histogram["agree"]) == 2 * (3 + 4 + 4)
    assert found.mean_encoder.value == pytest.approx(np.mean([1.9 / 3, 1.9 / 3, 0.5, 0.3, 0.5, 0.3]))

    told = build_latent_table("a", runs, tables, alive["a"])
    assert list(told["shared_class"][:3]) == ["all", "some", "some"]
    assert told["shared_class"].isna().tolist() == [False, False, False, True]
    assert told["n_shared_strict"].tolist() == [2, 1, 1, 0]
    assert told["unshared"].tolist() == [False] * 4  # latent 3 is dead, and a dead latent is not called unshared
    assert told["similarity"].tolist() == pytest.approx([0.85, 0.475, 0.475, 0.1])
    assert build_latent_table("b", runs, tables, alive["b"])["unshared"].tolist() == [False, False, True, True]
    assert build_latent_table("a", ["b"], tables, alive["a"])["shared_class"].tolist()[:3] == ["all", "all", "one"]


def test_the_latent_table_keeps_its_columns_in_parquet(tmp_path: Path) -> None:
    runs, tables, alive = study(3, 20, seed=0, widths=[20, 30, 20])
    told = build_latent_table("run_b", runs, tables, alive["run_b"])
    per_run = ["encoder_partner", "encoder_cosine", "decoder_partner", "decoder_cosine"]
    per_run += ["max_encoder_cosine", "max_decoder_cosine", *(f"shared_{name}" for name in DEFINITIONS)]
    per_run += ["max_encoder_neighbor", "max_decoder_neighbor"]
    expected = {f"{name}__{other}" for name in per_run for other in ("run_a", "run_c")}
    expected |= {"latent", "similarity", "unshared", "shared_class", *(f"n_shared_{name}" for name in DEFINITIONS)}
    expected |= {f"stability_{name}" for name in DEFINITIONS}
    assert set(told.columns) == expected
    lonely = (told["decoder_partner__run_a"] < 0) & (told["decoder_partner__run_c"] < 0)
    assert (
        told["similarity"].isna().tolist()
        == (
            lonely
            | (
                (told["encoder_cosine__run_a"] + told["decoder_cosine__run_a"]).isna()
                & (told["encoder_cosine__run_c"] + told["decoder_cosine__run_c"]).isna()
            )
        ).tolist()
    )
    path = tmp_path / "latents.overlap.parquet"
    write_table(path, told, inputs="x")
    pd.testing.assert_frame_equal(read_table(path), told, check_dtype=False)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10_000))
def test_orders_that_must_hold(n_runs: int, seed: int) -> None:
    runs, tables, alive = study(n_runs, 12, seed)
    found = measure_overlap(runs, tables, alive, resamples=20)
    for population in (found.alive, found.all):
        value = {name: population[name].value.value for name in DEFINITIONS}
        assert value["strict"] <= value["both"] <= value["decoder"]
        assert value["strict"] <= value["lenient"]
        for got in population.values():
            only, every = [x.value for x in got.only_one], [x.value for x in got.all_of_n]
            assert all(a >= b - 1e-12 for a, b in pairwise(only))
            assert all(a >= b - 1e-12 for a, b in pairwise(every))
            for figure in (got.value, *got.only_one, *got.all_of_n, *got.exactly_n, *got.pairs.values()):
                assert figure.low <= figure.value <= figure.high
    both = found.alive["both"].value.value
    assert found.max_cosine.value >= both - 1e-12  # the nearest is at least as near as the matched


def test_same_seed_same_interval() -> None:
    runs, tables, alive = study(3, 25, seed=3)
    first, again = (measure_overlap(runs, tables, alive, resamples=100, seed=7) for _ in range(2))
    assert first == again
    assert first.sweep.equals(again.sweep)
    other = measure_overlap(runs, tables, alive, resamples=100, seed=8)
    assert first.mean_decoder.value == other.mean_decoder.value
    assert first.mean_decoder != other.mean_decoder
    assert first.alive["strict"].only_one[0].value == 1
    with_none_alive = {**alive, "run_b": np.zeros(25, bool)}
    mute = measure_overlap(runs, tables, with_none_alive, resamples=20)
    assert mute.alive["strict"].regions["run_b"] == []
    assert mute.alive["strict"].pairs["run_a--run_b"].value == pytest.approx(
        find_shared(tables["run_a", "run_b"], "strict")[alive["run_a"]].mean()
    )
    nobody = measure_overlap(runs, tables, {run: np.zeros(25, bool) for run in runs}, resamples=20)
    assert isnan(nobody.alive["strict"].value.value)


def test_intervals_cover_as_often_as_stated() -> None:
    """Latents drawn from a population where 40 % are shared; the same latents ask from both sides.

    Resampling each run by itself would take the two sides for independent and hold the truth about 83 % of the time.
    """
    rng = np.random.default_rng(0)
    held = 0
    trials, width = 200, 150
    for _ in range(trials):
        is_shared = rng.random(width) < 0.4
        cosine = np.where(is_shared, 0.9, 0.3)
        partner = rng.permutation(width)
        back = np.argsort(partner)
        tables = {
            ("a", "b"): table(list(zip(partner, cosine, partner, cosine, strict=True))),
            ("b", "a"): table(list(zip(back, cosine[back], back, cosine[back], strict=True))),
        }
        alive = {"a": np.ones(width, bool), "b": np.ones(width, bool)}
        found = measure_overlap(["a", "b"], tables, alive, resamples=200).alive["strict"].value
        held += found.low <= 0.4 <= found.high
    assert 0.90 <= held / trials <= 0.99


@pytest.mark.parametrize("widths", [None, [20, 25, 40]])
def test_pairs_interval_does_not_depend_on_other_runs(widths: list[int] | None) -> None:
    runs, tables, alive = study(3, 25, seed=4, widths=widths)
    together = measure_overlap(runs, tables, alive, resamples=100)
    for a, b in combinations(runs, 2):
        alone = measure_overlap([a, b], tables, {run: alive[run] for run in (a, b)}, resamples=100)
        for definition in DEFINITIONS:
            pair = f"{a}--{b}"
            assert together.alive[definition].pairs[pair] == alone.alive[definition].pairs[pair]
            assert together.all[definition].pairs[pair] == alone.all[definition].pairs[pair]
        assert alone.alive["both"].pairs[f"{a}--{b}"] == alone.alive["both"].value


def rare(n_runs: int, width: int, counts: list[int]) -> tuple[list[str], Tables]:
    """Runs whose latents have a partner each, of which the first ``counts[k]`` are strict-shared with k + 1 others."""
    runs = [f"run_{'abcdefghij'[i]}" for i in range(n_runs)]
    tables: Tables = {}
    for a, b in combinations(range(n_runs), 2):
        cosines = np.zeros(width)
        start = 0
        for k, n in enumerate(counts):
            if max(a, b) <= k + 1:
                cosines[start : start + n] = 0.9
            start += n
        made = table([(i, float(c), i, float(c)) for i, c in enumerate(cosines)])
        tables[runs[a], runs[b]] = tables[runs[b], runs[a]] = made
    return runs, tables


@pytest.mark.parametrize("n_runs", [2, 3])
def test_few_of_many_follow_the_rule_for_none(n_runs: int) -> None:
    width = 6144
    before = -1.0
    for n in (0, 1, 2, 10, 29, 31, 100):
        runs, tables = rare(n_runs, width, [0] * (n_runs - 2) + [n])
        found = measure_overlap(runs, tables, {run: np.ones(width, bool) for run in runs}, resamples=200)
        value, low, high = found.alive["strict"].value
        want = proportion(n, width)
        assert value == pytest.approx(n / width)
        assert low <= value < high
        assert high == pytest.approx(want.high, rel=0.25)
        assert low == pytest.approx(want.low, rel=0.25, abs=2e-5)
        assert high > before
        before = high
        for of_pair in found.alive["strict"].pairs.values():
            assert of_pair == pytest.approx(found.alive["strict"].value, rel=0.3, abs=2e-5)
        assert 1 - found.alive["strict"].only_one[1].low == pytest.approx(want.high, rel=0.25)
        nearest = found.max_cosine
        assert nearest.high == pytest.approx(want.high, rel=0.25)


@pytest.mark.parametrize("n_units", [50, 400])
@pytest.mark.parametrize("p", [0.003, 0.02, 0.1, 0.5, 0.97, 0.999])
def test_a_fractions_interval_covers_near_both_ends(p: float, n_units: int) -> None:
    runs = ["run_a", "run_b"]
    draw = LatentBootstrap(runs, rare(2, n_units, [0])[1], 1000, 0)
    rng = np.random.default_rng(1)
    held, rounds = 0, 400
    members = {run: np.ones(n_units, bool) for run in runs}
    for _ in range(rounds):
        x = (rng.random(n_units) < p)[:, None]
        found = estimate(mean_over(draw.fractions(dict.fromkeys(runs, x), members)[:, :, 0], axis=1), n_units)
        held += found.low <= p <= found.high
        assert found.low < found.high
    # Counts are discrete: at some fractions of few units even Wilson's own interval covers less than it says.
    by_count = [proportion(count, n_units) for count in range(n_units + 1)]
    of_count = stats.binom.pmf(np.arange(n_units + 1), n_units, p)
    exact = float(sum(of_count[count] for count, each in enumerate(by_count) if each.low <= p <= each.high))
    assert held / rounds >= min(0.95, exact) - 0.04


def test_equal_parts_of_latents_have_an_interval() -> None:
    halves = {run: np.full((100, 1), 0.5) for run in ("run_a", "run_b")}
    draw = LatentBootstrap(list(halves), rare(2, 100, [0])[1], 100, 0)
    drawn = mean_over(draw.fractions(halves, {run: np.ones(100, bool) for run in halves})[:, :, 0], axis=1)
    assert estimate(drawn, 100) == pytest.approx(proportion(50, 100))


def test_what_was_never_seen_is_not_surely_nowhere() -> None:
    """None or all of 40 latents come back: no resample differs, yet 1 in 50 of the population might."""
    width = 40
    alike, apart = (table([(i, cosine, i, cosine) for i in range(width)]) for cosine in (0.9, 0.3))
    alive = {run: np.arange(width) >= 8 for run in "ab"}
    bound = 1.96**2 / (32 + 1.96**2)
    none = measure_overlap(["a", "b"], {("a", "b"): apart, ("b", "a"): apart}, alive, resamples=50)
    every = measure_overlap(["a", "b"], {("a", "b"): alike, ("b", "a"): alike}, alive, resamples=50)
    for found in (none.alive["strict"].value, none.alive["both"].pairs["a--b"], none.max_cosine):
        assert tuple(found) == pytest.approx((0, 0, bound), abs=1e-4)
    for found in (every.alive["strict"].value, every.alive["both"].pairs["a--b"], every.max_cosine):
        assert tuple(found) == pytest.approx((1, 1 - bound, 1), abs=1e-4)
    assert tuple(none.all["strict"].value)[2] < bound  # more latents, more sure
    assert tuple(every.alive["strict"].only_one[0]) == (1, 1, 1)  # a latent is in its own SAE, whatever was drawn
    assert tuple(every.mean_decoder) == pytest.approx((0.9, 0.9, 0.9))  # no fraction: nothing is known of its spread


def test_threshold_sweep_passes_through_the_values() -> None:
    runs, tables, alive = study(3, 30, seed=5)
    swept = sweep_thresholds(runs, tables, alive)
    at = swept[swept["threshold"] == 0.7].iloc[0]
    found = measure_overlap(runs, tables, alive, resamples=5)
    for definition in DEFINITIONS:
        assert at[definition] == pytest.approx(found.alive[definition].value.value)
    assert (swept["strict"].diff().dropna() <= 0).all()
    assert (swept["lenient"] == swept["lenient"][0]).all()


def test_bimodality_tells_two_modes_from_one() -> None:
    rng = np.random.default_rng(0)

    def find(cosines: np.ndarray) -> Dip:
        n = len(cosines)
        made = table([(i, c, i, c) for i, c in enumerate(cosines)])
        every = np.ones(n, bool)
        whole = measure_overlap(["a", "b"], {("a", "b"): made, ("b", "a"): made}, {"a": every, "b": every}, resamples=2)
        return whole.bimodality

    one, two = rng.normal(0.6, 0.1, 1000), np.concatenate([rng.normal(0.3, 0.05, 500), rng.normal(0.9, 0.05, 500)])
    assert find(one).p_value > 0.1
    assert find(two).p_value < 0.001
    assert find(two).value.low > 0.1 > find(one).value.high


def test_pw_mcc_has_its_spread_over_pairs() -> None:
    runs, tables, alive = study(4, 30, seed=2)
    whole = measure_overlap(runs, tables, alive, resamples=5)
    means = [
        np.mean([tables[x, y]["decoder_cosine"].to_numpy()[alive[x]].mean() for x, y in ((a, b), (b, a))])
        for a, b in combinations(runs, 2)
    ]
    assert whole.mean_decoder.value == pytest.approx(np.mean(means), abs=1e-6)
    assert whole.pw_mcc_sd == pytest.approx(np.std(means, ddof=1), abs=1e-6)
    assert isnan(measure_overlap(runs[:2], tables, alive, resamples=5).pw_mcc_sd)


def test_nulls_have_every_figure_and_share_nothing() -> None:
    rng = np.random.default_rng(1)
    core = rng.normal(size=(2, 200, 64))
    weights = {run: core + 0.2 * rng.normal(size=core.shape) for run in "abc"}
    tables: Tables = {}
    for a, b in combinations("abc", 2):
        made = align(*weights[a], *weights[b])
        sides = (made.a, made.b)
        tables[a, b], tables[b, a] = add_null(sides, tuple(weights[a]), tuple(weights[b]), (a, b))
    alive = {run: np.ones(200, bool) for run in "abc"}
    found = measure_overlap(["a", "b", "c"], tables, alive, resamples=10)
    assert found.alive["strict"].value.value > 0.95
    assert set(found.nulls) == {"rotated"}
    for null in found.nulls.values():
        assert null.alive["strict"].value.value == 0
        assert null.alive["strict"].only_one[2].value == 1
        assert 0.2 < null.mean_decoder.value < 0.5  # the best of many, and far from 0 by that alone
    for name, null in found.nulls.items():
        alone = {pair: seen for pair, of in tables.items() if (seen := read_null(of)) is not None}
        as_real = measure_overlap(["a", "b", "c"], alone, alive, resamples=10)
        assert null.by_pair == as_real.by_pair
        assert null.mean_max_decoder.value == as_real.mean_max_decoder.value
        assert null.bimodality.of_sample == as_real.bimodality.of_sample < found.bimodality.of_sample
        told = build_latent_table("a", ["a", "b", "c"], tables, alive["a"])
        under = build_latent_table("a", ["a", "b", "c"], alone, alive["a"])
        for column in ("n_shared_strict", "stability_lenient", "n_shared_decoder", "similarity"):
            assert told[f"{column}__{name}"].equals(under[column]), column
            assert not told[column].equals(under[column])
    del tables["a", "c"]["encoder_cosine__rotated"]
    assert measure_overlap(["a", "b", "c"], tables, alive, resamples=10).nulls == {}
    assert "similarity__rotated" in build_latent_table("a", ["a", "b"], tables, alive["a"])
    assert "n_shared_strict__rotated" not in build_latent_table("a", ["a", "b", "c"], tables, alive["a"])


def test_gaussian_columns_of_earlier_versions_are_ignored() -> None:
    runs, tables, alive = study(3, 30, seed=2)
    old = {pair: of.assign(encoder_cosine__gaussian=0.5, decoder_partner__gaussian=0) for pair, of in tables.items()}
    assert measure_overlap(runs, old, alive, resamples=5) == measure_overlap(runs, tables, alive, resamples=5)
    assert build_latent_table(runs[0], runs, old, alive[runs[0]]).equals(
        build_latent_table(runs[0], runs, tables, alive[runs[0]])
    )


def test_figures_of_pairs_and_their_spread() -> None:
    runs, tables, alive = study(4, 30, seed=2, widths=[30, 40, 30, 30])
    found = measure_overlap(runs, tables, alive, resamples=5)
    for figure, column in (
        ("mean_encoder", "encoder_cosine"),
        ("mean_decoder", "decoder_cosine"),
        ("mean_max_encoder", "max_encoder_cosine"),
        ("mean_max_decoder", "max_decoder_cosine"),
    ):
        by_hand = {
            f"{a}--{b}": np.mean([tables[x, y][column][alive[x]].mean() for x, y in ((a, b), (b, a))])
            for a, b in combinations(runs, 2)
        }
        assert found.by_pair[figure] == pytest.approx(by_hand)
        assert getattr(found, figure).value == pytest.approx(np.mean([*by_hand.values()]), abs=1e-3)
    assert found.mean_max_decoder.value >= found.mean_decoder.value
    assert np.std([*found.by_pair["mean_decoder"].values()], ddof=1) == pytest.approx(found.pw_mcc_sd)
    values = [*found.by_pair["max_cosine"].values()]
    assert find_range(found.by_pair["max_cosine"]) == [min(values), max(values)]
    assert find_range({"a--b": 0.5}) is None
    assert find_range({"a--b": 0.5, "a--c": None, "b--c": nan}) is None
    nobody = {**alive, runs[0]: np.zeros(30, bool)}
    assert len(measure_overlap(runs, tables, nobody, resamples=5).by_pair["mean_decoder"]) == 3


def test_what_is_missing_is_named() -> None:
    runs, tables, alive = study(3, 8, seed=0)
    del tables["run_b", "run_c"]
    with pytest.raises(
        NotFound, match=r"'run_b' and 'run_c' are not aligned yet; run `python cli\.py align run_b run_c`"
    ):
        measure_overlap(runs, tables, alive)
    with pytest.raises(BadInput, match="'run_a' has 9 latents, but 8 in its alignment with 'run_b'"):
        measure_overlap(runs[:2], tables, {"run_a": np.ones(9, bool), "run_b": np.ones(8, bool)})
    for few in (["run_a"], ["run_a", "run_a"], []):
        with pytest.raises(BadInput, match="two or more different runs"):
            measure_overlap(few, tables, alive)
    with pytest.raises(BadInput, match="two or more different runs, not 'run_a'"):
        build_latent_table("run_a", ["run_a"], tables, alive["run_a"])
