"""Gated: one path decides whether a latent fires, another how strongly, so that the penalty shrinks no activation."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.dictionaries.entries import firings_by, parts
from sae.dictionaries.gradients import Totals, lift
from sae.dictionaries.sae import Firings, Loss, Objective, Sae, draw_weights


class GatedSae(Sae):
    """A gate and a magnitude share the encoder's directions (Rajamanoharan et al. 2024, arXiv 2404.16014).

    p = (x - b_dec) W_enc^T,   a = 1[p + b_gate > 0] relu(exp(r_mag) p + b_mag),   x_hat = a W_dec + b_dec
    S = mean ||g||_1 / sqrt(V / B),   G = sum ||g W_dec + b_dec - x||^2 / V,   g = relu(p + b_gate)

    The step of the gate passes no gradient; the gate learns from S and from G, where the decoder is constant (the
    paper's frozen copy). Decoder rows have length 1. The paper resamples dead latents; here the bias that keeps them
    silent, the gate's or the magnitude's, is raised (see ``sae.dictionaries.gradients``).
    """

    architecture = "gated"
    penalised = True
    slots_per_k = 0

    def __init__(
        self, W_enc: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor, W_dec: Tensor, b_dec: Tensor, k: int | None
    ) -> None:
        super().__init__(W_enc, b_gate, W_dec, b_dec, k)
        for name, tensor in (("r_mag", r_mag), ("b_mag", b_mag)):
            if tuple(tensor.shape) != (self.num_latents,):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with W_enc {tuple(W_enc.shape)}: it has M")
        self.r_mag, self.b_mag = r_mag.contiguous(), b_mag.contiguous()

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        """[M] the gate's bias, which decides whether a latent fires"""
        return self.b_gate

    @b_enc.setter
    def b_enc(self, value: Tensor) -> None:
        self.b_gate = value

    @classmethod
    def init(cls, d_in: int, num_latents: int, k: int, seed: int, x_sample: Tensor | None = None) -> GatedSae:
        """Draw fresh weights; the two paths begin equal."""
        weights = draw_weights(d_in, num_latents, seed, x_sample)
        zero = torch.zeros(num_latents)
        return cls(b_gate=weights.pop("b_enc"), r_mag=zero, b_mag=zero.clone(), **weights, k=k)

    def parameters(self) -> dict[str, Tensor]:
        of = super().parameters()
        return {"W_enc": self.W_enc, "b_gate": of.pop("b_enc"), "r_mag": self.r_mag, "b_mag": self.b_mag, **of}

    def encode(self, x: Tensor) -> Firings:
        def activate(p: Tensor) -> Tensor:
            return torch.addcmul(self.b_mag, p, self.r_mag.exp()).relu_() * (p + self.b_gate > 0)

        return firings_by(activate, self.centred(x), self.W_enc, None)

    def loss_and_gradient(self, x: Tensor, objective: Objective) -> tuple[Loss, dict[str, Tensor]]:
        centred, stretch = self.centred(x), self.r_mag.exp()
        y = self.target(x, objective)
        totals = Totals(self, y, centred, objective)
        penalty = objective.sparsity / (objective.tokens * objective.unit)
        length, unexplained = (x.new_zeros((), dtype=torch.float64) for _ in range(2))
        for rows, entries in parts(centred, self.W_enc, None, -self.b_gate):
            magnitude = torch.addcmul(entries.of(self.b_mag), entries.pre, entries.of(stretch)).relu_() * entries.real
            totals.add(rows, entries, magnitude, stretch=entries.of(stretch))

            gate = (entries.pre + entries.of(self.b_gate)).relu_() * entries.real
            length += gate.sum(1).sum(dtype=torch.float64)
            error = entries.error(gate, self.W_dec, self.b_dec, y[rows])
            unexplained += error.squares
            of = entries.sums(gate, error.products * totals.scale + penalty, error.residual, centred[rows])
            totals.add_to("W_enc", of.W_enc)
            totals.add_to("b_gate", of.b_enc)
        gradient = {"b_gate": torch.zeros_like(self.b_gate), **totals.gradient()}
        stretched = gradient.pop("b_enc")
        if not self.transcodes:
            gradient["b_dec"] -= gradient["b_gate"] @ self.W_enc
        gradient["b_mag"] = stretched / stretch
        # Sums over tokens of exp(r_mag) p times the gradient by a; those of a times it are W_dec's along its rows.
        gradient["r_mag"] = (gradient["W_dec"] * self.W_dec).sum(1) - self.b_mag * gradient["b_mag"]
        by_gate = self.b_gate <= self.b_mag / stretch  # the higher of the two thresholds on p
        revival, by_threshold = lift(self.W_enc, centred, -torch.minimum(self.b_gate, self.b_mag / stretch), objective)
        gradient["b_gate"] -= by_threshold * by_gate
        gradient["b_mag"] -= by_threshold * ~by_gate / stretch
        sparsity = length / (objective.tokens * objective.unit)
        other = unexplained / objective.variance
        return Loss(totals.squares / objective.variance, revival, sparsity, totals.firings, other), gradient
