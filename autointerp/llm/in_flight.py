"""Run many pieces of work at once, up to a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from autointerp.llm.budget import BudgetSpent
from sae.common.progress import Bar

T = TypeVar("T")


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
