"""Explainers, one file each: activating contexts in, one plain sentence out. ``base`` holds the interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.common.registry import Registry

if TYPE_CHECKING:
    from autointerp.explaining.explainers.base import Explainer

EXPLAINERS: Registry[Explainer] = Registry(__name__, "explainer")  # by name on the command line
