"""Encode centred activations: the dense encoder product and the choice among its results.

The product is most of a step's arithmetic. It may be rounded to 8 bits or bfloat16, because it only finds the latents
worth computing again in float32 (``kernels.cpu_shortlist``). No B x M matrix is formed, only some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sae.common.precision import Precision, has_int8_products
from sae.dictionaries.kernels import buffers, cpu
from sae.dictionaries.kernels.steps import kernels_for
from sae.dictionaries.sae import Firings

_PRE_ACTIVATION_BYTES = 32 * 2**20  # dense pre-activations that may exist at once; about a last-level cache
_CPU_BFLOAT16_BYTES = 8 * 2**20  # the product is so fast that finding its results in the cache pays


def topk_firings(centred: Tensor, weight: Tensor, bias: Tensor, k: int, precision: Precision = "float32") -> Firings:
    """Return TopK(relu(centred @ weight.T + bias)) for [B, D], [M, D], [M]; ``precision`` affects the product only."""
    if precision == "int8" and centred.dtype == torch.float32 and centred.is_cpu:
        return _topk_in_int8(centred, weight, bias, k)
    if precision == "bfloat16" and centred.dtype == torch.float32:
        return _topk_in_bfloat16(centred, weight, bias, k)
    if cpu.multiplies_in_tiles(centred):
        return Firings(*cpu.product_topk(centred.contiguous(), weight, bias, k))
    rows = _rows_at_once(centred, len(weight) * weight.element_size())
    pre = _empty((rows, len(weight)), centred)

    def choose(part: slice) -> tuple[Tensor, Tensor]:
        dense = torch.addmm(bias, centred[part], weight.T, out=pre[: len(centred[part])])
        return kernels_for(centred.device).topk(dense, k)

    return _choose_by_pieces(centred, k, rows, choose)


def _choose_by_pieces(centred: Tensor, k: int, rows: int, choose: Callable[[slice], tuple[Tensor, Tensor]]) -> Firings:
    n = len(centred)
    found = Firings(centred.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=centred.device))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        found.activations[part], found.indices[part] = choose(part)
    return found


def _topk_in_int8(centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> Firings:
    x, w = cpu.quantise(centred.contiguous()), cpu.quantise(weight)
    rows = _rows_at_once(centred, 4 * len(weight))
    memory = _empty((rows, len(weight)), centred, torch.int32)

    def choose(part: slice) -> tuple[Tensor, Tensor]:
        inputs = cpu.Quantised(*(t[part] for t in x))
        products = product_of_int8(inputs.rows, w.rows, memory[: len(inputs.rows)])
        return cpu.quantised_topk(products, inputs, w, centred[part], weight, bias, k)

    return _choose_by_pieces(centred, k, rows, choose)


def product_of_int8(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """Write ``x @ w.T`` of int8 [B, D] and [M, D] into ``out`` [B, M] int32."""
    if has_int8_products() and x.shape[1] > 1:  # PyTorch 2.13 returns noise for a width of one
        return torch._int_mm(x, w.T, out=out)
    return out.copy_(x.float() @ w.float().T)  # without the instructions, ``_int_mm`` may saturate


def _topk_in_bfloat16(centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> Firings:
    # The bias goes into the product as two more columns, which is cheaper than adding it afterwards; two because
    # one would round it.
    d_in = centred.shape[1]
    inputs, columns = _widen(centred), _widen(weight)
    inputs[:, d_in:] = 1
    columns[:, d_in] = bias
    columns[:, d_in + 1] = bias - columns[:, d_in]
    size = _CPU_BFLOAT16_BYTES if centred.is_cpu else _PRE_ACTIVATION_BYTES
    rows = _rows_at_once(centred, 2 * len(weight), size)
    pre = _empty((rows, len(weight)), inputs)

    def choose(part: slice) -> tuple[Tensor, Tensor]:
        dense = torch.mm(inputs[part], columns.T, out=pre[: len(inputs[part])])
        return kernels_for(centred.device).rounded_topk(dense, centred[part], weight, bias, k)

    return _choose_by_pieces(centred, k, rows, choose)


def _widen(matrix: Tensor) -> Tensor:
    wide = _empty((len(matrix), matrix.shape[1] + 2), matrix, torch.bfloat16)
    wide[:, : matrix.shape[1]] = matrix
    return wide


def _rows_at_once(centred: Tensor, row_bytes: int, size: int | None = None) -> int:
    return max(1, min(len(centred), (size or _PRE_ACTIVATION_BYTES) // row_bytes))


def _empty(shape: tuple[int, int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or like.dtype
    return buffers.empty(shape, dtype) if like.is_cpu else torch.empty(shape, dtype=dtype, device=like.device)
