"""Explain a latent by the tokens and short runs of tokens on which it fires. Asks no model.

A baseline after Neuron2Graph (Foote et al. 2023, arXiv 2305.19911) and its use by Gao et al. (2024, arXiv 2406.04093):
short runs of tokens that end where the latent fires, with the expected firing after each, all counted in the contexts.

* Every token of the activating and the background (silent) contexts is counted. Both kinds have the same total weight,
  so P(active) = 1/2 is the even decision; the judge's threshold is fixed there.
* A run that fired f of n times has chance (f + s c) / (n + s), where c is the chance of the shorter pattern that it
  extends: a prior of strength s against runs seen once or twice.
* Patterns are added greedily by gain in likelihood. At each position the longest chosen run decides. A token on which
  the latent fires *less* than elsewhere is a pattern too. The search keeps, for every candidate, the positions and
  firings it would have if chosen next, so adding a pattern costs a few operations over the candidates only.
* Cross-validation over the explaining contexts, with the search repeated in every fold, decides the number of patterns
  and where P = 1/2 lies. Neither depends on a test context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from autointerp.explaining.explainers.base import Explanation
from autointerp.explaining.patterns import (
    HIGHEST,
    LONGEST_RUN,
    LOWEST,
    Pattern,
    Patterns,
    bound,
    round_to_written,
)
from autointerp.journal.method import BASELINE
from sae.common.files import digest

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_METHOD = 1  # raise it when the same settings would give another sentence


@dataclass(frozen=True)
class NgramSettings:
    """Everything the n-gram sentence depends on, besides the contexts."""

    max_patterns: int = 24  # most patterns in a sentence
    prior: float = 4.0  # strength s of the prior, in occurrences within activating contexts
    least_gain: float = 0.5  # nats of likelihood that a pattern must gain
    folds: int = 10  # folds of the cross-validation; fewer where there are fewer contexts
    background: int = 300  # silent contexts to draw


class NgramExplainer:
    """Explains by counting. Equal contexts give an equal sentence."""

    name = BASELINE
    asks_model: ClassVar[bool] = False
    prompt_hash = ""
    model = ""

    def __init__(self, settings: NgramSettings | None = None) -> None:
        self.settings = settings or NgramSettings()
        self.settings_hash = digest({"method": _METHOD, "longest_run": LONGEST_RUN, **asdict(self.settings)})
        self.needs_background = self.settings.background

    async def explain(self, latent: int, contexts: Sequence[Context], background: Sequence[Context]) -> Explanation:  # noqa: ARG002
        """Explain ``contexts``, in which the latent fires, against ``background``, in which it is silent."""
        found = find_patterns(contexts, background, self.settings)
        if found is None:
            return Explanation(None, failure="fires on no token with text in the contexts it was given")
        return Explanation(found.write_sentence())


def find_patterns(
    contexts: Sequence[Context], background: Sequence[Context], settings: NgramSettings
) -> Patterns | None:
    """Find the patterns that distinguish the firings in ``contexts`` from the rest, the most informative first.

    Without background the chances are those within activating contexts and are not calibrated. Returns ``None`` if
    there is no firing to explain.
    """
    positions = Positions.of(contexts, background)
    if not positions.fires.any():
        return None
    size, factor = settings.max_patterns, 1.0
    if len(contexts) > 1 and background:
        size, factor = _cross_validate(positions, len(contexts), settings)
    (fit,) = search_patterns(positions, positions.context_weight, [size], settings.prior, settings.least_gain)
    chances = [bound(_scale(chance, factor)) for chance in fit.chance[[-1, *fit.order]].tolist()]
    average = bound(_scale(fit.mean, factor))
    patterns = zip(fit.order, chances[1:], strict=True)
    return Patterns(
        tuple(Pattern(positions.texts[c], p, round_to_written(p / average)) for c, p in patterns), chances[0]
    )


def _scale(chance: float, factor: float) -> float:
    """Return the chance whose intensity -log(1 - chance) is ``factor`` times that of ``chance``."""
    return -math.expm1(factor * math.log1p(-min(HIGHEST, chance)))


def _cross_validate(positions: Positions, n_active: int, settings: NgramSettings) -> tuple[int, float]:
    """Return the number of patterns with the least held-out loss, and the factor on all intensities for it."""
    most = min(settings.max_patterns, len(positions.texts))
    sizes = [size for size in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64) if size < most] + [most]
    n_contexts = len(positions.context_weight)
    n_folds = min(settings.folds, n_active)
    # Every fold gets an equal share of both kinds of context.
    fold = np.concatenate([np.arange(n_active) % n_folds, np.arange(n_contexts - n_active) % n_folds])
    intensity = np.zeros((len(sizes), n_contexts))
    for held in range(n_folds):
        fits = search_patterns(
            positions, positions.context_weight * (fold != held), sizes, settings.prior, settings.least_gain
        )
        part = positions.select(fold == held)
        for row, fit in enumerate(fits):
            intensity[row] += fit.compute_intensity(part)
    active = np.arange(n_contexts) < n_active
    calibrated = [_calibrate(row, active, positions.context_weight) for row in intensity]
    best = min(range(len(sizes)), key=lambda row: calibrated[row][1])
    return sizes[best], calibrated[best][0]


_SLOPE, _SLOPE_STRENGTH = 0.5, 1.0  # prior of the calibration's slope: held-out odds are overconfident, never reversed
_LEAST_SLOPE, _STEEPEST = 0.1, 30.0
_FACTOR_BOUND = 5.0


def _calibrate(intensity: Floats, active: Bools, weight: Floats) -> tuple[float, float]:
    """Return the factor on ``intensity`` [N] that calibrates P = 1/2 on held-out contexts, and the mean loss in nats.

    By weighted logistic regression of ``active`` [N] on the log odds of the noisy-or, x = log(exp(intensity) - 1).
    """
    x = np.log(np.expm1(np.clip(intensity, 1e-6, 30.0)))
    centre = float(weight @ x / weight.sum())
    design = np.stack([np.ones(len(x)), x - centre])
    prior, strength = np.array([0.0, _SLOPE]), np.array([1e-3, _SLOPE_STRENGTH])
    beta = prior.copy()
    for _ in range(15):  # Newton's method; converges in about six steps
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


# --- counting and searching -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positions:
    """Every token of the explaining contexts and of the background, concatenated.

    P positions, C candidate runs, N contexts (activating ones first).
    """

    context: Ints  # [P] the token's context, ascending
    fires: Floats  # [P] 1 where the latent fires, else 0
    runs: Ints  # [LONGEST_RUN, P] the candidate of one, two, three tokens that ends at the token; C for none
    texts: list[str]  # [C] the candidates written out; no text twice
    shorter: Ints  # [LONGEST_RUN, C] the candidates of 1, 2, 3 tokens that end a candidate, itself included; C for none
    context_weight: Floats  # [N] 1 for an activating context; silent ones have the same total weight

    @classmethod
    def of(cls, contexts: Sequence[Context], background: Sequence[Context]) -> Positions:
        """Concatenate the activating ``contexts`` and ``background``, of which only the tokens are read."""
        both = [*contexts, *background]
        number: dict[str, int] = {"": -1}  # a token without text is part of a character that another token shows
        tokens = np.array([number.setdefault(t, len(number)) for c in both for t in c.tokens], dtype=np.int64)
        context = np.repeat(np.arange(len(both)), [len(c.tokens) for c in both])
        strength = np.array([value for c in contexts for value in c.activations])
        fires = np.zeros(len(tokens))
        fires[: len(strength)] = strength > 0
        shown = tokens >= 0
        tokens, context, fires = tokens[shown], context[shown], fires[shown]
        weight = np.full(len(both), len(contexts) / max(1, len(background)))
        weight[: len(contexts)] = 1.0
        runs, texts = _find_candidates(tokens, context, context < len(contexts), list(number))
        shorter = np.full((LONGEST_RUN, len(texts) + 1), len(texts), dtype=np.int64)
        for length in range(LONGEST_RUN):
            shorter[: length + 1, runs[length]] = runs[: length + 1]
        return cls(context, fires, runs, texts, shorter[:, : len(texts)], weight)

    def select(self, kept: Bools) -> Positions:
        """Return the positions in the contexts ``kept`` [N]; candidates and contexts keep their numbers."""
        at = kept[self.context]
        return replace(self, context=self.context[at], fires=self.fires[at], runs=self.runs[:, at])


def _find_candidates(tokens: Ints, context: Ints, inside: Bools, words: list[str]) -> tuple[Ints, list[str]]:
    """Return the runs that may become patterns, as :attr:`Positions.runs` and :attr:`Positions.texts`.

    Every token that occurs ``inside`` an activating context [P], and every longer run that occurs there twice.
    """
    n = len(tokens)
    texts: list[str] = []
    known: set[str] = set()
    runs = np.full((LONGEST_RUN, n), -1, dtype=np.int64)
    key = tokens
    for length in range(1, LONGEST_RUN + 1):
        if length > 1:
            # A longer run is the shorter run that ends here, and the token before it.
            reaches = np.zeros(n, bool)
            reaches[length - 1 :] = context[length - 1 :] == context[: n - length + 1]
            key = np.where(reaches & (key >= 0), key * (len(words) + 1) + np.roll(tokens, length - 1), -1)
        values, first, place = np.unique(key, return_index=True, return_inverse=True)
        times = np.bincount(place[inside], minlength=len(values))
        kept = (values >= 0) & (times >= min(length, 2))
        index = np.full(len(values), -1, dtype=np.int64)
        for value in np.flatnonzero(kept):
            end = first[value] + 1
            text = "".join(words[token] for token in tokens[end - length : end])
            if text not in known:  # if two runs have the same text, the shorter one gets it
                known.add(text)
                index[value] = len(texts)
                texts.append(text)
        runs[length - 1] = index[place]
        key = np.where(((values >= 0) & (times >= 2))[place], place, -1)
    return np.where(runs < 0, len(texts), runs), texts


class Fit(NamedTuple):
    """A set of patterns with their chances."""

    order: list[int]  # the chosen candidates, the most informative first
    chance: Floats  # [C + 1] by candidate, valid for the chosen ones. Last: of a position where none of them ends.
    mean: float  # the chance at an average position

    def compute_intensity(self, positions: Positions) -> Floats:
        """Return -log(1 - P(active)) of each context [N] by noisy-or over the given positions."""
        n = len(positions.texts)
        chosen = np.zeros(n + 1, bool)
        chosen[self.order] = True
        holds = np.full(positions.runs.shape[1], n)
        for run in positions.runs:
            holds = np.where(chosen[run], run, holds)
        cost = -np.log1p(-np.minimum(self.chance, HIGHEST))
        return np.bincount(positions.context, cost[holds], len(positions.context_weight)).astype(np.float64)


def search_patterns(
    positions: Positions, context_weight: Floats, sizes: Sequence[int], prior: float, least_gain: float
) -> list[Fit]:
    """Add patterns greedily, and fit the chances at each of ``sizes`` (ascending) patterns.

    ``context_weight`` [N] is that of a position in each context; 0 skips the context. ``prior`` is in units of weight.
    A fit has fewer patterns if no more gain ``least_gain`` nats.
    """
    n = len(positions.texts)
    weight = context_weight[positions.context]
    hits = weight * positions.fires
    times, fired = np.zeros(n + 1), np.zeros(n + 1)
    for run in positions.runs:
        times += np.bincount(run, weight, n + 1)
        fired += np.bincount(run, hits, n + 1)
    # Number n stands for "no pattern": so far it has every position.
    times[n], fired[n] = weight.sum(), hits.sum()
    mean = min(HIGHEST, max(LOWEST, float(fired[n] / max(times[n], 1e-9))))
    length = np.zeros(n + 1, dtype=np.int64)
    for tokens, run in enumerate(positions.runs, 1):
        length[run] = tokens
    length[n] = 0
    parent = np.full(n, n)  # the longest chosen pattern that a candidate ends in
    free = np.ones(n, bool)
    order: list[int] = []
    chance = _smooth_chances(order, parent, length, times, fired, prior, mean)
    fits: list[Fit] = []
    for size in sizes:
        while len(order) < size:
            now = chance[parent]
            then = (fired[:n] + prior * now) / (times[:n] + prior)
            gain = fired[:n] * np.log(then / now) + (times[:n] - fired[:n]) * np.log((1 - then) / (1 - now))
            gain[~free] = -1.0
            best = int(gain.argmax()) if n else -1
            if best < 0 or gain[best] < least_gain:
                break
            order.append(best)
            free[best] = False
            # Its positions are taken from the pattern that had them, and from the free runs between the two.
            # Still shorter runs have lost them already.
            loser = int(parent[best])
            for other in {loser, *positions.shorter[:, best].tolist()} - {best}:
                if length[other] >= length[loser]:
                    times[other] -= times[best]
                    fired[other] -= fired[best]
            # The longer runs that end in it now compete with it.
            under = (positions.shorter == best).any(0) & (length[parent] < length[best])
            under[best] = False
            parent[under] = best
            chance = _smooth_chances(order, parent, length, times, fired, prior, mean)
        fits.append(Fit(list(order), chance, mean))
    return fits


def _smooth_chances(
    order: list[int], parent: Ints, length: Ints, times: Floats, fired: Floats, prior: float, mean: float
) -> Floats:
    """Return smoothed chances of the chosen patterns [C + 1], each towards that of the one it extends."""
    n = len(parent)
    chance = np.full(n + 1, mean)
    chance[n] = (fired[n] + prior * mean) / (times[n] + prior)
    chosen = np.array(order, dtype=np.int64)
    for tokens in range(1, LONGEST_RUN + 1):
        which = chosen[length[chosen] == tokens]
        chance[which] = (fired[which] + prior * chance[parent[which]]) / (times[which] + prior)
    return chance
