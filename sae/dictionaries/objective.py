"""The training loss and its parts, shared by the trainer and the architectures.

With residual r = x_hat - x and total variance V = sum ||x - mean(x)||^2 of the batch, the loss is

    FVU + alpha * AuxK + lambda * S + G,   FVU = sum ||r||^2 / V

AuxK, or another term in its place, revives dead latents (``sae.dictionaries.gradients``). S is the architecture's
sparsity term, a mean over tokens (none in TopK and BatchTopK). G is any further term (Gated's auxiliary
reconstruction). V and the number of tokens are given, so that the gradients of parts of a batch add up.

Activations are not rescaled. Numbers with their unit are measured in sqrt(V / B), the root mean square distance of a
token from the mean, so that lambda and the bandwidth mean the same for every hookpoint.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae.common.precision import Precision
from sae.common.ranks import ALONE, Job


class AuxK(NamedTuple):
    """The auxiliary loss of one step (Gao et al. 2024, appendix A.2)."""

    dead: Tensor  # [M] bool: the latents that it revives
    k: int  # dead latents per token in the reconstruction of the error, at most
    coefficient: float  # alpha


class Objective(NamedTuple):
    """The loss of one step."""

    variance: float  # V, of the whole batch
    tokens: int  # B, of the whole batch
    auxk: AuxK | None = None
    sparsity: float = 0.0  # lambda; unused by architectures that choose by rank
    bandwidth: float = 0.01  # epsilon of JumpReLU's estimators, in units of ``unit``
    precision: Precision = "float32"  # of the dense encoder product; activations and gradients are never rounded
    job: Job = ALONE  # the processes that share the batch, for architectures that choose among all of its tokens

    @property
    def unit(self) -> float:
        """sqrt(V / B), the root mean square distance of a token's activations from their mean."""
        return math.sqrt(self.variance / self.tokens)


class Loss(NamedTuple):
    """The loss of one batch, before the step; float64 scalars on the weights' device."""

    fvu: Tensor
    auxk: Tensor  # without its coefficient; P for architectures with a penalty; 0 without a dead latent
    sparsity: Tensor  # S, without its coefficient; 0 for architectures without it
    firings: Tensor  # [M] int64: tokens of the batch for which each latent fires
    other: Tensor | None = None  # G; None for architectures without it
    least: Tensor | None = None  # the smallest activation among the firings, if the architecture uses it


def total_variance(x: Tensor) -> float:
    """Return V, the sum of squared distances of ``x`` [B, D] from its mean; no dictionary changes it."""
    return float((x - x.mean(0)).square().sum(dtype=torch.float64))
