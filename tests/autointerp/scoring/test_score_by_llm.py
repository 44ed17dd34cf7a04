"""`explain` and `score` by a language model, from a trained run to its score table: what is counted and kept."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_server import FakeServer, Reply, error, sensible, token
from tiny_study import harvested_study

from autointerp.contexts.sampler import TestSet
from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import Outcome, explain_runs
from autointerp.findings.reliability import verdicts_of
from autointerp.journal.journal import Journal, Verdict
from autointerp.llm.additions import read_headers
from autointerp.llm.options import LlmOptions
from autointerp.scoring.score import score_runs
from autointerp.scoring.score_table import COLUMNS, UNTESTED, score_table
from sae.common.errors import BadInput, Unavailable
from sae.common.files import read_table, table_metadata
from sae.study.run import Run
from sae.study.stage import Compute

N = 4
SECRET = "sk-secret-0123456789abcdef"
ITEMS = 12  # contexts that an explanation is tested on


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory, tiny_neox_dir: Path) -> Path:
    """A root with one trained and harvested run."""
    root = tmp_path_factory.mktemp("harvested")
    half = ITEMS // 2
    harvested_study(root, tiny_neox_dir, n_explain=10, n_active=half, n_inactive=half, n_hard=0, n_same_token=0)
    return root


@pytest.fixture
def run(harvested: Path, tmp_path: Path) -> Run:
    return Run.open("run_a", Path(shutil.copytree(harvested, tmp_path / "runs")))


def explain(run: Run, server: FakeServer, **more: Any) -> Outcome:
    options = LlmOptions(url=server.url, concurrency=2, **more)
    return explain_runs([run], Choice(n=N), "llm", options, Compute("cpu", 1))


def score(run: Run, server: FakeServer, protocol: str = "batch", named: bool = True, **more: Any) -> Outcome:
    options = LlmOptions(url=server.url, protocol=protocol, concurrency=2, **more)
    return score_runs([run] if named else None, run.root, ("detection",), "llm", options, control_latents=0)


def table_of(run: Run) -> pd.DataFrame:
    """The score table without the n-gram baseline's rows, which stand beside."""
    table = read_table(run.stage_path("scores"))
    return table[table["explainer"] == "llm"]


def test_everything_is_done_once(run: Run) -> None:
    with FakeServer() as server:
        explained = explain(run, server)
        assert (explained.n_done, explained.n_new, explained.n_failed) == (N, N, 0)
        scored = score(run, server, "single")
        assert (scored.n_done, scored.n_new, scored.n_failed) == (N, N, 0)
        assert len(server.requests) == N + N * ITEMS
        again = explain(run, server), score(run, server, "single")
        assert [(x.n_done, x.n_new, x.n_failed) for x in again] == [(N, 0, 0)] * 2
        assert len(server.requests) == N + N * ITEMS
    with Journal(run.journal_path) as journal:
        usage = journal.usage().set_index("stage")
    assert dict(usage["requests"]) == {"explain": N, "score": N * ITEMS}
    table = read_table(run.stage_path("scores"))
    assert tuple(table.columns) == COLUMNS
    assert (table["status"] == "ok").all()


def test_a_model_that_repeats_an_example_fails_and_costs_nothing_again(run: Run) -> None:
    def repeat(body: dict[str, Any]) -> str:
        return str(body["messages"][-2]["content"])

    with FakeServer(repeat) as server:
        first = explain(run, server)
        assert len(server.requests) == 2 * N
        again = explain(run, server)
        assert len(server.requests) == 2 * N, "both answers are in the cache"
    assert first.failures == again.failures
    assert (first.n_done, first.n_failed) == (0, N)
    assert [reason.split(":")[0] for reason in first.failures] == ["copied from the prompt"]
    with Journal(run.journal_path) as journal:
        assert journal.usage()["requests"].tolist() == [2 * N]


def test_a_model_that_says_the_same_of_every_latent_is_flagged(run: Run) -> None:
    with FakeServer('[EXPLANATION]: Words like "ananas" in a text.') as server:
        explained = explain(run, server)
        assert (explained.n_done, explained.n_failed) == (N, 0)
        assert explained.flags == {f"same text as {N - 1} others": N, "quotes nothing it saw": N}
        options = LlmOptions(url=server.url)
        server.answer = sensible
        scored = score_runs([run], run.root, ("detection",), "llm", options, control_latents=2)
    assert scored.n_done == N
    lacking = f"run_a: {N} explanations have no swapped control: no dissimilar latent with another text"
    assert lacking in scored.notes


def test_contexts_per_request_are_as_asked_for(run: Run) -> None:
    with FakeServer() as server:
        explain(run, server)
        options = LlmOptions(url=server.url, contexts_per_request=ITEMS)
        scored = score_runs([run], run.root, ("detection",), "llm", options, control_latents=0)
        assert scored.n_done == N
        assert len(server.requests) == N + N, "one request for all contexts of a latent"


@pytest.mark.parametrize(("protocol", "size"), [("batch", 5), ("single", 1)])
def test_what_was_answered_together_is_on_record(run: Run, protocol: str, size: int) -> None:
    with FakeServer() as server:
        explain(run, server)
        score(run, server, protocol)
    with Journal(run.journal_path) as journal:
        verdicts = journal.verdicts(control="none")
    by_model, baseline = (verdicts[(verdicts["model"] != "") == asked] for asked in (True, False))
    assert baseline["request"].isna().all()
    assert not baseline.empty
    rest = [ITEMS % size] if ITEMS % size else []
    for _, of in by_model.groupby("explanation_id"):
        requests = of.groupby("request")["context"]
        assert sorted(requests.size(), reverse=True) == [size] * (ITEMS // size) + rest
        assert (requests.first() == requests.first().index).all()


def test_requests_include_harder_contexts_and_stay_whole(run: Run) -> None:
    """What a split keeps together are requests as they were sent, not fives of what the score counts of them."""
    rows = pd.DataFrame({"explanation_id": [1], "control": ["none"], "status": ["ok"]})
    setup = dict.fromkeys(("judge", "scorer", "settings_hash", "judge_prompt_hash"), "x") | {"model": "m"}
    kinds = ["random", "hard", None, "same_token", None, "random"] * 2
    with Journal(run.journal_path) as journal:
        journal.add_explanation(
            latent=3, explainer="llm", settings_hash="", prompt_hash="", model="m", contexts=(), text="x"
        )
        for first, is_known in ((0, True), (100, False)):  # twelve in requests of four; twelve of an older journal
            journal.add_verdicts(
                [
                    Verdict(
                        *(3, 1, "x", "x", "x", "x", "m", first + i, kind is None, kind),
                        label=True,
                        request=i // 4 * 4 if is_known else None,
                    )
                    for i, kind in enumerate(kinds)
                ]
            )
    found = verdicts_of(run, rows, setup)
    assert found["request"].tolist() == [0, 0, 4, 4, 4, 8, 8, 8, -3, -3, -4, -4, -4, -5, -5, -5]


def test_a_score_does_not_depend_on_answer_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: sums are rounded in the order of their parts."""
    with FakeServer() as server:
        explain(run, server)
        score(run, server, "single")
    with sqlite3.connect(run.journal_path) as connection:
        connection.execute("UPDATE verdict SET p = (7919 * id % 11) / 11.0")
    connection.close()
    in_order = Journal.verdicts
    tables = []
    with Journal(run.journal_path) as journal:
        for seed in range(8):
            monkeypatch.setattr(
                Journal,
                "verdicts",
                lambda journal, seed=seed, **of: in_order(journal, **of).sample(frac=1, random_state=seed),
            )
            tables.append(score_table(journal).map(str).to_dict())
    assert all(table == tables[0] for table in tables)


def test_a_protocol_counts_its_own_scores(run: Run) -> None:
    with FakeServer() as server:
        explain(run, server)
        server.answer = lambda _: Reply("neither")
        first = score(run, server, "single")
        assert (first.n_done, first.n_failed) == (0, N)
    with FakeServer() as server:
        second = score(run, server, "batch")
    assert (second.n_done, second.n_new, second.n_failed) == (N, N, 0)
    assert len(table_of(run)) == 2 * N


@pytest.mark.parametrize("named", [True, False])
def test_all_failed_explanations_are_counted_without_crash(run: Run, named: bool) -> None:
    with FakeServer("I cannot tell.") as server:
        explained = explain(run, server)
        assert (explained.n_done, explained.n_failed) == (0, N)
        scored = score(run, server, named=named)
    reason = "no explanation: the answer has no line that begins with [EXPLANATION]:"
    assert (scored.n_done, scored.n_failed, dict(scored.left_out)) == (0, 0, {reason: N})
    table = read_table(run.stage_path("scores"))
    assert tuple(table.columns) == COLUMNS
    assert table["balanced_accuracy"].isna().all()


def test_a_language_models_failures_are_not_the_baselines(run: Run) -> None:
    with FakeServer("I cannot tell.") as server:
        explain(run, server)
    explain_runs([run], Choice(n=N), "ngram", LlmOptions(), Compute("cpu", 1))
    scored = score_runs([run], run.root, ("detection",), "ngram", LlmOptions(), control_latents=0)
    assert (scored.n_done, scored.n_failed) == (N, 0)


def test_an_explain_stopped_at_once_leaves_nothing(run: Run) -> None:
    Journal(run.journal_path).close()
    with FakeServer() as server:
        with pytest.raises(BadInput, match="has explanations to score"):
            score(run, server, named=False)
        assert score(run, server).n_done >= N


def test_a_lost_server_keeps_its_answers_and_cost(run: Run) -> None:
    with FakeServer() as server:
        explain(run, server)
        before = len(server.requests)

        def last_words(body: dict[str, object]) -> Reply | str:
            return sensible(body) if len(server.requests) - before <= 20 else error(401)

        server.answer = last_words
        with pytest.raises(Unavailable):
            score(run, server, "single")
    with Journal(run.journal_path) as journal:
        answered = len(journal.verdicts(judge="llm"))
        usage = journal.usage().set_index("stage")
    assert 18 <= answered <= 20
    assert usage.loc["score", "requests"] == answered
    with FakeServer() as server:
        assert score(run, server, "single").n_done == N
        assert len(server.requests) == N * ITEMS - 20, "answers that came but were not journalled are in the cache"


def test_missing_server_abilities_are_reported_and_stored(run: Run) -> None:
    with FakeServer(gives_logprobs=False, counts_cached=False) as server:
        explained = explain(run, server)
        assert [note for note in explained.notes if "log-probabilities" in note] == []
        scored = score(run, server, "auto")
        assert len(server.probes) == 2
    notes = " ".join(scored.notes)
    assert "no log-probabilities: labels stand in for P(active)" in notes
    assert "cached" in notes
    assert table_of(run)["auroc"].isna().all()
    found = table_metadata(run.stage_path("scores"))["capabilities"]
    assert (found["logprobs"], found["cached_tokens"], found["json_schema"]) == (0, False, True)


@pytest.mark.parametrize("name", ["authorization", "api-key"])
def test_the_key_is_in_no_file_or_output(
    name: str,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever a server does with the key or header that it is given: it says it in answers, in errors, in escapes."""
    monkeypatch.setenv("AUTOINTERP_API_KEY", SECRET)
    given: dict[str, Any] = (
        {} if name == "authorization" else {"headers": read_headers("--llm-header", [f"{name}={SECRET}"])}
    )
    caplog.set_level(logging.DEBUG)
    escaped = "".join(f"\\u{ord(c):04x}" for c in SECRET)
    told: list[str] = []

    def betray(body: dict[str, Any]) -> Reply | str:
        n = len(server.requests) % 6
        if n == 0:
            return error(500, f"key {SECRET} made me fail")
        if n == 1:
            return error(400, f"bad key {SECRET}", code=SECRET, param=SECRET)
        if n == 2:
            return Reply(f"[EXPLANATION]: The key {SECRET}.", logprobs=[token(SECRET)])
        if n == 3:
            return Reply(body=f'{{"choices": [{{"message": {{"content": "[EXPLANATION]: {escaped} is it."}}}}]}}')
        if n == 4:
            return Reply(body={"error": {"message": f"no {SECRET}"}}, headers={"x-key": SECRET})
        return sensible(body)

    with FakeServer(betray, key=SECRET, key_header=name) as server:
        explained = explain(run, server, **given)
        scored = score(run, server, "auto", named=False, **given)
        told += [repr(explained), str(explained.as_dict()), repr(scored), str(scored.as_dict())]
        assert explained.n_failed
        assert explained.n_done
        assert all(seen.headers[name].endswith(SECRET) for seen in server.requests)
    with FakeServer(key="another", key_header=name) as server, pytest.raises(Unavailable) as caught:
        score(run, server, "single", **given)
    told.append("".join(traceback.format_exception(caught.value)))
    with FakeServer() as server:
        explain(run, server)
        score(run, server)
    command = [
        sys.executable,
        str(Path(__file__).parents[3] / "cli.py"),
        "report",
        "--sae",
        "run_a",
        "--root",
        str(run.root),
    ]
    for more in ((), ("--json",)):
        shown = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
        assert "llm" in shown.stdout
        told += [shown.stdout, shown.stderr]
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert {"journal.sqlite", "cache.sqlite"} <= {path.name for path in files}
    told += [*capfd.readouterr(), caplog.text, *(path.read_bytes().decode("latin-1") for path in files)]
    assert not [text[:200] for text in told if SECRET in text or SECRET[:12] in text or escaped in text]


@pytest.mark.parametrize("protocol", ["batch", "single"])
def test_both_scorers_together_stand_side_by_side(run: Run, protocol: str) -> None:
    with FakeServer() as server:
        explain(run, server)
        options = LlmOptions(url=server.url, protocol=protocol, concurrency=2)

        def go(*scorers: str) -> Outcome:
            return score_runs([run], run.root, scorers, "llm", options, control_latents=0)

        first = go("detection", "fuzzing")
        assert first.n_failed == 0
        asked = len(server.requests)
        questions = [
            str(seen.body["messages"]) for seen in server.requests if "marked rightly" in str(seen.body).lower()
        ]
        assert questions
        assert all("<<" in question or "⟦" in question for question in questions)
        again = go("fuzzing", "detection")
        assert len(server.requests) == asked
        assert again.n_new == 0
    table = table_of(run)
    assert Counter(table["scorer"]) == {"detection": N, "fuzzing": N}
    fuzzed = table[(table["scorer"] == "fuzzing") & (table["status"] == "ok")]
    assert len(fuzzed) + sum("have no fuzzing score" in note for note in first.notes) > 0
    assert (fuzzed["n_active"] == fuzzed["n_inactive"]).all()
    detected = table[table["scorer"] == "detection"]
    assert detected["stratum_tpr"].map(len).gt(0).all(), "the other scorer's rows keep their strata"
    assert len(set(detected["settings_hash"])) == 1
    assert not set(detected["judge_prompt_hash"]) & set(fuzzed["judge_prompt_hash"])
    with Journal(run.journal_path) as journal:
        verdicts = journal.verdicts(scorer="fuzzing", judge="llm")
    assert set(verdicts["negative_kind"].dropna()) == {"mismarked"}
    assert verdicts.groupby("latent")["context"].apply(lambda windows: windows.is_unique).all()


def test_latent_that_cannot_be_fuzzed_is_no_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autointerp.scoring.scorers.fuzzing.mark", lambda _: TestSet([], []))
    with FakeServer() as server:
        explain(run, server)
        options = LlmOptions(url=server.url, concurrency=2)
        outcome = score_runs([run], run.root, ("fuzzing", "detection"), "llm", options, control_latents=0)
    assert (outcome.n_done, outcome.n_failed) == (N, 0)
    assert outcome.notes == [f"run_a: {N} explanations have no fuzzing score: too few contexts for it"]
    table = table_of(run)
    assert Counter(table["status"]) == {"ok": N, UNTESTED: N}
    assert set(table["judge"]) == {"llm"}, "what n-grams are judged by is none of a model's explanations"
    assert table.loc[table["status"] == UNTESTED, "balanced_accuracy"].isna().all()
