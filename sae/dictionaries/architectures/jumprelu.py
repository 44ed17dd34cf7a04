"""JumpReLU: every latent has its own threshold, learnt by estimating the derivative of a step."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from sae.dictionaries.entries import batch_topk, firings_by, parts
from sae.dictionaries.gradients import Totals, lift
from sae.dictionaries.sae import Firings, Loss, Objective, Sae, draw_weights

_BEGIN = 4  # times k: L0 at the first step


class JumpReluSae(Sae):
    """A latent fires where its pre-activation exceeds its threshold (Rajamanoharan et al. 2024, arXiv 2407.14435).

    z = (x - b_dec) W_enc^T + b_enc,   a = z 1[z > theta],   x_hat = a W_dec + b_dec,   S = mean ||a||_0

    S and the step in a have no useful derivative by theta. Both get the paper's straight-through estimators, an average
    over a rectangular window of width epsilon (the bandwidth):

    d a / d theta = -(theta / epsilon) 1[|z - theta| < epsilon / 2],   d 1[z > theta] / d theta = the same / theta

    The encoder learns from the reconstruction alone. The parameter is log theta in units of sqrt(D) / 2: the logarithm
    keeps theta above 0, and the unit lets it keep pace with the encoder. (Adam changes a weight of about 1 / sqrt(D) by
    the learning rate, sqrt(D) times as much in proportion; half of that follows as well,
    with less noise.) The paper ignores dead latents; here their biases are raised (see ``sae.dictionaries.gradients``).
    """

    architecture = "jumprelu"
    penalised = True
    slots_per_k = 0

    def __init__(
        self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor, k: int | None
    ) -> None:
        super().__init__(W_enc, b_enc, W_dec, b_dec, k)
        if tuple(threshold.shape) != (self.num_latents,) or not bool((threshold > 0).all()):
            raise ValueError(f"threshold must hold {self.num_latents} positive numbers, one for each latent")
        self.threshold = threshold.contiguous()
        self._reset_log_threshold()

    @classmethod
    def init(cls, d_in: int, num_latents: int, k: int, seed: int, x_sample: Tensor | None = None) -> JumpReluSae:
        """Draw fresh weights with one threshold, at which ``_BEGIN`` times k latents fire for a token of ``x_sample``.

        From there thresholds and directions adapt to each other even in a short run. Without a sample: 0.001.
        """
        weights = draw_weights(d_in, num_latents, seed, x_sample)
        least = torch.tensor(1e-3)
        if x_sample is not None:
            begin = min(_BEGIN * k, num_latents)
            chosen = batch_topk(x_sample.float().cpu() - weights["b_dec"], weights["W_enc"], weights["b_enc"], begin)
            least = torch.maximum(chosen.least, least)
        return cls(**weights, threshold=least.repeat(num_latents), k=k)

    def parameters(self) -> dict[str, Tensor]:
        return {**super().parameters(), "log_threshold": self.log_threshold}

    def weights(self) -> dict[str, Tensor]:
        return {**super().parameters(), "threshold": self.threshold}

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        super().to(device, dtype)
        self._reset_log_threshold()
        return self

    @property
    def _unit(self) -> float:
        """Return the unit of ``log_threshold``."""
        return self.d_in**0.5 / 2

    def _reset_log_threshold(self) -> None:
        self.log_threshold = self.threshold.log() / self._unit

    def measure(self, loss: Loss, step: int) -> None:  # noqa: ARG002
        self.threshold.copy_(self.log_threshold * self._unit).exp_()

    def encode(self, x: Tensor) -> Firings:
        def activate(pre: Tensor) -> Tensor:
            return pre.mul_(pre > self.threshold)

        return firings_by(activate, self.centred(x), self.W_enc, self.b_enc)

    def loss_and_gradient(self, x: Tensor, objective: Objective) -> tuple[Loss, dict[str, Tensor]]:
        centred, theta = self.centred(x), self.threshold
        totals = Totals(self, self.target(x, objective), centred, objective)
        bandwidth = objective.bandwidth * objective.unit
        penalty = objective.sparsity / objective.tokens
        for rows, entries in parts(centred, self.W_enc, self.b_enc, theta - bandwidth / 2):
            above = entries.real & (entries.pre > entries.of(theta))
            near = entries.real & ((entries.pre - entries.of(theta)).abs() < bandwidth / 2)
            activations = entries.pre * above
            error = totals.add(rows, entries, activations)
            # Near a threshold, but below it: no firing, but the reconstruction may call for one.
            products = error.products + entries.products(near & ~above, error.residual, self.W_dec)
            steps = (products * (totals.scale * entries.of(theta)) + penalty) * near
            totals.add_to("log_threshold", entries.by_latent(steps) * theta * (self._unit / -bandwidth))
        gradient = {"log_threshold": torch.zeros_like(theta), **totals.gradient()}
        revival, by_threshold = lift(self.W_enc, centred, theta - self.b_enc, objective)
        gradient["b_enc"] -= by_threshold
        sparsity = totals.firings.sum(dtype=torch.float64) / objective.tokens
        return Loss(totals.squares / objective.variance, revival, sparsity, totals.firings), gradient
