"""From an explanation's verdicts to a score. Each file is one way of testing; ``base`` is what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.common.registry import Registry

if TYPE_CHECKING:
    from autointerp.scoring.scorers.base import Scorer

SCORERS: Registry[Scorer] = Registry(__name__, "scorer")
"""Every scorer by its name on the command line and in the journal."""
