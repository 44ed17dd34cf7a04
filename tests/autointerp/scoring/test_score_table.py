"""The score table is made from the journal, and a `score` that has nothing to ask draws nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from fake_server import FakeServer, Reply, error, sensible
from test_score_by_llm import ITEMS, N, explain, harvested, run, score  # noqa: F401
from tiny_study import change_record

from autointerp.contexts.sampler import ContextSampler
from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import Outcome, explain_runs
from autointerp.journal.journal import Journal
from autointerp.llm.options import LlmOptions
from autointerp.scoring.adaptive import StoppingRule
from autointerp.scoring.score import score_runs
from autointerp.scoring.score_table import COLUMNS
from sae.common.errors import Unavailable
from sae.common.files import digest, read_table, write_table
from sae.study.run import Run
from sae.study.stage import Compute

ALL = 6  # latents explained by n-grams


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The latents whose test sets have been drawn, one after another."""
    found: list[int] = []
    draw: Callable[..., object] = ContextSampler.testing

    def counted(self: ContextSampler, latent: int, *rest: object) -> object:
        found.append(latent)
        return draw(self, latent, *rest)

    monkeypatch.setattr(ContextSampler, "testing", counted)
    return found


def by_ngrams(run: Run, n_swapped: int | None = None) -> Outcome:  # noqa: F811
    return score_runs([run], run.root, ("detection",), "ngram", LlmOptions(), n_swapped)


def explained_by_both(run: Run, server: FakeServer) -> None:  # noqa: F811
    explain_runs([run], Choice(n=ALL), "ngram", LlmOptions(), Compute("cpu", 1))
    explain(run, server)


def table_of(run: Run) -> pd.DataFrame:  # noqa: F811
    return read_table(run.stage_path("scores"))


def test_judges_in_turn_are_done_at_once(run: Run, drawn: list[int], capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with FakeServer() as server:
        explained_by_both(run, server)
        first = by_ngrams(run)
        assert (first.n_done, first.n_new) == (ALL, ALL)
        assert "score table of run_a" in capsys.readouterr().err
        assert score(run, server).n_new == N
        path = run.stage_path("scores")
        drawn.clear()
        sent, before = len(server.requests), path.read_bytes()
        capsys.readouterr()
        for _ in range(2):
            again = by_ngrams(run)
            assert (again.n_done, again.n_new, again.n_failed) == (ALL, 0, 0)
            again = score(run, server)
            assert (again.n_done, again.n_new, again.n_failed) == (N, 0, 0)
        assert len([seen for seen in server.requests[sent:] if "chat" in seen.path]) == 0
    assert not drawn
    assert path.read_bytes() == before
    assert "score" not in capsys.readouterr().err


def test_kept_rows_are_those_that_would_be_made(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        explained_by_both(run, server)
        score(run, server)
        by_ngrams(run)
        score(run, server, "single")
        kept = table_of(run)
        run.stage_path("scores").unlink()
        # Of every set-up it must be known what was asked: each is made by its own call.
        score(run, server)
        by_ngrams(run)
        score(run, server, "single")
    assert set(kept["judge"]) == {"llm", "ngram"}
    assert kept["settings_hash"].nunique() == 3
    assert kept["stratum_tpr"].map(len).min() > 0
    pd.testing.assert_frame_equal(kept, table_of(run))


def test_failed_rows_leave_other_column_types_alone(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        explained_by_both(run, server)
        by_ngrams(run)
        before = table_of(run)
        server.answer = lambda _: Reply("I cannot tell.")
        explain_runs([run], Choice(n=ALL), "llm", LlmOptions(url=server.url), Compute("cpu", 1), 0)
        by_ngrams(run)
        with_failed = table_of(run)
        assert with_failed["judge"].isna().sum() == ALL - N
        server.answer = sensible
        explain_runs([run], Choice(n=ALL), "llm", LlmOptions(url=server.url), Compute("cpu", 1), 0)
        by_ngrams(run)
    pd.testing.assert_frame_equal(with_failed[with_failed["judge"].notna()], before, check_dtype=False)
    pd.testing.assert_frame_equal(table_of(run), before)


def test_the_baseline_covers_the_models_latents(run: Run, drawn: list[int]) -> None:  # noqa: F811
    with FakeServer() as server:
        explained_by_both(run, server)
        with Journal(run.journal_path) as journal:
            by_model = set(journal.explanations(explainer="llm")["latent"])
            assert len(by_model) == N < len(journal.explanations(explainer="ngram")) == ALL
        drawn.clear()
        score(run, server)
        assert set(drawn) == by_model
    with Journal(run.journal_path) as journal:
        judged = journal.verdicts(judge="ngram")
    assert set(judged["latent"]) == by_model
    assert set(judged["control"]) == {"none", "swap"}
    outcome = by_ngrams(run)
    assert (outcome.n_done, outcome.n_new) == (ALL, ALL - N), "the others are still to be judged"
    table = table_of(run)
    by_ngram = table[table["judge"] == "ngram"]
    assert len(by_ngram) == len(by_ngram.drop_duplicates(["latent", "control"])), "with the same controls"
    assert set(by_ngram.loc[by_ngram["control"] == "none", "latent"]) > by_model


def test_leftovers_of_a_stopped_call_become_rows(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        explained_by_both(run, server)
        by_ngrams(run)
        sent = len(server.requests)
        server.answer = lambda body: sensible(body) if len(server.requests) - sent <= 20 else error(401)
        with pytest.raises(Unavailable):
            score(run, server, "single")
    before = table_of(run)
    assert set(before["judge"]) == {"ngram"}
    assert by_ngrams(run).n_new == 0
    table = table_of(run)
    assert set(table["judge"]) == {"llm", "ngram"}
    pd.testing.assert_frame_equal(table[table["judge"] == "ngram"].reset_index(drop=True), before)
    with FakeServer() as server:
        assert score(run, server, "single").n_done == N


def test_one_judges_failures_are_retried_by_it_alone(run: Run, drawn: list[int]) -> None:  # noqa: F811
    with FakeServer() as server:
        explained_by_both(run, server)
        by_ngrams(run)
        server.answer = lambda _: Reply("neither")
        assert score(run, server).n_failed == N
        drawn.clear()
        assert by_ngrams(run).n_new == 0
        assert not drawn
        server.answer = sensible
        assert score(run, server).n_done == N
    assert (table_of(run)["status"] == "ok").all()


def test_another_journal_makes_no_old_call_done(run: Run) -> None:  # noqa: F811
    explain_runs([run], Choice(n=ALL), "ngram", LlmOptions(), Compute("cpu", 1))
    by_ngrams(run)
    for path in run.folder.glob("journal.sqlite*"):
        path.unlink()
    explain_runs([run], Choice(n=ALL), "ngram", LlmOptions(), Compute("cpu", 1))
    again = by_ngrams(run)
    assert (again.n_done, again.n_new) == (ALL, ALL)


def test_scores_of_other_contexts_stay(run: Run) -> None:  # noqa: F811
    explain_runs([run], Choice(n=ALL), "ngram", LlmOptions(), Compute("cpu", 1))
    by_ngrams(run)
    before = table_of(run)
    text = (run.folder / "run.json").read_text()
    assert '"sample_seed": 0' in text
    (run.folder / "run.json").write_text(text.replace('"sample_seed": 0', '"sample_seed": 1'))
    change_record(run.folder / "run.json")
    assert by_ngrams(Run.open(run.name, run.root)).n_new == ALL
    table = table_of(run)
    assert table["settings_hash"].nunique() == 2
    old = table[table["settings_hash"] == before["settings_hash"].iloc[0]]
    pd.testing.assert_frame_equal(old.reset_index(drop=True), before)


def without_test_sets(run: Run) -> None:  # noqa: F811
    """Make the run one of the version before journals kept test sets."""
    with sqlite3.connect(run.journal_path) as connection:
        connection.execute("DROP TABLE test_set")
        connection.execute("DROP TABLE owner")
        connection.execute("ALTER TABLE explanation DROP COLUMN quotes_unseen")
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    write_table(run.stage_path("scores"), table_of(run), columns=digest(COLUMNS), material="m")


@pytest.mark.parametrize("rule", [None, StoppingRule(0.3)])
def test_old_runs_keep_scores_and_are_not_reasked(run: Run, rule: StoppingRule | None) -> None:  # noqa: F811
    def go() -> Outcome:
        return score_runs([run], run.root, ("detection",), "llm", LlmOptions(url=server.url), 0, rule)

    with FakeServer() as server:
        explained_by_both(run, server)
        go()
        score(run, server, "single")
        by_ngrams(run)
        before = table_of(run)
        without_test_sets(run)
        sent = len(server.requests)
        for again in (by_ngrams, lambda run: score(run, server, "single"), lambda _: go()):
            assert again(run).n_new == 0
            pd.testing.assert_frame_equal(table_of(run), before)
        assert not [seen for seen in server.requests[sent:] if "chat" in seen.path]


def test_old_rounds_without_table_are_scored_by_rerunning(run: Run) -> None:  # noqa: F811
    def go() -> Outcome:
        return score_runs([run], run.root, ("detection",), "ngram", LlmOptions(), 0, StoppingRule(0.3))

    explain_runs([run], Choice(n=ALL), "ngram", LlmOptions(), Compute("cpu", 1))
    go()
    before = table_of(run)
    without_test_sets(run)
    run.stage_path("scores").unlink()
    by_ngrams(run, 0)
    by_rounds = table_of(run)["precision"].isna() & (table_of(run)["settings_hash"] == before["settings_hash"].iloc[0])
    assert table_of(run).loc[by_rounds, "status"].str.contains("run the same `score` again").all()
    assert go().n_new == 0
    after = table_of(run)
    pd.testing.assert_frame_equal(after[after["precision"].notna()].reset_index(drop=True), before)


def test_unasked_contexts_of_a_stopped_call_are_failed(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        explained_by_both(run, server)
        sent = len(server.requests)
        server.answer = lambda body: sensible(body) if len(server.requests) - sent <= 5 else error(401)
        with pytest.raises(Unavailable):
            score(run, server, "single")
    by_ngrams(run)
    table = table_of(run)
    stopped = table[table["judge"] == "llm"]
    assert len(stopped) > 0
    assert (stopped["n_active"] + stopped["n_inactive"] + stopped["n_failed"] == ITEMS).all()
    assert stopped["status"].str.contains("contexts without a verdict").all()


def test_skipped_controls_are_trained_when_asked_for(run: Run) -> None:  # noqa: F811
    explain_runs([run], Choice(n=ALL), "ngram", LlmOptions(), Compute("cpu", 1))
    by_ngrams(run, 0)
    assert set(table_of(run)["control"]) == {"none"}
    assert by_ngrams(run).n_new == 0
    assert (table_of(run)["control"] == "swap").sum() > 0
    path: Path = run.stage_path("scores")
    before = path.read_bytes()
    by_ngrams(run, 0)
    assert path.read_bytes() == before
