"""The sparse steps of a TopK autoencoder: choose, decode, differentiate, update.

Only K of M latents are active for a token, so decoding and every weight gradient need K/M of the dense arithmetic. The
dense encoder product stays with the BLAS library. Three modules implement the steps: ``cpu`` (compiled loops), ``cuda``
(Triton programs) and ``plain`` (PyTorch operations, for any device).
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from sae.dictionaries.kernels import cpu, plain


class Kernels(Protocol):
    """The sparse steps on one kind of device. Their results agree between devices up to rounding.

    In ``cuda`` and ``plain`` all tensors may have a leading seeds axis (weights [S, M, D], slots [S, B, K]).
    """

    def topk(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the ``k`` largest positive pre-activations of each row: activations [B, K], latents [B, K] int64.

        Empty slots have activation 0, latent 0. The order of the slots has no meaning, but is fixed on one device.
        """

    def rounded_topk(self, pre: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return :meth:`topk` of ``centred @ weight.T + bias``, given that product ``pre`` [B, M] in bfloat16.

        ``centred`` [B, D], ``weight`` [M, D], ``bias`` [M] and the results are float32: latents near the K-th are
        computed again. Two latents closer together than bfloat16 can distinguish may be confused.
        """

    def decode(self, activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return ``bias + sum_j activations[:, j] * weight[latents[:, j]]``, [B, D]."""

    def residuals(
        self, activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual [B, D], its products with decoder rows [B, K], and the sum of its squares (float64).

        The residual is decoded minus target; products are those with each active slot's decoder row, 0 if empty.
        With a seeds axis, ``target`` [B, D] is that of all seeds and the sums are [S].
        """

    def weight_gradients(
        self,
        values: Tensor,
        products: Tensor,
        latents: Tensor,
        residual: Tensor,
        centred: Tensor,
        scale: float,
        num_latents: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradient of ``scale / 2 * sum(residual**2)`` by W_dec [M, D], W_enc [M, D] and b_enc [M].

        ``values`` [B, K] are the activations, ``products`` [B, K] and ``residual`` [B, D] those of :meth:`residuals`,
        ``centred`` [B, D] is the encoder's input. The fourth result, [M] int64, counts each latent's firings.
        """

    def adam(
        self, weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, step: int, rate: float, unit_rows: bool
    ) -> None:
        """Take one step of Adam (Kingma & Ba 2015), in place on ``weight`` and the moments ``first`` and ``second``.

        All four have shape [M, D] or [M]; ``step`` counts from 1. With ``unit_rows``, the part of the gradient along
        each row is removed and rows are rescaled to length 1. Constants: ``cpu_loops.BETAS`` and ``EPS``.
        """


def kernels_for(device: torch.device) -> Kernels:
    """Return the fastest implementation of the steps for tensors on ``device``."""
    if device.type == "cpu":
        return cpu
    return (triton_kernels() if device.type == "cuda" else None) or plain


@cache
def triton_kernels() -> Kernels | None:
    """Return the steps as Triton programs, or None where Triton is not installed. Call it for CUDA devices only."""
    try:
        from sae.dictionaries.kernels import cuda
    except ImportError:
        return None
    return cuda
