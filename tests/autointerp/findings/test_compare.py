"""Two runs side by side: figures are those of the files, pairs those asked for, and nothing is lost at any width."""

from __future__ import annotations

import copy
import io
import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from scipy import stats

from autointerp.findings.json_values import to_json
from autointerp.findings.pair import PairChoice, chosen, compare_runs, ensure_pair_aligned, the_two
from autointerp.findings.shape import Comparison
from autointerp.journal.journal import Journal
from autointerp.report.compare import comparison_page
from autointerp.report.terminal import print_page
from sae.alignment.alignment import read_alignment
from sae.alignment.overlap import find_shared
from sae.common.errors import BadInput, NotFound
from sae.common.files import read_table, write_table
from sae.study.run import Run
from sae.study.stage import Compute


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs; most of the first's explained latents have an explained partner."""
    made = small_study.whole(tmp_path_factory.mktemp("compare"), seeds=2, nulls=True)
    table = read_alignment(made[0].root / "alignments", "run_a", "run_b").a
    partners = sorted({int(i) for i in table["decoder_partner"].iloc[:60]})
    failing = {partners[3]: "the server said no"}
    small_study.scored(made[1], small_study.explained(made[1], partners, failing=failing), control=False)
    return made


@pytest.fixture(scope="module")
def found(runs: list[Run]) -> Comparison:
    return compare_runs(runs[0], runs[1])


def drawn(found: Comparison, choice: PairChoice | None = None, width: int = 80, colour: Any = None) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=colour, force_terminal=colour is not None, highlight=False)
    print_page(comparison_page(found, chosen(found.pairs, choice or PairChoice())), console)
    return out.getvalue()


# --- figures ------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_alignment(runs: list[Run], found: Comparison) -> None:
    table = read_alignment(runs[0].root / "alignments", "run_a", "run_b").a
    assert [pair.latent for pair in found.pairs] == table["latent"].tolist()
    assert [pair.partner for pair in found.pairs] == table["decoder_partner"].tolist()
    for name in ("strict", "both", "decoder", "lenient"):
        assert [pair.shared[name] for pair in found.pairs] == find_shared(table, name).tolist()
    firing = [read_table(run.stage_path("firing")).set_index("latent") for run in runs]
    for pair in found.pairs:
        row = table.iloc[pair.latent]
        assert pair.encoder_cosine == row["encoder_cosine"]
        assert pair.same_partner == (row["encoder_partner"] == row["decoder_partner"])
        for side, of, latent in zip(pair.sides, firing, (pair.latent, pair.partner), strict=True):
            assert side.n_firings == of.loc[latent, "n_firings"]
            assert side.alive == (not of.loc[latent, "dead"])
    json.dumps(to_json(found), allow_nan=False)


def test_agreement_uses_the_scores_of_both_sides(runs: list[Run], found: Comparison) -> None:
    scores = []
    for run in runs:
        rows = read_table(run.stage_path("scores"))
        good = rows[(rows["control"] == "none") & (rows["status"] == "ok")]
        scores.append(good.set_index("latent")["balanced_accuracy"])
    table = read_alignment(runs[0].root / "alignments", "run_a", "run_b").a.set_index("latent")
    both = pd.DataFrame(
        {"a": scores[0], "b": scores[1].reindex(table["decoder_partner"]).set_axis(table.index)}
    ).dropna()
    returns = pd.Series(find_shared(table, "strict"), index=table.index).reindex(both.index)
    assert found.agreement
    for name, of in (("together", both), ("shared", both[returns]), ("unshared", both[~returns])):
        told = found.agreement[name]
        assert told.n == len(of) > 5
        assert told.spearman.value == pytest.approx(stats.spearmanr(of["a"], of["b"]).statistic)
        assert told.difference.value == pytest.approx((of["a"] - of["b"]).mean())
        assert told.gap.value == pytest.approx((of["a"] - of["b"]).abs().mean())
        for figure in ("spearman", "difference", "gap"):
            low, high = getattr(told, figure).interval
            assert low <= getattr(told, figure).value <= high
    by_latent = {pair.latent: pair for pair in found.pairs}
    for latent, row in both.iterrows():
        assert by_latent[int(str(latent))].score_gap == pytest.approx(row["a"] - row["b"])
    assert sum(pair.score_gap is not None for pair in found.pairs) == len(both)


def test_the_threshold_and_definition_decide_what_is_shared(runs: list[Run]) -> None:
    loose: Any = compare_runs(runs[0], runs[1], definition="decoder", threshold=0.3)
    table = read_alignment(runs[0].root / "alignments", "run_a", "run_b").a
    assert [pair.is_shared for pair in loose.pairs] == find_shared(table, "decoder", 0.3).tolist()
    assert loose.overlap.definition == "decoder"
    assert loose.overlap.threshold == 0.3


def test_what_lacks_an_explanation_is_counted_and_named(runs: list[Run], found: Comparison) -> None:
    lacking = found.lacking
    explained = [{p.sides[i].latent for p in found.pairs if p.sides[i].explanation} for i in (0, 1)]
    assert lacking.n_explained_both + lacking.n_explained_one == len(
        {p.latent for p in found.pairs if p.latent in explained[0] or p.partner in explained[1]}
    )
    entries = {entry.latent: entry for entry in lacking.without_explanation if entry.run == "run_b"}
    expected = {p.partner for p in found.pairs if p.latent in explained[0]} - explained[1]
    assert set(entries) == expected
    eligible = read_table(runs[1].stage_path("contexts")).set_index("latent")["eligible"]
    assert {latent for latent, e in entries.items() if not e.can_be_explained} == {
        latent for latent in expected if not eligible[latent]
    }
    failed = [entry.why for entry in entries.values() if (entry.why or "").startswith("failed")]
    assert failed == ["failed: the server said no"]
    root = ["--root", str(runs[0].root)]
    assert lacking.explain == [" ".join(["python cli.py explain --sae run_a --with-partners", *root])]
    assert lacking.score == " ".join(["python cli.py score --sae run_a --sae run_b", *root])
    text = drawn(found)
    able = [entry for entry in entries.values() if entry.can_be_explained]
    assert f"run_b: {len(able)} latents with an explained partner" in text
    assert "explain --sae run_a --with-partners" in text


def test_nothing_explained_names_the_command(tmp_path: Path) -> None:
    made = small_study.runs_of(tmp_path, 2)
    small_study.harvested(made)
    small_study.aligned(made)
    bare = compare_runs(made[0], made[1])
    assert bare.agreement is None
    text = drawn(bare)
    assert "Nothing is explained in either run yet." in text
    assert "explain --sae run_a --with-partners" in text
    assert "No pair is scored on both sides." in text
    assert "8 of the" in text
    assert "pairs of latents that both fire" in text


def test_scores_of_other_setups_are_skipped_and_reported(tmp_path: Path) -> None:
    made = small_study.whole(tmp_path, seeds=2)
    rows = small_study.scored(made[1], small_study.explained(made[1], list(range(50))))
    write_table(made[1].stage_path("scores"), rows.assign(judge_prompt_hash="another"))
    other: Any = compare_runs(made[0], made[1])
    assert other.agreement is None
    assert other.scored_by.other_made_otherwise
    assert all(pair.sides[1].score is None for pair in other.pairs)
    assert "The scores of run_b were made in another way" in drawn(other)


@pytest.fixture
def lone_model(tmp_path: Path) -> list[Run]:
    """Both runs are scored by n-grams; ten latents of the first also by a model, later."""
    made = small_study.whole(tmp_path, seeds=2)
    small_study.scored(made[1], small_study.explained(made[1], list(range(50))))
    path, numbers = made[0].stage_path("scores"), {}
    with Journal(made[0].journal_path) as journal:
        for latent in range(10):
            words: dict[str, Any] = {
                "settings_hash": "x" * 64,
                "prompt_hash": "p" * 64,
                "model": "m",
                "text": f"model on {latent}",
            }
            numbers[latent] = journal.add_explanation(latent=latent, explainer="llm", contexts=[1], **words)
    rows = read_table(path)
    mine = rows[(rows["control"] == "none") & rows["latent"].isin(list(numbers))]
    by = {"explainer": "llm", "explainer_model": "m", "explain_settings_hash": "x" * 64, "judge": "llm", "model": "m"}
    mine = mine.assign(explanation_id=mine["latent"].map(numbers), **by, explain_prompt_hash="p" * 64)
    write_table(path, pd.concat([rows, mine], ignore_index=True))
    return made


def test_the_newest_scores_of_both_runs_are_compared(lone_model: list[Run]) -> None:
    told: Any = compare_runs(lone_model[0], lone_model[1])
    assert told.scored_by.explainer == "ngram"
    assert told.agreement["together"].n > 10
    texts = [side.explanation for pair in told.pairs for side in pair.sides if side.explanation]
    assert len(texts) > 60
    assert not any("model on" in text for text in texts)
    assert to_json(compare_runs(lone_model[0], lone_model[1], explainer="ngram")) == to_json(told)


def test_explanations_of_two_explainers_are_never_paired(lone_model: list[Run]) -> None:
    told: Any = compare_runs(lone_model[0], lone_model[1], explainer="llm")
    assert told.agreement is None
    assert told.scored_by.other_made_otherwise
    sides = [[pair.sides[i].explanation for pair in told.pairs] for i in (0, 1)]
    assert sum(text is not None for text in sides[0]) == 10
    assert not any(sides[1])
    page = " ".join(drawn(told).split())
    assert "This explains partners, with the same --llm-url or --vllm as before:" in page
    assert "This scores what is explained, with the same --llm-url or --vllm as before:" in page
    with pytest.raises(NotFound, match=r"'gpt'.*'llm' and 'ngram'"):
        compare_runs(lone_model[0], lone_model[1], explainer="gpt")


def test_scoring_is_advised_only_where_it_can_help(tmp_path: Path) -> None:
    made = small_study.whole(tmp_path, seeds=2, m=40, n_scored=40)
    table = read_alignment(tmp_path / "alignments", "run_a", "run_b").a
    partners = [int(i) for i in table["decoder_partner"]]
    for run, latents in zip(made, (list(range(40)), partners), strict=True):
        failing = {latents[0]: "too few contexts that can be marked otherwise"} if run is made[1] else {}
        small_study.scored(run, small_study.explained(run, latents), failing=failing)
    told: Any = compare_runs(made[0], made[1])
    assert told.lacking.not_scored == [0]
    assert told.lacking.score is None
    assert "This scores" not in drawn(told)
    rows = read_table(made[1].stage_path("scores"))
    write_table(made[1].stage_path("scores"), rows[rows["latent"] != partners[0]])
    told = compare_runs(made[0], made[1])
    assert told.lacking.not_scored == [0]
    assert "This scores what is explained:" in drawn(told)


def test_scores_of_the_second_run_alone_are_shown(tmp_path: Path) -> None:
    made = small_study.runs_of(tmp_path, 2)
    small_study.harvested(made)
    small_study.aligned(made)
    table = small_study.scored(made[1], small_study.explained(made[1], list(range(50))), control=False)
    alone = compare_runs(made[0], made[1])
    told = {p.partner: p.sides[1].score for p in alone.pairs if p.sides[1].score}
    assert {k: v.value.value for k, v in told.items()} == pytest.approx(
        table.set_index("latent")["balanced_accuracy"].to_dict()
    )
    assert alone.lacking.explain[0].startswith("python cli.py explain --sae run_b --with-partners")


def test_a_wider_run_has_latents_without_partner(tmp_path: Path) -> None:
    from sae.alignment.alignment import align, write_alignment

    wide, narrow = (small_study.runs_of(tmp_path, 1, study=s, m=m)[0] for s, m in (("wide", 90), ("narrow", 60)))
    for run in (wide, narrow):
        small_study.harvested([run])
    rng = np.random.default_rng(0)
    sides = [rng.normal(size=(2, m, 32)) for m in (90, 60)]
    aligned = align(*sides[0], *sides[1], names=(wide.name, narrow.name))
    write_alignment(tmp_path / "alignments", wide.name, narrow.name, aligned, "inputs")
    told: Any = compare_runs(wide, narrow)
    assert told.n_without_partner == 30
    assert len(told.pairs) == 60
    assert compare_runs(narrow, wide).n_without_partner == 0
    assert "different studies" in (told.apart or "")
    assert "Aligned by --force" in drawn(told)
    assert "30 latents of wide_a have no partner" in drawn(told)


# --- which pairs --------------------------------------------------------------------------------------------


def test_the_default_spreads_over_all_similarities(found: Comparison) -> None:
    told = chosen(found.pairs, PairChoice())
    both = [p for p in found.pairs if all(side.explanation for side in p.sides)]
    alike = sorted((p.similarity for p in both), reverse=True)
    picked = [p.similarity for p in told.pairs]
    assert len(picked) == 8
    assert (picked[0], picked[-1]) == (alike[0], alike[-1])
    places = [alike.index(x) for x in picked]
    assert np.ptp(np.diff(places)) <= 1
    assert told.n_of == len(both)
    assert f"8 of the {len(both)} pairs that are explained on both sides" in told.says


@pytest.mark.parametrize("sort", ["similarity", "score", "gap", "firing"])
@pytest.mark.parametrize("sharing", ["any", "shared", "unshared"])
def test_an_order_holds_over_all_that_are_left(found: Comparison, sort: Any, sharing: Any) -> None:
    keys: dict[str, Any] = {
        "similarity": lambda p: p.similarity,
        "score": lambda p: p.sides[0].score.value.value + p.sides[1].score.value.value,
        "gap": lambda p: abs(p.score_gap),
        "firing": lambda p: min(side.firing_frequency for side in p.sides),
    }
    told = chosen(found.pairs, PairChoice(n=10**6, sort=sort, sharing=sharing))
    values = [keys[sort](pair) for pair in told.pairs]
    assert values == sorted(values, reverse=True)
    assert len(values) == told.n_of > 0
    if sharing != "any":
        assert {pair.is_shared for pair in told.pairs} == {sharing == "shared"}
    first = chosen(found.pairs, PairChoice(n=3, sort=sort, sharing=sharing))
    assert first.latents == told.latents[:3]


@given(st.integers(1, 200))
def test_no_pair_is_shown_twice(found: Comparison, n: int) -> None:
    told = chosen(found.pairs, PairChoice(n=n))
    assert len(set(told.latents)) == len(told.latents) == min(n, told.n_of)


def test_none_is_told(found: Comparison) -> None:
    nothing = [replace(pair, is_shared=True) for pair in found.pairs]
    told = chosen(nothing, PairChoice(sharing="unshared", sort="gap"))
    assert told.says == "There are no unshared pairs that are scored on both sides."


# --- in the terminal ----------------------------------------------------------------------------------------


def without_spaces(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_no_line_is_wider_and_nothing_is_lost(found: Comparison, width: int, colour: Any) -> None:
    runs = [found.runs[0], replace(found.runs[1], name="a_run_with_quite_a_long_name")]
    long = replace(copy.deepcopy(found), runs=runs)
    words = " ".join(f"word{i}" for i in range(60)) + " " + "x" * 200 + " 漢字かな交じり文" * 9
    for i, pair in enumerate(p for p in long.pairs if all(side.explanation for side in p.sides)):
        for j, side in enumerate(pair.sides):
            pair.sides[j] = replace(side, explanation=f"explanation{i}of{j} {words}")
    text = drawn(long, width=width)
    lines = text.splitlines()
    if colour is None:
        assert max(map(cell_len, text.splitlines())) <= width
        assert not any(line != line.rstrip() for line in text.splitlines())
    else:
        coloured = drawn(long, width=width, colour=colour)
        assert "\x1b[" in coloured
        assert without_spaces(text)[:200] == without_spaces(_plain(coloured))[:200]
    assert not [line for line in lines if "…" in line]
    each = (min(width, 100) - 2) // 2
    columns = [
        without_spaces("".join(_cells(line, *span) for line in lines)) for span in ((0, each), (2 + each, width))
    ]
    for pair in chosen(long.pairs, PairChoice()).pairs:
        assert f"{pair.latent} ↔ {pair.partner}" in text
        for column, side in zip(columns, pair.sides, strict=True):
            assert without_spaces(side.explanation or "") in column
            assert without_spaces(f"fires {side.n_firings:,} times") in column or not side.alive


def _plain(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _cells(line: str, begin: int, end: int) -> str:
    """What stands in the cells from ``begin`` to ``end``; a wide character is where it begins."""
    at, kept = 0, ""
    for character in line:
        if begin <= at < end:
            kept += character
        at += cell_len(character)
    return kept


def test_how_a_pair_is_matched_fits_one_line(found: Comparison) -> None:
    """At 80 columns, with cosines and latents of any size that there are."""
    wide = copy.deepcopy(found)
    wide.pairs[:] = [replace(pair, encoder_partner=32_767, same_partner=False, jaccard=0.63) for pair in wide.pairs]
    lines = [line for line in drawn(wide).splitlines() if line.startswith("  encoder ")]
    assert len(lines) == 8
    assert all(line.endswith("encoder's partner is 32767 · fire together .63") for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_hostile_text_is_shown_and_not_obeyed(found: Comparison, width: int) -> None:
    runs = [replace(run, name=f"run\x1b[31m{run.name[-1]}") for run in found.runs]
    nasty = replace(copy.deepcopy(found), runs=runs)
    for pair in nasty.pairs:
        pair.sides[:] = [replace(side, explanation=small_study.NASTY) for side in pair.sides]
    text = drawn(nasty, width=width)
    acts = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}
    assert not acts
    assert "[red]markup[/red]" in text
    assert max(map(cell_len, text.splitlines())) <= width


def test_without_unicode_the_page_is_legible(found: Comparison) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    print_page(
        comparison_page(found, chosen(found.pairs, PairChoice())), Console(file=stream, width=80, color_system=None)
    )
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    text = raw.getvalue().decode("ascii")
    pair = chosen(found.pairs, PairChoice()).pairs[0]
    assert f"{pair.latent} = {pair.partner}" in text


# --- which two ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "not 0 runs"),
        (["run_a"], "not 1 run;"),
        (["run_a", "run_a"], "not 'run_a' twice"),
        (["run_a", "run_b", "run_a"], "not 3 runs"),
    ],
)
def test_a_comparison_takes_two(runs: list[Run], names: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        the_two(names, runs[0].root)


def test_an_unknown_run_is_named(runs: list[Run]) -> None:
    with pytest.raises(NotFound, match=r"'run_q'.*'run_a'"):
        the_two(["run_a", "run_q"], runs[0].root)


def test_runs_of_different_studies_are_refused(tmp_path: Path) -> None:
    a, b = (small_study.runs_of(tmp_path, 1, study=study)[0] for study in ("one", "two"))
    with pytest.raises(BadInput, match=r"different studies.*align one_a two_a --force"):
        ensure_pair_aligned(a, b, Compute())
