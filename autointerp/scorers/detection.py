"""Detection: can the judge tell, from the explanation alone, in which contexts the latent fires?

After Paulo et al. (2024, arXiv 2410.13928). Activating contexts from every quantile of activation and as many in which
the latent is silent are shuffled; the judge answers for each. Balanced accuracy, not accuracy: were there more silent
contexts than activating ones, a judge that always says no would look good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from autointerp.scorers.base import ScoreRow
from autointerp.statistics import UNKNOWN, auroc, balanced_accuracy
from sae.firings import mix

if TYPE_CHECKING:
    from autointerp.contexts import Context, TestSet

MOST_FAILED = 0.2
"""Above this share of failures there is no score: what fails is seldom a fair sample of what was asked."""


class DetectionScorer:
    """Balanced accuracy and AUROC of the judge's verdicts on activating and silent contexts."""

    name: ClassVar[str] = "detection"

    def items(self, test_set: TestSet) -> list[Context]:
        """Both kinds together, in the order of a hash of their window: neither kind nor strength shows in it."""
        both = [*test_set.active, *test_set.inactive]
        places = mix(np.array([context.window for context in both], dtype=np.uint64))
        return [both[i] for i in np.argsort(places, kind="stable")]

    def score(self, verdicts: pd.DataFrame, items: Sequence[Context] = ()) -> ScoreRow:
        """See :meth:`autointerp.scorers.base.Scorer.score`.

        The judge's own yes or no (P(active) of at least one half, where it gives a probability) makes the balanced
        accuracy; AUROC is computed when every verdict has a probability.
        """
        missing = 0
        if items:
            asked = {context.window for context in items}
            verdicts = verdicts[verdicts["context"].isin(asked)]
            missing = len(asked) - verdicts["context"].nunique()
        if verdicts["context"].duplicated().any():
            raise ValueError("verdicts of several judgings mixed: a context is there twice")
        unanswered = verdicts["failure"].notna()
        good = verdicts[~unanswered]
        truth = good["truth"].to_numpy(dtype=bool)
        n_active, n_inactive = int(truth.sum()), int((~truth).sum())
        n_failed = int(unanswered.sum()) + missing
        status = _status(n_active, n_inactive, n_failed, verdicts.loc[unanswered, "failure"])
        if status != "ok":
            return ScoreRow(*UNKNOWN, math.nan, math.nan, *UNKNOWN, n_active, n_inactive, n_failed, status, [])
        label = good["label"].to_numpy(dtype=float).astype(bool)
        p = good["p"].to_numpy(dtype=float)
        ranked = UNKNOWN if np.isnan(p).any() else auroc(truth, p)
        return ScoreRow(
            *balanced_accuracy(truth, label),
            float(label[truth].mean()),
            float((~label[~truth]).mean()),
            *ranked,
            n_active,
            n_inactive,
            n_failed,
            status,
            _by_stratum(items, dict(zip(good["context"].tolist(), label.tolist(), strict=True))),
        )


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


def _by_stratum(items: Sequence[Context], labels: dict[int, bool]) -> list[float]:
    strata = {context.window: context.stratum for context in items if context.stratum is not None}
    said: list[list[bool]] = [[] for _ in range(max(strata.values(), default=-1) + 1)]
    for window, stratum in strata.items():
        if window in labels:
            said[stratum].append(labels[window])
    return [sum(answers) / len(answers) if answers else math.nan for answers in said]
