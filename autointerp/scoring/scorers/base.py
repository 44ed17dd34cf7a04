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


class Figures(NamedTuple):
    """How well the judge tells the contexts to say yes of from one kind of the others. Unknown is NaN, never zero."""

    ba: Estimate = UNKNOWN
    """Balanced accuracy, (TPR + TNR) / 2. Interval: Wilson's of the two rates, joined by MOVER."""
    tnr: Estimate = UNKNOWN
    """Of the contexts to say no of, the share of no. Interval: Wilson's."""
    auroc: Estimate = UNKNOWN
    """Unknown where the judge gives no probabilities. Interval: DeLong's."""
    n: int = 0
    """Contexts to say no of, with a verdict."""
    n_failed: int = 0
    """Contexts without one, because the judge failed or was not asked."""


class ScoreRow(NamedTuple):
    """One explanation's score, with its figures over each kind of contexts to say no of."""

    status: str
    """``ok``, or ``failed: …`` with the reason."""
    n_active: int
    """Contexts to say yes of (the latent fires there; the marks are right), with a verdict."""
    random: Figures
    """Over random silent contexts, or wrong marks. Its ``n_failed`` counts the contexts to say yes of, too."""
    tpr: Estimate = UNKNOWN
    """Of the contexts to say yes of, the share of yes. Interval: Wilson's."""
    strata: Sequence[Estimate] = ()
    """TPR by stratum of activation, the weakest first. Empty when not asked for."""
    hard: Figures = Figures()
    """Over silent contexts in which a neighbour of the latent fires strongly, if there are any."""
    same_token: Figures = Figures()
    """Over silent contexts that hold the latent's top token, if there are any."""
    precision: float = math.nan
    """The half-width at which judging was to stop; NaN where a fixed number of contexts was judged."""
    stopped: str = ""
    """What ended adaptive judging, one of :data:`STOPS`; empty without a precision."""

    def as_columns(self) -> dict[str, Any]:
        """Return the row's columns in a score table."""
        random = self.random
        columns: dict[str, Any] = {
            "balanced_accuracy": random.ba.value,
            "ba_low": random.ba.low,
            "ba_high": random.ba.high,
        }
        columns |= {**_columns("tpr", self.tpr), **_columns("tnr", random.tnr), **_columns("auroc", random.auroc)}
        columns |= {"n_active": self.n_active, "n_inactive": random.n, "n_failed": random.n_failed}
        columns["status"] = self.status
        columns |= {f"stratum_{name}": [e[i] for e in self.strata] for i, name in enumerate(("tpr", "low", "high"))}
        for kind, figures in (("hard", self.hard), ("same_token", self.same_token)):
            for name, estimate in (("ba", figures.ba), ("tnr", figures.tnr), ("auroc", figures.auroc)):
                columns |= _columns(f"{name}_{kind}", estimate)
            columns |= {f"n_{kind}": figures.n, f"n_failed_{kind}": figures.n_failed}
        return {**columns, "precision": self.precision, "stopped": self.stopped}


def _columns(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


SCORE_COLUMNS = tuple(ScoreRow("", 0, Figures()).as_columns())


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
        """Return all contexts in the order for the judge: that of a hash, which reveals neither kind nor strength."""
        return in_hash_order([*test_set.active, *test_set.inactive, *test_set.hard, *test_set.same_token])

    def score(self, verdicts: pd.DataFrame, items: Sequence[Planned] = ()) -> ScoreRow:
        """Score one explanation, judged once (one judge, control and replicate).

        Args:
            verdicts: from :meth:`autointerp.journal.journal.Journal.verdicts`: ``context``, ``truth``, ``p``,
                ``label``, ``failure`` and ``negative_kind`` are read.
            items: the planned contexts, if known: verdicts on others are ignored, missing ones count as failed, and the
                activating strata are scored too.
        """
        return measure(verdicts, items)


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
        return ScoreRow(status, n_active, Figures(n=n_inactive, n_failed=n_failed))
    active = good.where(truth)

    def over(judged: _Columns, n_failed: int) -> Figures:
        """Return the figures of ``judged`` contexts to say no of; only counts if too few have a verdict."""
        no = judged.where(~judged.failed)
        n = len(no.context)
        if n == 0 or n_failed > MOST_FAILED * (n + n_failed):
            return Figures(n=n, n_failed=n_failed)
        truth, label, p = (np.concatenate([getattr(part, c) for part in (active, no)]) for c in ("truth", "label", "p"))
        rank = UNKNOWN if np.isnan(p).any() else auroc(truth, p)
        return Figures(balanced_accuracy(truth, label), _rate(~no.label), rank, n, n_failed)

    def over_kind(kind: str) -> Figures:
        of_kind = judged.where(judged.kind == kind)
        return over(of_kind, int(of_kind.failed.sum()) + of_kind.missing_of([c for c in items if c.kind == kind]))

    strata = _by_stratum(items, dict(zip(good.context.tolist(), label.tolist(), strict=True)))
    random = over(good.where(~truth), 0)._replace(n_failed=n_failed)
    return ScoreRow(status, n_active, random, _rate(label[truth]), strata, over_kind("hard"), over_kind("same_token"))


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
        return _Columns._make(column[chosen] for column in self)

    def missing_of(self, asked: Sequence[Planned]) -> int:
        """Return the number of planned contexts without a verdict; a failed verdict is one."""
        return len({context.window for context in asked} - set(self.context.tolist()))


def _rate(right: np.ndarray) -> Estimate:
    return proportion(float(right.sum()), len(right))


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
