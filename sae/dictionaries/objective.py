"""What training minimises, and what one batch came to: the words that trainer and architectures share.

With residual r = x_hat - x and total variance V = sum ||x - mean(x)||^2 of the batch, the loss is

    FVU + alpha * AuxK + lambda * S + G,   FVU = sum ||r||^2 / V

where AuxK revives dead latents (or another term in its place, see ``sae.dictionaries.gradients``), S is the
architecture's own sparsity term, a mean over the tokens (TopK and BatchTopK have none), and G is what else it minimises
(Gated's auxiliary reconstruction). V and the number of tokens are given, not taken from the batch, so that a batch can
be worked on in parts whose gradients add up.

Activations are not rescaled before training. What has their unit is measured in sqrt(V / B), the root mean square
distance of a token from the mean: so lambda and the bandwidth mean the same for every hookpoint.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae.common.precision import Precision
from sae.common.ranks import ALONE, Job


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
    bandwidth: float = 0.01
    """epsilon of JumpReLU's estimators, in units of ``unit``"""
    precision: Precision = "float32"
    """of the dense encoder product; activations and gradients are not rounded in any case"""
    job: Job = ALONE
    """the processes that share the batch, for architectures that choose among all of its tokens"""

    @property
    def unit(self) -> float:
        """sqrt(V / B), the root mean square distance of a token's activations from their mean."""
        return math.sqrt(self.variance / self.tokens)


class Loss(NamedTuple):
    """One batch, before the step; the numbers are float64 scalars on the weights' device."""

    fvu: Tensor
    auxk: Tensor
    """without its coefficient, or in its place P where there is a penalty (see ``sae.dictionaries.gradients``); 0
    without a dead latent"""
    sparsity: Tensor
    """S, without its coefficient; 0 for architectures without one"""
    firings: Tensor
    """[M] int64: tokens of the batch for which each latent fires"""
    other: Tensor | None = None
    """G; None for architectures without it"""
    least: Tensor | None = None
    """the smallest activation among the firings; None for architectures that do not ask"""


def total_variance(x: Tensor) -> float:
    """V, the sum of squared distances of ``x`` [B, D] from its mean: the same for every dictionary."""
    return float((x - x.mean(0)).square().sum(dtype=torch.float64))
