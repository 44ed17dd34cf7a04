"""Detection: can the judge tell, from the explanation alone, in which contexts the latent fires?

After Paulo et al. (2024, arXiv 2410.13928). Activating contexts from every quantile of activation and as many in which
the latent is silent are shuffled; the judge answers for each. Balanced accuracy, not accuracy: were there more silent
contexts than activating ones, a judge that always says no would look good.

The score is the one over silent contexts drawn at random, as in the paper. Contexts in which a neighbour fires, and
such as hold the latent's top token, are judged among the others, and have figures of their own.
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
        """All kinds together, in the order of a hash of their window: neither kind nor strength shows in it."""
        return in_hash_order([*test_set.active, *test_set.inactive, *test_set.hard, *test_set.same_token])

    def score(self, verdicts: pd.DataFrame, items: Sequence[Planned] = ()) -> ScoreRow:
        """See :meth:`autointerp.scoring.scorers.base.Scorer.score`."""
        return measure(verdicts, items)
