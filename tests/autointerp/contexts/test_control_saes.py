"""`explain` and `score` take the control SAEs of the study along, by the same protocol; nothing is asked twice."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_server import FakeServer, error, sensible
from tiny_study import harvested_study

from autointerp.contexts.material import Material
from autointerp.contexts.selection import Choice, choose_latents, choose_sample_size, draw_control_latents
from autointerp.explaining.explain import Outcome, explain_runs
from autointerp.findings.json_values import to_json
from autointerp.findings.study import findings_of
from autointerp.journal.journal import Journal
from autointerp.llm.limits import Budget, BudgetSpent
from autointerp.llm.options import LlmOptions
from autointerp.scoring.dry_run import forecast_explain, forecast_score
from autointerp.scoring.score import score_runs
from sae.common.errors import Unavailable
from sae.common.files import read_table
from sae.study.controls import find_controls
from sae.study.run import Run, study_runs
from sae.study.stage import Compute

N = 4
CPU = Compute("cpu", 1)
NONE = LlmOptions()
SIZES = {"n_explain": 10, "n_active": 6, "n_inactive": 6, "n_hard": 3, "n_same_token": 0}
NAMES = ["run_a", "run-frozen_a", "run-untrained_a"]


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory, tiny_neox_dir: Path) -> Path:
    """A root with one run and its controls, harvested."""
    root = tmp_path_factory.mktemp("harvested")
    harvested_study(root, tiny_neox_dir, controls=True, **SIZES, min_explain=3, min_active=6)
    return root


@pytest.fixture
def run(harvested: Path, tmp_path: Path) -> Run:
    return Run.open("run_a", Path(shutil.copytree(harvested, tmp_path / "runs")))


def explain(run: Run, n: int = N, server: FakeServer | None = None, sample: int | None = None, **of: Any) -> Outcome:
    options = NONE if server is None else LlmOptions(url=server.url, concurrency=2, budget=of.pop("budget", None))
    return explain_runs([run], Choice(n=n, **of), "ngram" if server is None else "llm", options, CPU, sample)


def score(run: Run | None, root: Path, server: FakeServer | None = None, sample: int | None = None) -> Outcome:
    options = NONE if server is None else LlmOptions(url=server.url, concurrency=2, protocol="batch")
    kind = "ngram" if server is None else "llm"
    return score_runs([run] if run else None, root, ("detection",), kind, options, 2, None, sample)


def explained(run: Run, explainer: str = "ngram") -> list[int]:
    if not run.journal_path.exists():
        return []
    with Journal(run.journal_path) as journal:
        table = journal.explanations(explainer=explainer)
    return sorted(table["latent"].tolist())


def saes(root: Path) -> list[Run]:
    return [Run.open(name, root) for name in NAMES]


def rows_of(run: Run) -> Any:
    table = read_table(run.stage_path("scores"))
    return table[table["status"] == "ok"]


# --- the n-gram baseline -----------------------------------------------------------------------------------------


def test_a_sample_of_each_is_explained_and_scored(run: Run) -> None:
    outcome = explain(run)
    assert outcome.runs == NAMES
    assert (outcome.n_done, outcome.n_new, outcome.n_failed) == (3 * N, 3 * N, 0)
    assert outcome.n_controls == 2 * N
    assert [len(explained(sae)) for sae in saes(run.root)] == [N, N, N]
    assert outcome.explained == ["run_a"], "scoring it scores the controls too"
    scored = score(run, run.root)
    assert scored.runs == NAMES
    assert scored.n_failed == 0
    assert (scored.n_done, scored.n_controls) == (3 * N, 2 * N)
    own, *controls = (rows_of(sae) for sae in saes(run.root))
    assert Counter(own["control"]) == {"none": N, "swap": 2}
    for table in controls:
        assert Counter(table["control"]) == {"none": N}, "a control has no control"
        assert (table["n_active"] + table["n_inactive"] == 12).all()
        assert (table["n_hard"] > 0).any(), "the harder negatives too"
    tree = to_json(findings_of(run, study_runs("run", run.root)).scores)
    assert [row["n_scored"] for row in tree["control_saes"]] == [N, N]
    assert tree["lacking_controls"] is None
    assert tree["baseline"] is None, "the scores are the baseline's"
    again = explain(run), score(run, run.root)
    assert [outcome.n_new for outcome in again] == [0, 0]


def test_as_many_as_are_asked_for(run: Run) -> None:
    explain(run, sample=0)
    assert [len(explained(sae)) for sae in saes(run.root)] == [N, 0, 0]
    notes = score(run, run.root).notes
    assert any("not explained, so not scored" in note for note in notes)
    explain(run, sample=2)
    few = [explained(sae) for sae in saes(run.root)[1:]]
    assert [len(latents) for latents in few] == [2, 2]
    explain(run, sample=4)
    for before, sae in zip(few, saes(run.root)[1:], strict=True):
        assert set(before) < set(explained(sae)), "the sample grows"
    score(run, run.root, sample=1)
    assert [len(rows_of(sae)) for sae in saes(run.root)[1:]] == [1, 1]
    score(run, run.root)
    assert [len(rows_of(sae)) for sae in saes(run.root)[1:]] == [4, 4]


@pytest.mark.parametrize(
    ("choice", "asks_model", "asked", "n_of_run", "size"),
    [
        (Choice(), True, None, 200, 50),
        (Choice(), True, None, 20, 20),
        (Choice(), False, None, 400, 200),
        (Choice(indices=(1, 2)), True, None, 2, 0),
        (Choice(indices=(1, 2)), True, 5, 2, 5),
        (Choice(), True, 0, 200, 0),
        (Choice(), True, 500, 200, 500),
    ],
)
def test_the_number_that_nobody_named(
    choice: Choice, asks_model: bool, asked: int | None, n_of_run: int, size: int
) -> None:
    assert choose_sample_size(choice, asks_model, asked, n_of_run) == size


@pytest.mark.parametrize("n", [1, 3, 5, 32])
def test_the_sample_is_the_one_explain_takes(run: Run, n: int) -> None:
    for control in find_controls(run).values():
        table = Material.of(control).eligibility()
        eligible = table["latent"][table["eligible"]].tolist()
        assert draw_control_latents(control, n) == choose_latents(control, pd.DataFrame(), eligible, Choice(n=n))


def test_without_names_they_are_scored_as_controls(run: Run) -> None:
    explain(run)
    assert score(None, run.root).runs == NAMES
    assert Counter(rows_of(saes(run.root)[1])["control"]) == {"none": N}


def test_a_named_control_is_an_ordinary_run(run: Run) -> None:
    frozen = find_controls(run)["frozen"]
    assert explain(frozen).runs == ["run-frozen_a"]
    assert score(frozen, run.root).runs == ["run-frozen_a"]
    assert Counter(rows_of(frozen)["control"]) == {"none": N, "swap": 2}


def test_controls_that_were_not_harvested_are(run: Run) -> None:
    for sae in saes(run.root)[1:]:
        shutil.rmtree(sae.firings_folder)
    assert explain(run).runs == NAMES


def test_a_control_without_enough_contexts_stops_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from autointerp.contexts.sampler import ContextSampler

    real = ContextSampler.eligible
    frozen = find_controls(run)["frozen"].store().digest

    def eligible(self: ContextSampler, latent: int) -> tuple[bool, str]:
        return (False, "fires nearly everywhere") if self.store.digest == frozen else real(self, latent)

    monkeypatch.setattr(ContextSampler, "eligible", eligible)
    outcome = explain(run)
    assert outcome.n_done == 2 * N
    assert any("run-frozen_a" in note and "no latent has enough contexts" in note for note in outcome.notes)


# --- a language model --------------------------------------------------------------------------------------------


def questions(server: FakeServer) -> int:
    return len([seen for seen in server.requests if seen.path.endswith("/chat/completions")])


def chat_windows(run: Run, judge: str) -> dict[int, set[int]]:
    with Journal(run.journal_path) as journal:
        table = journal.verdicts(judge=judge, control="none")
    return {latent: set(table.loc[table["latent"] == latent, "context"]) for latent in set(table["latent"].tolist())}


def test_language_model_gets_a_baseline_on_its_contexts(run: Run) -> None:
    with FakeServer() as server:
        explain(run, server=server)
        assert questions(server) == 3 * N, "the baseline asks nothing"
        assert explained(run, "ngram") == explained(run, "llm")
        assert [explained(sae) for sae in saes(run.root)[1:]] == [[], []], "it stands beside the run alone"
        before = questions(server)
        score(run, run.root, server)
        own, swapped, parts = N, 2, -(-15 // 5)
        assert questions(server) - before == (3 * own + swapped) * parts, "no model judges the baseline"
        score(run, run.root, server)
        assert questions(server) - before == (3 * own + swapped) * parts
    assert chat_windows(run, "ngram") == chat_windows(run, "llm")
    table = rows_of(run)
    both = table[table["control"] == "none"].groupby("judge")["explainer"].agg(set).to_dict()
    assert both == {"llm": {"llm"}, "ngram": {"ngram"}}
    assert (table["n_failed"] == 0).all()
    assert table["stratum_tpr"].map(len).min() > 0, "of both judges it is known what was asked"
    found = to_json(findings_of(run, study_runs("run", run.root)))
    assert found["methods"]["judge"]["name"] == "llm"
    assert found["scores"]["baseline"]["n_scored"] == N
    assert [row["n_scored"] for row in found["scores"]["control_saes"]] == [N, N]


def test_a_model_judges_when_only_ngrams_exist(run: Run) -> None:
    explain(run, sample=0)
    with FakeServer() as server:
        assert score(run, run.root, server).n_done == N
        assert questions(server) > 0


def test_a_dry_run_counts_them(run: Run) -> None:
    with FakeServer() as server:
        options = LlmOptions(url=server.url, protocol="batch")
        for sample in (None, 2, 0):
            foretold = forecast_explain([run], Choice(n=N), "llm", options, None, sample)
            assert foretold.requests == N + 2 * (N if sample is None else sample)
        whole = forecast_explain([run], Choice(n=N), "llm", options, None).requests
        explain(run, server=server)
        assert questions(server) == whole
        for named, sample in (([run], None), (None, None), ([run], 1), ([run], 0)):
            args = ("detection",), "llm", options, None, 2, None
            foretold = forecast_score(named, run.root, *args, sample)
            assert foretold.requests == (N + 2 + 2 * (N if sample is None else sample)) * 3
        whole = forecast_score([run], run.root, *args).requests
        before = questions(server)
        score(run, run.root, server)
        assert questions(server) - before == whole
        assert forecast_score([run], run.root, *args).requests == 0


def test_a_dry_run_before_their_harvest_says_so(run: Run) -> None:
    shutil.rmtree(find_controls(run)["frozen"].firings_folder)
    with FakeServer() as server:
        foretold = forecast_explain([run], Choice(n=N), "llm", LlmOptions(url=server.url), None)
    assert any("control SAEs are not counted" in note for note in foretold.notes)


def test_a_stopped_call_resumes_with_what_remains(run: Run) -> None:
    with FakeServer() as server:
        server.answer = lambda body: sensible(body) if questions(server) <= N + 2 else error(401)
        with pytest.raises(Unavailable):
            explain(run, server=server)
    with FakeServer() as server:
        outcome = explain(run, server=server)
        assert N <= questions(server) <= 2 * N - 2 + 2
        assert outcome.n_done == 3 * N


def test_the_budget_holds_for_them_too(run: Run) -> None:
    with FakeServer() as server:
        with pytest.raises(BudgetSpent) as caught:
            explain(run, server=server, budget=Budget(tokens=2000))
        assert f"0 of {N} latents are finished" in str(caught.value)
        asked = questions(server)
        assert asked < 3 * N
        explain(run, server=server)
        assert questions(server) == 3 * N


def test_further_draws_and_replicates_have_their_controls(run: Run) -> None:
    with FakeServer() as server:
        options = LlmOptions(url=server.url, protocol="batch")
        explained = explain_runs([run], Choice(n=N), "llm", options, CPU, 2, draws=2)
        assert (explained.n_done, explained.n_controls) == (2 * (N + 4), 8)
        args = ("detection",), "llm", options
        repeats: dict[str, Any] = {"control_latents": 2, "draws": 2, "replicates": 2}
        foretold, before = forecast_score([run], run.root, *args, None, **repeats), questions(server)
        score_runs([run], run.root, *args, **repeats)
        assert questions(server) - before == foretold.requests
    for draw, replicate in ((0, 0), (1, 0), (0, 1), (1, 1)):
        found = findings_of(run, study_runs(run.study, run.root), draw=draw, replicate=replicate).scores
        assert found is not None
        assert found.control is not None
        assert (found.control.n_scored, [of.n_scored for of in found.control_saes]) == (2, [2, 2])
