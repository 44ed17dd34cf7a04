"""From centred activations to the latents that fire: the dense encoder product and the choice among its results.

The product is the only dense arithmetic of a step, and most of all its arithmetic. It may be rounded to bfloat16,
because it only has to tell which latents are worth computing: their activations are computed in float32 again (see
``kernels_bf16``). Pre-activations exist for some rows at a time only, never as a B x M matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae import kernels
from sae.dictionary import Firings
from sae.precision import Precision

_PRE_ACTIVATION_BYTES = 32 * 2**20  # dense pre-activations that may exist at once; about a last-level cache
_CPU_BFLOAT16_BYTES = 8 * 2**20  # the product is so fast that it pays to find its results in the cache


def topk_firings(centred: Tensor, weight: Tensor, bias: Tensor, k: int, precision: Precision = "float32") -> Firings:
    """TopK(relu(centred @ weight.T + bias)) for centred [B, D], weight [M, D], bias [M].

    ``precision`` is that of the product; activations are those of the tensors' own type in any case.
    """
    if precision == "bfloat16" and centred.dtype == torch.float32:
        return _rounded(centred, weight, bias, k)
    rows = max(1, _PRE_ACTIVATION_BYTES // (weight.shape[0] * weight.element_size()))
    parts = [kernels.topk(torch.addmm(bias, part, weight.T), k) for part in centred.split(rows)]
    if len(parts) == 1:
        return Firings(*parts[0])
    return Firings(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


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
    pre = inputs.new_empty(rows, num_latents)
    found = Firings(centred.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=centred.device))
    for start in range(0, n, max(1, rows)):
        part = slice(start, start + rows)
        dense = torch.mm(inputs[part], columns.T, out=pre[: len(inputs[part])])
        found.activations[part], found.indices[part] = kernels.rounded_topk(dense, centred[part], weight, bias, k)
    return found


def _widened(matrix: Tensor) -> Tensor:
    """A copy in bfloat16 with room for two more columns."""
    wide = torch.empty(len(matrix), matrix.shape[1] + 2, dtype=torch.bfloat16, device=matrix.device)
    wide[:, : matrix.shape[1]] = matrix
    return wide
