"""The gradient of the reconstruction error, worked out by hand, for any architecture whose firings are few.

AuxK = sum ||e_hat - e||^2 / V, where e = x - x_hat is taken as given (no gradient flows through it), and
e_hat = a_aux W_dec is its reconstruction by the k_aux dead latents with the largest positive pre-activations of each
token (Gao et al. 2024, appendix A.2). It has the form of the reconstruction error: a target, some latents, an error.
So both are differentiated by the same kernels, AuxK's over the dictionary of the dead latents alone.

A latent that TopK leaves dead still has positive pre-activations now and then, by which AuxK revives it. One that a
penalty has killed has none, because its bias is far too low. The penalised architectures have another term in AuxK's
place, after the pre-activation loss of Conerly et al. ("Dictionary Learning Optimization Techniques", Circuits Updates
of January 2025): how far the dead latents' pre-activations z lie below what they have to exceed,

    P = sum_{dead i} mean_b (theta_i - z_bi) / (M sqrt(V / B)),

a mean over all M latents. It teaches the biases alone, so that dead latents rise until they fire without turning
towards the mean of the activations, all alike. (Gated has two biases: the one that keeps the latent silent is taught.)

Automatic differentiation would keep the B x M pre-activations, and an encoder whose backward knows only the
chosen slots leaves AuxK without effect on the encoder, which is what must revive a dead latent. Here nothing
wider than K slots per token is kept, and every parameter receives its part of both terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.encoding import topk_firings
from sae.dictionaries.entries import Error, Sums
from sae.dictionaries.kernels import steps as kernels
from sae.dictionaries.objective import Objective
from sae.dictionaries.sae import Firings, Sae


class Reconstruction(NamedTuple):
    """How far the decoded firings are from the activations, and what would bring them nearer."""

    squares: Tensor
    """the sum of squared errors, a float64 scalar"""
    residual: Tensor
    """[B, D] reconstruction minus target"""
    products: Tensor
    """[B, K] the residual's product with the decoder row of each slot; 0 for an empty one"""
    gradient: dict[str, Tensor]
    """of ``scale / 2 * squares`` by W_enc, b_enc, W_dec, b_dec, where the activation of a slot that fires is its
    pre-activation ``(x - b_dec) W_enc^T + b_enc``"""
    firings: Tensor
    """[M] int64: tokens for which each latent fires"""


def reconstruction(sae: Sae, firings: Firings, x: Tensor, centred: Tensor, scale: float) -> Reconstruction:
    """The error of ``sae`` with the given firings on ``x`` [B, D], where ``centred`` is ``x - b_dec``."""
    residual, products, squares = kernels.residuals(*firings, sae.W_dec, sae.b_dec, x)
    of = kernels.weight_gradients(
        firings.activations, products, firings.indices, residual, centred, scale, sae.num_latents
    )
    # b_dec is added to the reconstruction and subtracted from the encoder's input.
    centre = residual.sum(0) * scale - of.b_enc @ sae.W_enc
    gradient = {"W_enc": of.W_enc, "b_enc": of.b_enc, "W_dec": of.W_dec, "b_dec": centre}
    return Reconstruction(squares, residual, products, gradient, of.firings)


class Totals:
    """What the groups of a batch add up to; their number does not change it, but for rounding."""

    def __init__(self, sae: Sae, x: Tensor, objective: Objective) -> None:
        self.scale = 2 / objective.variance
        """times a residual's product with a decoder row: the gradient of FVU by that activation"""
        self.squares = torch.zeros((), dtype=torch.float64, device=x.device)
        self.residual = torch.empty_like(x)
        """[B, D] reconstruction minus target"""
        self.firings = torch.zeros(sae.num_latents, dtype=torch.int64, device=x.device)
        self._sae = sae
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: Tensor, error: Error, of: Sums) -> None:
        """Add the tokens ``rows`` [R]: their error, and the sums whose slopes are gradients by pre-activations."""
        self.residual[rows] = error.residual
        self.squares += error.squares
        self.firings += of.firings
        self.add_to("W_enc", of.W_enc)
        self.add_to("b_enc", of.b_enc)
        self.add_to("W_dec", of.W_dec.mul_(self.scale))

    def add_to(self, name: str, amount: Tensor) -> None:
        """Add to one tensor of the gradient. ``amount`` may be kept and changed."""
        if name in self._sums:
            self._sums[name] += amount
        else:
            self._sums[name] = amount

    def gradient(self) -> dict[str, Tensor]:
        """The gradient of the groups by W_enc, b_enc, W_dec, b_dec and what else has been added to.

        b_dec is added to the reconstruction and subtracted from the encoder's input.
        """
        sae, none = self._sae, torch.zeros_like  # a process may have been given no token of a batch
        sums = {"W_enc": none(sae.W_enc), "b_enc": none(sae.b_enc), "W_dec": none(sae.W_dec), **self._sums}
        return {**sums, "b_dec": self.residual.sum(0) * self.scale - sums["b_enc"] @ self._sae.W_enc}


def add_auxk(
    gradient: dict[str, Tensor],
    sae: Sae,
    centred: Tensor,
    residual: Tensor,
    objective: Objective,
) -> Tensor:
    """Add AuxK's gradient to ``gradient`` and return AuxK, without its coefficient, as a float64 scalar."""
    auxk = objective.auxk
    if auxk is None or auxk.coefficient <= 0 or not bool(auxk.dead.any()):
        return torch.zeros((), dtype=torch.float64, device=residual.device)
    dead = auxk.dead.nonzero().squeeze(1)
    encoder, decoder = sae.W_enc[dead], sae.W_dec[dead]
    chosen = topk_firings(centred, encoder, sae.b_enc[dead], min(auxk.k, len(dead)), objective.precision)
    none = torch.zeros_like(sae.b_dec)
    error, products, squares = kernels.residuals(*chosen, decoder, none, residual.neg())
    scale = 2 / objective.variance * auxk.coefficient
    of = kernels.weight_gradients(chosen.activations, products, chosen.indices, error, centred, scale, len(dead))
    gradient["W_enc"][dead] += of.W_enc
    gradient["b_enc"][dead] += of.b_enc
    gradient["W_dec"][dead] += of.W_dec
    gradient["b_dec"] -= of.b_enc @ encoder
    return squares / objective.variance


class Lift(NamedTuple):
    """The term P, which lowers what dead latents have to exceed."""

    value: Tensor
    """P, without its coefficient, a float64 scalar"""
    gradient: Tensor
    """[M] of alpha P by the thresholds; 0 for latents that are not dead"""


def lift(weight: Tensor, centred: Tensor, threshold: Tensor, objective: Objective) -> Lift:
    """P of dead latents that fire where ``centred @ weight.T`` [B, M] exceeds ``threshold`` [M].

    ``centred`` [B, D] may be a part of the batch: P and its gradient are then that part's.
    """
    auxk = objective.auxk
    gradient = torch.zeros_like(threshold)
    if auxk is None or auxk.coefficient <= 0 or not bool(auxk.dead.any()):
        return Lift(torch.zeros((), dtype=torch.float64, device=centred.device), gradient)
    share = 1 / (objective.tokens * objective.unit * len(weight))
    below = threshold * len(centred) - torch.mv(weight, centred.sum(0))
    gradient[auxk.dead] = auxk.coefficient * share * len(centred)
    return Lift(below[auxk.dead].sum(dtype=torch.float64) * share, gradient)
