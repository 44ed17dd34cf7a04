"""What the scores stand above: control SAEs and the baseline, out of the tables, in the findings and in the report."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from small_study import findings
from tiny_study import change_record

from autointerp.findings import study
from autointerp.findings.controls import difference_of_means
from autointerp.report.report import report_page
from autointerp.report.terminal import print_page
from sae.common.files import read_table, write_table
from sae.study.run import Run

FROZEN = {"frozen": "decoder", "untrained": "everything"}


def control(root: Path, kind: str, mean: float, n: int = 30) -> Run:
    """A control SAE of the study, ``n`` of its latents scored around ``mean``."""
    (run,) = small_study.runs_of(root, 1, study=f"run-{kind}", frozen=FROZEN[kind])
    small_study.harvested([run])
    values = np.random.default_rng(len(kind)).normal(mean, 0.05, n).clip(0, 1)
    numbers = small_study.explained(run, list(range(n)))
    small_study.scored(run, numbers, values=dict(enumerate(values.tolist())), control=False)
    return run


def scores_of(root: Path) -> dict[str, Any]:
    return findings(root, ["run_a", "run_b", "run_c"])["scores"]


def page_of(root: Path, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_page(report_page(study.findings(root, ["run_a", "run_b", "run_c"]), is_full=True), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def own(run: Run) -> pd.Series:
    table = read_table(run.stage_path("scores"))
    return table[table["control"] == "none"]["balanced_accuracy"].astype(float)


@given(st.integers(0, 10**6), st.integers(20, 200), st.integers(20, 200), st.floats(-0.3, 0.3))
def test_the_interval_of_a_difference_is_welchs(seed: int, n: int, m: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = pd.Series(rng.normal(0.6 + shift, 0.1, n)), pd.Series(rng.normal(0.6, 0.2, m))
    found, reference = difference_of_means(a, b), stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found.value == pytest.approx(a.mean() - b.mean())
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.15 * width)
    assert found.high == pytest.approx(reference.high, abs=0.15 * width)
    assert difference_of_means(a, b) == found, "seeded"


def test_control_saes_stand_beside_the_scores(tmp_path: Path) -> None:
    run, *_ = small_study.whole(tmp_path)
    frozen, untrained = control(tmp_path, "frozen", 0.6), control(tmp_path, "untrained", 0.5)
    tree = scores_of(tmp_path)
    assert tree["lacking_controls"] is None
    assert [(row["kind"], row["run"]) for row in tree["control_saes"]] == [
        ("frozen", "run-frozen_a"),
        ("untrained", "run-untrained_a"),
    ]
    for row, sae in zip(tree["control_saes"], (frozen, untrained), strict=True):
        assert row["mean"] == pytest.approx(own(sae).mean())
        assert row["n_scored"] == 30
        assert row["above"]["mean"] == pytest.approx(own(run).mean() - own(sae).mean())
        low, high = row["above"]["interval"]
        assert low < row["above"]["mean"] < high
    for width in (80, 100, 120):
        page = page_of(tmp_path, width)
        for name in ("swapped control", "frozen decoder", "untrained SAE", "own minus this"):
            assert name in page
    assert "this difference comes from training" in " ".join(page_of(tmp_path).split())


def test_a_score_no_better_than_control_says_so(tmp_path: Path) -> None:
    small_study.whole(tmp_path)
    control(tmp_path, "frozen", 0.65), control(tmp_path, "untrained", 0.9)
    words = " ".join(page_of(tmp_path).split())
    assert "score no higher than those of an SAE whose random decoder was never trained" in words
    assert "score lower than those of an SAE that was not trained at all" in words


def test_missing_parts_name_the_command(tmp_path: Path) -> None:
    run, *_ = small_study.whole(tmp_path)
    lacking = scores_of(tmp_path)["lacking_controls"]
    assert lacking["command"].startswith("python cli.py train --name run --root")
    for kind in FROZEN:
        small_study.runs_of(tmp_path, 1, study=f"run-{kind}", frozen=FROZEN[kind])
    lacking = scores_of(tmp_path)["lacking_controls"]
    assert lacking["kinds"] == ["frozen", "untrained"]
    assert lacking["command"].startswith("python cli.py explain --sae run_a --root")
    assert lacking["command"] in " ".join(page_of(tmp_path).replace("\\\n", "").split())
    for kind in FROZEN:
        small_study.explained(Run.open(f"run-{kind}_a", tmp_path), [1, 2, 3])
    assert scores_of(tmp_path)["lacking_controls"]["command"].startswith("python cli.py score --sae run_a --root")
    control(tmp_path, "frozen", 0.5)
    lacking = scores_of(tmp_path)["lacking_controls"]
    assert lacking["kinds"] == ["untrained"]
    assert run.name == "run_a"


@pytest.mark.parametrize("differs", ["judge", "precision", "contexts"])
def test_what_was_scored_otherwise_is_no_control(tmp_path: Path, differs: str) -> None:
    small_study.whole(tmp_path)
    frozen = control(tmp_path, "frozen", 0.5)
    assert len(scores_of(tmp_path)["control_saes"]) == 1
    if differs == "contexts":
        record = frozen.folder / "run.json"
        record.write_text(record.read_text().replace('"n_active": 50', '"n_active": 40'))
        change_record(record)
    else:
        table = read_table(frozen.stage_path("scores"))
        table[differs] = "llm" if differs == "judge" else 0.1
        write_table(frozen.stage_path("scores"), table)
    assert scores_of(tmp_path)["control_saes"] == []


@pytest.mark.parametrize(("swapped", "leaks"), [(0.5, False), (0.56, True), (0.45, True)])
def test_a_swapped_control_far_from_half_is_reported(tmp_path: Path, swapped: float, leaks: bool) -> None:
    run, *_ = small_study.whole(tmp_path)
    table = read_table(run.stage_path("scores"))
    of = table["control"] == "swap"
    table.loc[of, "balanced_accuracy"] = swapped + np.random.default_rng(0).permutation(
        np.linspace(-0.1, 0.1, of.sum())
    )
    write_table(run.stage_path("scores"), table)
    tree = scores_of(tmp_path)["control"]
    assert tree["leaks"] is leaks
    low, high = tree["interval"]
    assert leaks is not (low <= 0.5 <= high)
    assert ("finds some answers without the explanation" in " ".join(page_of(tmp_path).split())) is leaks


def test_every_mean_has_its_distance_to_control(tmp_path: Path) -> None:
    run, *_ = small_study.whole(tmp_path)
    table = read_table(run.stage_path("scores")).set_index("latent")
    difference = (
        table[table["control"] == "none"]["balanced_accuracy"] - table[table["control"] == "swap"]["balanced_accuracy"]
    )
    found = findings(tmp_path, ["run_a", "run_b", "run_c"])
    tree = found["scores"]
    assert tree["control"]["above_control"]["mean"] == pytest.approx(difference.mean())
    total = 0
    for row in tree["by_class"].values():
        if row["n_scored"]:
            assert row["above_control"]["n"] == row["n_scored"]
            total += row["above_control"]["mean"] * row["n_scored"]
    assert total / len(difference) == pytest.approx(difference.mean())


def test_harder_negatives_have_controls_of_their_own(tmp_path: Path) -> None:
    run, *_ = small_study.whole(tmp_path)
    frozen = control(tmp_path, "frozen", 0.5)
    for sae, shift in ((run, 0.1), (frozen, 0.02)):
        table = read_table(sae.stage_path("scores"))
        for column in ("ba", "tnr", "auroc"):
            table[f"{column}_hard"] = table["balanced_accuracy"] - shift
        table["n_failed_hard"] = 0
        write_table(sae.stage_path("scores"), table)
    tree = scores_of(tmp_path)
    hard = tree["negatives"]["hard"]
    above = tree["control"]["above_control"]["mean"]
    assert hard["above_control"]["mean"] == pytest.approx(above), "both fell by as much"
    (row,) = tree["control_saes"]
    assert row["negatives"]["hard"]["above"]["mean"] == pytest.approx(row["above"]["mean"] - 0.08)
    page = page_of(tmp_path)
    assert "own score minus" in page
    lines = [line for line in page.splitlines() if line.startswith("a neighbour fires")]
    assert len(lines) == 2


def test_the_baseline_is_compared_latent_by_latent(tmp_path: Path) -> None:
    run, *_ = small_study.whole(tmp_path)
    table = read_table(run.stage_path("scores"))
    by_model = table[table["latent"] % 2 == 0].assign(explainer="llm", judge="llm", model="m", explainer_model="m")
    by_model["balanced_accuracy"] = by_model["balanced_accuracy"] + 0.05
    # The model's explanations are older here than the baseline's, which are made beside them.
    by_model["explanation_id"] = by_model["explanation_id"] - 1000
    write_table(run.stage_path("scores"), pd.concat([table, by_model], ignore_index=True))
    found = findings(tmp_path, ["run_a", "run_b", "run_c"])
    assert found["methods"]["judge"]["name"] == "llm"
    baseline = found["scores"]["baseline"]
    assert baseline["n_scored"] == (by_model["control"] == "none").sum()
    assert baseline["above"]["mean"] == pytest.approx(0.05)
    assert baseline["above"]["interval"] == pytest.approx([0.05, 0.05])
    words = " ".join(page_of(tmp_path).split())
    assert "n-gram baseline" in words
    assert "n-grams alone, which cost nothing, score lower (+.050 [+.050, +.050]" in words
