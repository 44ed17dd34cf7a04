"""Compiled loops that find the K largest of M numbers known roughly, and compute only those exactly.

A dense product in few bits is several times as fast as one in float32, and separates most latents from the K largest.
Latents near the K-th are computed again from the float32 rows, and the choice is made among those numbers: activations
and gradients are those of float32. Rough numbers come as int16 in the same order, 32 of them to a register.

In bfloat16: positive numbers are ordered as their bits are, and negative ones have the sign of an int16. Only a latent
whose pre-activation nearly equals the K-th can be confused with it.

In 8 bits: each row of activations x and of the encoder w is rounded to 127 steps of its own,

    x = s q + e,  |e| <= s / 2,     w = t r + f,  |f| <= t / 2     (q, r integers of 8 bits)

and x . w is known as s t (q . r), which a processor with 8-bit instructions (VNNI, AMX) computes at twice the rate of
bfloat16 and four to sixteen times that of float32. The error e . w + x . f is a sum of D independent roundings, with a
standard deviation of at most

    sigma = sqrt((s^2 max |w|^2 + max t^2 |x|^2) / 12),

about 1 % of an unrelated latent's pre-activation where no coordinate of x is unusually large. Latents up to INT8_MARGIN
sigma below the K-th are computed exactly. (A bound for any signs would be sqrt(D) times as wide.)
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from sae.dictionaries.kernels.cpu_loops import FAST, VECTOR, Arrays, keep_largest

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
_NOT_FINITE = np.uint16(0xFF80)  # in bfloat16: minus infinity and all NaNs with a sign, which must surface
_COUNTED = 16384  # at a time, in integers of 16 bits, of which twice as many fit into a register as of 32

BFLOAT16_MARGIN = 3  # units in the last place: one for the rounding of two results, two for the error of the products
INT8_MARGIN = 6  # standard deviations of the rounding error
_STEPS = 127
_UNITS = 4  # of the integers in which rough pre-activations are compared, to a standard deviation
_HIGHEST = 32000  # of these integers
_TO_INTEGER = np.float32(1.5 * 2**23)  # added, it leaves the nearest integer in a float's lowest bits


@_compiled
def _floor(bits: np.ndarray, n: int, k: int, low: int, slack: int) -> int:
    """Return the largest integer above ``low`` that ``k`` of ``bits[:n]`` reach, or ``low`` if there is none.

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
def _memory(m: int, width: int, like: np.ndarray) -> Any:
    """Return the lanes, the mask and the lists that :func:`candidates` needs for rows of ``m``, and exact values."""
    lanes, mask, length = np.empty(width, np.int16), np.zeros(m + -m % 8, np.uint8), m + 8 + VECTOR
    return lanes, mask, np.empty(length, np.int16), np.empty(length, np.int64), np.empty(length, like.dtype)


@_compiled
def candidates(
    row: np.ndarray, k: int, margin: int, lanes: np.ndarray, mask: np.ndarray, found: np.ndarray, who: np.ndarray
) -> int:
    """Write the latents that may be among the ``k`` largest into ``who``, and return their number.

    These are the positive ones less than ``margin`` below the ``k``-th of ``row``, and those that are NaN.
    """
    m, width = len(row), len(lanes)
    lanes[:] = row[:width]
    for start in range(width, m - width + 1, width):
        part = row[start : start + width]
        for lane in range(width):
            lanes[lane] = max(lanes[lane], part[lane])
    floor = np.int16(max(1, _floor(lanes, width, k, 0, k // 4) - margin))
    for j in range(m):
        mask[j] = (row[j] >= floor) | (np.uint16(row[j]) >= _NOT_FINITE)
    # Nearly all of the mask is zero: eight at a time are skipped. The rest is written before it is counted, so that
    # there is no branch to predict wrongly.
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
    """Write ``x @ weight[who[i]] + bias[who[i]]`` into ``out[i]`` for the first ``n``."""
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
def topk_of_bfloat16(bits: np.ndarray, width: int, encoder: Arrays, slots: Arrays, low: int, high: int) -> None:
    (centred, weight, bias), (values, latents) = encoder, slots
    k = values.shape[1]
    lanes, mask, found, who, exact = _memory(bits.shape[1], width, centred)
    for b in range(low, high):
        n = candidates(bits[b], k, BFLOAT16_MARGIN, lanes, mask, found, who)
        exact_rows(centred[b], weight, bias, who, n, exact)
        keep_largest(exact, who, n, values[b], latents[b])


@_compiled
def quantise_rows(
    matrix: np.ndarray, out: np.ndarray, steps: np.ndarray, lengths: np.ndarray, low: int, high: int
) -> None:
    """Round ``matrix[i]`` to ``steps[i] * out[i]``; ``lengths[i]`` is its norm, not finite where an entry is not."""
    one = np.empty(matrix.shape[1], np.float32)
    bits = one.view(np.int32)
    for i in range(low, high):
        row, into = matrix[i], out[i]
        largest, squares = np.float32(0), np.float32(0)
        for d in range(len(row)):
            largest = max(largest, abs(row[d]))
        scale = np.float32(_STEPS) / largest if largest > 0 else np.float32(0)
        for d in range(len(row)):
            scaled = row[d] * scale
            squares += scaled * scaled  # of numbers up to 127: no row is too small or too large for it
            one[d] = scaled + _TO_INTEGER
        steps[i] = largest / np.float32(_STEPS)
        lengths[i] = np.sqrt(squares) * steps[i]
        for d in range(len(row)):
            into[d] = np.int8(bits[d])


@_compiled
def topk_of_int8(
    products: np.ndarray,
    of_x: Arrays,
    weight_steps: np.ndarray,
    largest_of: tuple[float, float, float],
    width: int,
    encoder: Arrays,
    slots: Arrays,
    low: int,
    high: int,
) -> None:
    """Choose by ``products`` [B, M] int32, which are q . r.

    ``of_x`` is s and |x|, [B] each; ``weight_steps`` [M] is t; ``largest_of`` holds the largest |w|, t and |bias|.
    """
    (steps, lengths), (longest, coarsest, highest_bias) = of_x, largest_of
    (centred, weight, bias), (values, latents) = encoder, slots
    m, k = products.shape[1], values.shape[1]
    lanes, mask, found, who, exact = _memory(m, width, centred)
    rough = np.empty(m, np.int16)
    margin = 1 + INT8_MARGIN * _UNITS
    lowest, highest, raised = np.float32(0), np.float32(np.iinfo(np.int16).max), np.float32(margin)
    for b in range(low, high):
        s, length = steps[b], lengths[b]
        sigma = np.sqrt((s * s * longest * longest + coarsest * coarsest * length * length) / 12)
        largest = length * longest + highest_bias
        unit = max(sigma / _UNITS, largest / _HIGHEST)
        product, per_product, per_bias = products[b], np.float32(s / unit), np.float32(1 / unit)
        if largest == 0:
            n = 0
        elif not (sigma < np.inf and largest < np.inf and per_product < np.inf and per_bias < np.inf):
            # A number is NaN, or out of range: all latents are computed, so that it surfaces.
            n = m
            for j in range(m):
                who[j] = j
        else:
            # Raised by the margin, because a rough number below zero may be an exact one above.
            for j in range(m):
                value = np.float32(product[j]) * weight_steps[j] * per_product + bias[j] * per_bias + raised
                rough[j] = np.int16(max(lowest, min(highest, value)))
            n = candidates(rough, k, margin, lanes, mask, found, who)
        exact_rows(centred[b], weight, bias, who, n, exact)
        keep_largest(exact, who, n, values[b], latents[b])
