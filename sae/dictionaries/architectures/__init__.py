"""The architectures of a sparse autoencoder, one file each, under the names that settings and checkpoints give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.common.registry import Registry

if TYPE_CHECKING:
    from sae.dictionaries.sae import Sae

ARCHITECTURES: Registry[Sae] = Registry(__name__, "architecture", "architecture")
