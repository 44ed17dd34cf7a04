"""When to try again, and when to give up: one request, or all of them."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity

from autointerp.llm.exchange import AnswerFailed
from autointerp.llm.faults import Transient, no_server
from autointerp.llm.servers import Servers

T = TypeVar("T")


class Retrying:
    """Calls until they no longer fail in a way that may pass.

    :param tries: how often one call is made.
    :param backoff: scale of the first pause between tries, in seconds; pauses double and are randomised.
    :param patience: calls in a row that may fail after all their tries before the servers are given up.
    """

    def __init__(self, servers: Servers, tries: int, backoff: float, patience: int) -> None:
        self._servers = servers
        self._tries, self._backoff, self._patience = tries, backoff, patience
        self._failed_in_a_row = 0

    async def __call__(self, once: Callable[[], Awaitable[T]], patient: bool = True) -> T:
        """``once`` until it does not raise :class:`Transient`, with growing, random pauses between.

        :param patient: whether a server that cannot be reached at all is worth waiting for. Before any work it is
            not: the user had better be told at once.
        :raises AnswerFailed: this call failed every time.
        :raises NoServer: as so many before it did, or as nothing can be reached any more.
        """

        def again(error: BaseException) -> bool:
            return isinstance(error, Transient) and (patient or not error.unreachable)

        def pause(state: tenacity.RetryCallState) -> float:
            # Where a server asked for a pause it is kept to in the line; here all must not return at once.
            return random.uniform(0, self._backoff) if self._servers.held_back() > 0 else grow(state)

        try:
            result = await once()  # nearly always the end of it: the machinery of trying again costs as much as sending
            self._failed_in_a_row = 0
            return result
        except Transient as error:
            failed: list[Transient] = [error]

        async def next_try() -> T:
            if failed:
                raise failed.pop()  # the first try, as tenacity counts
            return await once()

        grow = tenacity.wait_random_exponential(multiplier=self._backoff, max=30)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(again),
            wait=pause,
            stop=tenacity.stop_after_attempt(self._tries),
            reraise=True,
        )
        try:
            result = await retrying(next_try)
        except Transient as error:
            self._failed_in_a_row += 1
            if (error.unreachable and not self._servers.any_left()) or self._failed_in_a_row >= self._patience:
                raise no_server(self._servers.names, error.reason) from None
            raise AnswerFailed(f"{error.reason} ({self._tries} tries)", final=True) from None
        self._failed_in_a_row = 0
        return result
