"""One latent in the terminal and a run in a notebook: every kind of score, by whom, with its interval."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from small_study import findings
from tiny_study import cli

from autointerp import Run
from autointerp.contexts.sampling import load_sample
from autointerp.findings.latent import latent_findings
from autointerp.findings.reliability import reliability_findings, verdicts_of
from autointerp.report.latent import latent_page
from autointerp.report.terminal import print_page
from autointerp.scoring.scorers.base import HARDER
from autointerp.scoring.setups import rows_of, setups_of
from sae.common.errors import NotFound
from sae.common.files import read_table, write_table


@pytest.fixture
def run(tiny_root: Path) -> Run:
    """Explained and scored by n-grams, in detection and fuzzing: enough latents for a reliability."""
    cli("explain", "--sae", "run_a", "--latents", 30, "--root", tiny_root).well()
    both = ("--scorer", "detection", "--scorer", "fuzzing")
    cli("score", "--sae", "run_a", *both, "--root", tiny_root).well()
    return Run("run_a", tiny_root)


def test_show_tells_every_score_apart_with_its_interval(run: Run) -> None:
    table = run.scores()
    has = table[(table["control"] == "none") & (table["status"] == "ok") & table["ba_hard"].notna()]
    latent = int(has[has["scorer"] == "detection"]["latent"].iloc[0])
    found = cli("show", "--latent", latent, "--sae", "run_a", "--root", run.root, "--json").well().json
    rows = {(row["scorer"], row["control"]): row for row in found["scores"]}
    assert {("detection", "none"), ("fuzzing", "none"), ("detection", "swap")} <= set(rows)
    told = rows["detection", "none"]
    of_table = has[(has["latent"] == latent) & (has["scorer"] == "detection")].iloc[0]
    for kind in HARDER:
        for name in (f"ba_{kind}", f"ba_{kind}_low", f"tnr_{kind}_high", f"auroc_{kind}", f"n_{kind}"):
            assert told[name] == pytest.approx(of_table[name], nan_ok=True) or told[name] is None
    shown = cli("show", "--latent", latent, "--sae", "run_a", "--root", run.root).well().out
    assert {row["scorer"] for row in found["reliability"]} == {"detection", "fuzzing"}
    for words in ("detection, ngram", "fuzzing, ngram", "swap, detection, ngram", "a neighbour fires", "Reliability"):
        assert words in shown
    for width in (60, 80, 100, 120):
        page = io.StringIO()
        print_page(latent_page(latent_findings(run, latent)), Console(file=page, width=width, color_system=None))
        lines = page.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        (score,) = (line for line in lines if line.lstrip().startswith("detection, ngram"))
        assert all(part in score for part in (f"{told['n_active']} + {told['n_inactive']}", decimals(told["ba_high"])))
        assert "…" not in score


def test_setups_differ_by_precision(run: Run) -> None:
    scores = read_table(run.stage_path("scores"))
    mine = scores[(scores["control"] == "none") & (scores["scorer"] == "detection") & (scores["status"] == "ok")]
    rough = mine.assign(precision=0.1, settings_hash="r" * 64)
    fine = mine.iloc[1:].assign(precision=0.065, settings_hash="f" * 64)
    write_table(run.stage_path("scores"), pd.concat([scores, rough, fine], ignore_index=True))
    without, having = (int(mine["latent"].iloc[i]) for i in (0, 1))
    for latent, wanted in ((having, ["", "  to ±.065", "  to ±.1"]), (without, ["", "  to ±.1"])):
        found = latent_findings(run, latent)
        keys = {(row["scorer"], row["precision"]) for row in found["reliability"]}
        assert ("detection", 0.065) in keys or latent == without
        assert {precision for _, precision in keys} == {None, 0.1, *([0.065] if latent == having else [])}
        page = io.StringIO()
        print_page(latent_page(found), Console(file=page, width=80, color_system=None))
        lines = [line.strip() for line in page.getvalue().splitlines()]
        rows = [i for i, line in enumerate(lines) if line.startswith("detection, ngram")]
        named = [next((w for w in wanted if w and lines[i + 1] == w.strip()), "") for i in rows]
        assert sorted(named) == wanted
    assert len(run.reliability()) == len(setups_of(run.scores()))


def test_report_show_and_notebook_have_one_reliability(run: Run) -> None:
    """Of a stratified sample, whose weights make another number than the scored latents by themselves."""
    report = findings(run.root, ["run_a"])["scores"]["reliability"]
    latent = int(run.scores()["latent"].iloc[0])
    shown = next(row for row in latent_findings(run, latent)["reliability"] if row["scorer"] == "detection")
    table = run.reliability()
    noted = table[table["scorer"] == "detection"].iloc[0]
    assert (shown["value"], shown["interval"], shown["n"]) == (report["value"], report["interval"], report["n"])
    assert (noted["value"], [noted["low"], noted["high"]]) == (report["value"], report["interval"])
    sample = run.stage_path("sample")
    sample.rename(sample.with_suffix(".away"))
    assert run.reliability()[table["scorer"] == "detection"].iloc[0]["value"] != report["value"]


def decimals(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def test_a_notebook_has_the_reliability_of_each_setup(run: Run) -> None:
    table = run.reliability()
    assert table["scorer"].tolist() != []
    scores = run.scores()
    for (_, told), setup in zip(table.iterrows(), setups_of(scores), strict=True):
        rows = rows_of(scores, setup)
        expected = reliability_findings(rows, verdicts_of(run, rows, setup), load_sample(run, setup))
        assert told["scorer"] == setup["scorer"]
        if expected is None or np.isnan(expected.value.value):
            assert np.isnan(told["value"])
        else:
            assert told["value"] == pytest.approx(expected.value.value)
            assert [told["low"], told["high"]] == pytest.approx(expected.value.interval)
    assert table["value"].notna().any()
    scores_path = run.stage_path("scores")
    scores_path.unlink()
    with pytest.raises(NotFound, match="no scores"):
        run.reliability()


def test_the_table_of_latents_never_mixes_scorers(run: Run) -> None:
    table = run.latents().set_index("latent")
    scores = run.scores()
    own = scores[(scores["control"] == "none") & (scores["status"] == "ok")]
    for scorer, column in (("detection", "balanced_accuracy"), ("fuzzing", "fuzzing_balanced_accuracy")):
        expected = own[own["scorer"] == scorer].set_index("latent")["balanced_accuracy"]
        found = table[column].dropna()
        assert found.to_dict() == pytest.approx(expected.to_dict())
        assert len(expected) > 0
    assert {"ba_low", "tnr_low", "ba_hard", "ba_same_token_high", "fuzzing_ba_high"} <= set(table.columns)


def test_a_models_explanation_precedes_the_baseline(run: Run) -> None:
    scores = read_table(run.stage_path("scores"))
    mine = scores[(scores["control"] == "none") & (scores["scorer"] == "detection")]
    by_model = mine.assign(explainer="llm", judge="llm", model="m", balanced_accuracy=0.25)
    write_table(run.stage_path("scores"), pd.concat([by_model, scores], ignore_index=True))
    ok = by_model[by_model["status"] == "ok"]["latent"]
    assert (run.latents().set_index("latent").loc[ok, "balanced_accuracy"] == 0.25).all()
