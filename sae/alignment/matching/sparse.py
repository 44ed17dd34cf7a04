"""The best one-to-one matching along the edges of a sparse graph, exact, with the prices that prove it.

Rows choose among their own edges only. For n rows, m ≥ n columns and weights c, the matching with the largest sum and
its prices solve

    max Σ c[i, p(i)]   and   min Σ_i u[i] + Σ_j v[j]   with u[i] + v[j] ≥ c[i, j], v ≥ 0, v[j] = 0 where j is left over,

and at the optimum both are the same number. Two steps lead there:

1. *An auction with scaled increments* (Bertsekas 1988). A row without a column bids for the one that profits it most,
   raising its price until the row would as soon take its second choice, and ε more; who held the column has to bid
   again. With ε falling from a hundredth to a millionth, nearly all of the competition is settled in time that grows
   with the number of edges. What comes out is nearly optimal prices; the matching itself is thrown away where it is
   not exactly a row's first choice.
2. *Shortest augmenting paths* (Jonker & Volgenant 1987). Every row left without a column searches, by Dijkstra's method
   over the slacks u[i] + v[j] - c[i, j], for the cheapest chain of exchanges that ends in a free column; the prices
   move with it. This step is exact from any prices. After an auction its chains are short, since they run along edges
   whose slack is below ε.

Left-over columns are held by *spare* rows, m - n of them, whose weight is 0 everywhere. They are all alike and take
part in the searches as a single node, which knows every column. That keeps v at 0 for what is left over even when the
search starts from prices of an earlier, smaller graph (a warm start).

Shapes: n rows, m columns, E edges in compressed rows: ``starts`` [n+1], ``columns`` [E], ``weights`` [E].
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")  # no fast-math: slacks must be what they are

FREE = -1
_SPARE = -2
_TIGHT = 1e-14  # slack that rounding alone explains
_EPSILONS = (1e-2, 2e-3, 4e-4, 8e-5, 1.6e-5, 3e-6, 6e-7)
_BIDS = 60  # per row and ε at most: if prices creep (few columns, many rows alike), paths are the better method
_ALONE = 2.0  # a row with a single edge bids as if its second choice were this much worse


class Graph(NamedTuple):
    starts: NDArray[np.int64]
    """[n+1]: row i has the edges ``starts[i]:starts[i+1]``, at least one"""
    columns: Ints
    """[E]"""
    weights: Floats
    """[E]"""


class Solution(NamedTuple):
    partner: Ints
    """[n]: the column of each row"""
    u: Floats
    """[n]: what each row gains after paying for its column"""
    v: Floats
    """[m]: the column's price, zero or more, and 0 where the column is left over"""


def solve(graph: Graph, m: int, warm: Solution | None = None) -> Solution:
    """The best matching of all rows of ``graph`` to ``m`` columns, exact up to float64 rounding.

    With ``warm``, the solution for a graph with fewer edges, only what no longer holds is mended.

    Raises:
        ValueError: the edges admit no matching of all rows.
    """
    n = len(graph.starts) - 1
    owner = np.full(m, FREE, np.int32)
    partner = np.full(n, FREE, np.int32)
    if warm is not None:
        v = warm.v.copy()
        partner[:] = warm.partner
        owner[partner] = np.arange(n, dtype=np.int32)
    else:
        v = np.zeros(m)
        # Where columns are left over their price must come out as 0, so prices may not be raised in vain at the start.
        for epsilon in _EPSILONS if n == m else _EPSILONS[2:3]:
            _auction(*graph, v, owner, partner, epsilon, _BIDS * n)
    u = np.empty(n)
    if not _augment(*graph, u, v, owner, partner, m - n):
        raise ValueError("the edges admit no matching of all rows")
    # All prices may be moved together, against the rows' gains, as long as spare rows come out with exactly 0.
    v -= v.min()
    v[owner == _SPARE] = 0  # as they are but for rounding
    _gains(*graph, v, u)
    return Solution(partner, u, v)


@_compiled
def greedy(rows: np.ndarray, columns: np.ndarray, order: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows and columns along edges in this order, each once: partners [n], -1 for none, and what is free [m]."""
    partner, free = np.full(n, FREE, np.int32), np.ones(m, np.bool_)
    for e in order:
        i, j = rows[e], columns[e]
        if partner[i] < 0 and free[j]:
            partner[i], free[j] = j, False
    return partner, free


@_compiled
def _gains(starts: np.ndarray, columns: np.ndarray, weights: np.ndarray, v: np.ndarray, u: np.ndarray) -> None:
    """``u[i] = max_j (c[i, j] - v[j])``."""
    for i in range(len(u)):
        best = -np.inf
        for e in range(starts[i], starts[i + 1]):
            best = max(best, weights[e] - v[columns[e]])
        u[i] = best


@_compiled
def _auction(
    starts: np.ndarray,
    columns: np.ndarray,
    weights: np.ndarray,
    v: np.ndarray,
    owner: np.ndarray,
    partner: np.ndarray,
    epsilon: float,
    bids: int,
) -> None:
    """Bid until every row has a column that is within ``epsilon`` of its first choice, or ``bids`` are spent."""
    n = len(partner)
    waiting = np.empty(n, np.int32)
    size = 0
    for i in range(n - 1, -1, -1):
        j = partner[i]
        if j >= 0:
            best, own = -np.inf, -np.inf
            for e in range(starts[i], starts[i + 1]):
                profit = weights[e] - v[columns[e]]
                best = max(best, profit)
                if columns[e] == j:
                    own = profit
            if own >= best - epsilon:
                continue
            partner[i] = FREE
            owner[j] = FREE
        waiting[size] = i
        size += 1
    while size > 0 and bids > 0:
        bids -= 1
        size -= 1
        i = waiting[size]
        best, second, at = -np.inf, -np.inf, -1
        for e in range(starts[i], starts[i + 1]):
            profit = weights[e] - v[columns[e]]
            if profit > best:
                best, second, at = profit, best, columns[e]
            elif profit > second:
                second = profit
        if at < 0:
            continue  # no profit is a number: this row cannot bid
        if second == -np.inf:
            second = best - _ALONE
        v[at] += best - second + epsilon
        before = owner[at]
        owner[at] = i
        partner[i] = at
        if before >= 0:
            partner[before] = FREE
            waiting[size] = before
            size += 1


@_compiled
def _lift(heap: np.ndarray, place: np.ndarray, dist: np.ndarray, at: int) -> None:
    """Move the column at heap position ``at`` towards the root until its parent is no farther (ties: lower number)."""
    j = heap[at]
    while at > 0:
        above = (at - 1) >> 1
        k = heap[above]
        if dist[k] < dist[j] or (dist[k] == dist[j] and k < j):
            break
        heap[at] = k
        place[k] = at
        at = above
    heap[at] = j
    place[j] = at


@_compiled
def _take(heap: np.ndarray, place: np.ndarray, dist: np.ndarray, size: int) -> int:
    """Remove and return the nearest column; ``size`` is the heap's size before."""
    first = heap[0]
    place[first] = -1
    size -= 1
    if size > 0:
        j = heap[size]
        at = 0
        while True:
            child = 2 * at + 1
            if child >= size:
                break
            k = heap[child]
            if child + 1 < size:
                other = heap[child + 1]
                if dist[other] < dist[k] or (dist[other] == dist[k] and other < k):
                    child += 1
                    k = other
            if dist[j] < dist[k] or (dist[j] == dist[k] and j < k):
                break
            heap[at] = k
            place[k] = at
            at = child
        heap[at] = j
        place[j] = at
    return int(first)


@_compiled
def _settle(
    starts: np.ndarray,
    columns: np.ndarray,
    weights: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    owner: np.ndarray,
    partner: np.ndarray,
    spares: int,
) -> tuple[float, int]:
    """Keep of a matching what is exactly first choice, add what can be had at no slack.

    Returns the spare rows' common gain, and how many of them hold no column yet.
    """
    n, m = len(u), len(v)
    for i in range(n):
        j = partner[i]
        best, own = -np.inf, -np.inf
        for e in range(starts[i], starts[i + 1]):
            profit = weights[e] - v[columns[e]]
            best = max(best, profit)
            if columns[e] == j:
                own = profit
        u[i] = best
        if j >= 0 and own < best - _TIGHT:
            partner[i] = FREE
            owner[j] = FREE
    for i in range(n):
        if partner[i] == FREE:
            for e in range(starts[i], starts[i + 1]):
                j = columns[e]
                if owner[j] == FREE and weights[e] - v[j] >= u[i] - _TIGHT:
                    partner[i] = j
                    owner[j] = i
                    break
    least = np.inf
    for j in range(m):
        least = min(least, v[j])
    for j in range(m):
        if spares > 0 and owner[j] == FREE and v[j] == least:
            owner[j] = _SPARE
            spares -= 1
    return -least, spares


@_compiled
def _augment(
    starts: np.ndarray,
    columns: np.ndarray,
    weights: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    owner: np.ndarray,
    partner: np.ndarray,
    spares: int,
) -> bool:
    """Match every row, and ``spares`` more that weigh 0 everywhere, by shortest augmenting paths.

    ``v`` [m], ``owner`` [m] and ``partner`` [n] come in as any prices and any matching, and go out as the optimal ones;
    ``u`` [n] is written. Returns False where the edges do not suffice.

    From a row that has no column, ``dist[j]`` is the least sum of slacks of a chain row → column → that column's row →
    … → j. When the nearest free column is at distance ``best``, every column nearer than that gains ``best - dist`` in
    price and its row loses as much: slacks stay at zero or more, and those along the chain become zero.
    """
    n, m = len(u), len(v)
    spare_gain, lacking = _settle(starts, columns, weights, u, v, owner, partner, spares)
    dist, before = np.full(m, np.inf), np.empty(m, np.int32)
    heap, place = np.empty(m, np.int32), np.full(m, -1, np.int32)
    seen, near = np.empty(m, np.int32), np.empty(m, np.int32)
    for source in range(n + lacking):
        if source < n and partner[source] != FREE:
            continue
        root = source if source < n else _SPARE
        row, base = root, 0.0
        n_seen, n_near, size = 0, 0, 0
        best, end = np.inf, -1
        spare_at, spare_from, last = np.inf, -1, -1
        while True:
            if row == _SPARE:
                # They know every column. Once is enough: the columns they hold all lead back here.
                if spare_at == np.inf:
                    spare_at, spare_from = base, last
                    for j in range(m):
                        d = base + max(0.0, spare_gain + v[j])
                        if d < best and d < dist[j] and owner[j] != _SPARE:
                            if dist[j] == np.inf:
                                seen[n_seen] = j
                                n_seen += 1
                            dist[j] = d
                            before[j] = _SPARE
                            if owner[j] == FREE:
                                best, end = d, j
                            else:
                                if place[j] < 0:
                                    place[j] = size
                                    heap[size] = j
                                    size += 1
                                _lift(heap, place, dist, place[j])
            else:
                gain = u[row]
                for e in range(starts[row], starts[row + 1]):
                    j = columns[e]
                    d = base + max(0.0, gain - weights[e] + v[j])
                    if d < best and d < dist[j]:
                        if dist[j] == np.inf:
                            seen[n_seen] = j
                            n_seen += 1
                        dist[j] = d
                        before[j] = row
                        if owner[j] == FREE:
                            best, end = d, j
                        else:
                            if place[j] < 0:
                                place[j] = size
                                heap[size] = j
                                size += 1
                            _lift(heap, place, dist, place[j])
            if size == 0 or dist[heap[0]] >= best:
                break
            last = _take(heap, place, dist, size)
            size -= 1
            near[n_near] = last
            n_near += 1
            base = dist[last]
            row = owner[last]
        if end < 0:
            return False
        for x in range(n_near):
            j = near[x]
            if owner[j] >= 0:
                u[owner[j]] -= best - dist[j]
                v[j] += best - dist[j]
        if root >= 0:
            u[root] -= best
        if spare_at < best:
            spare_gain -= best - spare_at
            for j in range(m):
                if owner[j] == _SPARE:
                    v[j] += best - spare_at
        j = end
        while True:
            row = before[j]
            if row == _SPARE:
                owner[j] = _SPARE
                if spare_from < 0:
                    break
                j = spare_from
            else:
                owner[j] = row
                following = partner[row]
                partner[row] = j
                if row == root:
                    break
                j = following
        for x in range(n_seen):
            dist[seen[x]] = np.inf
            place[seen[x]] = -1
    return True
