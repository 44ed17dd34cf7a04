"""Dictionaries of every architecture with weights drawn at random, and how two of them are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.dictionaries.architectures.batchtopk import BatchTopKSae
from sae.dictionaries.architectures.gated import GatedSae
from sae.dictionaries.architectures.jumprelu import JumpReluSae
from sae.dictionaries.architectures.relu import ReluSae
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.sae import Sae

D, M, K = 6, 20, 3
ARCHITECTURES = ("topk", "batchtopk", "relu", "gated", "jumprelu")


def random_sae(architecture: str, seed: int = 0, *, unit: bool = True, k: int | None = K) -> Sae:
    """A dictionary of D = 6, M = 20 of which about half the latents fire; decoder rows of length 1 if ``unit``."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    decoder = normal(M, D)
    decoder = decoder / decoder.norm(dim=1, keepdim=True) if unit else decoder
    four = {"W_enc": normal(M, D), "b_enc": 0.3 * normal(M), "W_dec": decoder, "b_dec": normal(D)}
    if architecture == "topk":
        assert k is not None
        return TopKSae(**four, k=k)
    if architecture == "batchtopk":
        return BatchTopKSae(**four, k=k, threshold=torch.tensor(0.7))
    if architecture == "relu":
        return ReluSae(**four, k=k)
    if architecture == "jumprelu":
        return JumpReluSae(**four, threshold=normal(M).abs() + 0.1, k=k)
    b_gate = four.pop("b_enc")
    return GatedSae(**four, b_gate=b_gate, r_mag=0.5 * normal(M), b_mag=0.3 * normal(M), k=k)


def tokens(n: int = 40, seed: int = 9) -> Tensor:
    """Activations [n, D], off centre."""
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


def dense(sae: Sae, x: Tensor) -> Tensor:
    """What fires, as a matrix [B, M] in the dictionary's precision."""
    firings = sae.encode(x)
    return torch.zeros(len(x), sae.num_latents, dtype=sae.dtype).scatter_add(1, firings.indices, firings.activations)


def check_alike(sae: Sae, x: Tensor, activations: Tensor, reconstruction: Tensor) -> None:
    """That ``sae`` encodes and decodes ``x`` as somebody else does: [B, M] and [B, D]."""
    ours = dense(sae, x)
    assert (activations > 0).any()
    torch.testing.assert_close(ours, activations.to(ours.dtype), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x), reconstruction.to(ours.dtype), rtol=1e-4, atol=1e-5)
