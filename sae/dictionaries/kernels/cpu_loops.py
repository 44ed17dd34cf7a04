"""Compiled loops of the sparse steps; ``cpu`` calls them, one range of rows per thread.

* A row of pre-activations is folded into lanes with their maxima. A value that K maxima reach is a lower bound of the
  K-th largest, so only the few lanes above it are searched; both vectorise, and a bisection finds the K.
* A token's decoded residual stays in the first-level cache while the gradients of its K activations are computed.
* Weight gradients go latent by latent, so one thread writes a row of each gradient, in the order of the tokens: no
  atomics, and the same bits whatever the number of threads.

Four slots are added at a time: otherwise the accumulator's reads and writes would be the limit. Compiled code checks no
bounds, so every index computed from floats is bounded, for infinity, NaN, ties and subnormal numbers too
(``tests/sae/dictionaries/test_kernel_bounds.py``).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# Sums may be reordered and multiplications fused (that is what lets them vectorise); NaN and infinity keep
# their meaning, because the trainer's check for them relies on it.
FAST = {"reassoc", "contract", "nsz", "arcp"}
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
BETAS = 0.9, 0.999  # of Adam
EPS = 6.25e-10  # of Adam (Gao et al. 2024): gradients of rare latents are of the size of the usual 1e-8
Arrays = tuple[np.ndarray, ...]
VECTOR = 32  # short lists are filled up to whole registers; the remainder of a loop costs as much as ten of them
_SMALLEST_MOMENT = 1e-30  # below it a moment counts as zero; subnormal arithmetic is up to 100 times slower


@_compiled
def bracket(values: np.ndarray, n: int, k: int, slack: int) -> tuple[Any, Any]:
    """Return ``low < high`` such that at least ``k`` of ``values[:n]`` reach ``low`` and fewer reach ``high``.

    Bisects until at most ``k + slack`` reach ``low``, or no number lies between the two (ties). ``low`` is 0 if fewer
    than ``k`` are positive. If ``k`` or more are infinite, so is ``high``, which they reach: callers count slots.
    """
    kind = values.dtype.type
    low, high, half, one, zero = kind(0), kind(0), kind(0.5), kind(1), kind(0)
    for i in range(n):
        high = values[i] if values[i] > high else high
    high += high
    top = min(high, kind(np.finfo(values.dtype).max))  # there is no middle between a number and infinity
    while True:
        middle = low + (top - low) * half
        if middle <= low or middle >= top:
            return low, high
        reach = zero
        for i in range(n):
            reach += one if values[i] >= middle else zero
        if reach < k:
            high = top = middle
        else:
            low = middle
            if reach <= k + slack:
                return low, high


@_compiled
def keep_largest(exact: np.ndarray, who: np.ndarray, n: int, best: np.ndarray, names: np.ndarray) -> None:
    """Write the largest positive ``exact[:n]`` and their latents into ``best`` and ``names``, then zeros.

    ``exact`` must be longer by a whole register.
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
        # Comparisons are negated so that NaN passes them.
        if filled < k and not value <= 0 and (not value < above or (value >= least and ties > 0)):
            ties -= value < above
            best[filled], names[filled] = value, who[i]
            filled += 1
    best[filled:], names[filled:] = 0, 0


@_compiled
def add_to_rows(rows: np.ndarray, amount: np.ndarray) -> None:
    """Add ``amount`` to each row; NumPy takes half as long again."""
    for b in range(len(rows)):
        row = rows[b]
        for j in range(len(row)):
            row[j] += amount[j]


@_compiled
def topk_rows(pre: np.ndarray, depth: int, slots: Arrays, low: int, high: int) -> None:
    values, latents = slots
    m, k = pre.shape[1], values.shape[1]
    width = m // depth
    lowest = pre.dtype.type(-np.inf)
    lanes, chosen = np.empty(width, pre.dtype), np.empty(width, np.int64)
    found, who = np.empty(m + 1 + VECTOR, pre.dtype), np.empty(m + 1, np.int64)
    for b in range(low, high):
        row = pre[b]
        for lane in range(width):  # NaN, which nothing exceeds, must not hide the rest of its lane
            lanes[lane] = row[lane] if row[lane] > lowest else lowest
        for start in range(width, depth * width, width):
            part = row[start : start + width]
            for lane in range(width):
                lanes[lane] = part[lane] if part[lane] > lanes[lane] else lanes[lane]
        floor, _ = bracket(lanes, width, k, 1 + k // 4)
        # Written first and counted after: no branch to predict wrongly.
        n_chosen, n = 0, 0
        for lane in range(width):
            chosen[n_chosen] = lane
            n_chosen += lanes[lane] >= floor
        for c in range(n_chosen):
            for j in range(chosen[c], depth * width, width):
                found[n], who[n] = row[j], j
                n += (row[j] >= floor) & (row[j] > 0)
        for j in range(depth * width, m):
            found[n], who[n] = row[j], j
            n += (row[j] >= floor) & (row[j] > 0)
        keep_largest(found, who, n, values[b], latents[b])


@_compiled
def _decode_token(values: np.ndarray, latents: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """Add ``values @ weight[latents]`` to ``out``; the zeros among ``values`` are empty slots."""
    k = len(values)
    for j in range(0, k - k % 4, 4):
        a0, a1, a2, a3 = values[j], values[j + 1], values[j + 2], values[j + 3]
        if a0 == 0 and a1 == 0 and a2 == 0 and a3 == 0:
            continue
        w0, w1, w2, w3 = weight[latents[j]], weight[latents[j + 1]], weight[latents[j + 2]], weight[latents[j + 3]]
        for d in range(len(out)):
            out[d] += a0 * w0[d] + a1 * w1[d] + a2 * w2[d] + a3 * w3[d]
    for j in range(k - k % 4, k):
        a0 = values[j]
        if a0 != 0:
            w0 = weight[latents[j]]
            for d in range(len(out)):
                out[d] += a0 * w0[d]


@_compiled
def decode_rows(slots: Arrays, decoder: Arrays, out: np.ndarray, low: int, high: int) -> None:
    (values, latents), (weight, bias) = slots, decoder
    for b in range(low, high):
        out[b] = bias
        _decode_token(values[b], latents[b], weight, out[b])


@_compiled
def residual_rows(slots: Arrays, decoder: Arrays, target: np.ndarray, out: Arrays, low: int, high: int) -> None:
    (values, latents), (weight, bias), (residual, products, squares) = slots, decoder, out
    k = values.shape[1]
    for b in range(low, high):
        r, aim, a, who = residual[b], target[b], values[b], latents[b]
        for d in range(len(r)):
            r[d] = bias[d] - aim[d]
        _decode_token(a, who, weight, r)
        total = r.dtype.type(0)
        for d in range(len(r)):
            total += r[d] * r[d]
        squares[b] = total
        for j in range(k):
            dot = r.dtype.type(0)
            if a[j] > 0:
                w = weight[who[j]]
                for d in range(len(r)):
                    dot += r[d] * w[d]
            products[b, j] = dot


@_compiled
def sort_slots(
    values: np.ndarray, latents: np.ndarray, offsets: np.ndarray, token: np.ndarray, slot: np.ndarray
) -> None:
    """Sort slots by latent (a counting sort). ``offsets`` [M+2] must be zeros; its first M+1 entries are the result."""
    n, k = values.shape
    for b in range(n):
        for j in range(k):
            if values[b, j] > 0:
                offsets[latents[b, j] + 2] += 1
    for m in range(2, len(offsets)):
        offsets[m] += offsets[m - 1]
    for b in range(n):
        for j in range(k):
            if values[b, j] > 0:
                at = offsets[latents[b, j] + 1]
                offsets[latents[b, j] + 1] = at + 1
                token[at] = b
                slot[at] = b * k + j


@_compiled
def _add_rows(weights: np.ndarray, slot: np.ndarray, token: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """Add ``sum_i weights[slot[i]] * rows[token[i]]`` to ``out``."""
    n = len(slot)
    for i in range(0, n - n % 4, 4):
        a0, a1, a2, a3 = weights[slot[i]], weights[slot[i + 1]], weights[slot[i + 2]], weights[slot[i + 3]]
        r0, r1, r2, r3 = rows[token[i]], rows[token[i + 1]], rows[token[i + 2]], rows[token[i + 3]]
        for d in range(len(out)):
            out[d] += a0 * r0[d] + a1 * r1[d] + a2 * r2[d] + a3 * r3[d]
    for i in range(n - n % 4, n):
        a0 = weights[slot[i]]
        r0 = rows[token[i]]
        for d in range(len(out)):
            out[d] += a0 * r0[d]


@_compiled
def weight_gradient_rows(
    factors: Arrays, order: Arrays, rows: Arrays, scale: float, out: Arrays, low: int, high: int
) -> None:
    (values, products), (offsets, token, slot), (residual, centred) = factors, order, rows
    grad_dec, grad_enc, grad_bias = out
    for m in range(low, high):
        start, stop = offsets[m], offsets[m + 1]
        dec, enc = grad_dec[m], grad_enc[m]
        dec[:] = 0
        enc[:] = 0
        bias = dec.dtype.type(0)
        _add_rows(values, slot[start:stop], token[start:stop], residual, dec)
        _add_rows(products, slot[start:stop], token[start:stop], centred, enc)
        for i in range(start, stop):
            bias += products[slot[i]]
        factor = dec.dtype.type(scale)
        for d in range(len(dec)):
            dec[d] *= factor
        for d in range(len(enc)):
            enc[d] *= factor
        grad_bias[m] = bias * factor


@_compiled
def adam_rows(
    tensors: Arrays, rate: float, corrections: tuple[float, float], unit_rows: bool, low: int, high: int
) -> None:
    weight, grad, first, second = tensors
    kind, (beta1, beta2) = weight.dtype.type, BETAS
    b1, b2, c1, c2 = kind(beta1), kind(beta2), kind(1 - beta1), kind(1 - beta2)
    step, root, small = kind(rate / corrections[0]), kind(1 / np.sqrt(corrections[1])), kind(EPS)
    least, zero = kind(_SMALLEST_MOMENT), kind(0)
    for i in range(low, high):
        w, g, m, v = weight[i], grad[i], first[i], second[i]
        along = zero
        if unit_rows:
            for d in range(len(w)):
                along += g[d] * w[d]
        for d in range(len(w)):
            gradient = g[d] - along * w[d]
            mean = b1 * m[d] + c1 * gradient
            square = b2 * v[d] + c2 * gradient * gradient
            mean = mean if abs(mean) > least else zero
            square = square if square > least else zero
            m[d], v[d] = mean, square
            w[d] -= step * mean / (np.sqrt(square) * root + small)
        if unit_rows:
            norm = zero
            for d in range(len(w)):
                norm += w[d] * w[d]
            factor = kind(1) / np.sqrt(norm)
            for d in range(len(w)):
                w[d] *= factor
