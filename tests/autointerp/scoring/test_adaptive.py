"""Adaptive scoring: the score that survives stopping, and rounds that a resumed run goes through in the same way."""

from __future__ import annotations

import itertools
import shutil
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_server import FakeServer, Reply, error, sensible
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from tiny_study import harvested_study

from autointerp.contexts.sampler import Context, Kind, TestSet
from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import Outcome, explain_runs
from autointerp.journal.journal import Journal
from autointerp.llm.options import LlmOptions
from autointerp.scoring.adaptive import (
    Look,
    Stop,
    StoppingRule,
    Tally,
    _score,
    find_stop,
    interval,
    lay_out,
    schedule,
    stops,
    unbiased,
)
from autointerp.scoring.intervals import balanced_accuracy
from autointerp.scoring.score import score_runs
from autointerp.scoring.scorers.detection import DetectionScorer
from sae.common.errors import BadInput, Unavailable
from sae.common.files import read_table
from sae.settings import ContextSettings
from sae.study.run import Run
from sae.study.stage import Compute

# The looks, and the rule as a function of what has been judged


@given(st.integers(2, 400), st.integers(2, 400))
def test_looks_grow_to_the_whole_test_set(n_active: int, n_inactive: int) -> None:
    looks = schedule(n_active, n_inactive)
    assert looks[-1] == (n_active, n_inactive)
    assert all(max(after) > max(before) for before, after in itertools.pairwise(looks))
    assert all(after >= before and after[1] >= before[1] for before, after in itertools.pairwise(looks))
    assert max(looks[0]) >= min(20, n_active, n_inactive)
    assert len(looks) <= 16


def test_the_looks_of_the_usual_test_set() -> None:
    assert schedule(50, 50) == [(20, 20), (25, 25), (30, 30), (40, 40), (50, 50)]


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_the_interval_is_movers_of_clopper_and_pearsons(n: int, m: int, data: st.DataObject) -> None:
    x, y = data.draw(st.integers(0, n)), data.draw(st.integers(0, m))
    one, two = (binomtest(a, b).proportion_ci(0.95, method="exact") for a, b in ((x, n), (y, m)))
    value = (x / n + y / m) / 2
    below = np.hypot(x / n - one.low, y / m - two.low) / 2
    above = np.hypot(one.high - x / n, two.high - y / m) / 2
    assert np.allclose(interval(x, n, y, m), (value - below, value + above), atol=1e-9)


def every_course(looks: tuple[Look, ...], width: float) -> dict[tuple[int, int, int], tuple[float, float]]:
    """(look, right active, right inactive) → the first look's two rates, averaged over all courses that stop there."""
    found = defaultdict(list)
    n, m = looks[-1]
    for active, inactive in itertools.product(itertools.product((0, 1), repeat=n), itertools.product((0, 1), repeat=m)):
        for number, (a, b) in enumerate(looks):
            x, y = sum(active[:a]), sum(inactive[:b])
            if number == len(looks) - 1 or stops(Look(a, b), width)[x, y]:
                a1, b1 = looks[0]
                # Orders that differ only after the stop are one course, and there are equally many of each course.
                found[number, x, y].append((sum(active[:a1]) / a1, sum(inactive[:b1]) / b1))
                break
    means = {key: np.mean(courses, axis=0).tolist() for key, courses in found.items()}
    return {key: (tpr, tnr) for key, (tpr, tnr) in means.items()}


@pytest.mark.parametrize("looks", [(Look(2, 2), Look(4, 4)), (Look(2, 1), Look(3, 3), Look(5, 4))])
@pytest.mark.parametrize("width", [0.2, 0.33, 0.36, 0.39])
def test_the_rates_are_those_of_first_looks(looks: tuple[Look, ...], width: float) -> None:
    expected = every_course(looks, width)
    for (number, x, y), rates in expected.items():
        assert unbiased(looks[: number + 1], width, x, y) == pytest.approx(rates), (number, x, y)


def test_without_stopping_the_rates_are_the_raw_ones() -> None:
    assert unbiased((Look(20, 20), Look(30, 30)), 0.01, 21, 27) == pytest.approx((21 / 30, 27 / 30))


N_SIMULATED = 8_000  # the standard error of a coverage of .96 is .0022, of a mean score less than .001


def simulated(
    tpr: float, tnr: float, half_width: float, n: int, naive: bool = False, seed: int = 0
) -> tuple[float, float, float]:
    """Coverage, bias and mean contexts judged over ``N_SIMULATED`` latents of known rates."""
    rng = np.random.default_rng(seed)
    looks = schedule(n, n)
    right = [rng.random((N_SIMULATED, n)) < rate for rate in (tpr, tnr)]
    counts = [np.stack([part[:, : look[0]].sum(1) for look in looks], axis=1) for part in right]
    known: dict[tuple[int, ...], tuple[float, float, float]] = {}

    def at(number: int, x: int, y: int) -> tuple[float, float, float]:
        size = looks[number][0]
        if (number, x, y) not in known:
            if naive:
                truth = np.arange(2 * size) < size
                label = np.concatenate([np.arange(size) < x, np.arange(size) >= y])
                known[number, x, y] = balanced_accuracy(truth, label)
            else:  # the tallies of earlier looks are read for their sizes alone
                earlier = [Tally(a, 0, b, 0, 0) for a, b in looks[:number]]
                known[number, x, y] = _score([*earlier, Tally(size, x, size, y, 0)], half_width)[0]
        return known[number, x, y]

    covered = bias = judged = 0.0
    truth = (tpr + tnr) / 2
    for xs, ys in zip(*(c.tolist() for c in counts), strict=True):
        for number, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if naive:
                _, low, high = at(number, x, y)
                narrow = (high - low) / 2 <= half_width
            else:
                narrow = bool(stops(looks[number], half_width)[x, y])
            if narrow or number == len(looks) - 1:
                value, low, high = at(number, x, y)
                covered += low <= truth <= high
                bias += value - truth
                judged += 2 * looks[number][0]
                break
    return covered / N_SIMULATED, bias / N_SIMULATED, judged / N_SIMULATED


RATES = [(0.5, 0.5), (0.75, 0.75), (0.9, 0.9), (0.95, 0.95), (0.98, 0.98), (0.6, 0.95), (0.9, 0.98), (0.5, 0.98)]


@pytest.mark.parametrize(("half_width", "n"), [(0.065, 50), (0.1, 50), (0.065, 95), (0.127, 30)])
def test_the_reported_interval_covers_and_is_unbiased(half_width: float, n: int) -> None:
    for tpr, tnr in RATES:
        covered, bias, _ = simulated(tpr, tnr, half_width, n)
        assert covered >= 0.94, (tpr, tnr, covered)
        assert abs(bias) < 0.003, (tpr, tnr, bias)  # four standard errors of the simulation


def test_stopping_on_a_usual_interval_breaks_it() -> None:
    covered, bias, _ = simulated(0.98, 0.98, 0.1, 50, naive=True)
    assert covered < 0.9
    covered, bias, _ = simulated(0.9, 0.9, 0.1, 50, naive=True)
    assert bias > 0.003  # more than is allowed above


def test_good_explanations_take_half_the_contexts() -> None:
    assert simulated(0.98, 0.98, 0.065, 50)[2] < 55
    assert simulated(0.75, 0.75, 0.127, 50)[2] < 60


# Rounds of contexts


def contexts(n: int, active: bool, start: int, kind: Kind | None = None) -> list[Context]:
    kind = kind or ("active" if active else "random")
    return [Context(start + i, ("x",), (1.0 * active,), active, 0, kind) for i in range(n)]


Rounds = list[list[Context]]
Labels = dict[int, bool | None]


def rounds(n_active: int = 50, n_inactive: int = 50) -> Rounds:
    """Of a latent with so many contexts, where 50 of each kind are wanted."""
    found = TestSet(contexts(n_active, True, 0), contexts(n_inactive, False, 1000))
    return lay_out(found, DetectionScorer().items)


def test_rounds_hold_every_context_once_and_take_beginnings() -> None:
    found = rounds()
    assert len({c.window for c in up_to(found, len(found) - 1)}) == 100
    assert {c.window for c in found[0]} == {*range(20), *range(1000, 1020)}
    assert {c.window for c in up_to(found, 2)} == {*range(30), *range(1000, 1030)}


def with_harder(n_active: int = 50, n_inactive: int = 50, n_hard: int = 20, n_same_token: int = 20) -> Rounds:
    harder = contexts(n_hard, False, 2000, "hard"), contexts(n_same_token, False, 3000, "same_token")
    found = TestSet(contexts(n_active, True, 0), contexts(n_inactive, False, 1000), *harder)
    return lay_out(found, DetectionScorer().items)


@given(st.integers(5, 60), st.integers(5, 60), st.integers(0, 40), st.integers(0, 40))
def test_every_round_has_the_same_mix_of_negatives(n_active: int, n: int, n_hard: int, n_same: int) -> None:
    found = with_harder(n_active, n, n_hard, n_same)
    every = [c.window for c in up_to(found, len(found) - 1)]
    assert len(every) == len(set(every)) == n_active + n + n_hard + n_same
    for number in range(len(found)):
        counts = Counter(c.kind for c in up_to(found, number))
        assert abs(counts["hard"] - counts["random"] * n_hard / n) <= 0.5
        assert abs(counts["same_token"] - counts["random"] * n_same / n) <= 0.5


def test_harder_negatives_do_not_affect_stopping() -> None:
    found = with_harder()
    right = answered(found, 0)
    wrong = {c.window for c in found[0] if c.kind in ("hard", "same_token")}
    assert len(wrong) == 16
    assert stop(found, right, 0.1) == stop(found, answered(found, 0, wrong), 0.1)
    assert stop(found, right, 0.1) == stop(found, right | dict.fromkeys(wrong, None), 0.1)
    assert stop(found, right, 0.1) == stop(rounds(), answered(rounds(), 0), 0.1)
    del right[min(wrong)]
    assert stop(found, right, 0.1) is None, "they belong to the round"


def up_to(found: Rounds, number: int) -> list[Context]:
    return [context for part in found[: number + 1] for context in part]


def stop(found: Rounds, labels: Labels, half_width: float) -> Stop | None:
    return find_stop(found, labels, {"half_width": half_width, "n_active": 50, "n_inactive": 50})


def answered(found: Rounds, number: int, wrong: set[int] = frozenset()) -> Labels:  # type: ignore[assignment]
    return {c.window: c.active != (c.window in wrong) for c in up_to(found, number)}


def test_an_unfinished_round_decides_nothing() -> None:
    found = rounds()
    labels = answered(found, 0)
    assert stop(found, labels, 0.1) is not None
    del labels[19]
    assert stop(found, labels, 0.1) is None


def test_what_was_judged_beyond_the_stop_changes_nothing() -> None:
    found = rounds()
    everything = answered(found, 4, wrong={40, 41, 42, 1045})
    assert stop(found, everything, 0.1) == stop(found, answered(found, 0), 0.1)


def test_what_stopped_it_is_told() -> None:
    wrong = {*range(0, 50, 3), *range(1000, 1050, 3)}
    found = rounds()
    assert stop(found, answered(found, 4), 0.065).why == "narrow enough"  # type: ignore[union-attr]
    assert stop(found, answered(found, 4, wrong), 0.065).why == "cap"  # type: ignore[union-attr]
    few = rounds(22, 22)
    assert stop(few, answered(few, 1, wrong), 0.065).why == "out of contexts"  # type: ignore[union-attr]


def test_too_many_failures_decide_nothing() -> None:
    found = rounds()
    labels = answered(found, 0)
    few = labels | {3: None, 1004: None}
    end = stop(found, few, 0.15)
    assert end is not None
    assert end.estimate.low == pytest.approx(float(interval(19, 19, 19, 19)[0]))
    assert stop(found, labels | dict.fromkeys(range(10), None), 0.15) is None, "the next round is to be judged"
    assert stop(found, answered(found, 4) | dict.fromkeys(range(50), None), 0.15).why == "cap"  # type: ignore[union-attr]


@given(st.integers(2, 300), st.integers(2, 300), st.integers(4, 1000))
@settings(max_examples=50)
def test_a_cap_keeps_the_proportion_of_the_kinds(n_active: int, n_inactive: int, cap: int) -> None:
    capped = StoppingRule(0.1, cap).cap(ContextSettings(n_active=n_active, n_inactive=n_inactive))
    assert capped.n_active + capped.n_inactive == cap
    share = cap * n_active / (n_active + n_inactive)
    assert abs(capped.n_active - min(max(share, 2), cap - 2)) <= 0.5


@pytest.mark.parametrize(("half_width", "cap"), [(0.0, None), (0.7, None), (float("nan"), None), (0.1, 3), (0.1, 5000)])
def test_what_cannot_be_asked_for_is_refused(half_width: float, cap: int | None) -> None:
    with pytest.raises(BadInput, match=r"--ci-half-width|--max-contexts"):
        StoppingRule(half_width, cap)


# From the command's function to the score table

N = 4
WIDE = StoppingRule(0.13, 100)


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory, tiny_neox_dir: Path) -> Path:
    """A root with one run whose latents have explanations."""
    root = tmp_path_factory.mktemp("explained")
    runs = harvested_study(root, tiny_neox_dir, n_explain=10, n_active=30, n_inactive=30)
    with FakeServer() as server:
        explain_runs(runs, Choice(n=N), "llm", LlmOptions(url=server.url), Compute("cpu", 1))
    return root


@pytest.fixture
def run(explained: Path, tmp_path: Path) -> Run:
    return Run.open("run_a", Path(shutil.copytree(explained, tmp_path / "runs")))


def score(run: Run, server: FakeServer, precision: StoppingRule | None = WIDE, protocol: str = "batch") -> Outcome:
    options = LlmOptions(url=server.url, concurrency=2, protocol=protocol)
    return score_runs([run], run.root, ("detection",), "llm", options, 1, precision)


def table_of(run: Run) -> pd.DataFrame:
    table = read_table(run.stage_path("scores")).drop(columns=["stratum_tpr"])
    return table[table["judge"] == "llm"].set_index(["latent", "control"])  # the n-gram baseline stands beside


def test_rounds_end_when_narrow_or_used_up(run: Run) -> None:
    with FakeServer() as server:
        scored = score(run, server)
        assert (scored.n_done, scored.n_failed) == (N, 0)
        table = table_of(run)
        assert set(table["stopped"]) <= {"narrow enough", "cap", "out of contexts"}
        narrow = table[table["stopped"] == "narrow enough"]
        assert len(narrow) > 0
        assert ((narrow["ba_high"] - narrow["ba_low"]) / 2 <= WIDE.half_width + 1e-9).all()
        assert (table["precision"] == WIDE.half_width).all()
        assert (narrow["n_active"] + narrow["n_inactive"]).min() < 100
        asked = len(server.requests)
        with Journal(run.journal_path) as journal:
            n_judged = len(journal.verdicts(judge="llm"))
        kinds = ["n_active", "n_inactive", "n_hard", "n_same_token"]
        assert n_judged == table[kinds].sum().sum(), "nothing was judged beyond a stop"
        assert score(run, server).n_new == 0
        assert len(server.requests) == asked


def test_harder_negatives_are_judged_proportionally_and_apart(run: Run) -> None:
    with FakeServer() as server:
        score(run, server)
    table = table_of(run)
    assert (table["n_hard"] > 0).any()
    for kind in ("hard", "same_token"):
        told = table[table[f"ba_{kind}"].notna()]
        assert len(told) > 0
        # Of 50 random ones 33 harder ones of each kind are asked for; a latent may have fewer.
        assert (told[f"n_{kind}"] <= told["n_inactive"] * 33 / 50 + 0.5).all()
        expected = (told["tpr"] + told[f"tnr_{kind}"]) / 2
        assert told[f"ba_{kind}"].to_numpy() == pytest.approx(expected.to_numpy()), "with the corrected rate"
        assert (told[f"ba_{kind}_low"] <= told[f"ba_{kind}"]).all()
        assert (told[f"ba_{kind}"] <= told[f"ba_{kind}_high"]).all()
        assert told[f"auroc_{kind}_low"].isna().all()
    material = StoppingRule(0.1, 100).cap(run.settings.contexts)
    assert (material.n_active, material.n_inactive, material.n_hard, material.n_same_token) == (50, 50, 33, 33)


@pytest.mark.parametrize("answered", [3, 11, 25])
def test_a_resumed_run_equals_an_undisturbed_one(run: Run, explained: Path, tmp_path: Path, answered: int) -> None:
    other = Run.open("run_a", Path(shutil.copytree(explained, tmp_path / "undisturbed")))
    with FakeServer() as server:
        score(other, server)
        whole = len(server.requests)
    assert answered < whole
    with FakeServer() as server:
        server.answer = lambda body: sensible(body) if len(server.requests) <= answered else error(401)
        with pytest.raises(Unavailable):
            score(run, server)
    with FakeServer() as server:
        score(run, server)
        assert len(server.requests) <= whole - answered + 2, "no more than what was in flight is asked again"
    pd.testing.assert_frame_equal(table_of(run), table_of(other))


def test_failures_are_reasked_before_stopping(run: Run) -> None:
    with FakeServer() as server:

        def answer(body: dict[str, Any]) -> Reply | str:
            question = body["messages"][-1]["content"].encode()
            return Reply("neither") if zlib.crc32(question) % 15 == 0 else sensible(body)

        server.answer = answer
        score(run, server, protocol="single")
        before = table_of(run)
        assert before["n_failed"].sum() > 0
    with FakeServer() as server:
        score(run, server, protocol="single")
    after = table_of(run)
    assert (after["n_failed"] == 0).all()


def test_a_fixed_call_keeps_adaptive_scores(run: Run) -> None:
    with FakeServer() as server:
        score(run, server)
        adaptive = table_of(run)
        score(run, server, None)
    both = table_of(run)
    fixed = both[both["stopped"] == ""]
    assert (fixed["n_active"] + fixed["n_inactive"] == 60).all()
    assert fixed["precision"].isna().all()
    pd.testing.assert_frame_equal(both[both["stopped"] != ""], adaptive)


def test_a_stopped_round_is_no_score(run: Run) -> None:
    with FakeServer() as server:
        server.answer = lambda body: sensible(body) if len(server.requests) <= 3 else error(401)
        with pytest.raises(Unavailable):
            score(run, server)
    with FakeServer() as server:
        score(run, server, StoppingRule(0.2))
    table = table_of(run)
    unfinished = table[table["precision"] == WIDE.half_width]
    assert len(unfinished) > 0
    assert unfinished["status"].str.startswith("failed: not judged to its end").all()
    assert unfinished["balanced_accuracy"].isna().all()
