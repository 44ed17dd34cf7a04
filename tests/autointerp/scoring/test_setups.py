"""Several set-ups in one score table: never mixed, in an order, chosen by their explainer, and told apart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_study
from printed import console, text_of
from small_study import findings

from autointerp.findings import study
from autointerp.findings.evidence import View
from autointerp.journal.journal import Journal
from autointerp.report.report import report_page
from autointerp.report.terminal import print_page
from autointerp.scoring.adaptive import StoppingRule
from autointerp.scoring.setups import rows_of, setups_of, status_kind
from sae.common.errors import NotFound
from sae.common.files import read_table, write_table
from sae.study.run import Run

NAMES = ["run_a", "run_b", "run_c"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    small_study.whole(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


def test_set_ups_are_never_mixed(root: Path) -> None:
    run = Run("run_a", root)
    path = run.stage_path("scores")
    old = read_table(path)
    new = old[(old["control"] == "none") & (old["latent"] > 60)].assign(
        judge="llm", model="some-model", judge_prompt_hash="p" * 64, balanced_accuracy=0.9
    )
    write_table(path, pd.concat([old, new], ignore_index=True))
    found = findings(root, NAMES)
    assert found["scores"]["mean"] == pytest.approx(0.9)  # of equal age: a language model's before the baseline's
    assert found["methods"]["judge"] == {"name": "llm", "model": "some-model"}
    assert found["methods"]["prompt_hashes"] == {"judge": ["p" * 64]}
    assert [s["judge"] for s in found["methods"]["other_setups"]] == ["ngram"]
    chosen = findings(root, NAMES, View(judge="ngram"))
    assert chosen["scores"]["mean"] == pytest.approx(old.loc[old["control"] == "none", "balanced_accuracy"].mean())


@pytest.fixture
def two_explainers(root: Path) -> Path:
    """Latents above 60 of run_a are also explained and judged by a model: newer, and fewer."""
    path = Run("run_a", root).stage_path("scores")
    old = read_table(path)
    by: dict[str, Any] = {"explainer": "llm", "explainer_model": "m", "judge": "llm", "model": "m"}
    new = old[(old["control"] == "none") & (old["latent"] > 60)].assign(**by, balanced_accuracy=0.9)
    write_table(path, pd.concat([old, new.assign(explanation_id=new["explanation_id"] + 1000)], ignore_index=True))
    return root


def test_an_explainer_can_be_chosen(two_explainers: Path) -> None:
    newest = findings(two_explainers, NAMES)
    assert newest["scores"]["mean"] == pytest.approx(0.9)
    (other,) = newest["methods"]["other_explainers"]
    assert (other["explainer"], other["n_scored"]) == ("ngram", 108)
    assert other["above"] is None, "another judge"
    assert other["command"].startswith("python cli.py report --sae run_a --explainer ngram")
    chosen = findings(two_explainers, NAMES, View(explainer="ngram"))
    assert chosen["scores"]["n_scored"] == 108
    assert chosen["methods"]["explainer"]["name"] == "ngram"
    assert [(s["explainer"], s["precision"]) for s in chosen["methods"]["other_setups"]] == [("llm", None)]
    assert findings(two_explainers, NAMES, View(explainer="llm"))["scores"] == newest["scores"]
    with pytest.raises(NotFound, match=r"--explainer 'gpt'.*'run_a'.*those by 'llm' and 'ngram' are"):
        findings(two_explainers, NAMES, View(explainer="gpt"))
    with pytest.raises(NotFound, match=r"'ngram'.*'run_b'.*no explanation of it is"):
        findings(two_explainers, NAMES, View(focus="run_b", explainer="ngram"))


def test_explainers_are_compared_latent_by_latent(root: Path) -> None:
    """A second explainer, judged by the same protocol, scores .03 or .05 more on some of the latents."""
    path = Run("run_a", root).stage_path("scores")
    old = read_table(path)
    mine = old[(old["control"] == "none") & (old["latent"] > 60)]
    more = np.where(mine["latent"] % 2, 0.03, 0.05)
    theirs = mine.assign(
        explainer="contrastive", explainer_model="m", balanced_accuracy=mine["balanced_accuracy"] + more
    )
    theirs["explanation_id"] += 1000
    write_table(path, pd.concat([old, theirs], ignore_index=True))
    for explainer, sign in (("contrastive", 1), ("ngram", -1)):
        found = findings(root, NAMES, View(explainer=explainer))
        (other,) = found["methods"]["other_explainers"]
        expected = pd.Series(more, mine.index)[mine["balanced_accuracy"].notna()]
        above = other["above"]
        assert above["mean"] == pytest.approx(sign * expected.mean())
        assert (above["n"], above["fraction"]) == (len(expected), float(sign > 0))
        low, high = above["interval"]
        assert low < above["mean"] < high
        assert high - low < 0.01, "the same latents: only their differences vary"
        words = f"Over the {len(expected)} latents with both, the scores here are {'+' if sign > 0 else '−'}.0"
        target = console(100)
        print_page(report_page(study.findings(root, NAMES, View(explainer=explainer)), is_full=True), target)
        assert words in " ".join(text_of(target).split())


def test_scores_to_a_precision_say_so(root: Path) -> None:
    run = Run("run_a", root)
    assert findings(root, NAMES)["scores"]["precision"] is None
    table = read_table(run.stage_path("scores"))
    own = (table["control"] == "none").to_numpy()
    stopped = np.where(own & (np.arange(len(table)) % 4 == 0), "cap", "narrow enough")
    n = np.where(stopped == "cap", 80, 25)
    judged: dict[str, Any] = {"precision": 0.065, "stopped": stopped, "n_active": n, "n_inactive": n}
    write_table(run.stage_path("scores"), table.assign(**judged))
    n_cap = int((stopped[own] == "cap").sum())
    n_narrow = int(own.sum()) - n_cap
    assert min(n_cap, n_narrow) > 10
    for known in (False, True):
        if known:
            with Journal(run.journal_path) as journal:
                rounds = StoppingRule(0.065, 160).identity(run.settings.contexts)
                journal.add_setup(table["settings_hash"].iloc[0], {"adaptive": rounds, "material": "m"})
        found = findings(root, NAMES)
        told = found["scores"]["precision"]
        assert told["half_width"] == 0.065
        assert told["stopped"] == {"narrow enough": n_narrow, "cap": n_cap, "out of contexts": 0}
        assert told["mean_contexts"] == pytest.approx((160 * n_cap + 50 * n_narrow) / (n_cap + n_narrow))
        assert (told["rounds"] is None) != known
    assert "up to 80 activating" in found["methods"]["contexts"]
    assert "80 position-matched" in found["methods"]["contexts"]
    assert "narrow enough (to ±.065)" in found["methods"]["contexts"]
    target = console(120)
    print_page(report_page(study.findings(root, NAMES), is_full=True), target)
    page = " ".join(text_of(target).split())
    assert f"interval was ±.065: {told['mean_contexts']:.0f} contexts a latent on average, of at most 80 + 80." in page
    assert f"{n_narrow} latents ended narrow enough, {n_cap} at the cap, 0 with no contexts left." in page


def test_the_most_precise_of_equal_setups_comes_first() -> None:
    base = {"latent": 0, "control": "none", "status": "ok", "judge": "ngram", "scorer": "detection", "model": ""}
    rows = [
        {**base, "settings_hash": key, "explanation_id": 4, "precision": to}
        for key, to in (
            ("a", 0.1),
            ("b", np.nan),
            ("c", 0.065),
            ("d", 0.2),
        )
    ]
    assert [s["settings_hash"] for s in setups_of(pd.DataFrame(rows))] == ["b", "c", "a", "d"]
    newer = {**base, "settings_hash": "e", "explanation_id": 5, "precision": 0.3}
    assert setups_of(pd.DataFrame([*rows, newer]))[0]["settings_hash"] == "e"


def test_set_ups_are_ordered_by_their_newest_explanation() -> None:
    base = {"latent": 0, "control": "none", "status": "ok", "judge": "ngram", "scorer": "detection", "model": ""}
    table = pd.DataFrame(
        [{**base, "explainer": "llm", "explanation_id": 9}, {**base, "explainer": "ngram", "explanation_id": 4}]
    )
    assert [s["explainer"] for s in setups_of(table)] == ["llm", "ngram"]
    assert len(rows_of(table, setups_of(table)[1])) == 1
    assert setups_of(table, explainer="nobody") == []


def test_status_kinds() -> None:
    assert status_kind("ok") == "ok"
    assert status_kind("failed: no explanation: too few contexts: 3 to explain from") == "ineligible"
    assert status_kind("failed: 30 of 100 answers failed") == "failed"
