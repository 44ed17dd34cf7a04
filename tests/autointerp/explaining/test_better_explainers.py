"""Explainers that are shown more: silent contexts of similar latents, or the tokens that a latent promotes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from test_llm_explainer import CONTEXTS, context
from tiny_study import cli, harvested_study

from autointerp.contexts.material import Material
from autointerp.contexts.neighbours import Neighbours
from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import Outcome, explain_runs
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.explaining.explainers.base import Evidence
from autointerp.explaining.explainers.contrastive import ContrastiveExplainer
from autointerp.explaining.explainers.input_output import InputOutputExplainer
from autointerp.explaining.explainers.llm import LlmExplainer
from autointerp.journal.journal import Journal
from autointerp.llm.client import LlmClient
from autointerp.llm.options import LlmOptions
from autointerp.llm.prompts import conversation
from autointerp.scoring.dry_run import forecast_explain
from autointerp.scoring.score import score_runs
from sae.common.errors import NotFound
from sae.study.logits import Logits, LogitTable, TokenLogit, ensure_logits
from sae.study.run import Run
from sae.study.stage import Compute

N = 4
CLIENT = LlmClient("http://127.0.0.1:9", model="m")
LOGITS = Logits((TokenLogit(" cat", 2.0), TokenLogit('"\n', 1.0)), (TokenLogit("\u202edog", -2.0),), 0.0, 1.0, 0.0, 3.0)


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory, tiny_neox_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("harvested")
    harvested_study(root, tiny_neox_dir, n_explain=10, n_active=6, n_inactive=6, n_hard=6, n_same_token=0)
    return root


@pytest.fixture
def run(harvested: Path, tmp_path: Path) -> Run:
    return Run.open("run_a", Path(shutil.copytree(harvested, tmp_path / "runs")))


def explain(run: Run, server: FakeServer, name: str) -> Outcome:
    options = LlmOptions(url=server.url, concurrency=2)
    return explain_runs([run], Choice(n=N), name, options, Compute("cpu", 1))


def question_of(explainer: LlmExplainer, *shown: Any) -> str:
    return str(explainer.request(*shown).messages[-1]["content"])


# --- what is shown -------------------------------------------------------------------------------------------


def test_silent_contexts_follow_without_marks() -> None:
    silent = [context(["the", " >>", " sat"], [0.0, 0.0, 0.0]), context(["a", " cat"], [0.0, 0.0])]
    question = question_of(ContrastiveExplainer(CLIENT), CONTEXTS, silent)
    marked, _, rest = question.partition("It is silent in these:")
    assert marked.startswith("In these snippets the marks are ⟦ and ⟧"), "the silent ones have >> in them"
    assert "the ⟦cat⟧ sat" in marked
    assert rest.split("\n\n") == ["", "### Silent snippet 1\nthe >> sat", "### Silent snippet 2\na cat"]
    assert "silent in these" not in question_of(ContrastiveExplainer(CLIENT), CONTEXTS, [])


def test_promoted_tokens_are_quoted_in_two_lines() -> None:
    question = question_of(InputOutputExplainer(CLIENT), CONTEXTS, [], LOGITS)
    *_, more, less = question.splitlines()
    assert more == 'More likely next: " cat", "\\"\\n"'
    assert less == 'Less likely next: "\\u202edog"'
    without = question_of(InputOutputExplainer(CLIENT), CONTEXTS, [], None)
    assert without == question_of(LlmExplainer(CLIENT), CONTEXTS)


@pytest.mark.parametrize("name", ["contrastive", "input_output"])
def test_prompts_differ_from_the_default_and_each_other(name: str) -> None:
    own, default = EXPLAINERS[name](CLIENT), LlmExplainer(CLIENT)  # type: ignore[call-arg]
    assert own.prompt_hash != default.prompt_hash
    assert own.settings_hash != default.settings_hash
    mine, other = (
        {m["content"] for m in conversation(x).prefix if m["role"] == "assistant"} for x in (name, "explain")
    )
    assert len(mine) == len(other) == 3
    assert not mine & other, "no example of the default's"
    assert sum(len(m["content"]) for m in conversation(name).prefix) < 3_500, "not long"


# --- where it comes from -------------------------------------------------------------------------------------


def test_contrast_comes_from_the_explainers_side(run: Run) -> None:
    material = Material.of(run)
    near = Neighbours(material.store, run.read_decoder)
    eligibility = material.eligibility()
    found = 0
    for latent in eligibility["latent"][eligibility["eligible"]].tolist()[:6]:
        shown, silent = Evidence(ContrastiveExplainer(CLIENT), material).of(latent)
        test = material.sampler.testing(latent)
        judged = {c.text for c in [*test.active, *test.inactive, *test.hard, *test.same_token]}
        assert not judged & {c.text for c in [*shown, *silent]}
        assert len(silent) <= ContrastiveExplainer.needs_background
        fires = set(material.store.windows(latent)[0].tolist())
        for of in silent:
            assert (of.kind, of.active, of.window in fires) == ("hard", False, False)
            assert set(material.store.firing_in([of.window])[1].tolist()) & set(near(latent).tolist())
        again = Evidence(ContrastiveExplainer(CLIENT), Material.of(run)).of(latent)
        assert again == (shown, silent)
        found += len(silent)
    assert found >= 12


def test_test_sets_stay_as_they_were(run: Run) -> None:
    """What an explainer is shown in addition displaces nothing."""
    first, second = Material.of(run).sampler, Material.of(run).sampler
    second.background(3, 5, "hard")
    assert first.testing(3) == second.testing(3)
    assert first.background(3, 5) == second.background(3, 5)


def test_tokens_are_those_of_the_latent(run: Run) -> None:
    with FakeServer() as server:
        outcome = explain(run, server, "input-output")
        assert (outcome.n_done, outcome.n_failed) == (N, 0)
        questions = [seen.question for seen in server.requests]
    table = LogitTable(run)
    with Journal(run.journal_path) as journal:
        latents = journal.explanations(explainer="input_output")["latent"].tolist()
    expected = {question_of(InputOutputExplainer(CLIENT), [], [], table[i]).splitlines()[-2] for i in latents}
    assert {question.splitlines()[-2] for question in questions} == expected
    assert all(line.startswith("More likely next: ") for line in expected)


def test_a_hookpoint_without_promoted_tokens_is_explained_all_the_same(tiny_root: Path) -> None:
    run = Run.open("run_a", tiny_root)  # at a norm, which does not write into the stream
    with FakeServer() as server:
        outcome = explain(run, server, "input_output")
        assert not any("More likely" in seen.question for seen in server.requests)
    assert (outcome.n_done, outcome.n_failed) == (N, 0)
    (note,) = (note for note in outcome.notes if "promoted" in note)
    assert re.search("run_a: explained without promoted tokens: .* does not write into the residual stream", note)


# --- the commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["contrastive", "input_output"])
def test_a_dry_run_counts_what_is_then_sent(run: Run, name: str) -> None:
    with FakeServer() as server:
        options = LlmOptions(url=server.url)
        if name == "input_output":
            with pytest.raises(NotFound, match=r"has no promoted and suppressed tokens; run `.*harvest --sae run_a"):
                forecast_explain([run], Choice(n=N), name, options, None)
            ensure_logits([run], Compute("cpu", 1))
        before = forecast_explain([run], Choice(n=N), name, options, None)
        assert not server.requests
        explain(run, server, name)
        sent = sum(len(m["content"]) for seen in server.requests for m in seen.body["messages"])
    assert before.requests == len(server.requests) == N
    assert before.prompt_tokens == pytest.approx(sent / 4, rel=0.01)


def test_explainers_of_one_run_are_scored_and_told_apart(run: Run) -> None:
    names = ("llm", "contrastive", "input_output")
    with FakeServer() as server:
        for name in names:
            assert explain(run, server, name).n_done == N
            assert explain(run, server, name).n_new == 0
        score_runs([run], run.root, ("detection",), "llm", LlmOptions(url=server.url), control_latents=0)
    scores = Run("run_a", run.root).latents()
    assert scores["balanced_accuracy"].notna().sum() == N
    for name in names:
        words = ("--sae", "run_a", "--explainer", name.replace("_", "-"), "--root", run.root, "--json")
        found = cli("report", *words).well().json
        assert (found["methods"]["explainer"]["name"], found["scores"]["n_scored"]) == (name, N)
        assert {other["explainer"] for other in found["methods"]["other_explainers"]} == {*names, "ngram"} - {name}
