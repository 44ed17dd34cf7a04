"""Counting runs of tokens where a latent fires and where it does not, and the greedy search over them.

A run of tokens competes with the shorter runs that it ends in: at each position the longest *chosen* run decides. The
search keeps, for every candidate, the positions and firings that it would have if it were chosen next, so that adding
a pattern costs a few operations over the candidates and none over the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autointerp.explaining.patterns import HIGHEST, LONGEST_RUN, LOWEST

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Positions:
    """Every token of the explaining contexts and of the background, laid end to end.

    P positions, C candidate runs, N contexts (those in which the latent fires come first).
    """

    context: Ints
    """[P] which context the token stands in; ascending."""
    fires: Floats
    """[P] 1 where the latent fires, else 0."""
    runs: Ints
    """[LONGEST_RUN, P] the candidate of one, two, three tokens that ends at the token; C where there is none."""
    texts: list[str]
    """[C] the candidates written out; no text twice."""
    shorter: Ints
    """[LONGEST_RUN, C] the candidates of one, two, three tokens that a candidate ends in, itself included; else C."""
    context_weight: Floats
    """[N] 1 for an activating context; for a silent one what makes both kinds weigh alike in sum."""

    @classmethod
    def of(cls, contexts: Sequence[Context], background: Sequence[Context]) -> Positions:
        """``contexts`` are those in which the latent fires. Of ``background`` only the tokens are read."""
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
        runs, texts = _candidates(tokens, context, context < len(contexts), list(number))
        shorter = np.full((LONGEST_RUN, len(texts) + 1), len(texts), dtype=np.int64)
        for length in range(LONGEST_RUN):
            shorter[: length + 1, runs[length]] = runs[: length + 1]
        return cls(context, fires, runs, texts, shorter[:, : len(texts)], weight)

    def within(self, kept: Bools) -> Positions:
        """Only the positions in the contexts ``kept`` [N]; candidates and contexts keep their numbers."""
        at = kept[self.context]
        return Positions(
            self.context[at], self.fires[at], self.runs[:, at], self.texts, self.shorter, self.context_weight
        )


def _candidates(tokens: Ints, context: Ints, inside: Bools, words: list[str]) -> tuple[Ints, list[str]]:
    """The runs that may become patterns, as :attr:`Positions.runs` and :attr:`Positions.texts`.

    Every token that occurs ``inside`` an activating context [P], and every longer run that occurs there twice: one
    seen once says nothing that its last token does not.
    """
    n = len(tokens)
    texts: list[str] = []
    known: set[str] = set()
    runs = np.full((LONGEST_RUN, n), -1, dtype=np.int64)
    key = tokens
    for length in range(1, LONGEST_RUN + 1):
        if length > 1:
            # A longer run is the run of one token less that ends here, with the token before that.
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
            if text not in known:  # the same text may be cut into tokens in two ways: the shorter run has it
                known.add(text)
                index[value] = len(texts)
                texts.append(text)
        runs[length - 1] = index[place]
        key = np.where(((values >= 0) & (times >= 2))[place], place, -1)
    return np.where(runs < 0, len(texts), runs), texts


class Fit(NamedTuple):
    """The chances that go with a set of patterns."""

    order: list[int]
    """The chosen candidates, the most telling first."""
    chance: Floats
    """[C + 1] by candidate; only those of the chosen are of use. Last: of a position where none of them ends."""
    mean: float
    """The chance at an average position."""

    @property
    def other(self) -> float:
        return float(self.chance[-1])

    def intensity(self, positions: Positions) -> Floats:
        """[N] -log(1 - P(active)) of each context by noisy-or, counting the given positions."""
        n = len(positions.texts)
        chosen = np.zeros(n + 1, bool)
        chosen[self.order] = True
        holds = np.full(positions.runs.shape[1], n)
        for run in positions.runs:
            holds = np.where(chosen[run], run, holds)
        cost = -np.log1p(-np.minimum(self.chance, HIGHEST))
        return np.bincount(positions.context, cost[holds], len(positions.context_weight)).astype(np.float64)


def search(
    positions: Positions, context_weight: Floats, sizes: Sequence[int], prior: float, least_gain: float
) -> list[Fit]:
    """Add patterns greedily, and fit the chances at each of ``sizes`` (ascending) patterns.

    Args:
        context_weight: [N] what a position in each context counts; 0 leaves the context out.
        sizes: where fewer patterns gain enough, the fit is of those there are.
        prior: strength of the prior, in units of weight.
        least_gain: nats that a pattern must gain.
    """
    n = len(positions.texts)
    weight = context_weight[positions.context]
    hits = weight * positions.fires
    times, fired = np.zeros(n + 1), np.zeros(n + 1)
    for run in positions.runs:
        times += np.bincount(run, weight, n + 1)
        fired += np.bincount(run, hits, n + 1)
    # Number n stands for "no pattern": so far every position is its.
    times[n], fired[n] = weight.sum(), hits.sum()
    mean = min(HIGHEST, max(LOWEST, float(fired[n] / max(times[n], 1e-9))))
    length = np.zeros(n + 1, dtype=np.int64)
    for tokens, run in enumerate(positions.runs, 1):
        length[run] = tokens
    length[n] = 0
    parent = np.full(n, n)  # the longest chosen pattern that a candidate ends in
    free = np.ones(n, bool)
    order: list[int] = []
    chance = _chances(order, parent, length, times, fired, prior, mean)
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
            # Its positions are no longer those of the pattern they come from, nor of the free runs between the two.
            # Runs shorter still have lost them already.
            loser = int(parent[best])
            for other in {loser, *positions.shorter[:, best].tolist()} - {best}:
                if length[other] >= length[loser]:
                    times[other] -= times[best]
                    fired[other] -= fired[best]
            # The longer runs that end in it now have it to compete with.
            under = (positions.shorter == best).any(0) & (length[parent] < length[best])
            under[best] = False
            parent[under] = best
            chance = _chances(order, parent, length, times, fired, prior, mean)
        fits.append(Fit(list(order), chance, mean))
    return fits


def _chances(
    order: list[int], parent: Ints, length: Ints, times: Floats, fired: Floats, prior: float, mean: float
) -> Floats:
    """[C + 1] smoothed chances of the chosen patterns, each towards that of the one it extends."""
    n = len(parent)
    chance = np.full(n + 1, mean)
    chance[n] = (fired[n] + prior * mean) / (times[n] + prior)
    chosen = np.array(order, dtype=np.int64)
    for tokens in range(1, LONGEST_RUN + 1):
        which = chosen[length[chosen] == tokens]
        chance[which] = (fired[which] + prior * chance[parent[which]]) / (times[which] + prior)
    return chance
