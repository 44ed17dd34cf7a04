"""Many latents in flight together, each journalled as it ends; and what came of it, for the terminal and for JSON."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from autointerp.llm.budget import BudgetSpent
from sae.common.progress import Bar

T = TypeVar("T")


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
    """Given with the same options, it asks again only what failed."""
    next: str = ""
    """The command that comes after this one."""
    notes: list[str] = field(default_factory=list)
    of: str = "latent"
    """What is counted: latents, or the scores of several scorers."""
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
            "retry": self.retry if self.failures else None,
            "next": (self.next or None) if self.n_done and not self.failures else None,
            "notes": self.notes,
        }

    def render(self) -> None:
        from autointerp.report import render_outcome

        render_outcome(self.as_dict(), self.stage)


async def in_flight(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], limit: int, bar: Bar | None = None
) -> None:
    """``work`` on every item, at most ``limit`` at once. The first error stops the rest and is raised.

    A spent budget stops nothing that is under way: it is raised when that is done.
    """
    waiting = iter(items)
    done = 0
    spent: list[BudgetSpent] = []

    async def worker() -> None:
        nonlocal done
        for item in waiting:
            try:
                await work(item)
            except BudgetSpent as error:
                spent.append(error)
                return
            done += 1
            if bar is not None:
                bar.advance()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(limit):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        # A task group wraps what went wrong; callers know the error itself.
        raise _first(errors) from None
    if spent:
        raise BudgetSpent(spent[0].budget, done)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
