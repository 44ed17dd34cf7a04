"""Turn the verdicts on an explanation into a score. One file per test; ``base`` has the shared parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.common.registry import Registry

if TYPE_CHECKING:
    from autointerp.scoring.scorers.base import Scorer

SCORERS: Registry[Scorer] = Registry(__name__, "scorer")
"""Every scorer by its name on the command line and in the journal."""
