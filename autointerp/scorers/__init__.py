"""From an explanation's verdicts to a score. Each file is one way of testing; ``base`` is what they share."""

from __future__ import annotations

from autointerp.scorers.base import Scorer, ScoreRow
from autointerp.scorers.detection import DetectionScorer
from autointerp.scorers.fuzzing import FuzzingScorer

SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (DetectionScorer, FuzzingScorer)}
"""Every scorer by its name on the command line and in the journal."""

__all__ = ["SCORERS", "DetectionScorer", "FuzzingScorer", "ScoreRow", "Scorer"]
