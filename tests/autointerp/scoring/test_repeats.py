"""Several draws of explanations, several replicates of judgements and several judges: stored apart, paid for once."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_server import FakeServer, Reply, error, labelled, sensible, snippets_of
from test_score_by_llm import ITEMS, N, harvested, run  # noqa: F401
from tiny_study import cli

from autointerp import Run as OpenedRun
from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import Outcome, explain_runs
from autointerp.findings.evidence import View
from autointerp.findings.study import findings
from autointerp.journal.journal import Journal
from autointerp.llm.options import LlmOptions
from autointerp.report.neuronpedia import Ids, lines_of
from autointerp.scoring.dry_run import forecast_explain, forecast_score
from autointerp.scoring.score import score_runs
from autointerp.scoring.setups import setups_of
from sae.common.errors import BadInput, NotFound, Unavailable
from sae.common.files import read_table
from sae.study.run import Run
from sae.study.stage import Compute

DETECTION = ("detection",)


def varying(body: dict[str, Any]) -> Reply | str:
    """Answer as ``sensible`` at temperature 0; else explain by a letter, or turn some labels around, by the seed."""
    seed, question = body.get("seed"), str(body["messages"][-1]["content"])
    assert (seed is None) == (body["temperature"] == 0)
    if seed is None:
        return sensible(body)
    if not question.startswith("Statement: "):
        before = str(sensible(body)).replace('"', "").rstrip(".")  # of each latent its own
        return f'{before}, or "{"zea"[seed]}". Draw {seed}.'
    quoted = re.search(r'"(.+)"', question.split("\n", 1)[0])
    labels = [int(quoted is not None and quoted[1] in snippet) for snippet in snippets_of(question)]
    turned = [zlib.crc32(f"{seed} {snippet}".encode()) % 4 == 0 for snippet in snippets_of(question)]
    return labelled(body, [label ^ turn for label, turn in zip(labels, turned, strict=True)])


def options_of(server: FakeServer, **more: Any) -> LlmOptions:
    return LlmOptions(url=server.url, protocol="single", concurrency=2, **more)


def explain(run: Run, server: FakeServer, draws: int = 1, **more: Any) -> Outcome:  # noqa: F811
    return explain_runs([run], Choice(n=N), "llm", options_of(server, **more), Compute("cpu", 1), draws=draws)


def score(run: Run, server: FakeServer, judges: Any = "llm", **more: Any) -> Outcome:  # noqa: F811
    repeats = {name: more.pop(name, 1) for name in ("draws", "replicates")}
    return score_runs([run], run.root, DETECTION, judges, options_of(server, **more), 0, **repeats)


def table_of(run: Run) -> pd.DataFrame:  # noqa: F811
    table = read_table(run.stage_path("scores"))
    return table[table["explainer"] == "llm"]


# --- draws --------------------------------------------------------------------------------------------------


def test_draws_are_stored_apart_and_paid_for_once(run: Run) -> None:  # noqa: F811
    with FakeServer(varying) as server:
        one = explain(run, server)
        assert (one.of, one.n_done, len(server.requests)) == ("latent", N, N)
        with Journal(run.journal_path) as journal:
            before = journal.explanations(explainer="llm")
        foretold = forecast_explain([run], Choice(n=N), "llm", options_of(server), None, draws=3)
        three = explain(run, server, draws=3)
        assert (three.of, three.n_done, three.n_new, three.n_failed) == ("explanation", 3 * N, 2 * N, 0)
        assert len(server.requests) - N == foretold.requests == 2 * N
        again = explain(run, server, draws=3)
        assert (again.n_done, again.n_new, len(server.requests)) == (3 * N, 0, 3 * N)
    assert [seen.body.get("seed") for seen in server.requests] == [None] * N + [1] * N + [2] * N
    assert {seen.body["temperature"] for seen in server.requests[N:]} == {0.7}
    with Journal(run.journal_path) as journal:
        rows, setups = journal.explanations(explainer="llm"), journal.setups()
    assert rows[rows["draw"] == 0].reset_index(drop=True).equals(before)
    assert Counter(rows["draw"]) == {0: N, 1: N, 2: N}
    for _, of_latent in rows.groupby("latent"):
        assert len(set(of_latent["contexts"].map(tuple))) == 1
        assert of_latent.set_index("draw")["text"].str.extract(r"Draw (\d)\.$")[0].tolist()[1:] == ["1", "2"]
    (first,), (further,) = (
        set(rows["settings_hash"][rows["draw"].gt(0) == is_further]) for is_further in (False, True)
    )
    assert setups[further]["first"] == first != further


def test_another_temperature_is_another_explanation(run: Run) -> None:  # noqa: F811
    with FakeServer(varying) as server:
        explain(run, server, draws=2)
        hotter = explain(run, server, draws=2, temperature=1.0)
        assert (hotter.n_done, hotter.n_new) == (2 * N, N)
        assert [seen.body["temperature"] for seen in server.requests[-N:]] == [1.0] * N


def test_a_stopped_draw_resumes_where_it_was(run: Run) -> None:  # noqa: F811
    with FakeServer(varying) as server:
        server.answer = lambda body: varying(body) if len(server.requests) <= N + 2 else error(401)
        with pytest.raises(Unavailable):
            explain(run, server, draws=3)
        with Journal(run.journal_path) as journal:
            done = journal.explanations(explainer="llm")
        assert len(done) >= N
        n_asked, server.answer = len(server.requests), varying
        resumed = explain(run, server, draws=3)
        assert resumed.n_done == 3 * N
        assert len(server.requests) - n_asked == 3 * N - (N + 2), "an answer that came is not asked for again"


def test_only_draw_0_is_scored_and_reported_unless_asked(run: Run) -> None:  # noqa: F811
    with FakeServer(varying) as server:
        explain(run, server, draws=2)
        n = len(server.requests)
        assert score(run, server).n_done == N
        assert len(server.requests) - n == N * ITEMS
        plain = findings(run.root, ["run_a"])
        foretold = forecast_score([run], run.root, DETECTION, "llm", options_of(server), None, 0, draws=2)
        second = score(run, server, draws=2)
        assert (second.of, second.n_done, second.n_new) == ("score", 2 * N, N)
        assert len(server.requests) - n - N * ITEMS == foretold.requests == N * ITEMS
        third = score(run, server, draws=3)
        assert third.notes == ["run_a has no draw 2; `explain --draws 3` makes it"]
        assert len(server.requests) == n + 2 * N * ITEMS
    table = table_of(run)
    assert Counter(table["draw"]) == {0: N, 1: N}
    both = findings(run.root, ["run_a"])
    assert (both.scores.mean, both.scores.n_explained) == (plain.scores.mean, N)  # type: ignore[union-attr]
    assert [setup["draw"] for setup in setups_of(table)] == [0]
    of_second = findings(run.root, ["run_a"], View(draw=1)).scores
    assert of_second is not None
    assert (of_second.n_scored, of_second.n_explained, of_second.n_failed) == (N, N, 0)
    assert of_second.sample is not None, "a further draw is of the recorded sample too"
    second_scores = table[table["draw"] == 1]["balanced_accuracy"]
    assert second_scores.min() <= of_second.mean.value <= second_scores.max()
    assert of_second.mean != plain.scores.mean  # type: ignore[union-attr]
    with pytest.raises(NotFound, match="no scores of draw 4 replicate 0; there are draw 0 replicate 0, draw 1"):
        findings(run.root, ["run_a"], View(draw=4))
    opened = OpenedRun(run.name, run.root)
    assert {"draw", "replicate"} <= set(opened.scores().columns)
    assert set(opened.explanations()["draw"]) == {0, 1}
    first = table[table["draw"] == 0].set_index("latent")["balanced_accuracy"]
    assert opened.latents().set_index("latent")["balanced_accuracy"].dropna().to_dict() == first.to_dict()
    lines, _ = lines_of(run, Ids("m", "s"))
    by_llm = [line for line in lines if line["explanationModelName"]]
    assert len(by_llm) == N
    assert not any("Draw" in line["description"] for line in by_llm)


def test_failed_draws_are_in_no_figure_of_draw_0(run: Run) -> None:  # noqa: F811
    with FakeServer(lambda body: "I cannot tell." if body.get("seed") else sensible(body)) as server:
        explained = explain(run, server, draws=2)
        assert (explained.n_done, explained.n_failed) == (N, N)
        assert score(run, server, draws=2).n_done == N
    found = findings(run.root, ["run_a"])
    assert found.failures.n == 0
    assert found.scores is not None
    assert (found.scores.n_scored, found.scores.n_failed) == (N, 0)


# --- replicates ---------------------------------------------------------------------------------------------


def test_replicates_judge_the_same_contexts_again(run: Run) -> None:  # noqa: F811
    with FakeServer(varying) as server:
        explain(run, server)
        score(run, server)
        before, n = table_of(run), len(server.requests)
        foretold = forecast_score([run], run.root, DETECTION, "llm", options_of(server), None, 0, replicates=3)
        found = score(run, server, replicates=3)
        assert (found.n_done, found.n_new) == (3 * N, 2 * N)
        assert len(server.requests) - n == foretold.requests == 2 * N * ITEMS
        assert score(run, server, replicates=3).n_new == 0
        assert len(server.requests) == n + 2 * N * ITEMS
    assert Counter(seen.body["seed"] for seen in server.requests[n:]) == {1: N * ITEMS, 2: N * ITEMS}
    table = table_of(run)
    assert Counter(table["replicate"]) == {0: N, 1: N, 2: N}
    assert table[table["replicate"] == 0].reset_index(drop=True).equals(before.reset_index(drop=True))
    with Journal(run.journal_path) as journal:
        verdicts = journal.verdicts(judge="llm")
    contexts = verdicts.groupby(["replicate", "latent"])["context"].apply(frozenset)
    assert (contexts[0] == contexts[1]).all()
    assert (contexts[1] == contexts[2]).all()
    scores = findings(run.root, ["run_a"], View(replicate=2)).scores
    assert scores is not None
    assert scores.n_scored == N


def test_a_stopped_replicate_resumes(run: Run) -> None:  # noqa: F811
    with FakeServer(varying) as server:
        explain(run, server)
        whole = N + N * ITEMS
        server.answer = lambda body: varying(body) if len(server.requests) <= whole + 7 else error(401)
        with pytest.raises(Unavailable):
            score(run, server, replicates=2)
        n_asked, server.answer = len(server.requests), varying
        assert score(run, server, replicates=2).n_done == 2 * N
        assert len(server.requests) - n_asked == N * ITEMS - 7


# --- judges -------------------------------------------------------------------------------------------------


def test_several_judges_score_in_turn(run: Run) -> None:  # noqa: F811
    with FakeServer(models=("a", "b", "c")) as server:
        explain(run, server, model="a")
        n = len(server.requests)
        foretold = forecast_score(
            [run], run.root, DETECTION, "llm", options_of(server, model="a", judge_model=("a", "b")), None, 0
        )
        two = score(run, server, model="a", judge_model=("a", "b"))
        assert (two.backend, two.n_done) == ("llm (a), llm (b)", 2 * N)
        assert len(server.requests) - n == foretold.requests == 2 * N * ITEMS
        assert [(of.model, of.requests) for of in foretold.judges] == [("a", N * ITEMS), ("b", N * ITEMS)]
        assert foretold.as_dict()["judges"][1]["model"] == "b"
        three = score(run, server, model="a", judge_model=("a", "b", "c"))
        assert (three.n_done, three.n_new) == (3 * N, N)
        assert Counter(seen.body["model"] for seen in server.requests[n:]) == dict.fromkeys("abc", N * ITEMS)
    assert {setup["model"] for setup in setups_of(table_of(run))} == {"a", "b", "c"}
    for model in "abc":
        chosen = findings(run.root, ["run_a"], View(judge=model)).methods.judge
        assert chosen is not None
        assert chosen.model == model
    with pytest.raises(NotFound, match="--judge 'd' has no scores of 'run_a'; those by"):
        findings(run.root, ["run_a"], View(judge="d"))


def test_each_judge_asks_its_own_server(run: Run) -> None:  # noqa: F811
    with FakeServer() as explaining, FakeServer(models=("a",)) as one, FakeServer(models=("b",)) as other:
        explain(run, explaining)
        found = score(run, explaining, judge_model=("a", "b"), judge_url=(one.url, other.url))
        assert found.n_done == 2 * N
        assert (len(one.requests), len(other.requests), len(explaining.requests)) == (N * ITEMS, N * ITEMS, N)
        with pytest.raises(BadInput, match="--judge-url is given 2 times for 3 judges"):
            score(run, explaining, judge_model=("a", "b", "c"), judge_url=(one.url, other.url))


def test_judges_of_several_kinds(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        explain(run, server)
        found = score(run, server, judges=("ngram", "llm", "auto"), replicates=2)
        assert found.backend == "ngram, llm (fake-model)"
        assert found.n_done == N + 2 * N, "the n-gram judge always says the same, so its replicates are none"


# --- agreement ----------------------------------------------------------------------------------------------


def test_agreement_is_of_the_contexts_that_both_judged(run: Run) -> None:  # noqa: F811
    with FakeServer(varying, models=("a", "b")) as server:
        explain(run, server, draws=2, model="a")
        score(run, server, draws=2, replicates=2, model="a", judge_model=("a", "b"))
    found = findings(run.root, ["run_a"], View(judge="a")).scores
    assert found is not None
    told = {(row.by, row.draw, row.replicate, row.model): row for row in found.repeats}
    assert set(told) == {("draw", 1, 0, "a"), ("replicate", 0, 1, "a"), ("judge", 0, 0, "b")}
    with Journal(run.journal_path) as journal:
        rows = journal.verdicts(judge="llm", control="none")
        draws = journal.explanations().set_index("id")["draw"]
    rows["draw"] = rows["explanation_id"].map(draws)

    def labels(draw: int, replicate: int, model: str) -> pd.Series:
        kept = (rows["draw"] == draw) & (rows["replicate"] == replicate) & (rows["model"] == model)
        return rows[kept].set_index(["latent", "context"])["label"].sort_index()

    own = labels(0, 0, "a")
    for (by, draw, replicate, model), row in told.items():
        theirs = labels(draw or 0, replicate or 0, str(model))
        equal = (own == theirs).groupby("latent").mean()
        assert (row.n, row.n_contexts) == (N, N * ITEMS)
        assert equal.min() - 1e-9 <= row.equal.value <= equal.max() + 1e-9
        assert row.equal.low <= row.equal.value <= row.equal.high
        assert (row.equal.value == 1) == bool((own == theirs).all()), by
    assert told["judge", 0, 0, "b"].equal.value == 1, "both models answer alike at temperature 0"
    assert max(told[which].equal.value for which in told if which[0] != "judge") < 1
    of_second = findings(run.root, ["run_a"], View(judge="a", draw=1)).scores
    assert of_second is not None
    assert {(row.by, row.draw) for row in of_second.repeats if row.by == "draw"} == {("draw", 0)}


def test_commands_show_draws_replicates_and_judges(run: Run, tmp_path: Path) -> None:  # noqa: F811
    root = ("--root", run.root)
    with FakeServer(varying, models=("a", "b")) as server:
        by = ("--sae", "run_a", "--llm-url", server.url, "--llm-model", "a", *root)
        explained = cli("explain", "--latents", N, "--draws", 2, "--control-sae-latents", 0, *by).well()
        assert f"{2 * N} explanations made" in explained.out
        assert "score --sae run_a --draws 2 " in explained.out
        judges = ("--judge-model", "a", "--judge-model", "b", "--protocol", "single")
        planned = cli("score", *by, *judges, "--draws", 2, "--replicates", 2, "--dry-run").well().out
        assert "all 2 judges together" in planned
        cli("score", *by, *judges, "--draws", 2, "--replicates", 2).well()
    report = cli("report", "--sae", "run_a", "--judge", "a", "--full", *root).well().out
    for words in ("compared with", "draw 1", "replicate 1", "judge llm (b)", "equal answers"):
        assert words in report
    second = cli("report", "--sae", "run_a", "--judge", "b", "--draw", 1, "--json", *root).well().json
    assert second["methods"]["judge"]["model"] == "b"
    assert {(row["by"], row["model"]) for row in second["scores"]["repeats"]} == {
        ("draw", "b"),
        ("judge", "a"),
        ("replicate", "b"),
    }
    latent = int(table_of(run)["latent"].iloc[0])
    shown = cli("show", "--sae", "run_a", "--latent", latent, "--json", *root).well().json
    draws = [entry["draw"] for entry in shown["explanations"] if entry["explainer"] == "llm"]
    assert draws == [0, 1]
    assert {(row["draw"], row["replicate"]) for row in shown["scores"] if row["judge"] == "llm"} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }
    page = cli("show", "--sae", "run_a", "--latent", latent, *root).well().out
    assert "llm: a, draw 1" in page
    assert "detection, llm b, replicate 1" in page
    cli("report", "--sae", "run_a", "--html", "--to", tmp_path / "x.html", "--replicate", 1, *root).well()
    cli("report", "--sae", "run_a", "--draw", 7, *root).failed_in_one_line("no scores of draw 7", "draw 1 replicate 1")
