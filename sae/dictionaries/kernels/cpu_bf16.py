"""The compiled choice of latents by pre-activations in bfloat16; see ``kernels_shortlist``.

Positive bfloat16 numbers are ordered as their bits are, and negative ones have the sign of an int16: the choice is
one of small integers. Only a latent whose pre-activation is nearly that of the K-th can be taken for another.
"""

from __future__ import annotations

import numba
import numpy as np

from sae.dictionaries.kernels.cpu import FAST
from sae.dictionaries.kernels.cpu_shortlist import candidates, exact_rows, keep_largest, room

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
MARGIN = 3  # units in the last place: one for the rounding of two results, two for what was lost in the products


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
    lanes, mask = np.empty(width, np.int16), np.zeros(m + -m % 8, np.uint8)
    found, who, exact = np.empty(room(m), np.int16), np.empty(room(m), np.int64), np.empty(room(m), centred.dtype)
    for b in range(low, high):
        n = candidates(bits[b], k, MARGIN, lanes, mask, found, who)
        exact_rows(centred[b], weight, bias, who, n, exact)
        keep_largest(exact, who, n, values[b], latents[b])
