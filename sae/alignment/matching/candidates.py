"""Find the pairs of two dictionaries that can matter to a matching, by products of blocks that are not kept.

- :func:`shortlist`: the k nearest of every row and column, in one pass over all pairs. The k-th nearest so far is the
  threshold for a pair in its row or column; after a few blocks one in a thousand passes. In the end the thresholds
  bound all other pairs: c[i, j] ≤ min(row[i], column[j]).
- :func:`find_violations`: the pairs whose cosine exceeds their prices, c[i, j] > u[i] + v[j]. Products are formed only
  where the known bounds (:class:`Known`) allow such a pair.

A block of products is compared with thresholds while it is in cache, in a fiftieth of the product's time.

Shapes: n rows, m columns, D model width, E pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae.alignment.matching.directions import Directions, Floats, Screen, compute_cosines
from sae.dictionaries.kernels.cpu import products, run_in_parallel, split_evenly
from sae.dictionaries.kernels.cpu_loops import FAST

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
_TILE = (1024, 4096)  # 8 MiB in bfloat16, 16 in float32: fits a third-level cache
_CUDA_TILE = (8192, 16384)
_STRIP = 64  # neighbours compared together, at the cost of one branch
_SAMPLE = 1024  # at most: more cost more time than they save
_SAMPLED = 4096  # rows at a time
_KEPT = 4_000_000  # pairs of a block of rows, before the least are dropped
_LOOKED_AT = 1_000_000  # pairs whose exact cosine is formed at a time, and a row more
TOLERANCE = 1e-12  # a price may be exceeded by this: float64 rounding of cosines and prices stays below it


class Pairs(NamedTuple):
    """Pairs and their cosines, [E] each."""

    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    cosines: Floats


@dataclass
class Known:
    """Bounds on all pairs that are not candidates: c[i, j] ≤ ``row[i]``, ``column[j]`` and ``u[i] + v[j]``."""

    row: Floats
    column: Floats
    u: Floats
    v: Floats


def shortlist(a: Screen, b: Screen, k: int) -> tuple[NDArray[np.int32], NDArray[np.int32], Known]:
    """Return the ``k`` nearest of each row and column by the screens: rows and columns [E], in order, and bounds."""
    n, m = len(a), len(b)
    margin = a.margin(b)
    lists = _Lists(n, k, _kth_of_sample(a, b, k)), _Lists(m, k, _kth_of_sample(b, a, k))
    tiles = Tiles(a, b)
    for top in range(0, n, tiles.high):
        rows = slice(top, top + tiles.high)
        for left in range(0, m, tiles.wide):
            columns = slice(left, left + tiles.wide)
            tile = tiles.multiply(a.rows[rows], b.rows[columns])
            above = tiles.find_above(tile, lists[0].threshold[rows], lists[1].threshold[columns], 0.0, False)
            found = [(i + top, j + left, x) for i, j, x in above]

            def insert(side: int, _: int, found: Any = found) -> None:
                for i, j, x in found:
                    lists[side].insert(*((i, j) if side == 0 else (j, i)), x)

            run_in_parallel(insert, [(0, 1), (1, 2)])
    i, j = lists[0].pairs()
    jj, ii = lists[1].pairs()
    keys = np.unique(np.concatenate([i.astype(np.int64) * m + j, ii.astype(np.int64) * m + jj]))
    bounds = [margin.above(side.threshold.astype(np.float64)) for side in lists]
    known = Known(bounds[0], bounds[1], np.full(n, np.inf), np.zeros(m))
    return (keys // m).astype(np.int32), (keys % m).astype(np.int32), known


def _kth_of_sample(a: Screen, b: Screen, k: int) -> NDArray[np.float32]:
    """Return the k-th nearest of a sample of ``b`` to each row of ``a`` [n]; -inf where ``b`` is small."""
    size = min(_SAMPLE, max(len(b) // 128, 8 * k))
    if len(b) < 4 * size:
        return np.full(len(a), -np.inf, np.float32)
    few = b.rows[:: len(b) // size][:size]
    out = np.empty(len(a), np.float32)
    for top in range(0, len(a), _SAMPLED):
        rows = slice(top, top + _SAMPLED)
        products = (a.rows[rows] @ few.T).float().cpu().numpy()
        out[rows] = np.partition(products, size - k, axis=1)[:, size - k]
    # Products of other blocks may be summed in another order and rounded differently; one percent lower always holds.
    return np.asarray(out - np.float32(0.01) * np.abs(out), dtype=np.float32)


class _Lists:
    """The ``k`` nearest so far of each of n latents, and the threshold [n] that a nearer one must exceed."""

    def __init__(self, n: int, k: int, threshold: NDArray[np.float32]) -> None:
        self.threshold = threshold
        self._who, self._near = np.zeros((n, k), np.int32), np.zeros((n, k), np.float32)
        self._filled = np.zeros(n, np.int32)

    def insert(self, own: NDArray[np.int32], other: NDArray[np.int32], x: NDArray[np.float32]) -> None:
        insert_nearest(own, other, x, self._who, self._near, self._filled, self.threshold)

    def pairs(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        own, slot = np.nonzero(np.arange(self._who.shape[1]) < self._filled[:, None])
        return own.astype(np.int32), self._who[own, slot]


def find_violations(
    a: Directions,
    b: Directions,
    screens: tuple[Screen, Screen],
    u: Floats,
    v: Floats,
    known: Known,
    most: NDArray[np.int64],
    near: float,
) -> tuple[Pairs, Floats, int]:
    """Find the pairs whose cosine exceeds ``u[i] + v[j] - near``.

    Returns each row's ``most[i]`` pairs with the largest excess; each row's max_j (c[i, j] - u[i] - v[j])⁺ over *all*
    columns [n], up to ``TOLERANCE``; and the number of products formed. ``known`` is updated to bound all other pairs.
    """
    n = len(a)
    margin = screens[0].margin(screens[1])
    tiles = Tiles(*screens)
    excess, dropped = np.zeros(n), np.full(n, -near)
    kept: list[Pairs] = []
    formed = 0
    if next(_find_suspects(u, v, known, n), None) is None:
        return join([]), excess, 0
    # Every suspect is examined up to the margin ``near``, since the new bounds must hold for every pair.
    for rows, columns in _find_suspects(u - near, v, known, tiles.high):
        found: list[Pairs] = []
        formed += len(rows) * len(columns)
        some = screens[0].rows[torch.from_numpy(rows).to(tiles.a.device)]
        row = (u[rows] - near - margin.absolute - 1e-6).astype(np.float32)  # errs on the low side
        for left in range(0, len(columns), tiles.wide):
            part = columns[left : left + tiles.wide]
            whole = part[-1] - part[0] + 1 == len(part)
            where = slice(int(part[0]), int(part[-1]) + 1) if whole else torch.from_numpy(part).to(tiles.a.device)
            tile = tiles.multiply(some, screens[1].rows[where])
            for i, j, x in tiles.find_above(tile, row, v[part].astype(np.float32), margin.relative, True):
                if not len(i):
                    continue
                who, which = rows[i], part[j]
                # The most suspicious pairs by the screens, or all of a row where the screens cannot decide: exact
                # cosines cost far more, but only they separate pairs that equal their prices from those that exceed.
                looked_at = choose_most(who, x, v[which], u, most, dropped, *margin, True)
                for portion in _cut_in_portions(who, looked_at):
                    i_of, j_of = who[portion], which[portion]
                    exact = compute_cosines(a, b, i_of, j_of)
                    over = exact - u[i_of] - v[j_of]
                    np.maximum.at(excess, i_of, over)
                    keep = over > -near
                    pairs = Pairs(i_of[keep].astype(np.int32), j_of[keep].astype(np.int32), exact[keep])
                    found.append(_keep_most(pairs, u, v, most, dropped))
            if sum(len(part_of.rows) for part_of in found) > _KEPT:
                found = [_keep_most(join(found), u, v, most, dropped)]
        if found:
            kept.append(_keep_most(join(found), u, v, most, dropped))
    np.maximum(excess, dropped, out=excess)  # dropped pairs count with their bound
    excess[excess <= TOLERANCE] = 0
    known.u, known.v = u + dropped, v.copy()
    return join(kept), excess, formed


def join(parts: list[Pairs]) -> Pairs:
    if not parts:
        return Pairs(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0))
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _cut_in_portions(i: NDArray[np.int32], chosen: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """Yield the ``chosen`` places in portions of about ``_LOOKED_AT``, whole rows each; ``i`` [E] is in order."""
    left = np.flatnonzero(chosen)
    rows, start = i[left], 0
    while start < len(left):
        last = min(start + _LOOKED_AT, len(left)) - 1
        end = int(np.searchsorted(rows, rows[last], side="right"))
        yield left[start:end]
        start = end


def _keep_most(pairs: Pairs, u: Floats, v: Floats, most: NDArray[np.int64], dropped: Floats) -> Pairs:
    """Keep each row's ``most[i]`` pairs with the largest excess; ``dropped[i]`` is raised to bound the others."""
    order = np.lexsort((pairs.columns, pairs.rows))
    i, j, x = (column[order] for column in pairs)
    keep = choose_most(i, x, v[j], u, most, dropped, 0.0, 0.0, False)
    return Pairs(i[keep], j[keep], x[keep])


def _find_suspects(
    u: Floats, v: Floats, known: Known, high: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield blocks of at most ``high`` rows with the columns in which they may exceed ``u[i] + v[j]``.

    Such a pair needs row[i] - u[i] > v[j], column[j] - v[j] > u[i], and prices that fell since the last bounds. Columns
    are tested against the block's most suspicious row, so rows are sorted by suspicion, those with a fallen price
    first: the others only need columns whose price fell.
    """
    of_rows = _Suspicion(u, known.row - u, known.u - u)
    of_columns = _Suspicion(v, known.column - v, known.v - v)
    rows, columns = np.arange(len(u)), np.arange(len(v))
    for _ in range(3):  # fewer suspects on one side make fewer on the other
        if len(columns):
            rows = _narrow(rows, of_rows, columns, of_columns)
        if not len(rows) or not len(columns):
            return
        columns = _narrow(columns, of_columns, rows, of_rows)
    rows = rows[np.lexsort((rows, -of_rows.room[rows], of_rows.fell[rows] <= TOLERANCE))]
    for top in range(0, len(rows), high):
        block = np.sort(rows[top : top + high])
        chosen = _narrow(columns, of_columns, block, of_rows)
        if len(chosen):
            yield block, chosen


class _Suspicion(NamedTuple):
    """Of the rows or of the columns."""

    price: Floats
    room: Floats  # how far their bound exceeds their price
    fell: Floats  # how far their price fell since the bounds


def _narrow(
    some: NDArray[np.int64], own: _Suspicion, others: NDArray[np.int64], other: _Suspicion
) -> NDArray[np.int64]:
    """Return those of ``some`` that may exceed their prices with any of ``others``."""
    return some[
        (own.room[some] > other.price[others].min() + TOLERANCE)
        & (own.price[some] < other.room[others].max() - TOLERANCE)
        & (own.fell[some] + other.fell[others].max() > TOLERANCE)
    ]


class Tiles:
    """Products of blocks of two screens, and the pairs in them that exceed a threshold."""

    def __init__(self, a: Screen, b: Screen) -> None:
        self.a, self.b = a.rows, b.rows
        self.on_cpu = self.a.device.type == "cpu"
        high, wide = _TILE if self.on_cpu else _CUDA_TILE
        self.high, self.wide = min(high, len(a)), min(wide, len(b))
        self._out = torch.empty(self.high * self.wide, dtype=self.a.dtype, device=self.a.device)
        if self.on_cpu:
            room = self.high * self.wide
            self._found = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float32)

    def multiply(self, rows: Tensor, columns: Tensor) -> Tensor:
        out = self._out[: len(rows) * len(columns)].view(len(rows), len(columns))
        return products(rows, columns, out)

    def find_above(
        self, tile: Tensor, row: NDArray[np.float32], column: NDArray[np.float32], relative: float, summed: bool
    ) -> list[tuple[NDArray[Any], ...]]:
        """Find (i, j, c̃), by row, where c̃ exceeds the lesser threshold; if ``summed``, its upper bound the sum."""
        if not self.on_cpu:
            r, c = (torch.from_numpy(limits).to(tile.device) for limits in (row, column))
            values = tile.float()
            if summed:
                over = values + relative * values.abs() > r[:, None] + c
            else:
                over = values > torch.minimum(r[:, None], c)
            where = over.nonzero(as_tuple=True)
            return [tuple(found.cpu().numpy() for found in (where[0].int(), where[1].int(), values[where]))]
        bits = tile.view(torch.int16).numpy() if tile.dtype == torch.bfloat16 else tile.numpy()
        width = tile.shape[1]
        i, j, x = self._found
        ranges = split_evenly(len(tile))

        def search(low: int, high: int) -> int:
            part = slice(low * width, high * width)
            return int(_above(bits, row, column, np.float32(relative), summed, low, high, (i[part], j[part], x[part])))

        counts = run_in_parallel(search, ranges)
        parts = [slice(low * width, low * width + n) for (low, _), n in zip(ranges, counts, strict=True)]
        return [(i[part], j[part], x[part]) for part in parts]


def _wide(x: Any) -> Any:
    """Return a float32 as it is; widen an int16, the bits of a bfloat16, to float32."""
    raise NotImplementedError  # for compiled code only


@numba.extending.overload(_wide)
def _wide_compiled(x: Any) -> Any:
    def bits(x: Any) -> Any:
        return np.int32(np.int32(x) << 16).view(np.float32)

    def same(x: Any) -> Any:
        return x

    return bits if isinstance(x, numba.types.Integer) else same


@_compiled
def _above(
    tile: Any, row: Any, column: Any, relative: float, summed: bool, low: int, high: int, found: tuple[Any, Any, Any]
) -> int:
    n = 0
    width = tile.shape[1]
    found_i, found_j, found_x = found
    for i in range(low, high):
        line, limit = tile[i], row[i]
        for left in range(0, width, _STRIP):
            right = min(left + _STRIP, width)
            part, limits_of = line[left:right], column[left:right]
            any_over = False
            if right - left == _STRIP:
                # Two passes over a strip, since only a loop of known length becomes vector instructions.
                if summed:
                    for s in range(_STRIP):
                        x = _wide(part[s])
                        any_over |= x + relative * abs(x) > limit + limits_of[s]
                else:
                    for s in range(_STRIP):
                        any_over |= _wide(part[s]) > min(limit, limits_of[s])
                if not any_over:
                    continue
            for s in range(right - left):
                x = _wide(part[s])
                if (summed and x + relative * abs(x) > limit + limits_of[s]) or (
                    not summed and x > min(limit, limits_of[s])
                ):
                    found_i[n], found_j[n], found_x[n] = i, left + s, x
                    n += 1
    return n


@_compiled
def choose_most(
    i: Any, x: Any, price: Any, u: Any, most: Any, dropped: Any, absolute: float, relative: float, doubted: bool
) -> np.ndarray:
    """Return which found pairs to keep [E]: each row's ``most`` with the largest excess c̃ - u[i] - v[j].

    ``i`` [E] is in order; ``x`` [E] is c̃, ``price`` [E] v[j]. ``dropped`` [n] is raised to bound the true excess of
    the others. If ``doubted``, a row keeps all pairs while c̃ cannot decide whether the others exceed.
    """
    keep = np.ones(len(i), np.bool_)
    start = 0
    while start < len(i):
        stop = start
        while stop < len(i) and i[stop] == i[start]:
            stop += 1
        row = i[start]
        n = most[row]
        if stop - start > n:
            over = np.empty(stop - start)
            for e in range(start, stop):
                over[e - start] = x[e] + relative * abs(x[e]) - price[e]
            limit = np.partition(over, len(over) - n)[len(over) - n]
            # Pairs that equal their prices, or a cluster: their bound would stay above zero however many are kept.
            if doubted and limit - absolute - 2.02 * relative <= u[row] < limit + absolute:
                start = stop
                continue
            equals = 0
            for e in range(start, stop):
                keep[e] = over[e - start] > limit
                n -= keep[e]
                equals += over[e - start] == limit
            # Each row takes other ones of the equals, or all rows would compete for the same few. The choice does not
            # depend on how the list was partitioned.
            begin, at = (row * n) % equals, 0
            for e in range(start, stop):
                if over[e - start] == limit:
                    keep[e] = (at - begin) % equals < n
                    at += 1
            dropped[row] = max(dropped[row], limit + absolute - u[row])
        start = stop
    return keep


@_compiled
def insert_nearest(own: Any, other: Any, x: Any, who: Any, near: Any, filled: Any, threshold: Any) -> None:
    """Put found pairs into unordered lists of the k nearest.

    ``who`` and ``near`` are [n, k], with ``filled`` [n] in use; ``threshold`` [n] rises to the least of a full list.
    """
    k = who.shape[1]
    for e in range(len(own)):
        i = own[e]
        if not x[e] > threshold[i]:
            continue
        at = filled[i]
        if at < k:
            filled[i] += 1
        else:
            at = 0
            for s in range(1, k):
                if near[i, s] < near[i, at]:
                    at = s
        near[i, at], who[i, at] = x[e], other[e]
        if filled[i] == k:
            least = near[i, 0]
            for s in range(1, k):
                least = min(least, near[i, s])
            threshold[i] = max(threshold[i], least)
