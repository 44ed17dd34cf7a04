"""Detection: can the judge predict, from the explanation alone, in which contexts the latent fires?

After Paulo et al. (2024, arXiv 2410.13928). Activating contexts of every quantile of activation are shuffled with as
many random silent ones, and the judge answers for each. The score is balanced accuracy, because plain accuracy would
reward a judge that always says no if there were more silent contexts. Contexts in which a neighbour fires, or that hold
the latent's top token, are judged among the others but have figures of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import pandas as pd

from autointerp.scoring.scorers.base import ScoreRow, in_hash_order, measure

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context, ContextSampler, TestSet
    from autointerp.scoring.scorers.base import Planned


class DetectionScorer:
    """Balanced accuracy and AUROC of the judge's verdicts on activating and silent contexts."""

    name: ClassVar[str] = "detection"
    marked: ClassVar[bool] = False

    def test_set(self, sampler: ContextSampler, latent: int) -> TestSet:
        """See :meth:`autointerp.contexts.sampler.ContextSampler.testing`."""
        return sampler.testing(latent)

    def items(self, test_set: TestSet) -> list[Context]:
        """Return all kinds together, ordered by a hash of their window, which reveals neither kind nor strength."""
        return in_hash_order([*test_set.active, *test_set.inactive, *test_set.hard, *test_set.same_token])

    def score(self, verdicts: pd.DataFrame, items: Sequence[Planned] = ()) -> ScoreRow:
        """See :meth:`autointerp.scoring.scorers.base.Scorer.score`."""
        return measure(verdicts, items)
