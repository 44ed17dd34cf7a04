"""Blocks of products, and the search through them while they lie in the processor's cache.

A block is never sorted, only compared with a threshold for each row and each column; strips of it in which nothing is
above cost one branch. So a search takes a fiftieth of the time of the product that it reads.

Shapes: n rows, m columns, D model width.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae.alignment.matching.directions import Screen, even, in_parallel
from sae.dictionaries.kernels import cpu
from sae.dictionaries.kernels.cpu_loops import FAST

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
_TILE = (1024, 4096)  # 8 MiB in bfloat16, 16 in float32: within a third-level cache
_CUDA_TILE = (8192, 16384)
_STRIP = 64  # neighbours compared together: one branch for so many


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

    def product(self, rows: Tensor, columns: Tensor) -> Tensor:
        out = self._out[: len(rows) * len(columns)].view(len(rows), len(columns))
        return cpu.products(rows, columns, out)

    def above(
        self, tile: Tensor, row: NDArray[np.float32], column: NDArray[np.float32], relative: float, summed: bool
    ) -> list[tuple[NDArray[Any], ...]]:
        """Positions and values (i, j, c̃) where c̃ exceeds the lesser threshold, or c̃ + relative · |c̃| their sum.

        In parts, one after the other in the order of the rows.
        """
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
        ranges = even(len(tile))

        def search(low: int, high: int) -> int:
            part = slice(low * width, high * width)
            return int(_above(bits, row, column, np.float32(relative), summed, low, high, i[part], j[part], x[part]))

        counts = in_parallel(search, ranges)
        parts = [slice(low * width, low * width + n) for (low, _), n in zip(ranges, counts, strict=True)]
        return [(i[part], j[part], x[part]) for part in parts]


def _wide(x: Any) -> Any:
    """A float32 as it is; the bits of a bfloat16, an int16, as the float32 that they begin."""
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
    tile: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    relative: float,
    summed: bool,
    low: int,
    high: int,
    found_i: np.ndarray,
    found_j: np.ndarray,
    found_x: np.ndarray,
) -> int:
    """See :meth:`Tiles.above`; returns how many were found in rows ``low`` to ``high``."""
    n = 0
    width = tile.shape[1]
    for i in range(low, high):
        line, limit = tile[i], row[i]
        for left in range(0, width, _STRIP):
            right = min(left + _STRIP, width)
            part, limits_of = line[left:right], column[left:right]
            any_over = False
            if right - left == _STRIP:
                # The same twice over, since only a loop of known length becomes vector instructions throughout.
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
def few(
    i: np.ndarray,
    j: np.ndarray,
    x: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    most: np.ndarray,
    absolute: float,
    relative: float,
    dropped: np.ndarray,
    doubted: bool,
) -> np.ndarray:
    """Which of the found (i, j, c̃) to keep: of each row the ``most`` that exceed its prices most.

    They come in the order of rows, as numbers within ``rows`` and ``columns``. ``dropped`` comes to bound the true
    excess of the others. With ``doubted``, a row of whose others it is not plain whether they exceed keeps all.
    """
    keep = np.ones(len(i), np.bool_)
    start = 0
    while start < len(i):
        stop = start
        while stop < len(i) and i[stop] == i[start]:
            stop += 1
        row = rows[i[start]]
        n = most[row]
        if stop - start > n:
            over = np.empty(stop - start)
            for e in range(start, stop):
                over[e - start] = x[e] + relative * abs(x[e]) - v[columns[j[e]]]
            limit = np.partition(over, len(over) - n)[len(over) - n]
            # Equals of one price, or a cluster: their bound would never fall to zero, however many are taken.
            if doubted and limit - absolute - 2.02 * relative <= u[row] < limit + absolute:
                start = stop
                continue
            for e in range(start, stop):
                above = over[e - start] > limit
                if above:
                    n -= 1
                keep[e] = above
            # Of equals each row takes others, or all of them would compete for the same few; which they are does not
            # depend on how the list was partitioned.
            equals = 0
            for e in range(start, stop):
                equals += over[e - start] == limit
            begin, at = (row * n) % equals, 0
            for e in range(start, stop):
                if over[e - start] == limit:
                    keep[e] = (at - begin) % equals < n
                    at += 1
            dropped[row] = max(dropped[row], limit + absolute - u[row])
        start = stop
    return keep


@_compiled
def insert_nearest(
    own: np.ndarray,
    first: int,
    other: np.ndarray,
    first_other: int,
    x: np.ndarray,
    who: np.ndarray,
    near: np.ndarray,
    filled: np.ndarray,
    threshold: np.ndarray,
) -> None:
    """Put found pairs, numbered from ``first`` and ``first_other``, into lists of the k nearest: ``who`` and ``near``.

    [n, k] each, in no order, of which ``filled`` [n] are in use. ``threshold`` [n] rises to the least of a full list.
    """
    k = who.shape[1]
    for e in range(len(own)):
        i = own[e] + first
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
        near[i, at], who[i, at] = x[e], other[e] + first_other
        if filled[i] == k:
            least = near[i, 0]
            for s in range(1, k):
                least = min(least, near[i, s])
            threshold[i] = max(threshold[i], least)
