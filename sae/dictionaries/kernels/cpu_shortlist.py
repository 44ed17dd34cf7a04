"""Compiled loops that find the K largest of M numbers which are known roughly, and compute only those exactly.

A dense product in few bits is several times as fast as one in float32, and tells most latents from the K largest.
What comes near the K-th is computed again from the float32 rows, K and a few of them instead of M, and the choice is
made among those numbers. Activations, and with them all gradients, are those of float32.

What is known roughly comes as int16, ordered as the numbers are: 32 of them fit into a register.
"""

from __future__ import annotations

import numba
import numpy as np

from sae.dictionaries.kernels.cpu import FAST, bracket

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
NOT_FINITE = np.uint16(
    0xFF80
)  # in bfloat16: minus infinity and all NaNs with a sign: looked at too, so that they surface
VECTOR = 32  # short lists are filled up to whole registers; the remainder of a loop costs as much as ten of them

_COUNTED = 16384  # at a time, in integers of 16 bits, of which twice as many fit into a register as of 32


@_compiled
def _floor(bits: np.ndarray, n: int, k: int, low: int, slack: int) -> int:
    """The largest integer above ``low`` that ``k`` of ``bits[:n]`` reach, or ``low`` where there is none.

    With ``slack``, any such integer that at most ``k + slack`` reach.
    """
    highest = np.int16(low)
    for i in range(n):
        highest = max(highest, bits[i])
    high, bottom = np.int32(highest) + 1, np.int32(low)
    while high - bottom > 1:
        middle = np.int16((bottom + high) >> 1)
        reach = 0
        for start in range(0, n, _COUNTED):
            some = np.int16(0)
            for i in range(start, min(start + _COUNTED, n)):
                some += np.int16(bits[i] >= middle)
            reach += int(some)
        if reach < k:
            high = np.int32(middle)
        else:
            bottom = np.int32(middle)
            if reach <= k + slack:
                break
    return int(bottom)


@_compiled
def room(m: int) -> int:
    """Slots that the lists of :func:`candidates` need for rows of ``m``."""
    return m + 8 + VECTOR


@_compiled
def candidates(
    row: np.ndarray, k: int, margin: int, lanes: np.ndarray, mask: np.ndarray, found: np.ndarray, who: np.ndarray
) -> int:
    """Write the latents that may be among the ``k`` largest into ``who``; returns how many they are.

    Those are the positive ones less than ``margin`` below the ``k``-th of ``row``, and what is not a number.
    """
    m, width = len(row), len(lanes)
    lanes[:] = row[:width]
    for start in range(width, m - width + 1, width):
        part = row[start : start + width]
        for lane in range(width):
            lanes[lane] = max(lanes[lane], part[lane])
    floor = np.int16(max(1, _floor(lanes, width, k, 0, k // 4) - margin))
    for j in range(m):
        mask[j] = (row[j] >= floor) | (np.uint16(row[j]) >= NOT_FINITE)
    # Nearly all of the mask is zero: eight at a time are passed over, and what is left is written before it is
    # counted, so that there is no branch to predict wrongly.
    words = mask.view(np.uint64)
    n = 0
    for word in range(len(words)):
        if words[word]:
            for j in range(8 * word, min(8 * word + 8, m)):
                found[n], who[n] = row[j], j
                n += mask[j]
    if n > k:
        padded = n + -n % VECTOR
        found[n:padded] = 0
        floor = np.int16(max(floor, _floor(found, padded, k, floor, 0) - margin))
        kept = 0
        for i in range(n):
            who[kept] = who[i]
            kept += (found[i] >= floor) | (found[i] < 0)
        n = kept
    return n


@_compiled
def exact_rows(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, who: np.ndarray, n: int, out: np.ndarray) -> None:
    """``out[i] = x @ weight[who[i]] + bias[who[i]]`` for the first ``n``."""
    d_in = len(x)
    for i in range(0, n - n % 4, 4):
        w0, w1, w2, w3 = weight[who[i]], weight[who[i + 1]], weight[who[i + 2]], weight[who[i + 3]]
        s0, s1, s2, s3 = bias[who[i]], bias[who[i + 1]], bias[who[i + 2]], bias[who[i + 3]]
        for d in range(d_in):
            s0 += x[d] * w0[d]
            s1 += x[d] * w1[d]
            s2 += x[d] * w2[d]
            s3 += x[d] * w3[d]
        out[i], out[i + 1], out[i + 2], out[i + 3] = s0, s1, s2, s3
    for i in range(n - n % 4, n):
        w0 = weight[who[i]]
        s0 = bias[who[i]]
        for d in range(d_in):
            s0 += x[d] * w0[d]
        out[i] = s0


@_compiled
def keep_largest(exact: np.ndarray, who: np.ndarray, n: int, best: np.ndarray, names: np.ndarray) -> None:
    """The largest of ``exact[:n]`` that are positive, and whose they are, into ``best`` and ``names``; then zeros.

    ``exact`` has room for a whole register more.
    """
    k, zero = len(best), exact.dtype.type(0)
    least, above, ties = zero, zero, k
    if n > k:
        padded = n + -n % VECTOR
        exact[n:padded] = 0
        least, above = bracket(exact, padded, k, 0)
        for i in range(n):
            ties -= not exact[i] < above
    filled = 0
    for i in range(n):
        value = exact[i]
        # Comparisons are the other way round because what is not a number has to be seen.
        if filled < k and not value <= 0 and (not value < above or (value >= least and ties > 0)):
            ties -= value < above
            best[filled], names[filled] = value, who[i]
            filled += 1
    best[filled:], names[filled:] = 0, 0
