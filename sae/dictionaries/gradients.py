"""The gradient of the reconstruction error, worked out by hand, for any architecture with few firings per token.

AuxK = sum ||e_hat - e||^2 / V, where e = x - x_hat is a constant (no gradient flows through it), and e_hat = a_aux
W_dec is its reconstruction by the k_aux dead latents with the largest positive pre-activations of each token (Gao et
al. 2024, appendix A.2). It has the form of the reconstruction error, so the same kernels differentiate both, AuxK's
over the dictionary of the dead latents alone.

A latent killed by a penalty has no positive pre-activations by which AuxK could revive it: its bias is far too low. The
penalised architectures use another term, after the pre-activation loss of Conerly et al. ("Dictionary Learning
Optimization Techniques", Circuits Updates of January 2025): how far the pre-activations z
of dead latents lie below their thresholds,

    P = sum_{dead i} mean_b (theta_i - z_bi) / (M sqrt(V / B)),

a mean over all M latents. It trains the biases alone, so that dead latents rise until they fire, without all turning
towards the mean of the activations. (In Gated, P trains the bias that keeps the latent silent.)

Unlike with automatic differentiation, nothing wider than K slots per token is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.dictionaries.encoding import topk_firings
from sae.dictionaries.entries import Entries, Error
from sae.dictionaries.kernels.steps import kernels_for
from sae.dictionaries.sae import Firings, Objective, Sae


class Reconstruction(NamedTuple):
    """The error of the decoded firings, and its gradient."""

    squares: Tensor  # the sum of squared errors, a float64 scalar
    residual: Tensor  # [B, D] reconstruction minus target
    gradient: dict[str, Tensor]  # of ``scale / 2 * squares``; firing slots hold their pre-activation
    firings: Tensor  # [M] int64: tokens for which each latent fires


def reconstruction(sae: Sae, firings: Firings, x: Tensor, centred: Tensor, scale: float) -> Reconstruction:
    """Return the error of ``sae`` with the given firings on the target ``x`` [B, D]; ``centred`` is what it reads."""
    kernels = kernels_for(x.device)
    residual, products, squares = kernels.residuals(*firings, sae.W_dec, sae.b_dec, x)
    W_dec, W_enc, b_enc, fired = kernels.weight_gradients(
        firings.activations, products, firings.indices, residual, centred, scale, sae.num_latents
    )
    gradient = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": W_dec,
        **_other_gradients(sae, b_enc, residual, centred, scale),
    }
    return Reconstruction(squares, residual, gradient, fired)


def _other_gradients(sae: Sae, b_enc: Tensor, residual: Tensor, centred: Tensor, scale: float) -> dict[str, Tensor]:
    """Return the gradient by b_dec and W_skip; ``b_enc`` is that by b_enc."""
    if not sae.transcodes:
        # b_dec is added to the reconstruction and subtracted from the encoder's input.
        return {"b_dec": residual.sum(0) * scale - b_enc @ sae.W_enc}
    found = {"b_dec": residual.sum(0) * scale}
    return found if sae.W_skip is None else {**found, "W_skip": (residual.T @ centred).mul_(scale)}


class Totals:
    """Sums over the groups of a batch; the number of groups changes their rounding only."""

    def __init__(self, sae: Sae, x: Tensor, centred: Tensor, objective: Objective) -> None:
        self.scale = 2 / objective.variance  # times residual @ decoder row: the gradient by an activation
        self.squares = torch.zeros((), dtype=torch.float64, device=x.device)
        self.residual = torch.empty_like(x)  # [B, D] reconstruction minus target
        self.firings = torch.zeros(sae.num_latents, dtype=torch.int64, device=x.device)
        self._sae, self._x, self._centred = sae, x, centred
        self._sums: dict[str, Tensor] = {}

    def add(
        self, rows: Tensor, entries: Entries, activations: Tensor, penalty: float = 0.0, stretch: Tensor | float = 1.0
    ) -> Error:
        """Add the tokens ``rows`` [R] with these activations, and return the error of their reconstruction.

        ``penalty`` is the gradient of further terms by an activation, ``stretch`` that of an activation by its
        pre-activation.
        """
        error = entries.error(activations, self._sae.W_dec, self._sae.b_dec, self._x[rows])
        slopes = (error.products * self.scale + penalty) * stretch
        sums = entries.sums(activations, slopes, error.residual, self._centred[rows])
        self.residual[rows] = error.residual
        self.squares += error.squares
        self.firings += sums.firings
        self.add_to("W_enc", sums.W_enc)
        self.add_to("b_enc", sums.b_enc)
        self.add_to("W_dec", sums.W_dec.mul_(self.scale))
        return error

    def add_to(self, name: str, amount: Tensor) -> None:
        """Add to one tensor of the gradient. ``amount`` may be kept and changed."""
        if name in self._sums:
            self._sums[name] += amount
        else:
            self._sums[name] = amount

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient by W_enc, b_enc, W_dec, b_dec, W_skip and all other tensors that were added to."""
        sae, zero = self._sae, torch.zeros_like  # a process may have no token of a batch
        sums = {"W_enc": zero(sae.W_enc), "b_enc": zero(sae.b_enc), "W_dec": zero(sae.W_dec), **self._sums}
        return {**sums, **_other_gradients(sae, sums["b_enc"], self.residual, self._centred, self.scale)}


def add_auxk(gradient: dict[str, Tensor], sae: Sae, centred: Tensor, residual: Tensor, objective: Objective) -> Tensor:
    """Add AuxK's gradient to ``gradient`` and return AuxK, without its coefficient, as a float64 scalar."""
    auxk = objective.auxk
    if auxk is None or auxk.coefficient <= 0 or not bool(auxk.dead.any()):
        return torch.zeros((), dtype=torch.float64, device=residual.device)
    kernels, dead = kernels_for(residual.device), auxk.dead.nonzero().squeeze(1)
    encoder, decoder = sae.W_enc[dead], sae.W_dec[dead]
    slots = topk_firings(centred, encoder, sae.b_enc[dead], min(auxk.k, len(dead)), objective.precision)
    error, products, squares = kernels.residuals(*slots, decoder, torch.zeros_like(sae.b_dec), residual.neg())
    scale = 2 / objective.variance * auxk.coefficient
    W_dec, W_enc, b_enc, _ = kernels.weight_gradients(
        slots.activations, products, slots.indices, error, centred, scale, len(dead)
    )
    gradient["W_enc"][dead] += W_enc
    gradient["b_enc"][dead] += b_enc
    gradient["W_dec"][dead] += W_dec
    if not sae.transcodes:
        gradient["b_dec"] -= b_enc @ encoder
    return squares / objective.variance


def lift(weight: Tensor, centred: Tensor, threshold: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return P, a float64 scalar without its coefficient, and the gradient of alpha P by the thresholds, [M].

    A latent fires where ``centred @ weight.T`` [B, M] exceeds ``threshold`` [M]; the gradient is 0 for latents that
    are not dead. ``centred`` [B, D] may be a part of the batch: P and its gradient are then that part's.
    """
    auxk = objective.auxk
    gradient = torch.zeros_like(threshold)
    if auxk is None or auxk.coefficient <= 0 or not bool(auxk.dead.any()):
        return torch.zeros((), dtype=torch.float64, device=centred.device), gradient
    share = 1 / (objective.tokens * objective.unit * len(weight))
    below = threshold * len(centred) - torch.mv(weight, centred.sum(0))
    gradient[auxk.dead] = auxk.coefficient * share * len(centred)
    return below[auxk.dead].sum(dtype=torch.float64) * share, gradient
