"""Turn an explanation and contexts into P(active). One file per method; ``base`` has the shared interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.common.registry import Registry

if TYPE_CHECKING:
    from autointerp.scoring.judges.base import Judge

JUDGES: Registry[Judge] = Registry(__name__, "judge")
"""Every judge by its name on the command line and in the journal."""
