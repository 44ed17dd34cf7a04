"""The SAE architectures, one file each, under the names used by settings and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.common.registry import Registry

if TYPE_CHECKING:
    from sae.dictionaries.sae import Sae

ARCHITECTURES: Registry[Sae] = Registry(__name__, "architecture", "architecture")
