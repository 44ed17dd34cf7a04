"""The terminal report fits its width, survives hostile text, loses nothing without colour, and says what is missing."""

from __future__ import annotations

import copy
import math
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from printed import ACTS_ON_A_TERMINAL, ANSI, COLOURS, console, text_of
from rich.cells import cell_len

from autointerp.findings import shape
from autointerp.findings.counterparts import counterpart_findings
from autointerp.findings.evidence import Study, View
from autointerp.findings.latent import latent_findings
from autointerp.findings.returning import alignment_findings
from autointerp.findings.study import findings
from autointerp.report.latent import latent_page
from autointerp.report.numbers import percent
from autointerp.report.report import answer, describe_setups, describe_study, report_page, summary
from autointerp.report.sharing import alignment_page
from autointerp.report.stages import outcome_page, runs_page
from autointerp.report.terminal import print_page
from sae.alignment.nulls import FIRING_COLUMNS
from sae.alignment.overlap import DEFINITIONS
from sae.common.amounts import decimal
from sae.common.estimate import Estimate
from sae.common.files import write_table
from sae.study.run import Run

NAMES = ["run_a", "run_b", "run_c"]


def drawn(found: shape.StudyFindings, width: int = 80, colour: Any = None) -> str:
    target = console(width, colour)
    print_page(report_page(found, is_full=True), target)
    return text_of(target)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    small_study.whole(folder)
    return folder


@pytest.fixture(scope="module")
def found(root: Path) -> shape.StudyFindings:
    return findings(root, NAMES, contexts=small_study.contexts)


# --- the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("colour", COLOURS)
def test_no_line_is_longer_than_the_page(found: shape.StudyFindings, width: int, colour: Any) -> None:
    page = drawn(found, width, colour)
    for line in ANSI.sub("", page).splitlines():
        assert cell_len(line) <= min(width, 120), line
    if colour is None:
        assert "\x1b" not in page


@pytest.mark.parametrize("width", [80, 99, 100, 120])
def test_difference_from_the_control_has_its_own_heading(found: shape.StudyFindings, width: int) -> None:
    assert drawn(found, width).count("own minus swapped") == 2  # of the classes, of the quarters of similarity


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off_at_usual_widths(found: shape.StudyFindings, width: int) -> None:
    page = drawn(findings_without_contexts(found), width)
    assert "…" not in page


def findings_without_contexts(found: shape.StudyFindings) -> shape.StudyFindings:
    return replace(found, interesting=[replace(entry, contexts=[]) for entry in found.interesting or []])


@pytest.mark.parametrize("width", [80, 100])
def test_brief_report_answers_first(found: shape.StudyFindings, width: int) -> None:
    target = console(width)
    print_page(report_page(found), target)
    page = text_of(target)
    assert len(page.splitlines()) <= 120
    opening = page[: page.index("How much is shared when")]
    for words in ("Sharing: ", "another latent's explanation", "Interpretability: ", "Relation: ", "Next:"):
        assert words in " ".join(opening.split())
    assert "--full" in page
    whole = drawn(found, width)
    for section in ("Who was scored", "How similar partners are", "Methods"):
        assert section not in page
        assert section in whole


@pytest.mark.parametrize("width", [80, 100])
def test_summary_has_at_most_25_lines(found: shape.StudyFindings, width: int) -> None:
    target = console(width)
    print_page(summary(found), target)
    assert len(text_of(target).splitlines()) <= 25


def test_sections_come_in_a_natural_order(found: shape.StudyFindings) -> None:
    page = drawn(found)
    titles = [
        "How much is shared when only the seed changes",
        "How similar partners are",
        "Which SAEs share the latents of run_a",
        "How often shared and unshared latents fire",
        "How well the SAEs are trained",
        "How well the latents can be explained",
        "Who was scored",
        "How scores relate to similarity",
        "Unshared latents that are easy to explain",
        "Methods",
    ]
    places = [page.index(f"{title} ─") for title in titles]
    assert places == sorted(places)
    assert "What failed" not in page


def test_the_page_shows_the_numbers_of_the_object(found: Any) -> None:
    page = drawn(found)
    for definition in ("strict", "both", "decoder", "lenient"):
        assert percent(found.overlap.by(definition).value.value) in page
    assert decimal(found.scores.mean.value) in page
    assert decimal(found.scores.control.mean.value) in page
    assert decimal(found.relation.spearman.value, 2, sign=True) in page
    for entry in found.interesting[:5]:
        assert f"latent {entry.latent} " in page


@pytest.fixture(scope="module", params=[2, 3, 5])
def beside_chance(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> shape.StudyFindings:
    """A study with its nulls, and the totals of what its latents do as if they had been compared."""
    folder = tmp_path_factory.mktemp("nulls")
    runs = [run.name for run in small_study.whole(folder, seeds=request.param, m=60, n_scored=10, nulls=True)]
    found = findings(folder, runs, contexts=small_study.contexts)
    return replace(found, counterparts=some_counterparts(len(runs) > 2))


def some_counterparts(several: bool) -> shape.Counterparts:
    rng = np.random.default_rng(0)
    n = 200

    def side() -> pd.DataFrame:
        told = np.array([None, "same", "split", "absorbed", "broader", "new", "rare"], object)
        columns: dict[str, Any] = {"latent": range(n), "rebuilt": rng.random(n), "rebuilt__rotated": rng.random(n) / 4}
        for name in FIRING_COLUMNS:
            for column in (name, f"{name}__shifted"):
                columns[column] = rng.random(n)
        drawn_ = rng.integers(0, 7, n)
        relations, nulls = told[drawn_], told[np.where(drawn_ == 0, 0, rng.integers(1, 7, n))]
        partners = {name: rng.integers(0, n, n) for name in ("jaccard_partner", "jaccard_partner__shifted")}
        return pd.DataFrame({**columns, "relation": relations, "relation__shifted": nulls, **partners})

    pairs = [("a", "b"), ("b", "a"), *([("a", "c"), ("c", "a")] if several else [])]
    partners = pd.DataFrame({"decoder_partner": range(n), "encoder_partner": range(n)})
    facts = {pair: {"n_tokens": 2_000_000, "jaccard_gap_per_latent": 0.0123} for pair in pairs[::2]}
    found = counterpart_findings(
        {pair: side() for pair in pairs}, dict.fromkeys(pairs, partners), dict.fromkeys("abc", np.ones(n, bool)), facts
    )
    assert found is not None
    return found


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_nulls_fit_the_page(beside_chance: Any, width: int) -> None:
    page = drawn(findings_without_contexts(beside_chance), width)
    assert all(cell_len(line) <= width for line in page.splitlines())
    assert width < 80 or "…" not in page.replace("firing with the …", "")


def test_of_two_equal_means_one_is_shown(beside_chance: Any) -> None:
    found = copy.deepcopy(beside_chance)
    for name, value in (("shared", 0.613), ("unshared", 0.287)):
        of = found.counterparts.of_decoder_partner
        of[name] = replace(of[name], p_there=value, p_here=value)
    page = drawn(found)
    assert "P(other | this)" in page
    assert "P(this | other)" not in page
    (row,) = (line for line in page.splitlines() if "decoder's partner, shared" in line)
    assert row.count(".61") == 1


@pytest.mark.parametrize("width", [80, 120])
def test_every_shared_figure_has_its_chance_level(beside_chance: Any, width: int) -> None:
    """A null of its own for each place, changed to a number that is nowhere else, is found in the page."""
    found: Any = copy.deepcopy(findings_without_contexts(beside_chance))
    overlap_, similar, several = found.overlap, found.similarity, len(found.runs) > 2
    many = len(found.runs) > 3
    marked: list[str] = []

    def mark(holder: Any, key: Any, *, as_percent: bool = True) -> None:
        value = 0.5 + len(marked) / 1000
        if isinstance(holder, dict | list):
            holder[key] = value
        else:
            object.__setattr__(holder, key, value)
        marked.append(percent(value) if as_percent else decimal(value))

    of, alike = overlap_.nulls["rotated"], similar.null["rotated"]
    mark(of, "same_partner")
    if several:
        for key in ("only_one", "all_of_n", "exactly_n"):
            mark(getattr(of, key), -1)
        of_pairs: Any = overlap_.strict.pairs_null["rotated"]
        for pair in [*of_pairs] if not many else []:
            mark(of_pairs, pair)
        if many:
            of_pairs.update(dict.fromkeys(of_pairs, 0.9))
            mark(of_pairs, next(iter(of_pairs)))
        object.__setattr__(similar.pw_mcc, "null_sd", {"rotated": 0.0123})
    for key in ("mean_encoder", "mean_decoder", "mean_max_encoder", "mean_max_decoder"):
        mark(alike, key, as_percent=False)
    for key in ("mean_same_partner", "mean_different_partner"):
        mark(alike, key, as_percent=False)
    mark(similar.bimodality.null["rotated"], "of_sample", as_percent=False)
    for part in found.membership.parts[1:]:
        mark(part.null, "rotated")
    for name in DEFINITIONS:
        mark(overlap_.by(name).null, "rotated")
    mark(of, "max_cosine")
    mark(of.sweep["decoder"], overlap_.sweep["threshold"].index(0.3))
    moved = found.counterparts.null["shifted"]
    for i, row in enumerate(moved.relations):
        level: dict[str, float] = {}
        mark(level, "value")
        moved.relations[i] = replace(row, fraction=Estimate(level["value"], math.nan, math.nan))
    mark(moved.same_partner, "decoder")
    page = " ".join(drawn(found, width).split())
    assert [word for word in marked if word not in page] == []
    assert not several or ".0123" in page
    assert f"chance level {overlap_.strict.null['rotated']:.1%}".replace("%", " %") in page  # in the first lines
    assert "Compared over 2M tokens" in page
    assert "greater by at most .0123" in page


def test_words_do_not_depend_on_colour(found: shape.StudyFindings) -> None:
    def words(page: str) -> list[str]:
        return re.findall(r"[A-Za-z]{3,}|\.\d+", ANSI.sub("", page))

    bare = findings_without_contexts(found)
    assert words(drawn(bare, 80, "truecolor")) == words(drawn(bare, 80))


def test_hostile_text_is_shown_and_not_obeyed(found: shape.StudyFindings) -> None:
    assert found.interesting
    hostile = replace(
        found,
        study=small_study.NASTY,
        interesting=[replace(found.interesting[0], explanation=small_study.NASTY)],
        failures=shape.Failures(1, 2, [shape.Reason("score", small_study.NASTY, 1, [3])], "python cli.py score"),
        methods=replace(found.methods, judge=shape.Agent("llm", small_study.NASTY)),
    )
    page = drawn(hostile, 120)
    assert page.count("[red]markup[/red]") >= 4
    assert not {unicodedata.category(c) for c in page.replace("\n", "")} & ACTS_ON_A_TERMINAL
    coloured = ANSI.sub("", drawn(hostile, 120, "truecolor"))
    assert not {unicodedata.category(c) for c in coloured.replace("\n", "")} & ACTS_ON_A_TERMINAL


def test_an_ascii_terminal_gets_ascii(found: shape.StudyFindings) -> None:
    target = console(80, encoding="ascii")
    print_page(report_page(found, is_full=True), target)
    page = text_of(target)
    assert page.isascii()
    assert "How much is shared" in page
    assert max(map(len, page.splitlines())) <= 80


def test_failures_are_in_the_page_with_their_command(found: shape.StudyFindings) -> None:
    retry = "python cli.py explain --sae run_a --indices 3"
    page = drawn(
        replace(found, failures=shape.Failures(1, 0, [shape.Reason("explain", "no explanation line", 1, [3])], retry))
    )
    assert "What failed" in page
    assert "no explanation line" in page
    assert retry in page


def test_flagged_explanations_are_in_the_page(found: shape.StudyFindings) -> None:
    assert found.scores
    assert found.interesting
    rows = [shape.Reason("explain", f"same text as {n} others", n + 1, list(range(n + 1))) for n in (8, 3)]
    rows.append(shape.Reason("explain", "quotes nothing it saw", 2, [3, 20]))
    shown = replace(found.interesting[0], flags=["same text as 8 others"])
    page = drawn(replace(found, scores=replace(found.scores, flags=rows), interesting=[shown]))
    words = " ".join(page.split())
    assert "Flagged: 10 explanations shared by other latents or quoting nothing they saw" in words
    assert re.search(r"9 +same text as 8 others +0, 1, 2, 3, 4, 5, …", page)
    assert re.search(r"2 +quotes nothing it saw +3, 20", page)
    assert re.search(r"fires [^·]+ · same text as 8 others", words)
    unscored = replace(found.scores, flags=rows, n_scored=0)
    assert "quotes nothing it saw" in drawn(replace(found, scores=unscored))
    assert "flagged" not in drawn(found).lower()


def test_each_missing_stage_prints_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("eval_runs")
    runs = small_study.runs_of(root, m=40, d=16)
    page = drawn(findings(root, NAMES))
    assert "$ python cli.py align run_a run_b run_c\n" in re.sub(" +\n", "\n", page)
    assert "$ python cli.py explain --sae run_a\n" in re.sub(" +\n", "\n", page)
    small_study.harvested(runs)
    small_study.aligned(runs)
    numbers = small_study.explained(runs[0], [1, 2, 3])
    page = drawn(findings(root, NAMES))
    assert "python cli.py score --sae run_a" in page
    assert "$ python cli.py explain --sae run_a\n" not in re.sub(" +\n", "\n", page)
    small_study.scored(runs[0], {1: numbers[1]})
    page = drawn(findings(root, NAMES))
    assert "2 explained latents not scored yet" in page
    assert "Fewer than three latents are scored" in page


def test_one_run_alone_has_a_report(tmp_path: Path) -> None:
    small_study.whole(tmp_path, seeds=1, m=60, n_scored=30)
    page = drawn(findings(tmp_path, ["run_a"]))
    assert "train --name run --seeds 0 1" in page
    assert "own explanation" in page


def test_a_short_harvest_calls_no_latent_dead(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path, 2, m=40, d=16)
    small_study.harvested(runs, tokens=50_000)
    small_study.aligned(runs)
    page = drawn(findings(tmp_path, ["run_a", "run_b"]))
    assert "  L0  silent" in page
    assert "too few to call" in page


@pytest.mark.parametrize(
    ("whole", "partial", "words"),
    [
        ([0.1, 0.3], [0.05, 0.3], "Latents with similar partners in other seeds score better"),
        ([-0.3, -0.1], [-0.3, -0.1], "Latents with similar partners in other seeds score worse"),
        ([-0.1, 0.3], [0.05, 0.3], "At equal frequency, latents with similar partners in other seeds score better"),
        ([0.1, 0.3], [-0.1, 0.3], "not clearly so at equal frequency"),
        ([-0.1, 0.1], [-0.1, 0.1], "No clear relation"),
    ],
)
def test_the_summary_says_no_more_than_the_intervals(
    found: Any, whole: list[float], partial: list[float], words: str
) -> None:
    tree = replace(found.relation, spearman=Estimate(0.1, *whole), partial=Estimate(0.1, *partial), pooled=None)
    assert any(words in said for _, said in answer(replace(found, relation=tree)))


@pytest.mark.parametrize(
    ("mean", "interval", "words"),
    [
        (0.0804, [0.045, 0.12], "This is .080 [.045, .120] above the swapped control and .100 below the n-gram"),
        (-0.05, [-0.08, -0.02], "This is .050 [.020, .080] below the swapped control and"),
        (0.01, [-0.02, 0.04], "This is .010 [−.020, .040] above the swapped control and"),
        (-0.01, [-0.04, 0.02], "This is .010 [−.020, .040] below the swapped control and"),
        (0.01, None, "This is .010 above the swapped control and"),
    ],
)
def test_the_summary_compares_scores_with_each_control(
    found: Any, mean: float, interval: list[float] | None, words: str
) -> None:
    scores = found.scores
    above = shape.Difference(Estimate(mean, *(interval or (math.nan, math.nan))), 9, 1.0)
    control, below = replace(scores.control, above_control=above), shape.Mean(Estimate(-0.1, math.nan, math.nan))
    baseline = shape.Control(scores.mean, scores.quartiles, 0.5, 9, scores.histogram, below, {})
    answers = answer(replace(found, scores=replace(scores, control=control, baseline=baseline)))
    assert any(words in said for _, said in answers), answers


def test_other_set_ups_are_told_apart_in_words(found: shape.StudyFindings) -> None:
    model = {"explainer_model": "m", "model": "m"}
    one = {"explainer": "llm", "judge": "llm", **model, "scorer": "detection", "settings_hash": "a" * 64}
    ngram = {**one, "explainer": "ngram", "judge": "ngram", "explainer_model": "", "model": ""}
    told = describe_setups(
        [
            {**one, "precision": 0.065, "n_scored": 60},
            {**one, "precision": None, "n_scored": 60},
            {**one, "precision": None, "n_scored": 60, "settings_hash": "b" * 64},
            {**ngram, "precision": None, "n_scored": 1},
        ]
    )
    assert told == [
        "60 latents: explained by llm (m), judged by llm (m), detection, to ±.065",
        "60 latents: explained by llm (m), judged by llm (m), detection, all contexts, settings aaaaaaaa",
        "60 latents: explained by llm (m), judged by llm (m), detection, all contexts, settings bbbbbbbb",
        "1 latent: explained by ngram, judged by ngram, detection, all contexts",
    ]
    others = [shape.OtherExplainer(small_study.NASTY, 1, "python cli.py report --explainer x", None)]
    page = drawn(replace(found, methods=replace(found.methods, other_explainers=others)))
    assert "are scored too (1 latent)" in page
    assert "$ python cli.py report --explainer x" in page
    assert not {unicodedata.category(c) for c in page.replace("\n", "")} & ACTS_ON_A_TERMINAL


# --- the smaller pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("colour", ["truecolor", None])
def test_one_latent(root: Path, width: int, colour: Any) -> None:
    found = latent_findings(Run("run_a", root), 5)
    pieces = [{"tokens": p.tokens, "activations": p.activations} for p in small_study.contexts("run_a", 5)]
    target = console(width, colour)
    print_page(
        latent_page({**found, "contexts": pieces, "activations": {"edges": [0, 1, 2], "counts": [5, 1]}}), target
    )
    page = ANSI.sub("", text_of(target))
    assert all(cell_len(line) <= width for line in page.splitlines())
    assert "latent 5" in page
    assert "In the other seeds" in page
    assert "run_c" in page
    assert not {unicodedata.category(c) for c in page.replace("\n", "")} & ACTS_ON_A_TERMINAL


def test_a_flagged_explanation_is_shown_with_its_flags(root: Path) -> None:
    found = latent_findings(Run("run_a", root), 5)
    assert found["explanations"][0]["flags"] == []
    flags = ["same text as 7 others", "quotes nothing it saw"]
    found["explanations"][0]["flags"] = flags
    target = console(80)
    print_page(latent_page({**found, "activations": {"edges": [0, 1, 2], "counts": [5, 1]}}), target)
    assert all(f"! {flag}" in text_of(target) for flag in flags)


@pytest.mark.parametrize("reason", ["7 activating contexts to test on, [b]20[/b] needed", "", "dead"])
def test_an_unexplainable_latent_gives_a_reason_without_command(tmp_path: Path, reason: str) -> None:
    (run,) = small_study.runs_of(tmp_path, 1, m=20, d=8)
    small_study.harvested([run])
    if reason != "dead":
        table = pd.DataFrame(
            {"latent": range(20), "eligible": [i != 3 for i in range(20)], "ineligible_reason": reason}
        )
        write_table(run.stage_path("contexts"), table)
    found = latent_findings(run, 19 if reason == "dead" else 3)
    assert found["commands"]["explain"] is None
    target = console(80)
    print_page(latent_page({**found, "activations": {"edges": [0, 1, 2], "counts": [5, 1]}}), target)
    page = text_of(target)
    why = {"dead": "it never fires over the harvested tokens", "": "too few contexts"}.get(reason, reason)
    assert f"It cannot be explained: {why}." in page
    assert "has not been explained yet" not in page
    assert "explain --sae" not in page
    if reason:
        lines = page.splitlines()
        strip = next(i for i, line in enumerate(lines) if "█" in line)
        assert "activations over all firings" in lines[strip - 1]


def test_a_latent_of_a_bare_run(tmp_path: Path) -> None:
    (run,) = small_study.runs_of(tmp_path, 1, m=20, d=8)
    target = console(80)
    print_page(latent_page(latent_findings(run, 3)), target)
    page = text_of(target)
    for command in ("harvest --sae run_a", "explain --sae run_a --indices 3", "python cli.py align"):
        assert command in page


def test_outcome_with_failures_and_without() -> None:
    whole = {
        "runs": ["run_a"],
        "backend": "ngram",
        "of": "latent",
        "n_done": 200,
        "n_new": 200,
        "n_failed": 0,
        "failures": {},
        "notes": [],
    }
    target = console(80)
    print_page(outcome_page({**whole, "retry": None, "next": "python cli.py score --sae run_a"}, "explain"), target)
    assert "200 latents explained by ngram" in text_of(target)
    assert "score --sae run_a" in text_of(target)
    target = console(80)
    print_page(outcome_page({**whole, "n_done": 280, "n_controls": 80, "retry": None, "next": None}, "explain"), target)
    assert "200 latents explained and 80 of control SAEs" in text_of(target), "what was asked for comes first"
    target = console(80)
    failed = {"n_failed": 3, "failures": {"[red]too few": 2, "b": 1}, "retry": "python cli.py explain"}
    print_page(outcome_page({**whole, **failed}, "explain"), target)
    assert "[red]too few" in text_of(target)
    assert "This retries only what failed" in text_of(target)
    target = console(80)
    flagged = {"flags": {"same text as 9 others": 10}, "retry": None, "next": "python cli.py score"}
    print_page(outcome_page({**whole, **flagged}, "explain"), target)
    assert "explained, but flagged" in text_of(target)
    assert re.search(r"10 +same text as 9 others", text_of(target))
    assert "python cli.py score" in text_of(target), "they are no failures"
    target = console(80)
    print_page(outcome_page({**whole, "of": "score", "n_done": 400, "retry": None, "next": None}, "score"), target)
    assert "400 scores made, 200 of them now by ngram" in text_of(target)


def test_alignment_and_runs(root: Path) -> None:
    from sae.study.run import progress_of

    found = alignment_findings(Study.open(root, NAMES, View()))
    target = console(80)
    print_page(alignment_page(found), target)
    assert "strict" in text_of(target)
    assert "found in every one" in text_of(target)
    assert "--force" not in text_of(target)
    target = console(80)
    apart = "runs [red]x and y are of different hookpoints"
    print_page(alignment_page(replace(found, apart=apart)), target)
    assert "Aligned by --force: runs [red]x and y are of different hookpoints" in text_of(target)
    target = console(80)
    print_page(runs_page([progress_of(Run(name, root)) for name in NAMES]), target)
    assert text_of(target).count("yes") == 8  # three trained and harvested, one of them explained and scored
    target = console(80)
    print_page(runs_page([]), target)
    assert "python cli.py demo" in text_of(target)


# --- a study part-way ---------------------------------------------------------------------------------------


FOUR = [*NAMES, "run_d"]


@pytest.fixture
def part_way(tmp_path: Path) -> Path:
    """Three aligned SAEs, and a fourth seed that has been trained since."""
    small_study.whole(tmp_path, seeds=3, m=40, n_scored=12)
    small_study.runs_of(tmp_path, 4, m=40)
    return tmp_path


def head(root: Path, names: list[str] = FOUR, focus: str | None = None) -> dict[str, str]:
    return describe_study(findings(root, names, View(focus)))


def test_the_head_says_which_runs_are_aligned(part_way: Path) -> None:
    command = f"python cli.py align {' '.join(FOUR)} --root {part_way}"
    words = head(part_way)
    assert words["aligned"] == f"run_a, run_b and run_c; not run_d (next: {command})"
    assert words["runs"].endswith("run_c (seed 2), run_d (seed 3, not harvested)")
    assert "aligned" not in head(part_way, NAMES), "all of them are"
    assert head(part_way, focus="run_d")["aligned"].startswith("none (next: python cli.py align run_a")
    page = " ".join(drawn(findings(part_way, FOUR), 200).split())
    assert "aligned run_a, run_b and run_c; not run_d" in page
    assert "mean of 3 pairs" in page


def test_the_head_says_which_runs_are_not_trained(part_way: Path) -> None:
    (part_way / "run_d" / "cfg.json").unlink()
    words = head(part_way)
    assert "run_d (seed 3, training not finished)" in words["runs"]
    assert "not run_d (next: python cli.py train --name run --seeds 0 1 2 3" in words["aligned"]


def test_trained_runs_align_while_one_is_training(part_way: Path) -> None:
    (part_way / "run_c" / "cfg.json").unlink()
    found = findings(part_way, FOUR, View("run_a"))
    waiting = {entry.stage: entry.command for entry in found.missing}
    assert f"align run_a run_b run_d --root {part_way}" in waiting["overlap"]


def test_a_page_has_the_same_head(part_way: Path) -> None:
    from autointerp.report.html.page import write_report

    runs = [Run(name, part_way) for name in FOUR]
    written = Path(write_report(runs[0], runs)["path"]).read_text()
    assert "run_a, run_b and run_c; not run_d" in written


def test_runs_says_with_how_many_each_is_aligned(part_way: Path) -> None:
    from sae.study.run import progress_of

    for name in NAMES:
        table = pd.DataFrame({"latent": [0]})
        others = [other for other in NAMES if other != name]
        write_table(part_way / name / "latents.overlap.parquet", table, inputs="", against=others)
    told = [progress_of(Run(name, part_way)) for name in FOUR]
    assert [run["aligned_with"] for run in told] == [["run_b", "run_c"], ["run_a", "run_c"], ["run_a", "run_b"], []]
    target = console(80)
    print_page(runs_page(told, part_way), target)
    assert text_of(target).count("with 2 of 3") == 3
    (part_way / "run_d" / "cfg.json").unlink()
    target = console(80)
    print_page(runs_page(told, part_way), target)
    assert "with 2 of" not in text_of(target)
