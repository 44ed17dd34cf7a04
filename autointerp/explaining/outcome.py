"""What one `explain` or `score` did: counts, failures with their reasons, and what comes next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """What one command did, summed over its runs."""

    stage: str
    runs: list[str] = field(default_factory=list)
    backend: str = ""
    n_done: int = 0
    """Latents that now have what was asked for, those of earlier calls included."""
    n_new: int = 0
    """Of these, done by this call."""
    failures: Counter[str] = field(default_factory=Counter)
    """Reason → latents that failed for it, so that asking again may mend it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → latents that there was nothing to ask about, whoever asks again: no failures of this command."""
    retry: str = ""
    """The command that asks again only what failed: the one that was typed. Empty in a notebook."""
    next: str = ""
    """The command that comes after this one."""
    notes: list[str] = field(default_factory=list)
    of: str = "latent"
    """What is counted: latents, or the scores of several scorers."""
    explained: list[str] = field(default_factory=list)
    """Of ``runs``, those that are no control SAEs."""
    n_controls: int = 0
    """Of ``n_done``, latents of control SAEs, for which nobody asked by name."""

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
