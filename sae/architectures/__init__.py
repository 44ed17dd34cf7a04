"""The architectures of a sparse autoencoder, one file each, under the names that settings and checkpoints give them."""

from __future__ import annotations

from sae.architectures.topk import TopKSae
from sae.dictionary import Sae

ARCHITECTURES: dict[str, type[Sae]] = {kind.architecture: kind for kind in (TopKSae,)}

__all__ = ["ARCHITECTURES", "TopKSae"]
