"""How fast requests leave: one dispatcher for both limits, requests in a second and tokens in a minute.

Whoever wants to send stands in one line, and the one at its head waits until both limits let it go. Nobody is
overtaken: a long prompt is not starved by short ones that would fit in before it.

What a request will cost in tokens is known only afterwards, so it leaves on an estimate, its characters at the
tokens that a character has cost so far, and the difference is settled when the server has counted: with those who
leave next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from asyncio_throttle import Throttler

from sae.common.errors import BadInput

FIRST_GUESS = 0.3
"""Tokens of a character before anything has been counted: English text has about 0.25, code somewhat more."""
_MEMORY = 0.1
"""How much the latest count weighs in the mean."""


class Pace:
    """The dispatcher of one event loop.

    :param requests_per_second: begun in any second at most, spaced out; ``None`` for no limit.
    :param tokens_per_minute: of prompts and answers together, evenly spaced: no more are begun in any minute than this
        and one request; ``None`` for no limit.
    :param clock, sleep: of the token limit, for tests.
    """

    def __init__(
        self,
        requests_per_second: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._throttle = None
        if requests_per_second is not None:
            # At high rates so many in a twentieth of a second: the throttler looks at the clock now and then only.
            at_once = max(1, int(requests_per_second / 20))
            period = at_once / requests_per_second
            self._throttle = Throttler(at_once, period, retry_interval=min(0.005, period / 25))
        self._tokens_per_second = None if tokens_per_minute is None else tokens_per_minute / 60
        self._clock, self._sleep = clock, sleep
        self._line = asyncio.Lock()
        self._free_at = clock()
        self._tokens_of_a_character = FIRST_GUESS

    @property
    def limited(self) -> bool:
        return self._throttle is not None or self._tokens_per_second is not None

    async def leave(self, characters: int, held_back: Callable[[], float] = lambda: 0.0) -> float:
        """Wait for one's turn.

        :param characters: of the prompt.
        :param held_back: for how many seconds yet nothing may be sent at all, because the servers asked for a pause.
        :returns: the tokens that were reserved, for :meth:`settle`.
        """
        if not self.limited:
            while (wait := held_back()) > 0:
                await self._sleep(wait)
            return 0.0
        async with self._line:
            if self._throttle is not None:
                await self._throttle.acquire()
            while (wait := max(self._free_at - self._clock(), held_back())) > 0:
                await self._sleep(wait)
            if self._tokens_per_second is None:
                return 0.0
            reserved = self._tokens_of_a_character * characters
            self._free_at = self._clock() + reserved / self._tokens_per_second
            return reserved

    def settle(self, reserved: float, characters: int, tokens: int) -> None:
        """What the request cost after all, prompt and answer. A server that counts nothing leaves the estimate."""
        if self._tokens_per_second is None or tokens <= 0:
            return
        self._free_at += (tokens - reserved) / self._tokens_per_second
        if characters:
            latest = tokens / characters
            self._tokens_of_a_character += _MEMORY * (latest - self._tokens_of_a_character)


def check_limits(requests_per_second: float | None, tokens_per_minute: float | None) -> None:
    """:raises BadInput: a limit that lets nothing through."""
    for words, given in (("requests per second", requests_per_second), ("tokens per minute", tokens_per_minute)):
        if given is not None and not given > 0:
            raise BadInput(f"{words} = {given}: must be above 0; leave it out for no limit")
