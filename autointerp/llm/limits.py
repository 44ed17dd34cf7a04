"""Limit requests: how many are in flight, how many leave in a second or minute, and how much they may cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, TypeVar

from asyncio_throttle import Throttler

from autointerp.llm.exchange import Answer, AnswerFailed, Request
from sae.common.amounts import duration, parse_amount
from sae.common.commands import get_typed_command
from sae.common.errors import BadInput, UserError
from sae.common.progress import Bar, say, track

if TYPE_CHECKING:
    from autointerp.journal.usage import Usage

T = TypeVar("T")

FIRST_GUESS = 0.3  # tokens of a character before anything was counted: English text has about 0.25, code somewhat more
_LONG_WAIT = 60.0  # seconds; a longer wait is reported
_MEMORY = 0.1  # weight of the latest count in the mean
_FIRST_BOUND = 0.5  # prompt tokens of a character before the first answer, at most
_MESSAGE = 8  # tokens that a chat template puts around one message, at most


# --- in flight --------------------------------------------------------------------------------------------------------


async def run_in_flight(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], limit: int, bar: Bar | None = None
) -> None:
    """Run ``work`` on every item, at most ``limit`` at once. The first error stops the rest and is raised.

    A spent budget stops nothing that is in flight: it is raised afterwards.
    """
    waiting = iter(items)
    n_done = 0
    spent: list[BudgetSpent] = []

    async def worker() -> None:
        nonlocal n_done
        for item in waiting:
            try:
                await work(item)
            except BudgetSpent as error:
                spent.append(error)
                return
            n_done += 1
            if bar is not None:
                bar.advance()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(limit):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        # A task group wraps the error; callers expect the error itself.
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    if spent:
        raise BudgetSpent(spent[0].budget, n_done)


async def run_with_progress(
    items: Sequence[T], work: Callable[[T], Awaitable[None]], limit: int, title: str, things: str, done: int = 0
) -> None:
    """:func:`run_in_flight` with a progress bar, ``done`` of which were finished before.

    A spent budget says how many of the items are finished, and names the command to continue with.
    """
    with track(title, done + len(items), things, done=done) as bar:
        try:
            await run_in_flight(items, work, limit, bar)
        except BudgetSpent as error:
            raise BudgetSpent(error.budget, error.done, len(items), things, get_typed_command()) from None


# --- rate -------------------------------------------------------------------------------------------------------------


class Pace:
    """One queue for both rate limits of an event loop. A long prompt is not overtaken by short ones.

    The tokens of a request are known only afterwards, so it leaves on an estimate (its characters at the mean tokens of
    a character so far); later requests make up the difference.

    :param requests_per_second: begun in any second at most, spaced out; ``None`` for no limit.
    :param tokens_per_minute: of prompts and answers together, evenly spaced: no more are begun in any minute than this
        and one request; ``None`` for no limit.
    :param clock, sleep: of the token limit, for tests.
    :raises BadInput: a limit lets nothing through.
    """

    def __init__(
        self,
        requests_per_second: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        limits = {"requests per second": (requests_per_second, 0.001), "tokens per minute": (tokens_per_minute, 1)}
        for words, (given, least) in limits.items():
            if given is not None and not least <= given <= 1e12:
                raise BadInput(f"{words} = {given:g}: must be from {least} to 1e12; omit it for no limit")
        self._throttle = None
        if requests_per_second is not None:
            # At high rates a few leave together every twentieth of a second: the throttler reads the clock seldom.
            at_once = max(1, int(requests_per_second / 20))
            period = at_once / requests_per_second
            self._throttle = Throttler(at_once, period, retry_interval=min(0.005, period / 25))
        self._seconds_per_token = 0.0 if tokens_per_minute is None else 60 / tokens_per_minute
        self._clock, self._sleep = clock, sleep
        self._queue = asyncio.Lock()
        self._free_at = clock()  # when the limit on tokens lets the next request leave
        self._tokens_per_character = FIRST_GUESS

    async def wait(self, characters: int, pause_left: Callable[[], float] = lambda: 0.0) -> float:
        """Wait until a request may leave, and return the tokens that were reserved for it, for :meth:`settle`.

        ``pause_left`` gives the seconds left of a pause that the servers asked for.
        """
        async with self._queue:
            if self._throttle is not None:
                await self._throttle.acquire()
            while (seconds := max(self._free_at - self._clock(), pause_left())) > 0:
                if seconds >= _LONG_WAIT:
                    say(f"the next request waits {duration(seconds)}: a limit on tokens, or a pause of the server")
                await self._sleep(seconds)
            reserved = self._tokens_per_character * characters
            self._free_at = self._clock() + reserved * self._seconds_per_token
            return reserved

    def settle(self, reserved: float, characters: int, tokens: int) -> None:
        """Replace the estimate by the ``tokens`` of prompt and answer; 0 (not counted) keeps it."""
        if tokens <= 0:
            return
        self._free_at += (tokens - reserved) * self._seconds_per_token
        if characters:
            self._tokens_per_character += _MEMORY * (tokens / characters - self._tokens_per_character)


# --- cost -------------------------------------------------------------------------------------------------------------


class BudgetSpent(UserError):
    """The next request could exceed the budget. Raised when none is in flight any more; paid answers are kept."""

    def __init__(self, budget: Budget, done: int = 0, total: int = 0, things: str = "", command: str = "") -> None:
        self.budget, self.done, self.total = budget, done, total
        progress = f"; {done} of {total} {things} are finished" if total else ""
        then = f"; to continue with a new budget: {command}" if command else ""
        super().__init__(
            f"the budget of {budget.limit} is spent ({budget.spent}){progress}; paid answers are kept{then}"
        )


@dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens."""

    prompt: float
    completion: float
    cached: float | None = None  # of prompt tokens that the server had cached; ``None``: the price of any other

    def of(self, prompt: float, cached: float, completion: float) -> float:
        """Return the dollars for these numbers of tokens; ``cached`` of the ``prompt`` tokens were cached."""
        price_cached = self.prompt if self.cached is None else self.cached
        return ((prompt - cached) * self.prompt + cached * price_cached + completion * self.completion) / 1e6


def read_prices(prompt: float | None, cached: float | None, completion: float | None) -> Prices | None:
    """Return the prices given by flags; ``None`` where none was.

    :raises BadInput: one of the two required ones is missing, or one is negative.
    """
    if prompt is None and cached is None and completion is None:
        return None
    if prompt is None or completion is None:
        raise BadInput("prices need both --price-in and --price-out (dollars for a million tokens)")
    for flag, price in (("--price-in", prompt), ("--price-cached", cached), ("--price-out", completion)):
        if price is not None and not 0 <= price < 1e6:
            raise BadInput(f"{flag} {price:g}: give dollars for a million tokens, such as 0.15")
    return Prices(prompt, completion, cached)


@dataclass
class Budget:
    """The spending limit of one command and the amount spent so far, shared by all its requests."""

    tokens: int | None = None
    dollars: float | None = None
    prices: Prices | None = None
    _prompt: int = 0
    _cached: int = 0
    _completion: int = 0
    _in_flight: float = 0.0
    _tokens_per_character: float = 0.0
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def limit(self) -> str:
        return f"${self.dollars:,.2f}" if self.dollars is not None else f"{self.tokens or 0:,} tokens"

    @property
    def spent(self) -> str:
        counts = self._prompt, self._cached, self._completion
        dollars = "" if self.prices is None else f", ${self.prices.of(*counts):,.4f}"
        return "{:,} prompt tokens, {:,} of them cached, {:,} written".format(*counts) + dollars

    async def spend(self, request: Request, send: Callable[[], Awaitable[Answer]]) -> Answer:
        """Call ``send`` once the amounts spent and in flight allow for ``request``.

        :raises BudgetSpent: they never will, because nothing is in flight.
        """
        while self._exceeds(self._bound(request)):
            if not self._in_flight:
                raise BudgetSpent(self)
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting
        bound = self._bound(request)
        self._in_flight += self._amount(*bound)
        try:
            answer = await send()
        except AnswerFailed as failed:
            self._count(request, failed.usage, bound)
            raise
        else:
            self._count(request, answer.usage, bound)
            return answer
        finally:
            self._in_flight = max(0.0, self._in_flight - self._amount(*bound))
            if self._in_flight < 1e-12:  # left by rounding
                self._in_flight = 0.0
            for future in self._waiting:
                if not future.done():
                    future.set_result(None)
            self._waiting.clear()

    def _bound(self, request: Request) -> tuple[float, float, float]:
        """Return the most prompt, cached and answer tokens of ``request``, by the most tokens of a character so far."""
        tokens_per_character = self._tokens_per_character or _FIRST_BOUND
        prompt = request.characters * tokens_per_character + _MESSAGE * len(request.messages)
        return prompt, 0.0, float(request.max_tokens)

    def _amount(self, prompt: float, cached: float, completion: float) -> float:
        """Return tokens in the unit of the limit."""
        if self.dollars is None:
            return prompt + completion
        assert self.prices is not None
        return self.prices.of(prompt, cached, completion)

    def _exceeds(self, bound: tuple[float, float, float]) -> bool:
        spent = self._amount(self._prompt, self._cached, self._completion)
        limit = float(self.tokens or 0) if self.dollars is None else self.dollars
        return spent + self._in_flight + self._amount(*bound) > limit

    def _count(self, request: Request, usage: Usage, bound: tuple[float, float, float]) -> None:
        # A count that the server does not report, or that is impossible, is taken to be the bound.
        self._prompt += usage.prompt_tokens or int(bound[0])
        self._cached += usage.cached_tokens
        self._completion += usage.completion_tokens or int(bound[2])
        tokens_per_character = usage.prompt_tokens / max(1, request.characters)
        self._tokens_per_character = max(self._tokens_per_character, tokens_per_character)


def parse_budget(text: str | None, prices: Prices | None) -> Budget | None:
    """Parse ``2M`` (tokens, read and written) or ``$5``.

    :raises BadInput: it is neither, or it is in dollars and there are no prices.
    """
    if text is None:
        return None
    invalid = BadInput(f"--budget {text!r} is not an amount; write it like 2M (tokens) or '$5'")
    if text.strip().startswith("$"):
        if prices is None:
            raise BadInput(f"--budget {text}: dollars need --price-in and --price-out; prices are not built in")
        try:
            dollars = float(Decimal(text.strip()[1:].replace(",", "")))
        except InvalidOperation:
            raise invalid from None
        if not 0 < dollars < 1e9:
            raise invalid
        return Budget(dollars=dollars, prices=prices)
    try:
        tokens = parse_amount(text.strip())
    except ValueError:
        raise invalid from None
    if tokens < 1:
        raise invalid
    return Budget(tokens=tokens, prices=prices)
