"""The architectures of a sparse autoencoder, one file each, under the names that settings and checkpoints give them."""

from __future__ import annotations

from sae.architectures.batchtopk import BatchTopKSae
from sae.architectures.gated import GatedSae
from sae.architectures.jumprelu import JumpReluSae
from sae.architectures.relu import ReluSae
from sae.architectures.topk import TopKSae
from sae.dictionary import Sae

_KINDS: tuple[type[Sae], ...] = (TopKSae, BatchTopKSae, ReluSae, GatedSae, JumpReluSae)
ARCHITECTURES: dict[str, type[Sae]] = {kind.architecture: kind for kind in _KINDS}

__all__ = ["ARCHITECTURES", "BatchTopKSae", "GatedSae", "JumpReluSae", "ReluSae", "TopKSae"]
