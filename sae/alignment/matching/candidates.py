"""Which pairs of two dictionaries can matter to a matching, found by products of blocks, none of them kept.

Both searches look at every pair, or prove that they need not:

- :func:`shortlist`: the k nearest of every row and of every column, in one pass. The k-th nearest so far is a threshold
  that a pair has to exceed, in its row or in its column, to be looked at again; after the first few blocks one in a
  thousand does. What was passed over is bounded by the thresholds in the end: c[i, j] ≤ min(row[i], column[j]).
- :func:`violations`: the pairs whose cosine exceeds what prices allow, c[i, j] > u[i] + v[j]. Only where the bounds
  known so far leave room for one is the product formed at all (:class:`Known`).

Shapes: n rows, m columns, D model width, E pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sae.alignment.matching.directions import Directions, Floats, Margin, Screen, cosines, in_parallel
from sae.alignment.matching.screening import Tiles, few, insert_nearest

_SAMPLE = 1024  # at most: more would cost more time than they save
_SAMPLED = 4096  # rows at a time
_KEPT = 4_000_000  # pairs of a block of rows, before the least are let go
_LOOKED_AT = 1_000_000  # pairs at a time whose cosine is formed, and a row more
TOLERANCE = 1e-12  # a price may be exceeded by this: float64 rounding of cosines and prices stays below it


class Pairs(NamedTuple):
    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    cosines: Floats


@dataclass
class Known:
    """Bounds on all pairs that are not among the candidates: the least of the three holds.

    c[i, j] ≤ ``row[i]``,    c[i, j] ≤ ``column[j]``,    c[i, j] ≤ ``u[i] + v[j]``.
    """

    row: Floats
    column: Floats
    u: Floats
    v: Floats


def shortlist(a: Screen, b: Screen, k: int) -> tuple[NDArray[np.int32], NDArray[np.int32], Known]:
    """The ``k`` nearest of each row [n, D] and of each column [m, D], as the screens tell, and bounds on all others.

    Returns the pairs' rows and columns [E], in order, each once.
    """
    n, m = len(a), len(b)
    margin = a.margin(b)
    lists = _Lists(n, k, _kth_of_sample(a, b, k)), _Lists(m, k, _kth_of_sample(b, a, k))
    tiles = Tiles(a, b)
    for top in range(0, n, tiles.high):
        rows = slice(top, top + tiles.high)
        for left in range(0, m, tiles.wide):
            columns = slice(left, left + tiles.wide)
            tile = tiles.product(a.rows[rows], b.rows[columns])
            found = tiles.above(tile, lists[0].threshold[rows], lists[1].threshold[columns], 0.0, False)

            def insert(side: int, _: int, found: Any = found, top: int = top, left: int = left) -> None:
                for i, j, x in found:
                    if side == 0:
                        lists[0].insert(i, top, j, left, x)
                    else:
                        lists[1].insert(j, left, i, top, x)

            in_parallel(insert, [(0, 1), (1, 2)])
    i, j = lists[0].pairs()
    jj, ii = lists[1].pairs()
    keys = np.unique(np.concatenate([i.astype(np.int64) * m + j, ii.astype(np.int64) * m + jj]))
    bounds = [margin.above(side.threshold.astype(np.float64)) for side in lists]
    known = Known(bounds[0], bounds[1], np.full(n, np.inf), np.zeros(m))
    return (keys // m).astype(np.int32), (keys % m).astype(np.int32), known


def _kth_of_sample(a: Screen, b: Screen, k: int) -> NDArray[np.float32]:
    """For each row of ``a`` [n], what at least ``k`` of ``b`` reach; minus infinity where ``b`` is small.

    The k-th nearest of some is no nearer than the k-th nearest of all.
    """
    size = min(_SAMPLE, max(len(b) // 32, 8 * k))
    if len(b) < 4 * size:
        return np.full(len(a), -np.inf, np.float32)
    few = b.rows[:: len(b) // size][:size]
    out = np.empty(len(a), np.float32)
    for top in range(0, len(a), _SAMPLED):
        rows = slice(top, top + _SAMPLED)
        out[rows] = (a.rows[rows] @ few.T).float().topk(k).values[:, -1].cpu().numpy()
    # A product of other blocks may be summed in another order, and rounded otherwise: this much lower it still holds.
    return np.asarray(out - np.float32(0.01) * np.abs(out), dtype=np.float32)


class _Lists:
    """The ``k`` nearest so far of each of n latents, and the threshold above which there may be a nearer one."""

    def __init__(self, n: int, k: int, threshold: NDArray[np.float32]) -> None:
        self.threshold = threshold
        self._who, self._near = np.zeros((n, k), np.int32), np.zeros((n, k), np.float32)
        self._filled = np.zeros(n, np.int32)

    def insert(
        self, own: NDArray[np.int32], first: int, other: NDArray[np.int32], first_other: int, x: NDArray[np.float32]
    ) -> None:
        insert_nearest(own, first, other, first_other, x, self._who, self._near, self._filled, self.threshold)

    def pairs(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        own, slot = np.nonzero(np.arange(self._who.shape[1]) < self._filled[:, None])
        return own.astype(np.int32), self._who[own, slot]


def violations(
    a: Directions,
    b: Directions,
    screens: tuple[Screen, Screen],
    u: Floats,
    v: Floats,
    known: Known,
    most: NDArray[np.int64],
    near: float,
) -> tuple[Pairs, Floats, int]:
    """The pairs whose cosine comes within ``near`` of exceeding ``u[i] + v[j]``, and by how much each row exceeds it.

    Of a row's pairs the ``most[i]`` that exceed (or come near) the most are returned; ``known`` is updated to bound all
    that are not. The second result [n] is max_j (c[i, j] - u[i] - v[j])⁺ over *all* columns, up to ``TOLERANCE``; the
    third is how many products were formed.
    """
    n = len(a)
    margin = screens[0].margin(screens[1])
    tiles = Tiles(*screens)
    excess, dropped = np.zeros(n), np.full(n, -near)
    kept: list[Pairs] = []
    formed = 0
    if next(_suspects(u, v, known, n), None) is None:
        return joined([]), excess, 0
    # Where there is a doubt, all is brought up to the margin ``near``: what is known has to hold for every pair alike.
    for rows, columns in _suspects(u - near, v, known, tiles.high):
        found: list[Pairs] = []
        formed += len(rows) * len(columns)
        some = screens[0].rows[torch.from_numpy(rows).to(tiles.a.device)]
        row = _below(u[rows] - near, margin)
        for left in range(0, len(columns), tiles.wide):
            part = columns[left : left + tiles.wide]
            whole = part[-1] - part[0] + 1 == len(part)
            where = slice(int(part[0]), int(part[-1]) + 1) if whole else torch.from_numpy(part).to(tiles.a.device)
            tile = tiles.product(some, screens[1].rows[where])
            for i, j, x in tiles.above(tile, row, v[part].astype(np.float32), margin.relative, True):
                if not len(i):
                    continue
                # The most suspicious as the screens tell, and all of a row where these do not settle it: an exact look
                # costs far more, but only it tells equals of a price from what exceeds it.
                looked_at = few(i, j, x, rows, part, u, v, most, margin.absolute, margin.relative, dropped, True)
                for some_of in _portions(i, looked_at):
                    i_of, j_of = i[some_of], j[some_of]
                    who, which = rows[i_of], part[j_of]
                    exact = cosines(a, b, who, which)
                    over = exact - u[who] - v[which]
                    np.maximum.at(excess, who, over)
                    keep = over > -near
                    i_of, j_of, exact = i_of[keep], j_of[keep], exact[keep]
                    keep = few(i_of, j_of, exact, rows, part, u, v, most, 0.0, 0.0, dropped, False)
                    who, which = rows[i_of[keep]], part[j_of[keep]]
                    found.append(Pairs(who.astype(np.int32), which.astype(np.int32), exact[keep]))
            if sum(len(pairs.rows) for pairs in found) > _KEPT:
                found = [_most(joined(found), u, v, most, dropped)]
        if found:
            kept.append(_most(joined(found), u, v, most, dropped))
    np.maximum(excess, dropped, out=excess)  # of what was let go unseen, the bound has to do
    excess[excess <= TOLERANCE] = 0
    known.u, known.v = u + dropped, v.copy()
    return joined(kept), excess, formed


def joined(parts: list[Pairs]) -> Pairs:
    if not parts:
        return Pairs(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0))
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _portions(i: NDArray[np.int32], chosen: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """Where ``chosen``, in portions of about ``_LOOKED_AT`` pairs, whole rows each; ``i`` [E] is in order."""
    left = np.flatnonzero(chosen)
    rows, start = i[left], 0
    while start < len(left):
        last = min(start + _LOOKED_AT, len(left)) - 1
        end = int(np.searchsorted(rows, rows[last], side="right"))
        yield left[start:end]
        start = end


def _below(u: Floats, margin: Margin) -> NDArray[np.float32]:
    """Thresholds in float32 that err on the side of looking."""
    return (u - margin.absolute - 1e-6).astype(np.float32)


def _most(pairs: Pairs, u: Floats, v: Floats, most: NDArray[np.int64], dropped: Floats) -> Pairs:
    """Of each row's pairs the ``most[i]`` that exceed its prices the most; ``dropped[i]`` comes to bound the rest."""
    order = np.lexsort((pairs.columns, pairs.rows))
    i, j, x = (column[order] for column in pairs)
    every_row, every_column = np.arange(len(u)), np.arange(len(v))
    keep = few(i, j, x, every_row, every_column, u, v, most, 0.0, 0.0, dropped, False)
    return Pairs(i[keep], j[keep], x[keep])


def _suspects(u: Floats, v: Floats, known: Known, high: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Blocks of rows, at most ``high`` each, with the columns in which they may exceed ``u[i] + v[j]``.

    Such a pair needs row[i] - u[i] > v[j], column[j] - v[j] > u[i], and prices that fell since they were last found
    sufficient. Each is asked of a column and the block's most suspicious row. So rows are ordered by how suspicious
    they are, those whose own price fell first: of the others only columns whose price fell are asked.
    """
    room_row, room_column = known.row - u, known.column - v
    fell_row, fell_column = known.u - u, known.v - v
    rows, columns = np.arange(len(u)), np.arange(len(v))
    for _ in range(3):  # what is not suspicious on one side makes the other less so
        if not len(rows) or not len(columns):
            return
        least_v, most_column, most_fall = v[columns].min(), room_column[columns].max(), fell_column[columns].max()
        rows = rows[
            (room_row[rows] > least_v + TOLERANCE)
            & (u[rows] < most_column - TOLERANCE)
            & (fell_row[rows] + most_fall > TOLERANCE)
        ]
        if not len(rows):
            return
        most_row, least_u, most_fall = room_row[rows].max(), u[rows].min(), fell_row[rows].max()
        columns = columns[
            (v[columns] < most_row - TOLERANCE)
            & (room_column[columns] > least_u + TOLERANCE)
            & (fell_column[columns] + most_fall > TOLERANCE)
        ]
    rows = rows[np.lexsort((rows, -room_row[rows], fell_row[rows] <= TOLERANCE))]
    for top in range(0, len(rows), high):
        block = np.sort(rows[top : top + high])
        chosen = columns[
            (v[columns] < room_row[block].max() - TOLERANCE)
            & (room_column[columns] > u[block].min() + TOLERANCE)
            & (fell_column[columns] + fell_row[block].max() > TOLERANCE)
        ]
        if len(chosen):
            yield block, chosen
