"""The training loss of a TopK dictionary and its whole gradient, worked out by hand.

With residual r = x_hat - x and total variance V = sum ||x - mean(x)||^2 of the batch, the loss is

    FVU + alpha * AuxK,   FVU = sum ||r||^2 / V,   AuxK = sum ||e_hat - e||^2 / V

e = x - x_hat is taken as given (no gradient flows through it), and e_hat = a_aux W_dec is its reconstruction by
the k_aux dead latents with the largest positive pre-activations of each token (Gao et al. 2024, appendix A.2).
Both terms have one form: a target, some latents, an error. So both are differentiated by one function, AuxK's
over the dictionary of the dead latents alone.

Automatic differentiation would keep the B x M pre-activations, and an encoder whose backward knows only the
chosen slots leaves AuxK without effect on the encoder, which is what must revive a dead latent. Here nothing
wider than K slots per token is kept, and every parameter receives its part of both terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae import kernels
from sae.dictionary import TopKSae, topk_firings


class AuxK(NamedTuple):
    """What the auxiliary loss needs to know."""

    dead: Tensor
    """[M] bool: the latents that it revives"""
    k: int
    """dead latents per token in the reconstruction of the error; fewer where fewer are dead"""
    coefficient: float
    """alpha"""


class Loss(NamedTuple):
    """One batch, before the step; the three numbers are float64 scalars on the weights' device."""

    fvu: Tensor
    auxk: Tensor
    """without its coefficient; 0 where no latent is dead"""
    l0: Tensor
    """mean number of latents firing per token"""
    firings: Tensor
    """[M] int64: tokens of the batch for which each latent fires"""


def total_variance(x: Tensor) -> float:
    """V, the sum of squared distances of ``x`` [B, D] from its mean: the same for every dictionary."""
    return float((x - x.mean(0)).square().sum(dtype=torch.float64))


def loss_and_gradient(
    sae: TopKSae, x: Tensor, variance: float, auxk: AuxK | None = None
) -> tuple[Loss, dict[str, Tensor]]:
    """The loss of ``sae`` on the batch ``x`` [B, D] with total variance ``variance``, and its gradient.

    The gradient has the names and shapes of ``sae.parameters()``. It is the plain one: what the unit length
    of the decoder's rows takes away from it is left to the update.
    """
    centred = sae.centred(x)
    firings = sae.encode_centred(centred)
    residual, products, squares = kernels.residuals(*firings, sae.W_dec, sae.b_dec, x)
    scale = 2 / variance
    of = kernels.weight_gradients(
        firings.activations, products, firings.indices, residual, centred, scale, sae.num_latents
    )
    # b_dec is added to the reconstruction and subtracted from the encoder's input.
    centre = residual.sum(0) * scale - of.b_enc @ sae.W_enc
    gradient = {"W_enc": of.W_enc, "b_enc": of.b_enc, "W_dec": of.W_dec, "b_dec": centre}
    extra = torch.zeros_like(squares)
    if auxk is not None and auxk.coefficient > 0 and bool(auxk.dead.any()):
        extra = _add_auxk(gradient, sae, centred, residual, scale, auxk)
    l0 = of.firings.sum().double() / len(x)
    return Loss(squares / variance, extra / variance, l0, of.firings), gradient


def _add_auxk(
    gradient: dict[str, Tensor], sae: TopKSae, centred: Tensor, residual: Tensor, scale: float, auxk: AuxK
) -> Tensor:
    """Add AuxK's gradient to ``gradient`` and return its sum of squares."""
    dead = auxk.dead.nonzero().squeeze(1)
    encoder, decoder = sae.W_enc[dead], sae.W_dec[dead]
    chosen = topk_firings(centred, encoder, sae.b_enc[dead], min(auxk.k, len(dead)))
    none = torch.zeros_like(sae.b_dec)
    error, products, squares = kernels.residuals(*chosen, decoder, none, residual.neg())
    of = kernels.weight_gradients(
        chosen.activations, products, chosen.indices, error, centred, scale * auxk.coefficient, len(dead)
    )
    gradient["W_enc"][dead] += of.W_enc
    gradient["b_enc"][dead] += of.b_enc
    gradient["W_dec"][dead] += of.W_dec
    gradient["b_dec"] -= of.b_enc @ encoder
    return squares
