"""What every scorer is: a test set laid out for the judge, and the verdicts on it turned into one row.

A score of few contexts is worth little without its interval, and a score of the contexts that happened to be answered
is worth little without the number that were not. A row has both, and has no score at all where too much failed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import pandas as pd

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context, ContextSampler, TestSet

HARDER = ("hard", "same_token")
"""Kinds of negatives that have figures of their own and are in no others."""


STOPS = ("narrow enough", "cap", "out of contexts")
"""What ends adaptive judging: the interval, the most contexts that were asked for, or the most that there are."""


class ScoreRow(NamedTuple):
    """One explanation's score. What could not be measured is NaN, never zero."""

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
        """The contexts to test on, empty where there are too few."""
        ...

    def items(self, test_set: TestSet) -> list[Context]:
        """The contexts in the order in which the judge is to see them, which gives nothing away."""
        ...

    def score(self, verdicts: pd.DataFrame, items: Sequence[Context] = ()) -> ScoreRow:
        """The score of one explanation, judged once (one judge, control and replicate).

        Args:
            verdicts: rows as of :meth:`autointerp.journal.journal.Journal.verdicts`: ``context``, ``truth``, ``p``,
                ``label``, ``failure`` and ``negative_kind`` are read.
            items: what should have been judged, where that is known: verdicts on other contexts are then left aside,
                those that are missing count as failed, and the strata of the activating ones are scored too.
        """
        ...
