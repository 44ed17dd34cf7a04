"""The detection scorer: against brute force, and with failures that must never look like answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.contexts.sampler import Context, TestSet
from autointerp.scoring.scorers import SCORERS
from autointerp.scoring.scorers.detection import DetectionScorer
from sae.common.files import read_table, write_table

Answer = tuple[bool, float | None, str | None]


def verdicts(answers: Sequence[Answer]) -> pd.DataFrame:
    """(truth, p, failure) of each context, as the journal gives them back."""
    rows = [
        {
            "context": 100 + i,
            "truth": truth,
            "p": np.nan if p is None else p,
            "label": np.nan if failure else float(p is not None and p >= 0.5),
            "failure": failure,
            "negative_kind": None if truth else "random",
        }
        for i, (truth, p, failure) in enumerate(answers)
    ]
    columns = ["context", "truth", "p", "label", "failure", "negative_kind"]
    return pd.DataFrame(rows, columns=columns).astype({"p": float, "label": float})


def context(window: int, stratum: int | None) -> Context:
    return Context(window, ("a",), (float(stratum is not None),), stratum is not None, stratum, "active")


def halves(n: int) -> TestSet:
    """``n`` contexts of each kind, the activating ones of five strata in turn."""
    active = [context(100 + i, i % 5) for i in range(n)]
    return TestSet(active, [context(100 + n + i, None) for i in range(n)])


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.2, 0.49, 0.5, 0.8, 1.0]), st.none()), min_size=2))
def test_scores_equal_brute_force(answers: list[Answer]) -> None:
    row = DetectionScorer().score(verdicts(answers))
    yes = [p for truth, p, _ in answers if truth and p is not None]
    no = [p for truth, p, _ in answers if not truth and p is not None]
    if not yes or not no:
        assert row.status.startswith("failed: no verdict on any")
        assert math.isnan(row.random.ba.value)
        return
    tpr, tnr = np.mean([p >= 0.5 for p in yes]), np.mean([p < 0.5 for p in no])
    assert (row.status, row.n_active, row.random.n, row.random.n_failed) == ("ok", len(yes), len(no), 0)
    assert (row.tpr.value, row.random.tnr.value) == (pytest.approx(tpr), pytest.approx(tnr))
    assert row.random.ba.value == pytest.approx((tpr + tnr) / 2)
    assert row.random.auroc.value == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no]))
    assert row.random.ba.low <= row.random.ba.value <= row.random.ba.high
    assert row.random.auroc.low <= row.random.auroc.value <= row.random.auroc.high


def test_a_failure_is_neither_right_nor_wrong() -> None:
    answers: list[Answer] = [*[(True, 0.9, None)] * 40, *[(False, 0.1, None)] * 40]
    whole = DetectionScorer().score(verdicts(answers))
    refused = "server said no"
    failed: list[Answer] = [*[(True, None, refused)] * 10, *[(False, None, refused)] * 5]
    some = DetectionScorer().score(verdicts([*answers, *failed]))
    assert some.random.n_failed == 15
    assert some._replace(random=some.random._replace(n_failed=0)) == whole


def test_too_many_failures_leave_no_score() -> None:
    answers: list[Answer] = [*[(True, 0.9, None)] * 39, *[(False, 0.1, None)] * 40]
    failed: list[Answer] = [*[(True, None, "cut off")] * 15, *[(True, None, "no list")] * 6]
    row = DetectionScorer().score(verdicts([*answers, *failed]))
    assert row.status == "failed: 21 of 100 contexts without a verdict (most often: cut off)"
    assert all(math.isnan(e.value) for e in (row.tpr, row.random.ba, row.random.tnr, row.random.auroc))
    assert (row.n_active, row.random.n, row.random.n_failed) == (39, 40, 21)
    assert DetectionScorer().score(verdicts([])).status == "failed: nothing was judged"


def test_without_probabilities_there_is_no_auroc() -> None:
    table = verdicts([(True, 0.9, None), (False, 0.1, None)] * 20)
    row = DetectionScorer().score(table.assign(p=np.nan))
    assert row.random.ba.value == 1.0
    assert math.isnan(row.random.auroc.value)
    assert math.isnan(row.random.auroc.low)


def test_unanswered_questions_count_as_failed() -> None:
    tests = halves(50)
    items = DetectionScorer().items(tests)
    table = verdicts([(True, 0.9, None)] * 50 + [(False, 0.1, None)] * 50)
    unasked = pd.concat([table, verdicts([(False, 0.9, None)]).assign(context=999)], ignore_index=True)
    assert DetectionScorer().score(unasked, items).random.tnr.value == 1.0
    row = DetectionScorer().score(table.iloc[5:], items)
    assert (row.n_active, row.random.n_failed, row.status) == (45, 5, "ok")
    assert DetectionScorer().score(table.iloc[30:], items).status.startswith("failed: 30 of 100")


def test_strata_are_scored_apart() -> None:
    items = DetectionScorer().items(halves(50))
    table = verdicts([(True, 0.1 if i % 5 == 0 else 0.9, None) for i in range(50)] + [(False, 0.1, None)] * 50)
    assert DetectionScorer().score(table, items).as_columns()["stratum_tpr"] == [0.0, 1.0, 1.0, 1.0, 1.0]
    gone = table[~((table["context"] - 100) % 5 == 3) | ~table["truth"]]
    assert math.isnan(DetectionScorer().score(gone, items).strata[3].value)
    assert DetectionScorer().score(table).as_columns()["stratum_tpr"] == []


def test_mixed_judgings_are_refused() -> None:
    table = verdicts([(True, 0.9, None), (False, 0.1, None)])
    with pytest.raises(ValueError, match="twice"):
        DetectionScorer().score(pd.concat([table, table]))


def test_the_item_order_is_fixed_and_reveals_nothing() -> None:
    tests = halves(50)
    items = DetectionScorer().items(tests)
    turned = DetectionScorer().items(TestSet(tests.active[::-1], tests.inactive[::-1]))
    assert items == turned
    assert sorted(c.window for c in items) == list(range(100, 200))
    firsts = np.array([c.active for c in items])
    assert abs(firsts[:50].mean() - 0.5) < 0.2
    assert np.abs(np.diff(firsts.astype(int))).sum() > 30  # the kinds alternate often: they do not come in blocks


def test_rows_go_into_a_table_and_come_back(tmp_path: Path) -> None:
    items = DetectionScorer().items(halves(10))
    table = verdicts([(True, 0.9, None)] * 10 + [(False, 0.1, None)] * 10)
    rows: list[dict[str, Any]] = [
        DetectionScorer().score(table, items).as_columns(),
        DetectionScorer().score(table).as_columns(),
        {"status": "failed: no explanation"},
    ]
    write_table(tmp_path / "scores.parquet", pd.DataFrame(rows))
    back = read_table(tmp_path / "scores.parquet")
    assert back["balanced_accuracy"].isna().tolist() == [False, False, True]
    assert list(back["stratum_tpr"][0]) == [1.0] * 5
    assert SCORERS["detection"] is DetectionScorer
