"""Find the best one-to-one matching of two dictionaries over *all* pairs, without the matrix of pairs.

    candidates ──► exact matching among them, with prices ──► other pairs that exceed their prices? ──► none: done
        ▲                                                                      │
        └────────────────────────────── they become candidates ◄───────────────┘

For any prices u on rows and v on columns, v ≥ 0 and zero for columns left over, no matching can sum to more than

    Σ_i u[i] + Σ_j v[j] + Σ_i max_j (c[i, j] - u[i] - v[j])⁺ + rounding.

With the prices of the matching among the candidates, the first two terms are its own sum; the third is zero once no
pair exceeds its prices. So the check finds missed pairs and finally proves that none is left.

Checking all pairs costs a product of the dictionaries, nearly all of the time, and is mostly not needed: the first pass
bounds every other pair by the k-th nearest of its row and of its column (``sae.alignment.matching.candidates.Known``).
Only few rows and columns with low prices on both sides remain, and later products are of those alone.

Rows of zeros have cosine 0 with every column. They get the columns left over at the end.

Shapes: n rows, m columns, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import fsum
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from sae.alignment.matching.candidates import TOLERANCE, Pairs, find_violations, join, shortlist
from sae.alignment.matching.directions import Directions, Floats, Screen, compute_cosines, plain_products
from sae.alignment.matching.sparse import Solution, build_graph, match_greedily, solve
from sae.common.precision import resolve_float

Ints = NDArray[np.int32]

NEAREST = 24  # of each row and of each column: in random dictionaries prices reach down to about the 2 ln M-th nearest
_MOST = 64  # new candidates of a row at a time, four times as many whenever that was not enough
_MOST_AT_ALL = 256  # the limit, so that thousands of nearly equal latents are not all candidates of all
# Pairs this near to their prices become candidates too; half as near each round. Where prices fell by less than half
# of it, the known bounds suffice without a product.
_NEAR = 2e-3
_ROUNDS = 200
_ROWS = 1024
_EQUAL = 1e-12  # cosines that differ by less count as equal: the nearest must not depend on rounding


@dataclass(frozen=True)
class Nearest:
    """The nearest latent of the other dictionary, matched or not; the lowest number among equals."""

    who: NDArray[np.int32]
    cosine: Floats


@dataclass(frozen=True)
class Matching:
    """The matching, the prices that prove it, and the nearest of all rows and columns."""

    partner: NDArray[np.int32]  # [n]: the column of each row
    cosine: Floats  # [n]
    u: Floats  # [n]: the gain of each row after paying for its column
    v: Floats  # [m]: prices, zero or more, zero for columns left over
    sum: float
    upper_bound: float  # no matching sums to more
    nearest: tuple[Nearest, Nearest]  # of each row [n], of each column [m]
    rounds: int  # how often prices were checked for violations
    share_of_pairs: float  # the number of products formed, in multiples of n × m
    candidates: int  # pairs that the exact matching chose from

    @property
    def gap(self) -> float:
        """How far the sum can be below the best."""
        return self.upper_bound - self.sum


def find_best_matching(
    rows: ArrayLike,
    columns: ArrayLike,
    *,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    device: torch.device | str = "cpu",
    nearest: int = NEAREST,
) -> Matching:
    """Match every row of ``rows`` [n, D] to one of ``columns`` [m, D], n ≤ m, by the largest sum of cosines.

    Memory holds the rounded copies, a tile of products and some hundred bytes for each candidate.

    Args:
        rows, columns: of any length, finite; types other than float32 and float64 are converted to float32.
        precision: of the products that screen all pairs; it can change which of equally good matchings results.
        nearest: each row's and column's first candidates; affects time only.
    """
    a, b = Directions.of(rows), Directions.of(columns)
    if len(a) > len(b):
        raise ValueError(f"{len(a)} rows do not fit {len(b)} columns: exchange them")
    empty_a, empty_b = (int((side.inverse == 0).sum()) for side in (a, b))
    if len(a) == len(b) and empty_b > empty_a:  # rows of zeros are set aside in `a` only
        return _exchanged(_search(b, a, precision, device, nearest))
    return _search(a, b, precision, device, nearest)


def _search(
    all_rows: Directions,
    b: Directions,
    precision: Literal["auto", "float32", "bfloat16"],
    device: torch.device | str,
    k: int,
) -> Matching:
    n, m = len(all_rows), len(b)
    alive = np.flatnonzero(all_rows.inverse > 0)
    a = all_rows if len(alive) == n else Directions(all_rows.rows[alive], all_rows.inverse[alive])
    pairs, bounds = join([]), (np.full(n, -np.inf), np.full(m, -np.inf))
    solution = Solution(np.empty(0, np.int32), np.empty(0), np.zeros(m))
    excess, rounds, formed, total = np.zeros(0), 0, 0, 0
    if len(a):
        with plain_products():
            kind = resolve_float(precision, device)
            screens = Screen.of(a, kind, device), Screen.of(b, kind, device)
            i, j, known = shortlist(*screens, min(k, m))
            pairs = Pairs(i, j, compute_cosines(a, b, i, j))
            bounds[0][alive], bounds[1][:] = known.row, known.column
            edges = join([pairs, _fallback(a, b, pairs)])
            warm, most, near = None, np.full(len(a), _MOST), _NEAR
            formed = len(a) * m
            while True:
                graph = build_graph(*edges, len(a), m)
                solution = warm = solve(graph, m, warm)
                new, excess, asked = find_violations(a, b, screens, solution.u, solution.v, known, most, near)
                rounds, formed = rounds + 1, formed + asked
                if not excess.any() or rounds == _ROUNDS:
                    break
                short = (excess > 0) & (known.u > solution.u + TOLERANCE)  # dropped pairs may exceed too
                most[short] = np.minimum(4 * most[short], _MOST_AT_ALL)
                near /= 2
                edges = join([edges, new])
            total = len(graph.columns)
    rows, some = alive[pairs.rows], len(a) < n
    nearest = (
        _nearest(all_rows, b, rows, pairs.columns, pairs.cosines, bounds[0], False),
        _nearest(b, all_rows, pairs.columns.astype(np.int64), rows.astype(np.int32), pairs.cosines, bounds[1], some),
    )
    partner, u = _match_empty_rows(n, alive, solution)
    own = compute_cosines(all_rows, b, np.arange(n, dtype=np.int32), partner)
    # Per pair: the tolerance of each round, since a round builds on the bounds of earlier ones; and float64's error in
    # a cosine of D terms, in u and in v.
    rounding = n * (rounds * TOLERANCE + (a.rows.shape[1] + 16) * 2.0**-52)
    bound = fsum(u) + fsum(solution.v) + fsum(excess) + rounding
    return Matching(partner, own, u, solution.v, fsum(own), bound, nearest, rounds, formed / (n * m), total)


def _match_empty_rows(n: int, alive: NDArray[np.int64], solution: Solution) -> tuple[Ints, Floats]:
    """Return partner and gain of all ``n`` rows, where only those ``alive`` have been matched."""
    partner, u = np.full(n, -1, np.int32), np.zeros(n)
    partner[alive], u[alive] = solution.partner, solution.u
    free = np.ones(len(solution.v), dtype=bool)
    free[solution.partner] = False
    empty = np.flatnonzero(partner < 0)
    partner[empty] = np.flatnonzero(free)[: len(empty)]
    u[empty] = -solution.v.min()
    return partner, u


def _exchanged(found: Matching) -> Matching:
    """Return a square matching as seen from its columns. Prices v must be zero or more; gains u may be anything."""
    partner = np.argsort(found.partner).astype(np.int32)
    least = found.u.min()
    return replace(
        found,
        partner=partner,
        cosine=found.cosine[partner],
        u=found.v + least,
        v=found.u - least,
        nearest=found.nearest[::-1],
    )


def _fallback(a: Directions, b: Directions, pairs: Pairs) -> Pairs:
    """Return pairs that complete a greedy matching of all rows, so that the candidates admit one."""
    partner, free = match_greedily(pairs.rows, pairs.columns, np.argsort(-pairs.cosines, kind="stable"), len(a), len(b))
    left = np.flatnonzero(partner < 0).astype(np.int32)
    spare = np.flatnonzero(free).astype(np.int32)[: len(left)]
    return Pairs(left, spare, compute_cosines(a, b, left, spare))


def _nearest(
    a: Directions, b: Directions, i: NDArray[np.int64], j: Ints, cosine: Floats, bound: Floats, zeros: bool
) -> Nearest:
    """Return the nearest of ``b`` [m, D] to each of ``a`` [n, D], from candidates (i, j) and the others' ``bound`` [n].

    Rows that the candidates do not settle (ties, or too near to the bound) are computed in full. ``zeros``: ``b`` has
    rows of zeros, which are not candidates.
    """
    n = len(a)
    who, best = np.zeros(n, np.int32), np.full(n, -np.inf)
    np.maximum.at(best, i, cosine)
    winners = np.flatnonzero(cosine >= best[i] - _EQUAL)[::-1]
    order = winners[np.argsort(-j[winners], kind="stable")]
    who[i[order]] = j[order]  # the last one written is the lowest
    doubt = ~(best > bound + 2 * _EQUAL) | (zeros & (best <= 0))
    empty = a.inverse == 0
    who[empty], best[empty] = 0, 0.0
    rows = np.flatnonzero(doubt & ~empty)
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        best[some] = -np.inf
        for left in range(0, len(b), 4 * _ROWS):
            block = a.unit(some) @ b.unit(slice(left, left + 4 * _ROWS)).T
            value = block.max(axis=1)
            at = (block >= value[:, None] - _EQUAL).argmax(axis=1)
            better = value > best[some] + _EQUAL
            who[some[better]], best[some[better]] = at[better] + left, value[better]
    return Nearest(who, best)
