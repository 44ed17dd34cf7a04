"""What every scorer does with its verdicts: rates, their intervals, and what failed, in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from autointerp.scorers.base import HARDER, ScoreRow
from autointerp.statistics import UNKNOWN, Estimate, auroc, balanced_accuracy, proportion
from sae.firings import mix

if TYPE_CHECKING:
    from autointerp.contexts import Context

MOST_FAILED = 0.2
"""Above this share of failures there is no score: what fails is seldom a fair sample of what was asked."""


def in_hash_order(contexts: Sequence[Context]) -> list[Context]:
    """The contexts in the order of a hash of their window: neither kind nor strength shows in it."""
    places = mix(np.array([context.window for context in contexts], dtype=np.uint64))
    return [contexts[i] for i in np.argsort(places, kind="stable")]


def measure(verdicts: pd.DataFrame, items: Sequence[Context] = ()) -> ScoreRow:
    """See :meth:`autointerp.scorers.base.Scorer.score`.

    The judge's own yes or no (P(active) of at least one half, where it gives a probability) makes the balanced
    accuracy; AUROC is computed when every verdict has a probability. Negatives of the harder kinds are in none of the
    figures but their own, which take the TPR from the same activating contexts.
    """
    if items:
        verdicts = verdicts[verdicts["context"].isin({context.window for context in items})]
    if verdicts["context"].duplicated().any():
        raise ValueError("verdicts of several judgings mixed: a context is there twice")
    harder = verdicts["negative_kind"].isin(HARDER)
    own = verdicts[~harder]
    missing = _missing(own, [c for c in items if c.kind not in HARDER])
    unanswered = own["failure"].notna()
    good = own[~unanswered]
    truth, label, p = _answers(good)
    n_active, n_inactive = int(truth.sum()), int((~truth).sum())
    n_failed = int(unanswered.sum()) + missing
    status = _status(n_active, n_inactive, n_failed, own.loc[unanswered, "failure"])
    if status != "ok":
        return ScoreRow(*UNKNOWN, *UNKNOWN, *UNKNOWN, *UNKNOWN, n_active, n_inactive, n_failed, status, [], [], [])
    strata = _by_stratum(items, dict(zip(good["context"].tolist(), label.tolist(), strict=True)))
    row = ScoreRow(
        *balanced_accuracy(truth, label),
        *_rate(label[truth]),
        *_rate(~label[~truth]),
        *_ranked(truth, p),
        n_active,
        n_inactive,
        n_failed,
        status,
        [estimate.value for estimate in strata],
        [estimate.low for estimate in strata],
        [estimate.high for estimate in strata],
    )
    for kind in HARDER:
        row = row._replace(**_harder(kind, verdicts[verdicts["negative_kind"] == kind], items, good[truth]))
    return row


def _harder(kind: str, verdicts: pd.DataFrame, items: Sequence[Context], active: pd.DataFrame) -> dict[str, Any]:
    """The columns of one harder kind of negative; what cannot be measured keeps its NaN."""
    unanswered = verdicts["failure"].notna()
    n_failed = int(unanswered.sum()) + _missing(verdicts, [c for c in items if c.kind == kind])
    good = verdicts[~unanswered]
    found: dict[str, Any] = {f"n_{kind}": len(good), f"n_failed_{kind}": n_failed}
    if len(good) == 0 or n_failed > MOST_FAILED * (len(good) + n_failed):
        return found
    truth, label, p = _answers(pd.concat([active, good]))
    for name, estimate in (
        ("ba", balanced_accuracy(truth, label)),
        ("tnr", _rate(~label[~truth])),
        ("auroc", _ranked(truth, p)),
    ):
        found |= {f"{name}_{kind}": estimate.value, f"{name}_{kind}_low": estimate.low}
        found |= {f"{name}_{kind}_high": estimate.high}
    return found


def _missing(verdicts: pd.DataFrame, asked: Sequence[Context]) -> int:
    """How many contexts were to be judged and have no verdict, not even a failed one."""
    return len({context.window for context in asked} - set(verdicts["context"]))


def _answers(verdicts: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, label and P(active) of verdicts that did not fail."""
    label = verdicts["label"].to_numpy(dtype=float).astype(bool)
    return verdicts["truth"].to_numpy(dtype=bool), label, verdicts["p"].to_numpy(dtype=float)


def _rate(right: np.ndarray) -> Estimate:
    return proportion(float(right.sum()), len(right))


def _ranked(truth: np.ndarray, p: np.ndarray) -> Estimate:
    return UNKNOWN if np.isnan(p).any() else auroc(truth, p)


def _status(n_active: int, n_inactive: int, n_failed: int, reasons: pd.Series) -> str:
    """``ok``, or why a score of so many verdicts and failures would mean nothing."""
    n = n_active + n_inactive + n_failed
    if n == 0:
        return "failed: nothing was judged"
    often = f" (most often: {reasons.mode().iloc[0]})" if len(reasons) else ""
    if n_failed > MOST_FAILED * n:
        return f"failed: {n_failed} of {n} contexts without a verdict{often}"
    if n_active == 0 or n_inactive == 0:
        return f"failed: no verdict on any {'silent' if n_active else 'activating'} context{often}"
    return "ok"


def _by_stratum(items: Sequence[Context], labels: dict[int, bool]) -> list[Estimate]:
    """TPR of the contexts of each stratum, the weakest first."""
    strata = {c.window: c.stratum for c in items if c.stratum is not None and c.kind != "mismarked"}
    said: list[list[bool]] = [[] for _ in range(max(strata.values(), default=-1) + 1)]
    for window, stratum in strata.items():
        if window in labels:
            said[stratum].append(labels[window])
    return [proportion(sum(answers), len(answers)) for answers in said]
