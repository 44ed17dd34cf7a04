"""Detection: can the judge predict, from the explanation alone, in which contexts the latent fires?

After Paulo et al. (2024, arXiv 2410.13928). Activating contexts of every quantile of activation are shuffled with as
many random silent ones, and the judge answers for each. The score is balanced accuracy, because plain accuracy would
reward a judge that always says no if there were more silent contexts. Contexts in which a neighbour fires, or that hold
the latent's top token, are judged among the others but have figures of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from autointerp.scoring.scorers.base import Scorer

if TYPE_CHECKING:
    from autointerp.contexts.sampler import ContextSampler, TestSet


class DetectionScorer(Scorer):
    """Balanced accuracy and AUROC of the judge's verdicts on activating and silent contexts."""

    name: ClassVar[str] = "detection"
    marked: ClassVar[bool] = False

    def test_set(self, sampler: ContextSampler, latent: int) -> TestSet:
        """See :meth:`autointerp.contexts.sampler.ContextSampler.testing`."""
        return sampler.testing(latent)
