"""How scores go with return, of one run and of several: against recounts, and intervals against simulation."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from made_scores import Made, rank_correlation, score
from rich.console import Console
from scipy import stats
from small_study import findings

from autointerp.contexts.sampling import Draw, Sample, draw_sample, make_strata
from autointerp.findings import relation, study
from autointerp.findings.evidence import View
from autointerp.findings.json_values import to_json
from autointerp.findings.relation import Part
from autointerp.findings.shape import Reliability, StudyFindings
from autointerp.findings.statistics.resampling import Resamples
from autointerp.journal.journal import Journal, Verdict
from autointerp.report.numbers import estimate_of
from autointerp.report.report import report_page
from autointerp.report.terminal import print_page
from sae.alignment.alignment import read_alignment
from sae.alignment.bootstrap import partner_units
from sae.common.amounts import decimal
from sae.common.estimate import UNKNOWN, Estimate
from sae.common.files import read_table, write_table
from sae.study.run import Run


def matched_difference(*args: Any, **options: Any) -> Any:
    return to_json(relation.matched_difference(*args, **options))


def pooled_findings(*args: Any, **options: Any) -> Any:
    return to_json(relation.pooled_findings(*args, **options))


def relation_findings(*args: Any, **options: Any) -> Any:
    return to_json(relation.relation_findings(*args, **options))


NAMES = ["run_a", "run_b", "run_c"]


def part_of(made: Made, verdicts: pd.DataFrame, unit: np.ndarray | None = None, run: str = "run_a") -> Part:
    latents = pd.DataFrame(
        {
            "similarity": made.similarity,
            "firing_frequency": 10 ** (made.frequency - 3),
            "unshared": made.similarity < 0,
        }
    )
    rows = pd.DataFrame({"latent": np.arange(len(latents)), "balanced_accuracy": score(verdicts)})
    return Part(run, rows.assign(control="none", status="ok"), latents, verdicts, unit=unit)


def test_one_run() -> None:
    rng = np.random.default_rng(0)
    made = Made.draw(200, 0.6, "even", rng)
    found = relation_findings(part_of(made, made.verdicts(10, rng)))
    assert found is not None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    low, high = found["corrected"]["interval"]
    assert low <= rank_correlation(made.true, made.similarity) <= high
    assert found["corrected"]["value"] == pytest.approx(found["spearman"] / found["reliability"]["value"] ** 0.5)
    assert found["partial_corrected"]["value"] > found["partial"]["value"]
    assert sum(row["n"] for row in found["bins"]) == found["n"] == 200
    part = part_of(made, made.verdicts(10, rng))
    without = Part("run_a", part.rows, part.latents, NONE)
    found = relation_findings(without)
    assert found is not None
    assert found["corrected"] == found["reliability"] == {"value": None, "interval": None}
    assert found["spearman"] is not None


NONE = pd.DataFrame({"latent": np.empty(0, int), "truth": np.empty(0, bool), "label": np.empty(0)})


def test_failed_latents_leave_their_verdicts_out() -> None:
    rng = np.random.default_rng(0)
    made = Made.draw(120, 0.6, "even", rng)
    verdicts = made.verdicts(20, rng)
    part = part_of(made, verdicts)
    rows = part.rows.copy()
    rows.loc[:39, "status"] = "failed: 30 of 100 contexts without a verdict"
    found = relation_findings(Part("run_a", rows, part.latents, verdicts))
    kept = relation_findings(Part("run_a", rows[40:], part.latents, verdicts[verdicts["latent"] >= 40]))
    assert found == kept
    assert found is not None
    assert found["n"] == 80


def truth_of(made: Made) -> tuple[float, float]:
    """The rank correlation of the true scores with the similarity, and the mean true score of its lowest quarter."""
    lowest = made.true[made.similarity < np.quantile(made.similarity, 0.25)]
    return rank_correlation(made.true, made.similarity), float(lowest.mean())


def test_a_sample_tells_of_the_population(monkeypatch: pytest.MonkeyPatch) -> None:
    """The corrected correlation and the lowest quarter's mean of 500 latents, from 150 drawn with unequal chances."""
    monkeypatch.setattr("autointerp.findings.statistics.resampling.RESAMPLES", 200)
    monkeypatch.setattr("autointerp.findings.reliability._WORK", 1)
    rng, rounds = np.random.default_rng(4), 60
    made = Made.draw(500, 0.5, "even", rng)
    truth, quarter = truth_of(made)
    cells = make_strata(made.frequency, np.where(made.similarity > 0, made.similarity, np.round(made.similarity)))
    covered, values = np.zeros(2), []
    for seed in range(rounds):
        table = draw_sample(range(500), cells, 150, seed)
        sample = Sample((Draw(table, {"sharing": "any"}),))
        part = part_of(made, made.verdicts(40, rng))
        rows = part.rows[part.rows["latent"].isin(sample.drawn)].assign(
            ba_low=lambda of: of["balanced_accuracy"] - 0.1, ba_high=lambda of: of["balanced_accuracy"] + 0.1
        )
        found = relation_findings(replace(part, rows=rows, sample=sample))
        assert found is not None
        assert found["n"] == 150
        values.append(found["corrected"]["value"])
        for i, (bounds, of) in enumerate(
            [(found["corrected"]["interval"], truth), (found["bins"][0]["interval"], quarter)]
        ):
            covered[i] += bounds[0] <= of <= bounds[1]
    assert np.mean(values) == pytest.approx(truth, abs=0.03)
    assert (covered / rounds > 0.86).all(), covered / rounds


# --- at equal frequency ---------------------------------------------------------------------------------------------


def test_matched_frequency_takes_away_what_frequency_alone_makes() -> None:
    """Shared latents fire more often, and what fires often scores high: that is all. And then a tenth of their own."""
    rng = np.random.default_rng(0)
    frequency = rng.normal(size=2000)
    shared = rng.random(2000) < 1 / (1 + np.exp(-2 * frequency))
    measured = 0.7 + 0.1 * frequency + 0.05 * rng.normal(size=2000)
    resamples = Resamples(np.arange(2000))
    found = matched_difference(measured, shared, frequency, resamples)
    assert found["plain"]["value"] == pytest.approx(measured[shared].mean() - measured[~shared].mean())
    assert found["plain"]["value"] > 0.08
    assert abs(found["matched"]["value"]) < 0.02
    more = matched_difference(measured + 0.1 * shared, shared, frequency, resamples)
    assert more["matched"]["value"] == pytest.approx(found["matched"]["value"] + 0.1)
    assert more["matched"]["interval"][0] > 0.08
    assert (found["n_shared"], found["n_unshared"]) == (shared.sum(), (~shared).sum())


def test_matched_difference_equals_a_recount() -> None:
    rng = np.random.default_rng(1)
    frequency, shared, measured = rng.normal(size=40), np.arange(40) % 3 == 0, rng.random(40)
    found = matched_difference(measured, shared, frequency, Resamples(np.arange(40), 5))
    table = pd.DataFrame({"y": measured, "shared": shared, "stratum": pd.qcut(frequency, 5, labels=False)})
    total, weight = 0.0, 0.0
    for _, of in table.groupby("stratum"):
        a, b = of.loc[of["shared"], "y"], of.loc[~of["shared"], "y"]
        if len(a) and len(b):
            w = len(a) * len(b) / len(of)
            total, weight = total + w * (a.mean() - b.mean()), weight + w
    assert found["matched"]["value"] == pytest.approx(total / weight)


def test_nothing_to_compare() -> None:
    frequency = np.arange(20.0)
    for shared in (np.ones(20, bool), np.zeros(20, bool), frequency > 15):  # nowhere both at one frequency
        found = matched_difference(frequency, shared, frequency, Resamples(np.arange(20), 50))
        assert found["n_matched"] == 0 or shared.sum() == 4
        if found["n_matched"] == 0:
            assert found["matched"] == {"value": None, "interval": None}


# --- several runs ---------------------------------------------------------------------------------------------------


def several(made: Made, rng: np.random.Generator, n: int = 20, runs: int = 3) -> list[Part]:
    """The same latents in every run, each time with other verdicts and in another order."""
    parts = []
    for i in range(runs):
        order = rng.permutation(len(made.true))
        again = made.only(order)
        parts.append(part_of(again, again.verdicts(n, rng), unit=order, run=NAMES[i]))
    return parts


def test_several_runs_together_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    parts = several(Made.draw(100, 0.5, "even", rng), rng)
    found = pooled_findings(parts)
    assert found is not None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    table = pd.concat([part.joined() for part in parts])
    assert found["spearman"] == pytest.approx(stats.spearmanr(table["similarity"], table["score"]).statistic)
    assert found["n"] == 300
    assert found["n_units"] == 100
    one = relation_findings(Part("run_a", *_pooled_as_one(parts)))
    assert one is not None
    for name in ("spearman", "n"):
        assert found[name] == pytest.approx(one[name])
    for name in ("partial", "within_strata", "frequency", "corrected", "reliability"):
        assert found[name]["value"] == pytest.approx(one[name]["value"], abs=0.01)
    assert [row["mean"] for row in found["bins"]] == pytest.approx([row["mean"] for row in one["bins"]])
    assert [row["value"] for row in found["strata"]] == pytest.approx([row["value"] for row in one["strata"]])
    # Three scores of a latent are not three latents.
    for name in ("partial", "within_strata", "frequency", "corrected"):
        assert np.diff(found[name]["interval"]) > 1.2 * np.diff(one[name]["interval"])
    for wide, narrow in zip(found["bins"], one["bins"], strict=True):
        assert np.diff(wide["interval"]) > 1.2 * np.diff(narrow["interval"])
    assert pooled_findings(parts[:1]) is None
    assert pooled_findings([]) is None


def test_small_run_does_not_outweigh_a_large_one() -> None:
    """300 of 600 latents in one run; in the other, whose correlation is the reverse, 15 of 600."""
    rng = np.random.default_rng(0)
    parts: list[Part] = []
    for name, n, sign in (("run_a", 300, 1), ("run_b", 15, -1)):
        made = Made.draw(600, 0.9, "even", rng)
        turned = replace(made, similarity=sign * made.similarity)
        table = draw_sample(range(600), make_strata(made.frequency, turned.similarity), n, 0)
        sample = Sample((Draw(table, {"sharing": "any"}),))
        part = part_of(turned, turned.verdicts(50, rng), unit=np.arange(600) + 1000 * len(parts), run=name)
        rows = part.rows[part.rows["latent"].isin(sample.drawn)]
        parts.append(replace(part, rows=rows, sample=sample))
    found, alone = pooled_findings(parts), relation_findings(parts[0])
    assert found is not None
    assert alone is not None
    assert found["n"] == 315
    assert found["spearman"] == pytest.approx(alone["spearman"], abs=0.15)
    assert alone["spearman"] > 0.6
    low, high = found["interval"]
    assert high - low < 2 * (alone["interval"][1] - alone["interval"][0])


def _pooled_as_one(parts: list[Part]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    m = len(parts[0].latents)
    rows, latents, verdicts = ([getattr(p, name) for p in parts] for name in ("rows", "latents", "verdicts"))
    return (
        pd.concat([r.assign(latent=r["latent"] + i * m) for i, r in enumerate(rows)], ignore_index=True),
        pd.concat(latents, ignore_index=True),
        pd.concat([v.assign(latent=v["latent"] + i * m) for i, v in enumerate(verdicts)], ignore_index=True),
    )


@pytest.mark.slow
def test_pooled_intervals_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage of the pooled correlation and of the first quarter's mean, with whole groups and latent by latent."""
    monkeypatch.setattr("autointerp.findings.statistics.resampling.RESAMPLES", 400)
    monkeypatch.setattr("autointerp.findings.reliability._WORK", 1)
    rng, rounds = np.random.default_rng(2), 100
    large = Made.draw(100_000, 0.5, "even", rng)
    truth, quarter = truth_of(large)
    together, alone = np.zeros(2), np.zeros(2)
    for _ in range(rounds):
        made = Made.draw(150, 0.5, "even", rng)
        parts = several(made, rng, n=60)
        for unit, covered in ((True, together), (False, alone)):
            units = [part.unit if unit else _apart(i) for i, part in enumerate(parts)]
            chosen = [replace(part, unit=of) for part, of in zip(parts, units, strict=True)]
            found = pooled_findings(chosen)
            assert found is not None
            estimates = (found["corrected"]["interval"], truth), (found["bins"][0]["interval"], quarter)
            covered += [low <= value <= high for (low, high), value in estimates]
    assert (together / rounds > 0.88).all()
    assert (alone < together - 6).all()
    assert alone[1] / rounds < 0.8


def _apart(i: int) -> np.ndarray:
    """Units that no two latents share."""
    return np.arange(150) + 1000 * i


# --- as part of a study ---------------------------------------------------------------------------------------------


def scored_alike(root: Path, names: list[str]) -> None:
    """Score tables for ``names`` with verdicts behind them in their journals, each under settings of its own."""
    for i, name in enumerate(names):
        run, rng = Run(name, root), np.random.default_rng(i)
        numbers = small_study.explained(run, list(range(0, 100, 2)))
        table = small_study.scored(run, numbers)
        table["settings_hash"] = str(i) * 64
        table["replicate"] = 0
        write_table(run.stage_path("scores"), table)
        said = Verdict(
            latent=0,
            explanation_id=0,
            judge=small_study.JUDGED_BY["judge"],
            scorer=small_study.JUDGED_BY["scorer"],
            settings_hash=str(i) * 64,
            prompt_hash="",
            model="",
            context=0,
            truth=True,
        )
        verdicts = []
        for latent, number in numbers.items():
            for context, right in enumerate(rng.random(40) < (0.9 if latent < 48 else 0.6)):
                truth = context % 2 == 0
                kind = None if truth else "random"
                of = replace(said, latent=latent, explanation_id=number, context=context, truth=truth)
                verdicts.append(replace(of, negative_kind=kind, label=bool(truth == right)))
        with Journal(run.journal_path) as journal:
            journal.add_verdicts(verdicts)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("three")
    runs = small_study.runs_of(root)
    small_study.harvested(runs)
    small_study.aligned(runs)
    scored_alike(root, NAMES)
    return root


def test_findings_pool_the_runs_that_were_scored_alike(three: Path) -> None:
    found = findings(three, NAMES)
    pooled = found["relation"]["pooled"]
    assert pooled["runs"] == NAMES
    assert pooled["n"] == sum(findings(three, NAMES, View(focus=name))["relation"]["n"] for name in NAMES)
    tables = {(a, b): read_alignment(three / "alignments", a, b).a for a in NAMES for b in NAMES if a < b}
    tables |= {(b, a): read_alignment(three / "alignments", b, a).a for a, b in list(tables)}
    unit = partner_units(NAMES, tables)
    units: set[int] = set()
    for name in NAMES:
        latents = read_table(Run(name, three).stage_path("scores")).query("control == 'none'")["latent"]
        alive = ~read_table(Run(name, three).stage_path("firing"))["dead"].to_numpy()
        units |= {int(unit[name][i]) for i in latents if alive[i]}
    assert pooled["n_units"] == len(units)
    # The first 48 latents are the same direction everywhere.
    assert (unit["run_b"][:48] == unit["run_a"][:48]).all()
    assert found["scores"]["reliability"]["n"] == found["scores"]["n_scored"]
    assert found["scores"]["reliability"]["value"] > 0.6
    assert found["relation"]["reliability"]["value"] == pytest.approx(found["scores"]["reliability"]["value"], abs=0.1)


def test_what_was_judged_otherwise_is_not_pooled(three: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(three, tmp_path / "runs"))

    def pooled() -> Any:
        return findings(root, NAMES)["relation"]["pooled"]

    path = Run("run_c", root).stage_path("scores")
    write_table(path, read_table(path).assign(model="another"))
    assert pooled()["runs"] == ["run_a", "run_b"]
    Run("run_b", root).stage_path("scores").unlink()
    assert pooled() is None


def test_the_report_shows_what_was_found(three: Path) -> None:
    found: Any = study.findings(three, NAMES)
    tree = found.relation
    page = " ".join(plain(found).split())
    assert f"Reliability {estimate_of(found.scores.reliability.value, 2)}: the rank correlation" in page
    for of in (tree, tree.pooled):
        assert f"corrected for noise {estimate_of(of.corrected, 2, sign=True)} {of.n}" in page
    assert "3 runs together" in page
    assert f"{tree.pooled.n} latents are {tree.pooled.n_units} with their partners" in page
    matched = tree.shared_and_unshared.matched
    assert f"at equal firing frequency {decimal(matched.value, sign=True)}" in page
    # Without verdicts there is nothing to correct for, and nothing is said of it.
    poor = replace(tree, pooled=None, reliability=UNKNOWN, corrected=UNKNOWN, partial_corrected=UNKNOWN)
    page = plain(replace(found, relation=poor, scores=replace(found.scores, reliability=None)))
    assert "Reliability" not in page
    assert "without the score's noise" not in page
    assert "together" not in page.split("How scores relate to similarity")[1].split("Unshared latents")[0]
    low = Estimate(0.1, 0.0, 0.2)
    scores = replace(found.scores, reliability=Reliability(low, 20))
    page = " ".join(plain(replace(found, relation=replace(poor, reliability=low), scores=scores)).split())
    assert "Reliability .10: too small to correct" in page


def plain(found: StudyFindings) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    with console.capture() as captured:
        print_page(report_page(found, is_full=True), console)
    return captured.get()
