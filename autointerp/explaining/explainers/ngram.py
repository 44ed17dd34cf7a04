"""Explain a latent by the tokens and short runs of tokens on which it fires. No model is asked.

A published baseline, after Neuron2Graph (Foote et al. 2023, arXiv 2305.19911) and the use that Gao et al. (2024, arXiv
2406.04093) make of it for the latents of sparse autoencoders: short runs of tokens that end where the latent fires,
each with what is to be expected after it. Here all comes from counting in the contexts (no saliency, no substitutes
proposed by another model), and what is found is written as one sentence, because an explanation is text.

How the sentence is found:

* Every token of the activating contexts and of the background (silent) ones is counted. Both kinds of context weigh
  alike in sum, whatever their numbers, so that P(active) = 1/2 is the even decision; the judge's threshold is fixed
  there and never tuned.
* A run that fired f of n times has chance (f + s c) / (n + s), where c is the chance of the shorter pattern that it
  extends: the prior of strength s keeps what was seen once or twice from being believed.
* Patterns are added one at a time, each time the one that makes the firings likeliest. A longer run takes its
  positions away from the shorter one. A token on which the latent fires *less* than elsewhere is a pattern too: that is
  what can be said of a latent that fires nearly everywhere.
* How many patterns, and where P = 1/2 lies, are decided by cross-validation over the explaining contexts, with the
  search repeated in every fold. Neither sees a test context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.special import expit

from autointerp.explaining.explainers.base import Explanation
from autointerp.explaining.ngram_counts import Bools, Floats, Positions, search
from autointerp.explaining.patterns import HIGHEST, LONGEST_RUN, Pattern, Patterns, bounded, rounded
from autointerp.journal.method import BASELINE
from sae.common.files import digest

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context

_METHOD = 1  # raise it when the same settings would give another sentence


@dataclass(frozen=True)
class NgramSettings:
    """What the n-gram sentence depends on, besides the contexts."""

    max_patterns: int = 24
    """Patterns in a sentence at most."""
    prior: float = 4.0
    """Strength s of the prior, in occurrences within activating contexts."""
    least_gain: float = 0.5
    """Nats of likelihood that a pattern must gain."""
    folds: int = 10
    """Folds of the cross-validation; fewer where there are fewer contexts."""
    background: int = 300
    """Silent contexts asked for."""


class NgramExplainer:
    """An :class:`autointerp.explaining.explainers.base.Explainer` that counts. Equal contexts give an equal
    sentence."""

    name = BASELINE
    asks_model: ClassVar[bool] = False
    prompt_hash = ""
    model = ""

    def __init__(self, settings: NgramSettings | None = None) -> None:
        self.settings = settings or NgramSettings()
        self.settings_hash = digest({"method": _METHOD, "longest_run": LONGEST_RUN, **asdict(self.settings)})
        self.needs_background = self.settings.background

    async def explain(self, latent: int, contexts: Sequence[Context], background: Sequence[Context]) -> Explanation:  # noqa: ARG002
        """One sentence for ``contexts``, in which the latent fires, against ``background``, in which it is silent."""
        found = find_patterns(contexts, background, self.settings)
        if found is None:
            return Explanation(None, failure="fires on no token with text in the contexts it was given")
        return Explanation(found.sentence())


def find_patterns(
    contexts: Sequence[Context], background: Sequence[Context], settings: NgramSettings
) -> Patterns | None:
    """The patterns that tell the firings in ``contexts`` from the rest, the most telling first.

    Without any background the chances are those within activating contexts, and nothing can be calibrated.

    Returns:
        ``None`` when there is no firing to explain.
    """
    positions = Positions.of(contexts, background)
    if not positions.fires.any():
        return None
    size, factor = settings.max_patterns, 1.0
    if len(contexts) > 1 and background:
        size, factor = _cross_validate(positions, len(contexts), settings)
    (fit,) = search(positions, positions.context_weight, [size], settings.prior, settings.least_gain)
    chances = [bounded(_scaled(chance, factor)) for chance in [fit.other, *fit.chance[fit.order].tolist()]]
    average = bounded(_scaled(fit.mean, factor))
    patterns = zip(fit.order, chances[1:], strict=True)
    return Patterns(tuple(Pattern(positions.texts[c], p, rounded(p / average)) for c, p in patterns), chances[0])


def _scaled(chance: float, factor: float) -> float:
    """The chance whose intensity -log(1 - chance) is ``factor`` times that of ``chance``."""
    return -math.expm1(factor * math.log1p(-min(HIGHEST, chance)))


def _cross_validate(positions: Positions, n_active: int, settings: NgramSettings) -> tuple[int, float]:
    """The number of patterns with the least held-out loss, and the factor on all intensities that goes with it."""
    most = min(settings.max_patterns, len(positions.texts))
    sizes = [size for size in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64) if size < most] + [most]
    n_contexts = len(positions.context_weight)
    n_folds = min(settings.folds, n_active)
    # Both kinds of context are dealt out evenly.
    fold = np.concatenate([np.arange(n_active) % n_folds, np.arange(n_contexts - n_active) % n_folds])
    intensity = np.zeros((len(sizes), n_contexts))
    for held in range(n_folds):
        fits = search(positions, positions.context_weight * (fold != held), sizes, settings.prior, settings.least_gain)
        part = positions.within(fold == held)
        for row, fit in enumerate(fits):
            intensity[row] += fit.intensity(part)
    active = np.arange(n_contexts) < n_active
    calibrated = [_calibrate(row, active, positions.context_weight) for row in intensity]
    best = min(range(len(sizes)), key=lambda row: calibrated[row][1])
    return sizes[best], calibrated[best][0]


_SLOPE, _SLOPE_STRENGTH = 0.5, 1.0  # prior of the calibration's slope: held-out odds are overconfident, never reversed
_LEAST_SLOPE, _STEEPEST = 0.1, 30.0
_FACTOR_BOUND = 5.0


def _calibrate(intensity: Floats, active: Bools, weight: Floats) -> tuple[float, float]:
    """The factor on ``intensity`` [N] that puts P = 1/2 where held-out contexts are as likely active as not.

    By weighted logistic regression of ``active`` [N] on the log odds of the noisy-or, x = log(exp(intensity) - 1). The
    slope takes up overconfidence, which is of no concern to a decision at 1/2.

    Returns:
        The factor, and the regression's mean loss in nats.
    """
    x = np.log(np.expm1(np.clip(intensity, 1e-6, 30.0)))
    centre = float(weight @ x / weight.sum())
    design = np.stack([np.ones(len(x)), x - centre])
    prior, strength = np.array([0.0, _SLOPE]), np.array([1e-3, _SLOPE_STRENGTH])
    beta = prior.copy()
    for _ in range(15):  # Newton's method; it has settled after some six
        p = expit(beta @ design)
        gradient = design @ (weight * (active - p)) - strength * (beta - prior)
        curvature = (design * (weight * p * (1 - p))) @ design.T + np.diag(strength)
        beta = beta + np.linalg.solve(curvature, gradient)
        beta = np.clip(beta, [-_STEEPEST, _LEAST_SLOPE], _STEEPEST)
    logit = beta @ design
    loss = float(weight @ np.logaddexp(0, np.where(active, -logit, logit)) / weight.sum())
    even = min(30.0, max(-30.0, centre - beta[0] / beta[1]))
    factor = math.log(2) / math.log1p(math.exp(even))
    return min(_FACTOR_BOUND, max(1 / _FACTOR_BOUND, factor)), loss
