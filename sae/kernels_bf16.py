"""Compiled loops that choose latents by rounded pre-activations and then compute the chosen ones exactly.

Half of the bits are enough to tell most latents from the K largest, and a CPU with bfloat16 instructions multiplies
them two to eight times as fast. So the dense product is done in bfloat16; what comes near the K largest is computed
again in float32, K and a few rows instead of M, and the choice is made among those numbers. Activations, and with
them all gradients, are those of float32; only a latent whose pre-activation is nearly that of the K-th can be taken
for another.

Positive bfloat16 numbers are ordered as their bits are, and negative ones have the sign of an int16: the choice is
one of small integers, and 32 of them fit into a register.
"""

from __future__ import annotations

import numba
import numpy as np

from sae.kernels_cpu import FAST, bracket

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
_NOT_FINITE = np.uint16(0xFF80)  # minus infinity and all NaNs with a sign: looked at too, so that they surface
MARGIN = 3  # units in the last place: one for the rounding of two results, two for what was lost in the products
_VECTOR = 32  # short lists are filled up to whole registers; the remainder of a loop costs as much as ten of them

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
def _candidates(
    row: np.ndarray, k: int, lanes: np.ndarray, mask: np.ndarray, found: np.ndarray, who: np.ndarray
) -> int:
    """Write the latents that may be among the ``k`` largest into ``who``; returns how many they are."""
    m, width = len(row), len(lanes)
    lanes[:] = row[:width]
    for start in range(width, m - width + 1, width):
        part = row[start : start + width]
        for lane in range(width):
            lanes[lane] = max(lanes[lane], part[lane])
    floor = np.int16(max(1, _floor(lanes, width, k, 0, k // 4) - MARGIN))
    for j in range(m):
        mask[j] = (row[j] >= floor) | (np.uint16(row[j]) >= _NOT_FINITE)
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
        padded = n + -n % _VECTOR
        found[n:padded] = 0
        floor = np.int16(max(floor, _floor(found, padded, k, floor, 0) - MARGIN))
        kept = 0
        for i in range(n):
            who[kept] = who[i]
            kept += (found[i] >= floor) | (found[i] < 0)
        n = kept
    return n


@_compiled
def _exact(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, who: np.ndarray, n: int, out: np.ndarray) -> None:
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
def topk_rows(
    bits: np.ndarray,
    width: int,
    centred: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    values: np.ndarray,
    latents: np.ndarray,
    low: int,
    high: int,
) -> None:
    m, k = bits.shape[1], values.shape[1]
    room = m + 8 + _VECTOR
    lanes, mask = np.empty(width, np.int16), np.zeros(m + -m % 8, np.uint8)
    found, who, exact = np.empty(room, np.int16), np.empty(room, np.int64), np.empty(room, centred.dtype)
    zero = exact.dtype.type(0)
    for b in range(low, high):
        n = _candidates(bits[b], k, lanes, mask, found, who)
        _exact(centred[b], weight, bias, who, n, exact)
        best, names = values[b], latents[b]
        least, above, ties = zero, zero, k
        if n > k:
            padded = n + -n % _VECTOR
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
