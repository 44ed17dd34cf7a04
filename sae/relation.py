"""What a latent is in another dictionary of the same activations, judged by where they fire.

A latent whose direction has no counterpart may be there all the same, in another shape. Let F be the tokens at which
it fires, and call a latent b of the other dictionary *inside* it when b fires less often, and at least half of the time
within F; *wider* when it fires more often, and at least five times as often within F as overall (what fires nearly
everywhere contains everything, and says nothing). In this order:

    same       b and it fire together on at least half of the tokens at which either does (Jaccard ≥ .5)
    split      two to four latents inside it cover at least .8 of F between them, each .05 or more beyond those before
    absorbed   a wider b covers at least half of F, and falls silent where one c inside it fires: c covers at least .7
               of what b leaves out (.05 of F or more), b fires on at most .3 of F ∩ c, and the two cover .8 of F
               (feature absorption, Chanin et al., arXiv 2409.14507)
    broader    one wider latent covers at least .8 of F
    new        none of these
    rare       it fires on fewer than 20 of the tokens: too few to say

Legend: M latents; C candidates, of which each token of F has a pattern: bit i says that candidate i fires there.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

RELATIONS = {
    "same": "fires where one latent there fires",
    "split": "is covered by several narrower latents there",
    "absorbed": "lies in a wider latent there, except where a narrower one fires",
    "broader": "lies in a wider latent there",
    "new": "has no counterpart there: none fires mostly where it does",
    "rare": "fires too rarely to tell",
}
NAMES = tuple(RELATIONS)
MEMBERS = 4
CANDIDATES = 12  # half of them inside, half wider: 4,096 patterns

SAME = 0.5
_INSIDE = 0.5
_LIFT = 5.0
_COVERED = 0.8
_ADDS = 0.05
_MOSTLY = 0.5
_LEFT_OUT = 0.7
_SILENT = 0.3
FEWEST = 20

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def candidates(
    touched: np.ndarray, together: np.ndarray, n: int, firings: np.ndarray, n_tokens: int, out: np.ndarray
) -> int:
    """Choose into ``out`` [C] the latents that fire most often with one of ``n`` firings: inside first, then wider.

    Args:
        touched: [any] latents that fire with it at all; ``together`` [M] on how many tokens.
        firings: [M] on how many of the ``n_tokens`` tokens each fires.
    Returns:
        how many were chosen.
    """
    size = 0
    for kind in range(2):
        first = size
        for b in touched:
            c = together[b]
            inside = firings[b] < n and c >= _INSIDE * firings[b]
            wider = firings[b] > n and c * float(n_tokens) >= _LIFT * firings[b] * float(n)
            if not (inside if kind == 0 else wider):
                continue
            at = size
            if size - first == len(out) // 2:
                last = out[size - 1]
                if c < together[last] or (c == together[last] and b > last):
                    continue
                at = size - 1
            else:
                size += 1
            while at > first and (together[out[at - 1]] < c or (together[out[at - 1]] == c and out[at - 1] > b)):
                out[at] = out[at - 1]
                at -= 1
            out[at] = b
    return size


@_compiled
def judge(
    patterns: np.ndarray, chosen: np.ndarray, n: int, firings: np.ndarray, members: np.ndarray
) -> tuple[int, Any]:
    """Whether the latent is split, absorbed, broader or new; ``same`` and ``rare`` are seen without patterns.

    Args:
        patterns: [2^C] on how many of its tokens just these candidates fire.
        chosen: [≤ C] the candidates; n: tokens at which it fires; firings: [M].
        members: [4] is given the latents that the answer rests on, -1 where there are fewer.
    Returns:
        the number of the relation in ``NAMES``, and the share of its tokens that the members cover.
    """
    members[:] = -1
    covers = np.zeros(len(chosen))
    for pattern in range(1 << len(chosen)):
        for i in range(len(chosen)):
            if (pattern >> i) & 1:
                covers[i] += patterns[pattern]
    inside = np.zeros(len(chosen), np.bool_)
    for i in range(len(chosen)):
        inside[i] = firings[chosen[i]] < n
    taken = 0
    covered = 0.0
    for step in range(MEMBERS):
        best, at = 0.0, -1
        for i in range(len(chosen)):
            if inside[i] and not (taken >> i) & 1:
                adds = _count(patterns, len(chosen), 1 << i, taken)
                if adds > best:
                    best, at = adds, i
        if at < 0 or best < _ADDS * n:
            break
        taken |= 1 << at
        covered += best
        members[step] = chosen[at]
        if step > 0 and covered >= _COVERED * n:
            return 1, covered / n
    members[:] = -1
    best, wide, narrow = 0.0, -1, -1
    for i in range(len(chosen)):
        left = n - covers[i]
        if inside[i] or covers[i] < _MOSTLY * n or left < _ADDS * n:
            continue
        for j in range(len(chosen)):
            if not inside[j]:
                continue
            adds = _count(patterns, len(chosen), 1 << j, 1 << i)
            both = covers[j] - adds
            if adds >= _LEFT_OUT * left and both <= _SILENT * covers[j] and covers[i] + adds > best:
                best, wide, narrow = covers[i] + adds, i, j
    if best >= _COVERED * n:
        members[0], members[1] = chosen[wide], chosen[narrow]
        return 2, best / n
    best, wide = 0.0, -1
    for i in range(len(chosen)):
        if not inside[i] and covers[i] > best:
            best, wide = covers[i], i
    if best >= _COVERED * n:
        members[0] = chosen[wide]
        return 3, best / n
    return 4, best / n


@_compiled
def _count(patterns: np.ndarray, size: int, holding: int, without: int) -> float:
    """On how many tokens a candidate of ``holding`` fires, and none of ``without``."""
    total = 0.0
    for pattern in range(1 << size):
        if pattern & holding and not pattern & without:
            total += patterns[pattern]
    return total
