"""What a report says of latents that could not be tested, and of negatives of the harder kinds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_study
from rich.console import Console
from small_study import findings

from autointerp.findings import study
from autointerp.findings.evidence import View
from autointerp.findings.scores import too_few_findings
from autointerp.report.report import report_page
from autointerp.report.terminal import print_page
from sae.common.files import read_table, write_table
from sae.study.run import Run

NAMES = ["run_a", "run_b", "run_c"]


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return small_study.whole(tmp_path)


def shown(root: Path) -> str:
    out = Console(file=io.StringIO(), width=110, color_system=None, highlight=False)
    print_page(report_page(study.findings(root, NAMES, View()), is_full=True), out)
    return out.file.getvalue()  # type: ignore[attr-defined]


def test_latents_with_few_contexts_are_listed_by_class(runs: list[Run]) -> None:
    path = runs[0].stage_path("contexts")
    counted = read_table(path)
    rare = read_table(runs[0].stage_path("firing"))["n_firings"] < 3000
    counted["eligible"] &= ~rare
    counted.loc[~counted["eligible"], "ineligible_reason"] = "3 activating contexts to explain from, 10 needed"
    write_table(path, counted, inputs="x")
    found = findings(runs[0].root, NAMES, View())
    tree = found["scores"]["too_few"]
    firing = read_table(runs[0].stage_path("firing"))
    lacking = set(firing["latent"][~firing["dead"] & ~counted["eligible"]])
    assert lacking, "the study has some"
    assert set(tree["together"]["latents"]) == lacking
    assert tree["together"]["n"] == len(lacking)
    classes = [tree[name] for name in ("one", "some", "all") if name in tree]
    assert sum(row["n"] for row in classes) == len(lacking)
    assert set().union(*(row["latents"] for row in classes)) == lacking
    assert tree["together"]["reasons"] == {"too few activating contexts to explain from": len(lacking)}
    assert tree["together"]["median_frequency"] < tree["together"]["median_frequency_of_eligible"]
    text = shown(runs[0].root)
    assert "too few contexts" in text
    assert f"too few activating contexts to explain from: {len(lacking)}" in text


def test_where_nothing_was_counted_nothing_is_said() -> None:
    assert too_few_findings(pd.DataFrame({"alive": [True]})) is None
    every = pd.DataFrame({"alive": [True, False], "eligible": [True, False], "ineligible_reason": ["", "never fires"]})
    tree = too_few_findings(every)
    assert tree is not None
    assert (tree["together"].n_alive, tree["together"].n) == (1, 0), "a dead latent is not among them"


def test_each_kind_of_negative_is_scored_apart(runs: list[Run]) -> None:
    plain = findings(runs[0].root, NAMES, View())
    assert plain["scores"]["negatives"] == {}
    assert "a neighbour fires" not in shown(runs[0].root)
    path = runs[0].stage_path("scores")
    table = read_table(path)
    own = (table["control"] == "none").to_numpy()
    has = np.arange(len(table)) % 3 != 0
    for kind, loss in (("hard", 0.2), ("same_token", 0.1)):
        table[f"ba_{kind}"] = np.where(has, table["balanced_accuracy"] - loss, np.nan)
        table[f"tnr_{kind}"] = np.where(has, table["tnr"] - 2 * loss, np.nan)
        table[f"auroc_{kind}"] = np.nan
        table[f"n_failed_{kind}"] = 1
    write_table(path, table)
    found = findings(runs[0].root, NAMES, View())
    tree = found["scores"]["negatives"]
    for key in ("mean", "interval", "quartiles", "control"):
        assert found["scores"][key] == plain["scores"][key]
    for kind, loss in (("hard", 0.2), ("same_token", 0.1)):
        row = tree[kind]
        assert row["mean"] == pytest.approx(row["random_mean"] - loss)
        assert (row["n_scored"], row["n_missing"]) == (int((own & has).sum()), int((own & ~has).sum()))
        assert row["auroc_mean"] is None
        assert row["interval"][0] < row["mean"] < row["interval"][1]
    n = int(own.sum())
    assert found["scores"]["n_failed_answers"] == plain["scores"]["n_failed_answers"] + 2 * n
    text = shown(runs[0].root)
    assert "a neighbour fires" in text
    assert "same token" in text
