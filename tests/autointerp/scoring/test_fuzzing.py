"""The fuzzing scorer: marks that are right or wrong and alike in everything else, whatever the latent does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contexts import DenseStore, sampler

from autointerp.contexts.sampler import Context, TestSet
from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import explain_runs
from autointerp.explaining.patterns import Pattern, Patterns
from autointerp.llm.options import LlmOptions
from autointerp.scoring.intervals import balanced_accuracy
from autointerp.scoring.judges.ngram import NgramJudge
from autointerp.scoring.score import score_runs
from autointerp.scoring.scorers import SCORERS
from autointerp.scoring.scorers.fuzzing import FuzzingScorer, mark
from sae.common.files import read_table
from sae.study.run import Run
from sae.study.stage import Compute

W = 16


def activating(n: int, seed: int, density: float = 0.2, lean: float = 0.0) -> list[Context]:
    """``n`` contexts in which a latent fires: in runs, on one token or many, with ``lean`` more often early."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        chance = density * np.exp(-lean * np.arange(W) / W) * rng.choice([0.3, 1.0, 3.0])
        fires = rng.random(W) < np.clip(chance, 0, 1)
        fires |= np.roll(fires, 1) & (rng.random(W) < 0.5)  # runs
        fires[rng.integers(W // 4)] |= not fires.any()
        values = fires * (rng.random(W) + 0.05)
        context = Context(
            1000 * seed + i, tuple(f" {t}" for t in range(W)), tuple(values.tolist()), True, i % 5, "active"
        )
        found.append(context)
    return found


def verdicts(tests: TestSet, says: Callable[[Context], bool]) -> pd.DataFrame:
    rows = [
        {
            "context": c.window,
            "truth": c.truth,
            "p": float(says(c)),
            "label": float(says(c)),
            "failure": None,
            "negative_kind": None if c.truth else c.kind,
        }
        for c in FuzzingScorer().items(tests)
    ]
    return pd.DataFrame(rows)


@given(st.integers(0, 10**6), st.integers(2, 60), st.sampled_from([0.02, 0.1, 0.3, 0.8]), st.sampled_from([0.0, 4.0]))
def test_right_and_wrong_marks_are_the_same_marks(seed: int, n: int, density: float, lean: float) -> None:
    contexts = activating(n, seed, density, lean)
    tests = mark(contexts)
    assert Counter(c.marks for c in tests.active) == Counter(c.marks for c in tests.inactive)
    for cut in range(len(tests.active)):  # and so in any beginning
        assert tests.active[cut].marks == tests.inactive[cut].marks
    originals = {c.window: c for c in contexts}
    used = [c.window for c in (*tests.active, *tests.inactive)]
    assert len(set(used)) == len(used) <= n
    for c in tests.active:
        assert c.marks == tuple(originals[c.window].marked())
        assert c.truth
        assert c.kind == "active"
    for c in tests.inactive:
        assert c.marks is not None
        assert any(c.marks)
        assert not any(m and a > 0 for m, a in zip(c.marks, c.activations, strict=True)), "none of them fires"
        assert c.active
        assert not c.truth
        assert (c.tokens, c.activations) == (originals[c.window].tokens, originals[c.window].activations)
    assert mark(contexts) == tests


def test_a_sparse_latent_loses_no_context() -> None:
    for n in (40, 41):
        tests = mark(activating(n, 3, density=0.05))
        assert len(tests.active) == len(tests.inactive) == 20


def test_dense_tokens_cannot_be_marked_otherwise() -> None:
    assert mark(activating(30, 0, density=5.0)) == TestSet([], [])
    assert mark(activating(1, 0)) == TestSet([], [])
    assert mark([]) == TestSet([], [])


JUDGES: dict[str, Callable[[Context], bool]] = {
    "count": lambda c: sum(c.marks or ()) <= 2,
    "first": lambda c: (c.marks or ()).index(True) < 3,
    "last": lambda c: (c.marks or ())[::-1].index(True) < W // 2,
    "mean": lambda c: float(np.flatnonzero(c.marks or ()).mean()) < W / 3,
    "runs": lambda c: np.diff(np.flatnonzero(c.marks or ())).tolist().count(1) > 0,
    "text": lambda c: hash(c.window) % 2 == 0,
}


@pytest.mark.parametrize("judge", JUDGES)
def test_a_judge_of_marks_alone_scores_half(judge: str) -> None:
    """Over many latents that fire early, in runs, on few tokens or many."""
    truth, said = [], []
    for latent in range(200):
        density, lean = [0.05, 0.15, 0.4][latent % 3], 4.0 * (latent % 2)
        tests = mark(activating(60, latent, density, lean))
        for c in (*tests.active, *tests.inactive):
            truth.append(c.truth)
            said.append(JUDGES[judge](c))
    assert len(truth) > 5000
    assert 0.02 < np.mean(said) < 0.98, "the judge does tell contexts apart"
    found = balanced_accuracy(truth, said)
    if judge == "text":
        assert found.low <= 0.5 <= found.high
    else:
        assert found.value == 0.5


def test_marks_drawn_at_random_would_leak() -> None:
    """What the pairing is for: one wrong token, chosen anywhere, is told from the right ones by counting."""
    rng, truth, said = np.random.default_rng(0), [], []
    for latent in range(50):
        for c in activating(60, latent, 0.4):
            right = rng.random() < 0.5
            truth.append(right)
            said.append((sum(c.marked()) if right else 1) > 1)
    assert balanced_accuracy(truth, said).low > 0.7


def test_a_perfect_judge_scores_one_with_correct_strata() -> None:
    tests = mark(activating(60, 1, 0.1))
    items = FuzzingScorer().items(tests)
    row = FuzzingScorer().score(verdicts(tests, lambda c: c.truth), items)
    assert row.status == "ok"
    assert [e.value for e in (row.random.ba, row.tpr, row.random.tnr, row.random.auroc)] == [1.0] * 4
    assert row.n_active == row.random.n == len(tests.active)
    assert [stratum.value for stratum in row.strata] == [1.0] * 5
    assert row.hard.n == row.same_token.n == 0
    always = FuzzingScorer().score(verdicts(tests, lambda _: True), items)
    assert (always.random.ba.value, [stratum.value for stratum in always.strata]) == (0.5, [1.0] * 5)
    assert SCORERS["fuzzing"] is FuzzingScorer


def test_the_order_gives_nothing_away() -> None:
    tests = mark(activating(100, 2, 0.1))
    items = FuzzingScorer().items(tests)
    assert items == FuzzingScorer().items(TestSet(tests.active[::-1], tests.inactive[::-1]))
    kinds = np.array([c.truth for c in items])
    assert np.abs(np.diff(kinds.astype(int))).sum() > 30


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_contexts_come_from_the_judges_half(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 10**6, (300, W))
    values = rng.random((300, W)) * (rng.random((300, W)) < 0.1) * (rng.random((300, 1)) < 0.6)
    drawn = sampler(DenseStore(tokens, values), n_active=20, n_inactive=20, min_active=10)
    tests = FuzzingScorer().test_set(drawn, 0)
    assert len(tests.active) == len(tests.inactive) == 20
    shown = {c.window for c in drawn.explaining(0)}
    assert not shown & {c.window for c in (*tests.active, *tests.inactive)}
    few = sampler(DenseStore(tokens, values), n_active=200, n_inactive=20, min_active=150)
    assert FuzzingScorer().test_set(few, 0) == TestSet([], [])


def test_the_baseline_judges_only_marked_tokens() -> None:
    patterns = Patterns((Pattern(" raise Error", 0.9, 9.0), Pattern(" x", 0.5, 5.0)), 0.1)
    tokens = (" raise", " Error", " x", " y")
    for marks, expected in (
        ((False, True, False, False), 0.9),  # what stands before a marked token counts as ever
        ((False, False, True, False), 0.5),
        ((False, False, True, True), 1 - 0.5 * 0.9),
        ((False,) * 4, 0.0),
        ((True,) * 4, patterns.compute_probability(tokens)),
    ):
        assert patterns.compute_probability(tokens, marks=marks) == pytest.approx(expected)
    assert NgramJudge().of_marks().settings_hash != NgramJudge().settings_hash


def test_the_baseline_scores_both_ways(tiny_root: Path) -> None:
    run = Run.open("run_a", tiny_root)
    explain_runs([run], Choice(n=6), "ngram", LlmOptions(), Compute("cpu"))
    outcome = score_runs([run], tiny_root, ("detection", "fuzzing"), "ngram", LlmOptions(), 0)
    table = read_table(run.stage_path("scores"))
    fuzzed = table[(table["scorer"] == "fuzzing") & (table["status"] == "ok")]
    assert len(fuzzed) >= 3
    assert outcome.n_failed == 0
    assert (fuzzed["n_active"] == fuzzed["n_inactive"]).all()
    assert fuzzed["balanced_accuracy"].mean() > 0.7  # latents of this study stand for words
