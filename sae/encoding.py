"""From centred activations to the latents that fire: the dense encoder product and the choice among its results.

Pre-activations exist for some rows at a time only, never as a B x M matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae import kernels
from sae.dictionary import Firings

_PRE_ACTIVATION_BYTES = 32 * 2**20  # dense pre-activations that may exist at once; about a last-level cache


def topk_firings(centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> Firings:
    """TopK(relu(centred @ weight.T + bias)) for centred [B, D], weight [M, D], bias [M]."""
    rows = max(1, _PRE_ACTIVATION_BYTES // (weight.shape[0] * weight.element_size()))
    parts = [kernels.topk(torch.addmm(bias, part, weight.T), k) for part in centred.split(rows)]
    if len(parts) == 1:
        return Firings(*parts[0])
    return Firings(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
