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
    from autointerp.contexts import Context, TestSet


class ScoreRow(NamedTuple):
    """One explanation's score. What could not be measured is NaN, never zero."""

    balanced_accuracy: float
    """(TPR + TNR) / 2."""
    ba_low: float
    """Lower end of its 95 % interval."""
    ba_high: float
    tpr: float
    """Of the contexts in which the latent fires, the share that the judge said so of."""
    tnr: float
    """Of the contexts in which it is silent, the share that the judge said so of."""
    auroc: float
    """NaN where the judge gives no probabilities."""
    auroc_low: float
    auroc_high: float
    n_active: int
    """Activating contexts with a verdict."""
    n_inactive: int
    """Silent contexts with a verdict."""
    n_failed: int
    """Contexts of either kind without one, because the judge failed or was not asked."""
    status: str
    """``ok``, or ``failed: …`` with the reason."""
    stratum_tpr: list[float]
    """TPR by stratum of activation, the weakest first; NaN for a stratum without verdicts. Empty when not asked for."""
    precision: float = math.nan
    """The half-width at which judging was to stop; NaN where a fixed number of contexts was judged."""
    stopped: str = ""
    """What ended adaptive judging: ``narrow enough``, ``cap`` or ``out of contexts``; empty without a precision."""


class Scorer(Protocol):
    """A way of testing explanations."""

    name: ClassVar[str]
    """Short and stable, as stored in the journal: ``detection``."""

    def items(self, test_set: TestSet) -> list[Context]:
        """The contexts in the order in which the judge is to see them, which gives nothing away."""
        ...

    def score(self, verdicts: pd.DataFrame, items: Sequence[Context] = ()) -> ScoreRow:
        """The score of one explanation, judged once (one judge, control and replicate).

        Args:
            verdicts: rows as of :meth:`autointerp.journal.Journal.verdicts`: ``context``, ``truth``, ``p``, ``label``
                and ``failure`` are read.
            items: what should have been judged, where that is known: verdicts on other contexts are then left aside,
                those that are missing count as failed, and the strata of the activating ones are scored too.
        """
        ...
