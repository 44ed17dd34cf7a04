"""TopK: as many latents fire for each token as one asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.dictionary import Firings, Sae, geometric_median
from sae.encoding import topk_firings
from sae.gradients import add_auxk, reconstruction
from sae.objective import Loss, Objective


class TopKSae(Sae):
    """The k largest pre-activations of each token fire (Gao et al. 2024, section 2.3; Makhzani & Frey 2013).

    a = TopK(relu((x - b_dec) W_enc^T + b_enc)),   x_hat = a W_dec + b_dec

    A token whose positive pre-activations number fewer than k leaves slots empty.
    """

    architecture = "topk"
    k: int

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> None:
        super().__init__(W_enc, b_enc, W_dec, b_dec)
        if not 1 <= k <= self.num_latents:
            raise ValueError(f"k = {k} is not between 1 and the number of latents, {self.num_latents}")
        self.k = k

    @classmethod
    def init(cls, d_in: int, num_latents: int, k: int, seed: int, x_sample: Tensor | None = None) -> TopKSae:
        """Fresh weights, in float32 in main memory; only the encoder's come from ``seed``.

        The encoder is drawn as a linear layer's default, uniform in +-1/sqrt(D), with zero bias; the decoder is
        the encoder with rows of length 1; ``b_dec`` is the geometric median of ``x_sample`` [N, D] (Gao et al.
        2024, appendix A.1), or zero without one. A few thousand tokens are sample enough.
        """
        generator = torch.Generator().manual_seed(seed)
        bound = d_in**-0.5
        encoder = (torch.rand(num_latents, d_in, generator=generator) * 2 - 1) * bound
        decoder = torch.nn.functional.normalize(encoder.double(), dim=1).float()
        centre = torch.zeros(d_in) if x_sample is None else geometric_median(x_sample).float()
        return cls(encoder, torch.zeros(num_latents), decoder, centre, k)

    def encode(self, x: Tensor) -> Firings:
        return self.encode_centred(self.centred(x))

    def encode_centred(self, centred: Tensor) -> Firings:
        """:meth:`encode` for ``x - b_dec`` [B, D]. Pre-activations exist for some rows at a time only."""
        return topk_firings(centred, self.W_enc, self.b_enc, self.k)

    def loss_and_gradient(self, x: Tensor, objective: Objective) -> tuple[Loss, dict[str, Tensor]]:
        centred = self.centred(x)
        error = reconstruction(self, self.encode_centred(centred), x, centred, 2 / objective.variance)
        auxk = add_auxk(error.gradient, self, centred, error.residual, objective)
        none = torch.zeros_like(error.squares)
        return Loss(error.squares / objective.variance, auxk, none, error.firings), error.gradient
