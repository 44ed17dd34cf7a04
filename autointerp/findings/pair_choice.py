"""Which pairs of two runs a terminal shows: all are too many to read, and the most alike alone would flatter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Sort = Literal["similarity", "score", "gap", "firing"]
Sharing = Literal["any", "shared", "unshared"]
Pair = Mapping[str, Any]
SHOWN = 8


@dataclass(frozen=True)
class PairChoice:
    """``n`` pairs in the order of ``sort``; without one, spread evenly over similarity.

    ``sharing`` keeps the pairs that are shared, or those that are not, under the comparison's definition.
    """

    n: int = SHOWN
    sort: Sort | None = None
    sharing: Sharing = "any"


def _similarity(pair: Pair) -> float | None:
    return pair["similarity"]


def _score(pair: Pair) -> float | None:
    """The mean of the two scores."""
    values = [side["score"]["value"] for side in pair["sides"] if side["score"] is not None]
    return sum(values) / 2 if len(values) == 2 else None


def _gap(pair: Pair) -> float | None:
    return None if pair["score_gap"] is None else abs(pair["score_gap"])


def _firing(pair: Pair) -> float | None:
    """The frequency of the one that fires less."""
    known = [side["firing_frequency"] for side in pair["sides"] if side["firing_frequency"] is not None]
    return min(known) if len(known) == 2 else None


_ORDERS: dict[str, tuple[Callable[[Pair], float | None], str]] = {
    "similarity": (_similarity, "the most alike first"),
    "score": (_score, "the best scored first (mean of both)"),
    "gap": (_gap, "those first whose scores differ most"),
    "firing": (_firing, "the most frequent first (the rarer of the two counts)"),
}
_BY_SCORES = ("score", "gap")


def chosen(pairs: Sequence[Pair], choice: PairChoice) -> dict[str, Any]:
    """The pairs to show, in order; ``n_of`` how many they are out of, and ``says``, in words which they are.

    They are among those that are explained on both sides, where there are any; else among those that are on one; else
    among all whose two latents fire. In an order by scores, among those that are scored on both sides.
    """
    kept = [pair for pair in pairs if choice.sharing == "any" or pair["is_shared"] == (choice.sharing == "shared")]
    kept, among = _among(kept, choice)
    order, how = _ORDERS[choice.sort or "similarity"]
    ranked = sorted(kept, key=lambda pair: (-_or_least(order(pair)), pair["latent"]))
    if choice.sort is None:
        n = min(choice.n, len(ranked))
        shown = [ranked[i] for i in sorted({round(x) for x in np.linspace(0, len(ranked) - 1, n)})] if n else []
        how = "evenly spread from the most alike to the least alike"
    else:
        shown = ranked[: choice.n]
    kind = "" if choice.sharing == "any" else f"{choice.sharing} "
    which = f"{len(shown):,} of the {len(kept):,} {kind}pairs {among}"
    says = f"{which}, {how}" if shown else f"There are no {kind}pairs {among}"
    return {"n_of": len(kept), "says": f"{says}.", "latents": [pair["latent"] for pair in shown], "pairs": shown}


def _among(pairs: list[Pair], choice: PairChoice) -> tuple[list[Pair], str]:
    """The pairs that can be shown, and what they have in common."""
    if choice.sort in _BY_SCORES:
        return [pair for pair in pairs if pair["score_gap"] is not None], "that are scored on both sides"
    for n, words in ((2, "that are explained on both sides"), (1, "that are explained on one side")):
        found = [pair for pair in pairs if sum(side["explanation"] is not None for side in pair["sides"]) == n]
        if found:
            return found, words
    return [pair for pair in pairs if all(side["alive"] for side in pair["sides"])], "of latents that both fire"


def _or_least(value: float | None) -> float:
    return -math.inf if value is None else value
