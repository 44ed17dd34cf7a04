"""What training minimises, and what one batch came to: the words that trainer and architectures share.

With residual r = x_hat - x and total variance V = sum ||x - mean(x)||^2 of the batch, the loss is

    FVU + alpha * AuxK + lambda * S,   FVU = sum ||r||^2 / V

and S is the architecture's own sparsity term, a mean over the tokens; TopK and BatchTopK have none. V and the number
of tokens are given, not taken from the batch, so that a batch can be worked on in parts whose gradients add up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AuxK(NamedTuple):
    """What the auxiliary loss needs to know (Gao et al. 2024, appendix A.2)."""

    dead: Tensor
    """[M] bool: the latents that it revives"""
    k: int
    """dead latents per token in the reconstruction of the error; fewer where fewer are dead"""
    coefficient: float
    """alpha"""


class Objective(NamedTuple):
    """The loss of one step."""

    variance: float
    """V, of the whole batch"""
    tokens: int
    """B, of the whole batch"""
    auxk: AuxK | None = None
    sparsity: float = 0.0
    """lambda; architectures that choose by rank have no use for it"""


class Loss(NamedTuple):
    """One batch, before the step; the numbers are float64 scalars on the weights' device."""

    fvu: Tensor
    auxk: Tensor
    """without its coefficient; 0 where no latent is dead"""
    sparsity: Tensor
    """S, without its coefficient; 0 for architectures without one"""
    firings: Tensor
    """[M] int64: tokens of the batch for which each latent fires"""


def total_variance(x: Tensor) -> float:
    """V, the sum of squared distances of ``x`` [B, D] from its mean: the same for every dictionary."""
    return float((x - x.mean(0)).square().sum(dtype=torch.float64))
