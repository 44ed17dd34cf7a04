"""ReLU + L1: the sparse autoencoder first used on language models."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.dictionaries.entries import firings_by, parts
from sae.dictionaries.gradients import Totals, lift
from sae.dictionaries.sae import Firings, Loss, Objective, Sae


class ReluSae(Sae):
    """A latent fires where its pre-activation is positive; an L1 penalty makes that rare.

    a = relu((x - b_dec) W_enc^T + b_enc),   x_hat = a W_dec + b_dec,   S = mean ||a||_1 / sqrt(V / B)

    (Bricken et al. 2023, "Towards monosemanticity"; Cunningham et al. 2023). Decoder rows have length 1, so small
    activations and a large decoder cannot escape the penalty. Those papers resample dead latents; here their biases are
    raised (see ``sae.dictionaries.gradients``), which disturbs no optimiser state.
    """

    architecture = "relu"
    penalised = True
    slots_per_k = 0

    def encode(self, x: Tensor) -> Firings:
        return firings_by(torch.relu_, self.centred(x), self.W_enc, self.b_enc)

    def loss_and_gradient(self, x: Tensor, objective: Objective) -> tuple[Loss, dict[str, Tensor]]:
        centred = self.centred(x)
        totals = Totals(self, self.target(x, objective), centred, objective)
        penalty = objective.sparsity / (objective.tokens * objective.unit)
        length = x.new_zeros((), dtype=torch.float64)
        for rows, entries in parts(centred, self.W_enc, self.b_enc, 0.0):
            activations = entries.pre * entries.real
            length += activations.sum(1).sum(dtype=torch.float64)
            totals.add(rows, entries, activations, penalty)
        gradient = totals.gradient()
        revival, by_threshold = lift(self.W_enc, centred, -self.b_enc, objective)
        gradient["b_enc"] -= by_threshold
        sparsity = length / (objective.tokens * objective.unit)
        return Loss(totals.squares / objective.variance, revival, sparsity, totals.firings), gradient
