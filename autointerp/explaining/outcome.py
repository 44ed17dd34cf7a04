"""Summarise one `explain` or `score`: counts, failures with their reasons, and the next command."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """The result of one command, summed over its runs."""

    stage: str
    runs: list[str] = field(default_factory=list)
    backend: str = ""
    n_done: int = 0
    """Latents that now have a result, including those of earlier calls."""
    n_new: int = 0
    """Of these, the ones of this call."""
    failures: Counter[str] = field(default_factory=Counter)
    """Reason → latents that failed; asking again may succeed."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → latents with nothing to ask about; not failures."""
    retry: str = ""
    """The typed command, which asks again only for what failed. Empty in a notebook."""
    next: str = ""
    """The command for the next stage."""
    notes: list[str] = field(default_factory=list)
    of: str = "latent"
    """The unit of the counts: ``latent``, or the score of several scorers."""
    explained: list[str] = field(default_factory=list)
    """``runs`` without control SAEs."""
    n_controls: int = 0
    """Of ``n_done``, latents of control SAEs."""

    @property
    def n_failed(self) -> int:
        return sum(self.failures.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "backend": self.backend,
            "of": self.of,
            "n_done": self.n_done,
            "n_new": self.n_new,
            "n_controls": self.n_controls,
            "n_failed": self.n_failed,
            "failures": dict(self.failures.most_common()),
            "n_left_out": self.left_out.total(),
            "left_out": dict(self.left_out.most_common()),
            "retry": (self.retry or None) if self.failures else None,
            "next": (self.next or None) if self.n_done and not self.failures else None,
            "notes": self.notes,
        }
