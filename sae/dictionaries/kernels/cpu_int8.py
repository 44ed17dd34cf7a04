"""The compiled choice of latents by pre-activations that were multiplied in 8 bits; see ``kernels_shortlist``.

Each row of activations x and of the encoder w is rounded to 127 steps of its own,

    x = s q + e,  |e| <= s / 2,     w = t r + f,  |f| <= t / 2     (q, r integers of 8 bits)

and x . w is known as s t (q . r), which a processor with 8-bit instructions (VNNI, AMX) finds at twice the rate of
bfloat16 and four to sixteen times that of float32. What is lost, e . w + x . f, is a sum of D independent roundings:
its standard deviation is at most

    sigma = sqrt((s^2 max |w|^2 + max t^2 |x|^2) / 12),

about 1 % of that of an unrelated latent's pre-activation where no coordinate of x stands out. Latents up to MARGIN
sigma below the K-th are computed exactly, so that one is left out by mistake only where rounding errs by MARGIN
standard deviations. (A bound that holds whatever the signs of the roundings would be sqrt(D) times as wide.)
"""

from __future__ import annotations

import numba
import numpy as np

from sae.dictionaries.kernels.cpu import FAST
from sae.dictionaries.kernels.cpu_shortlist import candidates, exact_rows, keep_largest, room

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
MARGIN = 6  # standard deviations of what rounding has taken
_STEPS = 127
_UNITS = 4  # of the integers in which rough pre-activations are compared, to a standard deviation
_HIGHEST = 32000  # of these integers
_TO_INTEGER = np.float32(1.5 * 2**23)  # added, it leaves the nearest integer in a float's lowest bits


@_compiled
def quantise_rows(
    matrix: np.ndarray, out: np.ndarray, steps: np.ndarray, lengths: np.ndarray, low: int, high: int
) -> None:
    """``matrix[i]`` as ``steps[i] * out[i]``; ``lengths[i]`` is its norm, not finite where an entry is not."""
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
def topk_rows(
    products: np.ndarray,
    steps: np.ndarray,
    lengths: np.ndarray,
    weight_steps: np.ndarray,
    longest: float,
    coarsest: float,
    highest_bias: float,
    width: int,
    centred: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    values: np.ndarray,
    latents: np.ndarray,
    low: int,
    high: int,
) -> None:
    """The choice for tokens of which ``products`` [B, M] int32 is q . r, ``steps`` and ``lengths`` [B] are s and |x|.

    ``weight_steps`` [M] is t; ``longest``, ``coarsest`` and ``highest_bias`` are the largest |w|, t and |bias|, not
    finite where one of them is not.
    """
    m, k = products.shape[1], values.shape[1]
    lanes, mask, rough = np.empty(width, np.int16), np.zeros(m + -m % 8, np.uint8), np.empty(m, np.int16)
    found, who, exact = np.empty(room(m), np.int16), np.empty(room(m), np.int64), np.empty(room(m), centred.dtype)
    margin = 1 + MARGIN * _UNITS
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
            # Something is not a number, or too large or too small for one: all are computed, and it surfaces.
            n = m
            for j in range(m):
                who[j] = j
        else:
            # Raised by the margin, because what seems to be below zero may be above.
            for j in range(m):
                value = np.float32(product[j]) * weight_steps[j] * per_product + bias[j] * per_bias + raised
                rough[j] = np.int16(max(lowest, min(highest, value)))
            n = candidates(rough, k, margin, lanes, mask, found, who)
        exact_rows(centred[b], weight, bias, who, n, exact)
        keep_largest(exact, who, n, values[b], latents[b])
