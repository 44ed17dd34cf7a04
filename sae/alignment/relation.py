"""Find the counterpart of a latent in another dictionary of the same activations, by where latents fire.

Let F be the tokens at which a latent fires. Latents of the other dictionary count only if they fire at least five times
as often within F as overall. Such a latent is *inside* F if it fires no more often than the latent and at least half of
the time within F; *wider* if it fires more often. The first that applies:

    same       b and it fire together on at least half of the tokens at which either does (Jaccard J ≥ .5), and as far
               above chance: (J - J₀) / (1 - J₀) ≥ .5
    split      two to four latents inside F cover at least .8 of it together, each adding .05 or more (greedily, the
               one that adds most first)
    absorbed   a wider b covers at least half of F, and is silent where one c inside F fires: c covers at least .7 of
               the rest of F (.05 of F or more), b fires on at most .3 of F ∩ c, and the two cover .8 of F (feature
               absorption, Chanin et al., arXiv 2409.14507). The eight wider latents that cover the most are tried.
    broader    one wider latent covers at least .8 of F
    new        none of these
    rare       it fires on fewer than 20 of the tokens: too few to decide

Legend: n the size of F, t latents of the other dictionary that fire on F at all.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

RELATIONS = {
    "same": "fires where one latent there fires",
    "split": "is covered by several narrower latents there",
    "absorbed": "lies in a wider latent there, with a hole where a narrower one fires",
    "broader": "lies in a wider latent there",
    "new": "has no counterpart there: none fires mostly where it does",
    "rare": "fires too rarely to tell",
}
NAMES = tuple(RELATIONS)
MEMBERS = 4

_SAME = 0.5
_INSIDE = 0.5
_LIFT = 5.0
_COVERED = 0.8
_ADDS = 0.05
_MOSTLY = 0.5
_LEFT_OUT = 0.7
_SILENT = 0.3
_WIDEST = 8
_FEWEST = 20

Ints = npt.NDArray[np.int64]


class Tokens(Protocol):
    """The tokens of F, some of which are taken (:class:`sae.alignment.cofiring.FiringTokens`)."""

    def reset(self) -> None: ...
    def take(self, i: int) -> None: ...
    def count_left(self) -> Ints: ...


def find_relation(together: Ints, firings: Ints, n: int, n_tokens: int, tokens: Tokens) -> tuple[int, list[int], float]:
    """Return the relation of a latent that fires on n tokens to the t latents of the other dictionary that fire there.

    ``together`` and ``firings`` [t] count the tokens of F, and of all ``n_tokens``, at which each fires. Returns the
    relation's number in ``NAMES``, the latents (of the t) that it rests on, and the share of F they cover, or NaN.
    """
    if n < _FEWEST:
        return NAMES.index("rare"), [], float("nan")
    if len(together):
        jaccard = together / (n + firings - together)
        expected = firings * (n / n_tokens)
        by_chance = expected / (n + firings - expected)
        near = int(jaccard.argmax())
        if jaccard[near] >= _SAME and jaccard[near] - by_chance[near] >= _SAME * (1 - by_chance[near]):
            return NAMES.index("same"), [near], float(together[near] / n)
    lifted = together * float(n_tokens) >= _LIFT * firings * float(n)
    inside = lifted & (firings <= n) & (together >= _INSIDE * firings)
    wider = np.flatnonzero(lifted & (firings > n))
    wider = wider[np.argsort(-together[wider], kind="stable")]
    found = _split(together, inside, n, tokens) or _absorbed(together, inside, wider, n, tokens)
    if found is not None:
        return found
    if len(wider) and together[wider[0]] >= _COVERED * n:
        return NAMES.index("broader"), [int(wider[0])], float(together[wider[0]] / n)
    return NAMES.index("new"), [], float("nan")


def _split(
    together: Ints, inside: npt.NDArray[np.bool_], n: int, tokens: Tokens
) -> tuple[int, list[int], float] | None:
    if np.sort(together[inside])[-MEMBERS:].sum() < _COVERED * n:
        return None
    tokens.reset()
    members: list[int] = []
    covered = 0
    while len(members) < MEMBERS:
        adds = np.where(inside, tokens.count_left(), -1)
        best = int(adds.argmax())
        if adds[best] < _ADDS * n:
            return None
        tokens.take(best)
        members.append(best)
        covered += int(adds[best])
        if len(members) > 1 and covered >= _COVERED * n:
            return NAMES.index("split"), members, covered / n
    return None


def _absorbed(
    together: Ints, inside: npt.NDArray[np.bool_], wider: npt.NDArray[np.int64], n: int, tokens: Tokens
) -> tuple[int, list[int], float] | None:
    if not inside.any():
        return None
    best: tuple[int, list[int], float] | None = None
    partly = wider[(together[wider] >= _MOSTLY * n) & (n - together[wider] >= _ADDS * n)]
    for wide in partly[:_WIDEST]:
        if together[wide] + together[inside].max() < _COVERED * n:
            continue
        tokens.reset()
        tokens.take(int(wide))
        left = tokens.count_left()
        fits = inside & (left >= _LEFT_OUT * (n - together[wide])) & (together - left <= _SILENT * together)
        covered = np.where(fits, left + together[wide], 0)
        narrow = int(covered.argmax())
        if covered[narrow] >= _COVERED * n and (best is None or covered[narrow] / n > best[2]):
            best = NAMES.index("absorbed"), [int(wide), narrow], float(covered[narrow] / n)
    return best
