"""From activating contexts to one plain sentence. Each file is one way of doing it; ``base`` is what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.common.registry import Registry

if TYPE_CHECKING:
    from autointerp.explaining.explainers.base import Explainer

EXPLAINERS: Registry[Explainer] = Registry(__name__, "explainer")
"""Every explainer by its name on the command line and in the journal."""
