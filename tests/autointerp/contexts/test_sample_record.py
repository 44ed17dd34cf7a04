"""Samples on disk, and the findings that are weighted by them: against recounts, over the life of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from rich.console import Console
from small_study import findings

from autointerp.contexts.sampling import Draw, draw_sample, load_sample, make_strata, map_to_partners, store_draw
from autointerp.contexts.selection import Choice, draw_latents
from autointerp.findings import study
from autointerp.report.report import report_page
from autointerp.report.terminal import print_page
from sae.alignment.alignment import read_alignment
from sae.alignment.overlap import build_latent_table
from sae.common.files import read_table, table_metadata
from sae.study.run import Run

M = 300
BY = {"explainer": "ngram", "model": "", "settings_hash": "e" * 64, "prompt_hash": ""}
SETUP = {
    "explainer": "ngram",
    "explainer_model": None,
    "explain_settings_hash": "e" * 64,
    "explain_prompt_hash": None,
}
NAMES = ["run_a", "run_b", "run_c"]


def eligible_of(run: Run) -> list[int]:
    table = read_table(run.stage_path("contexts"))
    return [int(latent) for latent in table["latent"][table["eligible"]]]


def overlap_of(runs: list[Run], run: Run) -> pd.DataFrame:
    names = [r.name for r in runs]
    alive = ~read_table(run.stage_path("firing"))["dead"].to_numpy()
    others = [name for name in names if name != run.name]
    tables = {(run.name, x): _seen_from(run, x) for x in others}
    return build_latent_table(run.name, names, tables, alive)


def _seen_from(run: Run, other: str) -> pd.DataFrame:
    first, second = sorted((run.name, other))
    both = read_alignment(run.root / "alignments", first, second)
    return both.a if run.name == first else both.b


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    found = small_study.runs_of(tmp_path, m=M)
    small_study.harvested(found)
    small_study.aligned(found)
    return found


def sampled(runs: list[Run], n: int | None, *, more: list[int] | None = None, **choice: Any) -> Draw:
    """The first run explained and scored as `explain --latents n` and `score` would, with ``more`` named outright."""
    run = runs[0]
    of = draw_latents(run, overlap_of(runs, run), eligible_of(run), Choice(n=n, **choice))
    store_draw(run, of, BY)
    small_study.scored(run, small_study.explained(run, sorted({*of.latents, *(more or [])})))
    return of


def own(run: Run, control: str = "none") -> pd.Series:
    table = read_table(run.stage_path("scores"))
    kept = (table["control"] == control) & (table["status"] == "ok")
    return table[kept].set_index("latent")["balanced_accuracy"]


def test_findings_are_those_of_the_weighted_scores(runs: list[Run]) -> None:
    of = sampled(runs, 90)
    found = findings(runs[0].root, NAMES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    tree, weights = found["scores"], of.table.set_index("latent")["weight"]
    score = own(runs[0])
    assert tree["mean"] == pytest.approx(np.average(score, weights=weights[score.index]))
    assert abs(tree["mean"] - score.mean()) > 0.002  # the strata were not drawn from alike
    low, high = tree["interval"]
    assert low < tree["mean"] < high
    assert [b[0] <= q <= b[1] for q, b in zip(tree["quartiles"], tree["quartile_intervals"], strict=True)] == [True] * 3
    swapped = own(runs[0], "swap")
    above = tree["control"]["above_control"]
    assert above["mean"] == pytest.approx(np.average(score - swapped, weights=weights[score.index]))
    assert above["fraction"] == pytest.approx(np.average(score > swapped, weights=weights[score.index]))
    shared_class = overlap_of(runs, runs[0]).set_index("latent")["shared_class"]
    for name, row in tree["by_class"].items():
        inside = score.index[shared_class[score.index] == name]
        assert row["mean"] == pytest.approx(np.average(score[inside], weights=weights[inside]))
    assert sum(tree["histogram"]["counts"]) == 90
    assert sum(tree["histogram"]["estimated"]) == pytest.approx(len(of.table), abs=0.1)
    sample = tree["sample"]
    assert (sample["n_drawn"], sample["n_scored"], sample["n_outside"], sample["n_waiting"]) == (90, 90, 0, 0)
    assert sample["population"] == len(eligible_of(runs[0])) == sum(c["n_latents"] for c in sample["draws"][0]["cells"])
    assert 30 < sample["effective_n"] < 90
    relation = found["relation"]
    assert relation["n"] == 90
    assert "spearman" in relation
    assert relation["interval"][0] < relation["spearman"] < relation["interval"][1]


def test_relation_is_of_the_rows_written_out(runs: list[Run]) -> None:
    """Weights that are whole numbers: each latent as many times as it stands for others."""
    run = runs[0]
    of = sampled(runs, 90)
    table = of.table.copy()
    table["stratum"] = np.arange(len(table)) % 3
    table["drawn"] = False
    for stratum, n in enumerate((2, 3, 5)):  # one in so many
        inside = table.index[table["stratum"] == stratum]
        table.loc[inside[: len(inside) // n * n : n], "drawn"] = True
        table = table.drop(index=inside[len(inside) // n * n :])
    run.stage_path("sample").unlink()
    store_draw(run, Draw(table, of.about), BY)
    small_study.scored(run, small_study.explained(run, [int(x) for x in table["latent"][table["drawn"]]]))
    found = findings(run.root, NAMES)["relation"]
    chosen = table[table["drawn"]].set_index("latent")
    times = chosen["stratum"].map({0: 2, 1: 3, 2: 5})
    held = np.repeat(chosen.index, times)
    similar = overlap_of(runs, run).set_index("latent")["similarity"]
    frequency = read_table(run.stage_path("firing")).set_index("latent")["firing_frequency"]
    score = own(run)
    written = pd.DataFrame({"y": score[held], "x": similar[held], "f": frequency[held]}).rank()
    r = written.corr().to_numpy()
    assert found["spearman"] == pytest.approx(r[0, 1])
    assert found["frequency"]["value"] == pytest.approx(r[0, 2])
    held_fixed = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert found["partial"]["value"] == pytest.approx(held_fixed)


def test_a_census_equals_no_sample(runs: list[Run]) -> None:
    sampled(runs, None)
    weighted = findings(runs[0].root, NAMES)
    runs[0].stage_path("sample").unlink()
    plain = findings(runs[0].root, NAMES)
    for key in ("mean", "quartiles", "auroc_mean", "n_scored"):
        assert weighted["scores"][key] == pytest.approx(plain["scores"][key])
    for key in ("spearman", "n"):
        assert weighted["relation"][key] == pytest.approx(plain["relation"][key])
    for key in ("partial", "within_strata", "frequency"):
        assert weighted["relation"][key]["value"] == pytest.approx(plain["relation"][key]["value"])
    bins = [[row["mean"] for row in of["relation"]["bins"]] for of in (weighted, plain)]
    assert bins[0] == pytest.approx(bins[1])
    matched = [of["relation"]["shared_and_unshared"]["matched"]["value"] for of in (weighted, plain)]
    assert matched[0] == pytest.approx(matched[1])
    # That no other latents could have been drawn is known of the one and not of the other.
    assert np.diff(weighted["scores"]["interval"]) < 0.8 * np.diff(plain["scores"]["interval"])
    assert plain["scores"]["sample"] is None


def test_latents_named_outright_are_in_no_figure(runs: list[Run]) -> None:
    sampled(runs, 60)
    before, scores = findings(runs[0].root, NAMES), dict(own(runs[0]))
    of = load_sample(runs[0], SETUP)
    assert of is not None
    outside = sorted(set(eligible_of(runs[0])) - of.drawn)[:20]
    numbers = small_study.explained(runs[0], sorted({*of.drawn, *outside}))
    small_study.scored(runs[0], numbers, values=dict.fromkeys(outside, 0.31) | scores)
    after = findings(runs[0].root, NAMES)
    for key in ("mean", "interval", "quartiles", "n_scored", "histogram"):
        assert after["scores"][key] == before["scores"][key]
    for found in (before, after):  # the swapped controls of the made-up scores are drawn anew
        for quarter in found["relation"]["bins"]:
            del quarter["above_control"]
    assert after["relation"] == before["relation"]
    assert after["scores"]["sample"]["n_outside"] == 20
    assert after["scores"]["n_explained"] == 80


def test_lifetime_totals_are_kept(runs: list[Run]) -> None:
    run, table = runs[0], overlap_of(runs, runs[0])
    able = eligible_of(run)

    def asked(n: int | None, by: dict[str, str] = BY, **choice: Any) -> Draw:
        of = draw_latents(run, table, able, Choice(n=n, **choice))
        store_draw(run, of, by)
        return of

    small, large = asked(40), asked(90)
    kept = load_sample(run, SETUP)
    assert kept is not None
    assert kept.drawn == set(large.latents) > set(small.latents)
    before = run.stage_path("sample").stat().st_mtime_ns
    asked(40)  # held already
    asked(90)
    assert run.stage_path("sample").stat().st_mtime_ns == before
    # Another explainer has drawn for itself.
    asked(30, BY | {"model": "m"})
    theirs = load_sample(run, SETUP | {"explainer_model": "m"})
    assert theirs is not None
    assert len(theirs.drawn) == 30
    assert load_sample(run, SETUP | {"explainer_model": "other"}) is None
    # A part of the population adds nothing to the whole of it.
    unshared = asked(50, sharing="unshared")
    kept = load_sample(run, SETUP)
    assert kept is not None
    assert kept.drawn == set(large.latents)
    assert len(table_metadata(run.stage_path("sample"))["draws"]) == 3
    # The unshared of today, not of when another seed had not been trained: the newest of a filter counts alone.
    less = draw_latents(run, table, sorted(set(able) - set(unshared.latents[:1])), Choice(n=20, sharing="unshared"))
    store_draw(run, less, BY)
    assert len(table_metadata(run.stage_path("sample"))["draws"]) == 3
    # Where both parts were drawn from and the whole was not, they are the whole.
    by = BY | {"settings_hash": "x"}
    asked(50, by, sharing="unshared")
    shared = asked(70, by, sharing="shared")
    both = load_sample(run, SETUP | {"explain_settings_hash": "x"})
    assert both is not None
    assert both.population == len(able)
    assert both.drawn == set(unshared.latents) | set(shared.latents)
    weights = both.weights(both.drawn)
    assert weights["weight"].sum() == pytest.approx(len(able))
    assert weights["stratum"].nunique() == unshared.table["stratum"].nunique() + shared.table["stratum"].nunique()


def test_partners_are_drawn_where_their_latents_are(runs: list[Run]) -> None:
    run, sibling = runs[:2]
    table = overlap_of(runs, run)
    of = draw_latents(run, table, eligible_of(run), Choice(n=60))
    able = set(eligible_of(sibling))
    column = table.sort_values("latent")["decoder_partner__run_b"].to_numpy()
    theirs = map_to_partners(of, run.name, column, able)
    assert set(theirs.table["latent"]) == {int(column[x]) for x in of.table["latent"]} & able
    assert set(theirs.latents) == {int(column[x]) for x in of.latents} & able
    back = {int(column[x]): x for x in of.table["latent"]}
    mine = of.table.set_index("latent")
    for row in theirs.table.itertuples():
        assert row.probability == mine.loc[back[int(str(row.latent))], "probability"]
    store_draw(sibling, theirs, BY)
    kept = load_sample(sibling, SETUP)
    assert kept is not None
    assert kept.draws[0].about["partners_of"] == "run_a"
    # Both sides scored: latents and partners are one observation, in the stratum of the first run's.
    for one, chosen in ((run, of), (sibling, theirs)):
        store_draw(one, chosen, BY)
        small_study.scored(one, small_study.explained(one, chosen.latents))
    pooled = findings(run.root, NAMES)["relation"]["pooled"]
    assert pooled["weighted"]
    assert pooled["n_units"] <= 60 < pooled["n"]
    assert pooled["interval"][0] < pooled["spearman"] < pooled["interval"][1]
    sibling.stage_path("sample").unlink()
    assert not findings(run.root, NAMES)["relation"]["pooled"]["weighted"]


def test_the_report_says_what_the_figures_stand_for(runs: list[Run]) -> None:
    def text() -> str:
        out = io.StringIO()
        print_page(report_page(study.findings(runs[0].root, NAMES), is_full=True), Console(file=out, width=100))
        return " ".join(out.getvalue().split())

    sampled(runs, 60, more=eligible_of(runs[0])[:9])
    eligible = len(eligible_of(runs[0]))
    said = text()
    assert (
        f"60 latents, a stratified sample (similarity × log firing frequency) of {eligible} eligible; weighted" in said
    )
    assert "outside the sample" in said
    runs[0].stage_path("sample").unlink()
    assert "not drawn as a recorded sample" in text()
    sampled(runs, None)
    assert f"{eligible} latents: all {eligible} eligible" in text()
    runs[0].stage_path("sample").unlink()
    sampled(runs, 40, sharing="unshared")
    assert "eligible unshared; weighted" in text()


def test_a_population_of_one() -> None:
    table = draw_sample([7], make_strata([0.1]), 3)
    assert table["weight"].tolist() == [1.0]
    assert draw_sample([], make_strata([]), 3).empty
