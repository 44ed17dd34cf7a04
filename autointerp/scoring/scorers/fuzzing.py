"""Fuzzing: can the judge tell, from the explanation alone, *on which tokens* the latent fires?

After Paulo et al. (2024, arXiv 2410.13928). The text always activates the latent; some of its tokens are marked, and
the judge says whether they are those on which it fires. An explanation that names the right subject but not the right
token does well in detection and not here.

Marks must not give the answer away by themselves. Were the wrong ones drawn at random, a judge could win by counting
marks or by looking where they stand: latents fire on one token here and in runs there. So the activating contexts are
halved by hash within each stratum of activation, and each context of the one half lends its marks, at the very same
places, to one of the other half that is silent in all of them. Right and wrong marks then agree in number, in the
lengths of their runs and in their positions, exactly, and whoever looks at marks alone scores one half. Each context
is used once, so that nothing is seen both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from autointerp.contexts.sampler import TestSet
from autointerp.scoring.scorers.base import ScoreRow, in_hash_order, measure
from sae.firings.store import mix_bits

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context, ContextSampler
    from autointerp.scoring.scorers.base import Planned

_FORBIDDEN = 10**6


class FuzzingScorer:
    """Balanced accuracy and AUROC of the judge's verdicts on rightly and wrongly marked activating contexts."""

    name: ClassVar[str] = "fuzzing"
    marked: ClassVar[bool] = True

    def test_set(self, sampler: ContextSampler, latent: int) -> TestSet:
        """Up to ``n_active`` contexts of each kind; none at all where there are not half of ``min_active`` of each.

        ``active`` are the rightly marked ones, ``inactive`` the wrongly marked; their i-th ones bear the same marks.
        """
        settings = sampler.settings
        found = mark(sampler.activating(latent, 2 * settings.n_active))
        enough = min(settings.min_active, settings.n_active) / 2
        return found if len(found.active) >= enough else TestSet([], [])

    def items(self, test_set: TestSet) -> list[Context]:
        """Both kinds together, in the order of a hash of their window: which is which does not show in it."""
        return in_hash_order([*test_set.active, *test_set.inactive])

    def score(self, verdicts: pd.DataFrame, items: Sequence[Planned] = ()) -> ScoreRow:
        """See :meth:`autointerp.scoring.scorers.base.Scorer.score`; the strata are those of the rightly marked
        contexts."""
        return measure(verdicts, items)


def mark(contexts: Sequence[Context]) -> TestSet:
    """Activating contexts in pairs with the same marks: right ones in ``active``, wrong ones in ``inactive``.

    As many pairs as can be had, the members of a pair from near strata where that costs no pair; in the order in which
    their rightly marked contexts stand in ``contexts``. Fewer than half of the contexts where the latent fires so
    densely, or always at the same places, that marks cannot be lent.
    """
    right, wrong = _halves(contexts)
    if not right or not wrong:
        return TestSet([], [])
    marks = np.array([context.marked() for context in right])
    fires = np.array([context.activations for context in wrong]) > 0
    clash = marks.astype(np.int64) @ fires.astype(np.int64).T > 0  # [right, wrong]
    strata = [np.array([context.stratum or 0 for context in half]) for half in (right, wrong)]
    apart = np.abs(strata[0][:, None] - strata[1])
    pairs = [
        (right[i], wrong[j])
        for i, j in zip(*linear_sum_assignment(apart + _FORBIDDEN * clash), strict=True)
        if not clash[i, j]
    ]
    place = {context.window: i for i, context in enumerate(contexts)}
    pairs.sort(key=lambda pair: place[pair[0].window])
    return TestSet(
        [replace(context, marks=tuple(context.marked())) for context, _ in pairs],
        [replace(context, kind="mismarked", marks=tuple(lender.marked())) for lender, context in pairs],
    )


def _halves(contexts: Sequence[Context]) -> tuple[list[Context], list[Context]]:
    """The contexts dealt out in turn, stratum by stratum, in the order of a hash of their windows."""
    places = mix_bits(mix_bits(np.array([context.window for context in contexts], dtype=np.uint64)))
    order = np.lexsort((places, np.array([context.stratum or 0 for context in contexts])))
    dealt = [contexts[i] for i in order]
    return dealt[::2], dealt[1::2]
