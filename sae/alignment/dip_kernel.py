"""The compiled loops of Hartigan's dip, apart from :mod:`sae.alignment.dip` so that its readers need no compiler."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_compiled = numba.njit(cache=True, error_model="numpy")


@_compiled
def dip_of_jumps(at: np.ndarray, below: np.ndarray, reached: np.ndarray) -> Any:
    """Return the dip of a distribution with a jump at each of ``at`` [n], from ``below`` to ``reached``.

    The best function with one mode is convex, then straight over an interval of modes, then concave. The interval is
    narrowed from both ends to where the greatest convex function below the distribution and the least concave one above
    it are farthest apart. The parts outside determine the distance.
    """
    n = len(at)
    low, high = 0, n - 1
    convex, concave = np.empty(n, np.int64), np.empty(n, np.int64)
    least = 0.0
    while low < high:  # a single remaining place is a mode
        size_g = _hull(at, below, low, high, convex, 1.0)
        size_l = _hull(at, reached, low, high, concave, -1.0)
        apart, new_low, new_high = 0.0, low, high
        # The distance is largest where one of the two bends.
        j = 0
        for i in range(size_g):
            x = convex[i]
            while j + 1 < size_l - 1 and concave[j + 1] <= x:
                j += 1
            distance = _line(at, reached, concave[j], concave[min(j + 1, size_l - 1)], x) - below[x]
            if distance > apart:
                apart, new_low = distance, x
                new_high = concave[j] if concave[j] >= x else concave[min(j + 1, size_l - 1)]
        j = 0
        for i in range(size_l):
            x = concave[i]
            while j + 1 < size_g - 1 and convex[j + 1] < x:
                j += 1
            distance = reached[x] - _line(at, below, convex[j], convex[min(j + 1, size_g - 1)], x)
            if distance > apart:
                apart, new_high = distance, x
                last = convex[min(j + 1, size_g - 1)]
                new_low = last if last <= x else convex[j]
        if apart <= least:
            return 0.5 * max(least, apart)
        for i in range(size_g - 1):
            for x in range(convex[i], min(convex[i + 1] - 1, new_low) + 1 if convex[i] < new_low else 0):
                least = max(least, reached[x] - _line(at, below, convex[i], convex[i + 1], x))
        for i in range(size_l - 1):
            for x in range(max(concave[i] + 1, new_high), concave[i + 1] + 1 if concave[i + 1] > new_high else 0):
                least = max(least, _line(at, reached, concave[i], concave[i + 1], x) - below[x])
        if new_low == low and new_high == high:
            return 0.5 * max(least, apart)
        low, high = new_low, new_high
    return 0.5 * least


@_compiled
def _line(at: np.ndarray, height: np.ndarray, left: int, right: int, x: int) -> Any:
    if left == right:
        return height[left]
    share = (at[x] - at[left]) / (at[right] - at[left])
    return height[left] + share * (height[right] - height[left])


@_compiled
def _hull(at: np.ndarray, height: np.ndarray, low: int, high: int, out: np.ndarray, sign: float) -> int:
    """Find the corners of the greatest convex function below the points (``sign`` 1), or the least concave above."""
    size = 0
    for x in range(low, high + 1):
        while size >= 2:
            a, b = out[size - 2], out[size - 1]
            turn = (at[b] - at[a]) * (height[x] - height[a]) - (height[b] - height[a]) * (at[x] - at[a])
            if sign * turn > 0:
                break
            size -= 1
        out[size] = x
        size += 1
    return size
