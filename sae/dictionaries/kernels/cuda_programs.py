"""The Triton programs of the sparse steps, launched by ``cuda``: one program per row.

* Top-k bisects over the bits of floats. A row is first folded into lanes; a value that K lanes' maxima reach is a lower
  bound of the K-th largest, so one more pass leaves a short list, which is bisected to the last bit. If the list is
  long (ties), the row is bisected as a whole. Slots come in the order of their latents; of ties the first are taken.
* A program that decodes a token also computes the gradient of its activations, while the K decoder rows are in cache.
* Weight gradients go latent by latent, so that only one program writes a row and no addition is atomic.

Row numbers are 64-bit: S x M x D and S x B x M exceed 2^31. Only the first grid axis is wide enough to count them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _order(value: tl.tensor, INT: tl.constexpr, HIGHEST: tl.constexpr) -> tl.tensor:
    """Return integers ordered as the values, 0 for those not positive; NaN is above infinity."""
    bits = value.to(INT, bitcast=True) & HIGHEST
    return tl.where((value > 0) | (value != value), bits, 0)


@triton.jit
def _threshold(
    bits: tl.tensor, k: tl.tensor, INT: tl.constexpr, TOP: tl.constexpr, LAST: tl.constexpr, EXACT: tl.constexpr
) -> tl.tensor:
    """Return the largest integer that ``k`` of ``bits`` reach, or one that as many reach; 0 if fewer are positive.

    Without EXACT, the first integer found that at least ``k`` and at most ``k + k / 4`` reach.
    """
    most = k
    if not EXACT:
        most = k + k // 4
    level = tl.full([], 0, INT)
    step = tl.full([], 1, INT) << TOP
    reach = tl.full([], 2147483647, tl.int32)
    while (step >= LAST) & (reach > most):
        trial = level | step
        n = tl.sum((bits >= trial).to(tl.int32), 0)
        level = tl.where(n >= k, trial, level)
        reach = tl.where(n >= k, n, reach)
        step = step >> 1
    return level


@triton.jit
def _part(pre: tl.tensor, column: tl.tensor, n: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """Load the pre-activations of the given columns; 0 beyond the row's end."""
    return tl.load(pre + column, mask=column < n, other=0.0).to(FLOAT)


@triton.jit
def shortlist(
    pre: tl.tensor, found: tl.tensor, who: tl.tensor, count: tl.tensor, n: tl.tensor, k: tl.tensor,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, FLOAT: tl.constexpr, INT: tl.constexpr, TOP: tl.constexpr,
    HIGHEST: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    """Find the positive values of each row that are not below the bound, and count them; keep CAPACITY of them."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * n
    found += row * CAPACITY
    who += row * CAPACITY
    lane = tl.arange(0, LANES)
    best = tl.zeros([LANES], INT)
    for start in range(0, n, LANES):
        value = _part(pre, start + lane, n, FLOAT)
        best = tl.maximum(best, _order(value, INT, HIGHEST))
    floor = tl.maximum(_threshold(best, k, INT, TOP, LAST, False), 1)
    total = tl.full([], 0, tl.int32)
    for start in range(0, n, LANES):
        column = start + lane
        value = _part(pre, column, n, FLOAT)
        keep = _order(value, INT, HIGHEST) >= floor
        here = tl.sum(keep.to(tl.int32), 0)
        if here > 0:
            at = total + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(found + at, value, mask=keep & (at < CAPACITY))
            tl.store(who + at, column, mask=keep & (at < CAPACITY))
        total += here
    tl.store(count + row, total)


@triton.jit
def choose(
    found: tl.tensor, who: tl.tensor, count: tl.tensor, values: tl.tensor, latents: tl.tensor, k: tl.tensor,
    stride: tl.tensor, CAPACITY: tl.constexpr, SLOTS: tl.constexpr, INT: tl.constexpr, TOP: tl.constexpr,
    HIGHEST: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    """Choose the ``k`` largest of each short list; lists longer than CAPACITY are left to :func:`choose_from_row`."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(count + row)
    if n <= CAPACITY:
        place = tl.arange(0, CAPACITY)
        value = tl.load(found + row * stride + place, mask=place < n, other=0.0)
        latent = tl.load(who + row * stride + place, mask=place < n, other=0)
        bits = _order(value, INT, HIGHEST)
        level = _threshold(bits, k, INT, TOP, LAST, True)
        above = (bits > level).to(tl.int32)
        equal = ((bits == level) & (bits > 0)).to(tl.int32)
        chosen = (above > 0) | ((equal > 0) & (tl.cumsum(equal, 0) <= k - tl.sum(above, 0)))
        at = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(values + row * k + at, value, mask=chosen)
        tl.store(latents + row * k + at, latent.to(tl.int64), mask=chosen)
        slot = tl.arange(0, SLOTS)
        empty = (slot >= tl.sum(chosen.to(tl.int32), 0)) & (slot < k)
        tl.store(values + row * k + slot, tl.zeros([SLOTS], value.dtype), mask=empty)
        tl.store(latents + row * k + slot, tl.zeros([SLOTS], tl.int64), mask=empty)


@triton.jit
def choose_from_row(
    pre: tl.tensor, count: tl.tensor, values: tl.tensor, latents: tl.tensor, n: tl.tensor, k: tl.tensor,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, SLOTS: tl.constexpr, FLOAT: tl.constexpr, INT: tl.constexpr,
    TOP: tl.constexpr, HIGHEST: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    """Choose the ``k`` largest of each row whose short list did not fit; the row is read again for every bit."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(count + row) > CAPACITY:
        pre += row * n
        lane = tl.arange(0, LANES)
        level = tl.full([], 0, INT)
        step = tl.full([], 1, INT) << TOP
        while step >= LAST:
            trial = level | step
            reach = tl.full([], 0, tl.int32)
            for start in range(0, n, LANES):
                bits = _order(_part(pre, start + lane, n, FLOAT), INT, HIGHEST)
                reach += tl.sum((bits >= trial).to(tl.int32), 0)
            level = tl.where(reach >= k, trial, level)
            step = step >> 1
        above = tl.full([], 0, tl.int32)
        for start in range(0, n, LANES):
            bits = _order(_part(pre, start + lane, n, FLOAT), INT, HIGHEST)
            above += tl.sum((bits > level).to(tl.int32), 0)
        filled = tl.full([], 0, tl.int32)
        ties = tl.full([], 0, tl.int32)
        for start in range(0, n, LANES):
            value = _part(pre, start + lane, n, FLOAT)
            bits = _order(value, INT, HIGHEST)
            equal = ((bits == level) & (bits > 0)).to(tl.int32)
            chosen = (bits > level) | ((equal > 0) & (ties + tl.cumsum(equal, 0) <= k - above))
            at = filled + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(values + row * k + at, value, mask=chosen)
            tl.store(latents + row * k + at, (start + lane).to(tl.int64), mask=chosen)
            filled += tl.sum(chosen.to(tl.int32), 0)
            ties += tl.sum(equal, 0)
        slot = tl.arange(0, SLOTS)
        empty = (slot >= filled) & (slot < k)
        tl.store(values + row * k + slot, tl.zeros([SLOTS], FLOAT), mask=empty)
        tl.store(latents + row * k + slot, tl.zeros([SLOTS], tl.int64), mask=empty)


@triton.jit
def _gathered(
    weight: tl.tensor, first_row: tl.tensor, latents: tl.tensor, values: tl.tensor, start: tl.tensor, k: tl.tensor,
    width: tl.tensor, TILE: tl.constexpr, WIDTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load activations [TILE] of the slots from ``start`` on, their latents and rows; 0 for empty slots."""
    slot = start + tl.arange(0, TILE)
    d = tl.arange(0, WIDTH)
    value = tl.load(values + slot, mask=slot < k, other=0.0)
    latent = first_row + tl.load(latents + slot, mask=slot < k, other=0)
    w = tl.load(
        weight + latent[:, None] * width + d[None, :], mask=(value != 0)[:, None] & (d < width)[None, :], other=0.0
    )
    return value, latent, w


@triton.jit
def decode_rows(
    values: tl.tensor, latents: tl.tensor, weight: tl.tensor, bias: tl.tensor, target: tl.tensor, out: tl.tensor,
    products: tl.tensor, squares: tl.tensor, n_latents: tl.tensor, rows: tl.tensor, target_rows: tl.tensor,
    k: tl.tensor, width: tl.tensor, TILE: tl.constexpr, WIDTH: tl.constexpr, ERROR: tl.constexpr,
) -> None:  # fmt: skip
    """Decode a token's slots; with ERROR, compute the results of ``Kernels.residuals``."""
    row = tl.program_id(0).to(tl.int64)
    seed = row // rows
    d = tl.arange(0, WIDTH)
    values += row * k
    latents += row * k
    products += row * k
    total = tl.load(bias + seed * width + d, mask=d < width, other=0.0)
    if ERROR:
        total -= tl.load(target + row % target_rows * width + d, mask=d < width, other=0.0)
    for start in range(0, k, TILE):
        value, _, w = _gathered(weight, seed * n_latents, latents, values, start, k, width, TILE, WIDTH)
        total += tl.sum(value[:, None] * w, 0)
    tl.store(out + row * width + d, total, mask=d < width)
    if ERROR:
        tl.store(squares + row, tl.sum(total * total, 0))
        for start in range(0, k, TILE):
            value, _, w = _gathered(weight, seed * n_latents, latents, values, start, k, width, TILE, WIDTH)
            slot = start + tl.arange(0, TILE)
            tl.store(products + slot, tl.where(value > 0, tl.sum(w * total[None, :], 1), 0.0), mask=slot < k)


@triton.jit
def encode_slots(
    values: tl.tensor, latents: tl.tensor, weight: tl.tensor, bias: tl.tensor, centred: tl.tensor, out: tl.tensor,
    n_latents: tl.tensor, rows: tl.tensor, k: tl.tensor, width: tl.tensor, TILE: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the pre-activations of a token's slots in full precision; 0 for empty slots."""
    row = tl.program_id(0).to(tl.int64)
    first_row = row // rows * n_latents
    d = tl.arange(0, WIDTH)
    x = tl.load(centred + row * width + d, mask=d < width, other=0.0)
    for start in range(0, k, TILE):
        value, latent, w = _gathered(
            weight, first_row, latents + row * k, values + row * k, start, k, width, TILE, WIDTH
        )
        slot = start + tl.arange(0, TILE)
        pre = tl.sum(w * x[None, :], 1) + tl.load(bias + latent)
        tl.store(out + row * k + slot, tl.where(value != 0, pre, 0.0), mask=slot < k)


@triton.jit
def gradient_rows(
    order: tl.tensor, offsets: tl.tensor, values: tl.tensor, products: tl.tensor, residual: tl.tensor,
    centred: tl.tensor, grad_dec: tl.tensor, grad_enc: tl.tensor, grad_bias: tl.tensor, scale: tl.float64, k: tl.tensor,
    width: tl.tensor, TILE: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Compute one latent's row of each gradient, WIDTH columns of it, from the slots between its two offsets."""
    latent = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = tl.load(offsets + latent)
    stop = tl.load(offsets + latent + 1)
    dec = tl.zeros([WIDTH], grad_dec.dtype.element_ty)
    enc = tl.zeros([WIDTH], grad_dec.dtype.element_ty)
    along = tl.zeros([TILE], grad_dec.dtype.element_ty)
    for i in range(start, stop, TILE):
        place = i + tl.arange(0, TILE)
        slot = tl.load(order + place, mask=place < stop, other=0)
        value = tl.load(values + slot, mask=place < stop, other=0.0)
        product = tl.load(products + slot, mask=place < stop, other=0.0)
        element = (slot // k)[:, None] * width + d[None, :]
        there = (place < stop)[:, None] & (d < width)[None, :]
        dec += tl.sum(value[:, None] * tl.load(residual + element, mask=there, other=0.0), 0)
        enc += tl.sum(product[:, None] * tl.load(centred + element, mask=there, other=0.0), 0)
        along += product
    tl.store(grad_dec + latent * width + d, dec * scale, mask=d < width)
    tl.store(grad_enc + latent * width + d, enc * scale, mask=d < width)
    if tl.program_id(1) == 0:
        tl.store(grad_bias + latent, tl.sum(along, 0) * scale)


@triton.jit
def adam_rows(
    weight: tl.tensor, grad: tl.tensor, first: tl.tensor, second: tl.tensor, step: tl.float64, root: tl.float64,
    eps: tl.float64, beta1: tl.float64, beta2: tl.float64, rest1: tl.float64, rest2: tl.float64, total: tl.tensor,
    width: tl.tensor, WIDTH: tl.constexpr, UNIT_ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Update one row: a row of length 1 with UNIT_ROWS, else as many numbers as fit."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    element = row * width + d
    there = (d < width) & (element < total)
    w = tl.load(weight + element, mask=there, other=0.0)
    g = tl.load(grad + element, mask=there, other=0.0)
    if UNIT_ROWS:
        g -= tl.sum(g * w, 0) * w
    mean = tl.load(first + element, mask=there, other=0.0) * beta1 + g * rest1
    square = tl.load(second + element, mask=there, other=0.0) * beta2 + g * g * rest2
    tl.store(first + element, mean, mask=there)
    tl.store(second + element, square, mask=there)
    w -= mean * step / (tl.sqrt(square) * root + eps)
    if UNIT_ROWS:
        w = w / tl.sqrt(tl.sum(w * w, 0))
    tl.store(weight + element, w, mask=there)
