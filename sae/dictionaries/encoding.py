"""From centred activations to the latents that fire: the dense encoder product and the choice among its results.

The product is the only dense arithmetic of a step, and most of all its arithmetic. It may be rounded to 8 bits or to
bfloat16, because it only has to tell which latents are worth computing: their activations are computed in float32
again (see ``kernels_shortlist``). Pre-activations exist for some rows at a time only, never as a B x M matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.common.precision import Precision, has_int8_products
from sae.dictionaries.kernels import buffers
from sae.dictionaries.kernels import steps as kernels
from sae.dictionaries.sae import Firings

_PRE_ACTIVATION_BYTES = 32 * 2**20  # dense pre-activations that may exist at once; about a last-level cache
_CPU_BFLOAT16_BYTES = 8 * 2**20  # the product is so fast that it pays to find its results in the cache


def topk_firings(centred: Tensor, weight: Tensor, bias: Tensor, k: int, precision: Precision = "float32") -> Firings:
    """TopK(relu(centred @ weight.T + bias)) for centred [B, D], weight [M, D], bias [M].

    ``precision`` is that of the product; activations are those of the tensors' own type in any case.
    """
    if precision == "int8" and centred.dtype == torch.float32 and centred.is_cpu:
        return _in_8_bits(centred, weight, bias, k)
    if precision == "bfloat16" and centred.dtype == torch.float32:
        return _rounded(centred, weight, bias, k)
    if kernels.multiplies_in_tiles(centred):
        return Firings(*kernels.product_topk(centred.contiguous(), weight, bias, k))
    rows = min(len(centred), max(1, _PRE_ACTIVATION_BYTES // (weight.shape[0] * weight.element_size())))
    pre = _room((rows, len(weight)), centred)
    found = _empty(centred, k)
    for start in range(0, len(centred), max(1, rows)):
        part = slice(start, start + rows)
        dense = torch.addmm(bias, centred[part], weight.T, out=pre[: len(centred[part])])
        found.activations[part], found.indices[part] = kernels.topk(dense, k)
    return found


def _in_8_bits(centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> Firings:
    n, num_latents = len(centred), len(weight)
    x, w = kernels.quantised(centred.contiguous()), kernels.quantised(weight)
    rows = min(n, max(1, _PRE_ACTIVATION_BYTES // (4 * num_latents)))
    room = _room((rows, num_latents), centred, torch.int32)
    found = _empty(centred, k)
    for start in range(0, n, max(1, rows)):
        part = slice(start, start + rows)
        of = kernels.Quantised(*(t[part] for t in x))
        products = product_of_int8(of.rows, w.rows, room[: len(of.rows)])
        chosen = kernels.quantised_topk(products, of, w, centred[part], weight, bias, k)
        found.activations[part], found.indices[part] = chosen
    return found


def product_of_int8(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """``x @ w.T`` [B, M] of int8 [B, D] and [M, D] into int32 ``out``; exact where the processor has instructions."""
    if has_int8_products() and x.shape[1] > 1:  # PyTorch 2.13 returns noise for a width of one
        return torch._int_mm(x, w.T, out=out)
    return out.copy_(x.float() @ w.float().T)  # without the instructions, the former may saturate


def _room(shape: tuple[int, int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised matrix beside ``like``, of its type if no other is given."""
    dtype = dtype or like.dtype
    return buffers.empty(shape, dtype) if like.is_cpu else torch.empty(shape, dtype=dtype, device=like.device)


def _empty(centred: Tensor, k: int) -> Firings:
    n = len(centred)
    return Firings(centred.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=centred.device))


def _rounded(centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> Firings:
    (n, d_in), num_latents = centred.shape, len(weight)
    # The bias goes into the product as two more columns, which is cheaper than to add it afterwards; two because
    # one would round it.
    inputs, columns = _widened(centred), _widened(weight)
    inputs[:, d_in:] = 1
    columns[:, d_in] = bias
    columns[:, d_in + 1] = bias - columns[:, d_in]
    room = _CPU_BFLOAT16_BYTES if centred.is_cpu else _PRE_ACTIVATION_BYTES
    rows = min(n, max(1, room // (2 * num_latents)))
    pre = _room((rows, num_latents), inputs)
    found = _empty(centred, k)
    for start in range(0, n, max(1, rows)):
        part = slice(start, start + rows)
        dense = torch.mm(inputs[part], columns.T, out=pre[: len(inputs[part])])
        found.activations[part], found.indices[part] = kernels.rounded_topk(dense, centred[part], weight, bias, k)
    return found


def _widened(matrix: Tensor) -> Tensor:
    """A copy in bfloat16 with room for two more columns."""
    wide = _room((len(matrix), matrix.shape[1] + 2), matrix, torch.bfloat16)
    wide[:, : matrix.shape[1]] = matrix
    return wide
