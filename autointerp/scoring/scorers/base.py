"""The interface of a scorer: lay out a test set for the judge, and turn the verdicts on it into one row.

A row has the score's interval and the number of contexts that failed, and no score at all if too many did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from autointerp.scoring.intervals import auroc, balanced_accuracy
from sae.common.estimate import UNKNOWN, Estimate, proportion
from sae.firings.store import mix_bits

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context, ContextSampler, TestSet
    from autointerp.journal.journal import PlannedContext

    Planned = Context | PlannedContext

HARDER = ("hard", "same_token")
"""Kinds of negatives that have figures of their own and are in no others."""


STOPS = ("narrow enough", "cap", "out of contexts")
"""What ends adaptive judging: the interval, the most contexts that were asked for, or the most that there are."""


class ScoreRow(NamedTuple):
    """One explanation's score. NaN, never zero, for anything that could not be measured."""

    balanced_accuracy: float
    """(TPR + TNR) / 2."""
    ba_low: float
    """Lower end of its 95 % interval (Wilson's of the two rates, joined by MOVER)."""
    ba_high: float
    tpr: float
    """Of the contexts that the judge should say yes of (the latent fires there; the marks are right), the share that it
    did say yes of. Interval: Wilson's."""
    tpr_low: float
    tpr_high: float
    tnr: float
    """Of those that it should say no of (a silent context drawn at random; wrong marks), the share of no. Wilson's."""
    tnr_low: float
    tnr_high: float
    auroc: float
    """NaN where the judge gives no probabilities. Interval: DeLong's."""
    auroc_low: float
    auroc_high: float
    n_active: int
    """Contexts to say yes of, with a verdict."""
    n_inactive: int
    """Contexts to say no of, with a verdict; the harder kinds are not among them."""
    n_failed: int
    """Contexts of either kind without one, because the judge failed or was not asked."""
    status: str
    """``ok``, or ``failed: …`` with the reason."""
    stratum_tpr: list[float]
    """TPR by stratum of activation, the weakest first; NaN for a stratum without verdicts. Empty when not asked for."""
    stratum_low: list[float]
    """Lower ends of their 95 % intervals (Wilson's)."""
    stratum_high: list[float]
    ba_hard: float = math.nan
    """As ``balanced_accuracy``; the negatives are silent contexts in which a neighbour of the latent fires strongly."""
    ba_hard_low: float = math.nan
    ba_hard_high: float = math.nan
    tnr_hard: float = math.nan
    tnr_hard_low: float = math.nan
    tnr_hard_high: float = math.nan
    auroc_hard: float = math.nan
    auroc_hard_low: float = math.nan
    auroc_hard_high: float = math.nan
    n_hard: int = 0
    """Such contexts with a verdict; none where they could not be drawn, or the scorer has no such kind."""
    n_failed_hard: int = 0
    ba_same_token: float = math.nan
    """As ``balanced_accuracy``; the negatives are silent contexts that hold the latent's top token."""
    ba_same_token_low: float = math.nan
    ba_same_token_high: float = math.nan
    tnr_same_token: float = math.nan
    tnr_same_token_low: float = math.nan
    tnr_same_token_high: float = math.nan
    auroc_same_token: float = math.nan
    auroc_same_token_low: float = math.nan
    auroc_same_token_high: float = math.nan
    n_same_token: int = 0
    """Such contexts with a verdict; none where they could not be drawn, or the scorer has no such kind."""
    n_failed_same_token: int = 0
    precision: float = math.nan
    """The half-width at which judging was to stop; NaN where a fixed number of contexts was judged."""
    stopped: str = ""
    """What ended adaptive judging: ``narrow enough``, ``cap`` or ``out of contexts``; empty without a precision."""


class Scorer(Protocol):
    """A way of testing explanations."""

    name: ClassVar[str]
    """Short and stable, as stored in the journal: ``detection``."""
    marked: ClassVar[bool]
    """Whether the judge is asked about marked tokens, not about the whole text."""

    def test_set(self, sampler: ContextSampler, latent: int) -> TestSet:
        """Return the test contexts; empty if there are too few."""
        ...

    def items(self, test_set: TestSet) -> list[Context]:
        """Return the contexts in the order for the judge, which reveals nothing."""
        ...

    def score(self, verdicts: pd.DataFrame, items: Sequence[Planned] = ()) -> ScoreRow:
        """Score one explanation, judged once (one judge, control and replicate).

        Args:
            verdicts: from :meth:`autointerp.journal.journal.Journal.verdicts`: ``context``, ``truth``, ``p``,
                ``label``, ``failure`` and ``negative_kind`` are read.
            items: the planned contexts, if known: verdicts on others are ignored, missing ones count as failed, and the
                activating strata are scored too.
        """
        ...


MOST_FAILED = 0.2
"""Above this share of failures there is no score: what fails is seldom a fair sample of what was asked."""


def in_hash_order(contexts: Sequence[Context]) -> list[Context]:
    """Order contexts by a hash of their window, which reveals neither kind nor strength."""
    places = mix_bits(np.array([context.window for context in contexts], dtype=np.uint64))
    return [contexts[i] for i in np.argsort(places, kind="stable")]


def measure(verdicts: pd.DataFrame, items: Sequence[Planned] = ()) -> ScoreRow:
    """Turn verdicts into one row; see :meth:`Scorer.score`.

    Balanced accuracy uses the judge's own yes or no (P(active) of at least one half, if it gives a probability); AUROC
    needs a probability in every verdict. Harder negatives enter only their own figures, which share the TPR.
    """
    judged = _Columns.of(verdicts)
    if items:
        judged = judged.where(np.isin(judged.context, [context.window for context in items]))
    if len(np.unique(judged.context)) < len(judged.context):
        raise ValueError("verdicts of several judgings mixed: a context is there twice")
    own = judged.where(~np.isin(judged.kind, HARDER))
    good = own.where(~own.failed)
    truth, label = good.truth, good.label
    n_active, n_inactive = int(truth.sum()), int((~truth).sum())
    n_failed = int(own.failed.sum()) + own.missing_of([c for c in items if c.kind not in HARDER])
    status = _status(n_active, n_inactive, n_failed, own.failure[own.failed])
    if status != "ok":
        return ScoreRow(*UNKNOWN, *UNKNOWN, *UNKNOWN, *UNKNOWN, n_active, n_inactive, n_failed, status, [], [], [])
    strata = _by_stratum(items, dict(zip(good.context.tolist(), label.tolist(), strict=True)))
    row = ScoreRow(
        *balanced_accuracy(truth, label),
        *_rate(label[truth]),
        *_rate(~label[~truth]),
        *_ranked(truth, good.p),
        n_active,
        n_inactive,
        n_failed,
        status,
        [estimate.value for estimate in strata],
        [estimate.low for estimate in strata],
        [estimate.high for estimate in strata],
    )
    for kind in HARDER:
        row = row._replace(**_harder(kind, judged.where(judged.kind == kind), items, good.where(truth)))
    return row


def _harder(kind: str, judged: _Columns, items: Sequence[Planned], active: _Columns) -> dict[str, Any]:
    """Return the columns of one harder kind of negative, NaN where they cannot be measured."""
    n_failed = int(judged.failed.sum()) + judged.missing_of([c for c in items if c.kind == kind])
    good = judged.where(~judged.failed)
    n = len(good.context)
    found: dict[str, Any] = {f"n_{kind}": n, f"n_failed_{kind}": n_failed}
    if n == 0 or n_failed > MOST_FAILED * (n + n_failed):
        return found
    truth, label, p = (np.concatenate(pair) for pair in zip(active.answers, good.answers, strict=True))
    for name, estimate in (
        ("ba", balanced_accuracy(truth, label)),
        ("tnr", _rate(~label[~truth])),
        ("auroc", _ranked(truth, p)),
    ):
        found |= {f"{name}_{kind}": estimate.value, f"{name}_{kind}_low": estimate.low}
        found |= {f"{name}_{kind}_high": estimate.high}
    return found


class _Columns(NamedTuple):
    """Verdicts as one array per column: pandas is slow at taking rows of small tables many times."""

    context: npt.NDArray[np.int64]
    kind: npt.NDArray[np.object_]
    truth: npt.NDArray[np.bool_]
    label: npt.NDArray[np.bool_]
    """False, too, where the judge failed."""
    p: npt.NDArray[np.float64]
    failure: npt.NDArray[np.object_]
    failed: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, verdicts: pd.DataFrame) -> _Columns:
        failed = verdicts["failure"].notna().to_numpy()
        return cls(
            verdicts["context"].to_numpy(dtype=np.int64),
            verdicts["negative_kind"].to_numpy(dtype=object),
            verdicts["truth"].to_numpy(dtype=bool),
            np.where(failed, 0.0, verdicts["label"].to_numpy(dtype=float)).astype(bool),
            verdicts["p"].to_numpy(dtype=float),
            verdicts["failure"].to_numpy(dtype=object),
            failed,
        )

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Columns:
        return _Columns(
            self.context[chosen],
            self.kind[chosen],
            self.truth[chosen],
            self.label[chosen],
            self.p[chosen],
            self.failure[chosen],
            self.failed[chosen],
        )

    @property
    def answers(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        """Return truth, label and P(active)."""
        return self.truth, self.label, self.p

    def missing_of(self, asked: Sequence[Planned]) -> int:
        """Return the number of planned contexts without a verdict; a failed verdict is one."""
        return len({context.window for context in asked} - set(self.context.tolist()))


def _rate(right: np.ndarray) -> Estimate:
    return proportion(float(right.sum()), len(right))


def _ranked(truth: np.ndarray, p: np.ndarray) -> Estimate:
    return UNKNOWN if np.isnan(p).any() else auroc(truth, p)


def _status(n_active: int, n_inactive: int, n_failed: int, reasons: npt.NDArray[np.object_]) -> str:
    """Return ``ok``, or why a score with this many verdicts and failures would mean nothing."""
    n = n_active + n_inactive + n_failed
    if n == 0:
        return "failed: nothing was judged"
    often = f" (most often: {pd.Series(reasons).mode().iloc[0]})" if len(reasons) else ""
    if n_failed > MOST_FAILED * n:
        return f"failed: {n_failed} of {n} contexts without a verdict{often}"
    if n_active == 0 or n_inactive == 0:
        return f"failed: no verdict on any {'silent' if n_active else 'activating'} context{often}"
    return "ok"


def _by_stratum(items: Sequence[Planned], labels: dict[int, bool]) -> list[Estimate]:
    """Return the TPR of each stratum's contexts, weakest first."""
    strata = {c.window: c.stratum for c in items if c.stratum is not None and c.kind != "mismarked"}
    said: list[list[bool]] = [[] for _ in range(max(strata.values(), default=-1) + 1)]
    for window, stratum in strata.items():
        if window in labels:
            said[stratum].append(labels[window])
    return [proportion(sum(answers), len(answers)) for answers in said]
