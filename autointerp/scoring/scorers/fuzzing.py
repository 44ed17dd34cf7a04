"""Fuzzing: can the judge predict, from the explanation alone, *on which tokens* the latent fires?

After Paulo et al. (2024, arXiv 2410.13928). The text always activates the latent; some tokens are marked, and the judge
says whether they are those on which it fires. An explanation with the right subject but the wrong token does well in
detection and not here.

Marks alone must not reveal the answer, as randomly drawn wrong ones would by their number and position. So the
activating contexts are halved by hash within each stratum, and each context of one half lends its marks, at the same
places, to one of the other half that is silent in all of them. Right and wrong marks then agree exactly in number,
lengths of runs and positions. Each context is used once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.optimize import linear_sum_assignment

from autointerp.contexts.sampler import TestSet
from autointerp.scoring.scorers.base import Scorer
from sae.firings.store import mix_bits

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context, ContextSampler

_FORBIDDEN = 10**6


class FuzzingScorer(Scorer):
    """Balanced accuracy and AUROC of the judge's verdicts on rightly and wrongly marked activating contexts."""

    name: ClassVar[str] = "fuzzing"
    marked: ClassVar[bool] = True

    def test_set(self, sampler: ContextSampler, latent: int) -> TestSet:
        """Return up to ``n_active`` contexts of each kind; none if there are not half of ``min_active`` of each.

        ``active`` are rightly marked, ``inactive`` wrongly; the i-th of each have the same marks.
        """
        settings = sampler.settings
        found = mark(sampler.activating(latent, 2 * settings.n_active))
        enough = min(settings.min_active, settings.n_active) / 2
        return found if len(found.active) >= enough else TestSet([], [])


def mark(contexts: Sequence[Context]) -> TestSet:
    """Pair activating contexts with the same marks: right ones in ``active``, wrong ones in ``inactive``.

    Makes as many pairs as possible, from near strata if that costs no pair, in the order of the rightly marked
    contexts. Fewer than half of the contexts if the latent fires so densely, or so often at the same places, that marks
    cannot be lent.
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
    """Deal the contexts out in turn, stratum by stratum, in the order of a hash of their windows."""
    places = mix_bits(mix_bits(np.array([context.window for context in contexts], dtype=np.uint64)))
    order = np.lexsort((places, np.array([context.stratum or 0 for context in contexts])))
    dealt = [contexts[i] for i in order]
    return dealt[::2], dealt[1::2]
