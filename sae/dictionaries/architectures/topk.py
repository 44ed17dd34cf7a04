"""TopK: k latents fire for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.common.precision import Precision, has_int8_products
from sae.dictionaries.encoding import topk_firings
from sae.dictionaries.gradients import add_auxk, reconstruction
from sae.dictionaries.sae import Firings, Loss, Objective, Sae


class TopKSae(Sae):
    """The k largest pre-activations of each token fire (Gao et al. 2024, section 2.3; Makhzani & Frey 2013).

    a = TopK(relu((x - b_dec) W_enc^T + b_enc)),   x_hat = a W_dec + b_dec

    A token with fewer than k positive pre-activations leaves slots empty. AuxK revives dead latents.
    """

    architecture = "topk"
    gradients_at_once = 1
    slots_per_k = 1
    k: int

    def encode(self, x: Tensor) -> Firings:
        return self.encode_centred(self.centred(x))

    def encode_fast(self, x: Tensor) -> Firings:
        # Sums of integers are exact in any order: firings do not depend on how many tokens are encoded together.
        exact_in_8_bits = self.device.type == "cpu" and has_int8_products()
        return self.encode_centred(self.centred(x), "int8" if exact_in_8_bits else "float32")

    def encode_centred(self, centred: Tensor, precision: Precision = "float32") -> Firings:
        """Return :meth:`encode` for ``x - b_dec`` [B, D]."""
        return topk_firings(centred, self.W_enc, self.b_enc, self.k, precision)

    def loss_and_gradient(self, x: Tensor, objective: Objective) -> tuple[Loss, dict[str, Tensor]]:
        centred = self.centred(x)
        firings = self.encode_centred(centred, objective.precision)
        error = reconstruction(self, firings, self.target(x, objective), centred, 2 / objective.variance)
        auxk = add_auxk(error.gradient, self, centred, error.residual, objective)
        none = torch.zeros_like(error.squares)
        return Loss(error.squares / objective.variance, auxk, none, error.firings), error.gradient
