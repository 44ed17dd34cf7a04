"""BatchTopK: k latents fire per token on average over a batch; their number varies from token to token."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.dictionaries.entries import batch_topk, firings_by
from sae.dictionaries.gradients import Totals, add_auxk
from sae.dictionaries.sae import Firings, Loss, Objective, Sae, draw_weights


class BatchTopKSae(Sae):
    """The B k largest pre-activations of a batch of B tokens fire (Bussmann, Leask & Nanda 2024, arXiv 2412.06410).

    z = relu((x - b_dec) W_enc^T + b_enc),   a = BatchTopK(z) in training,   a = z 1[z > theta] afterwards,
    x_hat = a W_dec + b_dec

    theta is the expected smallest activation of a batch: a running mean over about the last hundred batches, because
    the weights change. AuxK revives dead latents.
    """

    architecture = "batchtopk"

    def __init__(
        self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int | None, threshold: Tensor
    ) -> None:
        super().__init__(W_enc, b_enc, W_dec, b_dec, k)
        if threshold.ndim:
            raise ValueError(f"threshold has shape {tuple(threshold.shape)}; it is one number")
        self.threshold = threshold

    @classmethod
    def init(cls, d_in: int, num_latents: int, k: int, seed: int, x_sample: Tensor | None = None) -> BatchTopKSae:
        """Draw fresh weights; the threshold is 0 until it is measured."""
        return cls(**draw_weights(d_in, num_latents, seed, x_sample), k=k, threshold=torch.zeros(()))

    def weights(self) -> dict[str, Tensor]:
        return {**super().parameters(), "threshold": self.threshold}

    def measure(self, loss: Loss, step: int) -> None:
        if loss.least is not None:
            self.threshold += (loss.least - self.threshold) / min(step + 1, 100)

    def encode(self, x: Tensor) -> Firings:
        def activate(pre: Tensor) -> Tensor:
            return pre.relu_().mul_(pre > self.threshold)

        return firings_by(activate, self.centred(x), self.W_enc, self.b_enc)

    def loss_and_gradient(self, x: Tensor, objective: Objective) -> tuple[Loss, dict[str, Tensor]]:
        if self.k is None:
            raise ValueError("a BatchTopK dictionary without a k cannot be trained")
        centred = self.centred(x)
        totals = Totals(self, self.target(x, objective), centred, objective)
        chosen = batch_topk(centred, self.W_enc, self.b_enc, self.k, objective.job, objective.precision)
        for rows, entries in chosen.groups:
            totals.add(rows, entries, entries.pre)
        gradient = totals.gradient()
        auxk = add_auxk(gradient, self, centred, totals.residual, objective)
        none = torch.zeros_like(totals.squares)
        loss = Loss(totals.squares / objective.variance, auxk, none, totals.firings, least=chosen.least)
        return loss, gradient
