"""What asking may cost: prices, and a budget that ends a command cleanly before it is overdrawn.

There is no list of prices here: prices change, and one that is out of date is worse than none. Who wants dollars gives
``--price-in``, ``--price-cached`` and ``--price-out``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from sae.common.amounts import parse_amount
from sae.common.errors import BadInput, UserError

if TYPE_CHECKING:
    from autointerp.journal.usage import Usage
    from autointerp.llm.exchange import Answer, Request

FIRST_GUESS = 0.5
"""Prompt tokens for a character before the first answer has told: more than any usual text has."""
_MESSAGE = 8  # tokens that a chat template puts around one message, at most


class BudgetSpent(UserError):
    """The next request could overdraw the budget. Raised when none is under way any more; what was paid for is kept."""

    def __init__(self, budget: Budget, done: int = 0, total: int = 0, what: str = "", go_on: str = "") -> None:
        self.budget, self.done, self.total = budget, done, total
        far = f"; {done} of {total} {what} were done to the end" if total else ""
        then = f"; to go on, with a new budget: {go_on}" if go_on else ""
        super().__init__(
            f"the budget of {budget.limit} is spent ({budget.spent}){far}; what was paid for is kept{then}"
        )


@dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens."""

    prompt: float
    completion: float
    cached: float | None = None
    """Of prompt tokens that the server had cached; ``None``: as much as any other."""

    def of(self, prompt: float, cached: float, completion: float) -> float:
        """Dollars for so many tokens; ``cached`` of the ``prompt`` tokens were cached."""
        dear = self.prompt if self.cached is None else self.cached
        return ((prompt - cached) * self.prompt + cached * dear + completion * self.completion) / 1e6


def prices_of(prompt: float | None, cached: float | None, completion: float | None) -> Prices | None:
    """The prices given by flags; ``None`` where none was.

    :raises BadInput: one of the two that are needed is missing, or one is negative.
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
    """What one command may spend, and what it has spent. Shared by all that it asks."""

    tokens: int | None = None
    dollars: float | None = None
    prices: Prices | None = None
    _prompt: int = 0
    _cached: int = 0
    _completion: int = 0
    _in_flight: float = 0.0
    _per_character: float = 0.0
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def limit(self) -> str:
        return f"${self.dollars:,.2f}" if self.dollars is not None else f"{self.tokens or 0:,} tokens"

    @property
    def spent(self) -> str:
        dollars = "" if self.prices is None else f", ${self._priced():,.4f}"
        return f"{self._prompt:,} prompt tokens, {self._cached:,} of them cached, {self._completion:,} written{dollars}"

    def _priced(self) -> float:
        return self.prices.of(self._prompt, self._cached, self._completion) if self.prices is not None else 0.0

    def _bound(self, request: Request) -> tuple[float, float]:
        """The most that ``request`` may take: prompt tokens by the most tokens for a character seen so far."""
        per_character = self._per_character or FIRST_GUESS
        return _characters(request) * per_character + _MESSAGE * len(request.messages), float(request.max_tokens)

    def _amount(self, prompt: float, completion: float) -> float:
        """In what the limit is in."""
        if self.dollars is None:
            return prompt + completion
        assert self.prices is not None
        return self.prices.of(prompt, 0, completion)

    def _over(self, amount: float) -> bool:
        spent, limit = (
            (self._priced(), self.dollars)
            if self.dollars is not None
            else (self._prompt + self._completion, float(self.tokens or 0))
        )
        return spent + self._in_flight + amount > limit

    async def spend(self, request: Request, send: Callable[[], Awaitable[Answer]]) -> Answer:
        """``send`` as soon as what is spent and in flight leaves room for ``request``.

        :raises BudgetSpent: there is no room, and nothing in flight that could leave some.
        """
        from autointerp.llm.exchange import AnswerFailed

        while self._over(self._amount(*self._bound(request))):
            if not self._in_flight:
                raise BudgetSpent(self)
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting
        held = self._bound(request)
        self._in_flight += self._amount(*held)
        try:
            answer = await send()
        except AnswerFailed as failed:
            self._count(request, failed.usage, held)
            raise
        else:
            self._count(request, answer.usage, held)
            return answer
        finally:
            self._in_flight = max(0.0, self._in_flight - self._amount(*held))
            if self._in_flight < 1e-12:  # what rounding leaves
                self._in_flight = 0.0
            for future in self._waiting:
                if not future.done():
                    future.set_result(None)
            self._waiting.clear()

    def _count(self, request: Request, usage: Usage, held: tuple[float, float]) -> None:
        # What the server does not say, or what cannot be right, counts as the most that the request may take.
        self._prompt += usage.prompt_tokens or int(held[0])
        self._cached += usage.cached_tokens
        self._completion += usage.completion_tokens or int(held[1])
        self._per_character = max(self._per_character, usage.prompt_tokens / max(1, _characters(request)))


@contextmanager
def going_on(total: int, what: str, command: str) -> Iterator[None]:
    """Adds to a spent budget how far ``total`` of ``what`` had come, and the command to go on with."""
    try:
        yield
    except BudgetSpent as error:
        raise BudgetSpent(error.budget, error.done, total, what, command) from None


def _characters(request: Request) -> int:
    return sum(len(message["content"]) for message in request.messages)


def parse_budget(text: str | None, prices: Prices | None) -> Budget | None:
    """``2M`` (tokens, read and written) or ``$5``.

    :raises BadInput: it is neither, or dollars are meant and there are no prices.
    """
    if text is None:
        return None
    if text.strip().startswith("$"):
        if prices is None:
            raise BadInput(f"--budget {text}: dollars need --price-in and --price-out; prices are not built in")
        try:
            dollars = float(Decimal(text.strip()[1:].replace(",", "")))
        except InvalidOperation:
            dollars = -1.0
        if not 0 < dollars < 1e9:
            raise BadInput(f"--budget {text!r} is not an amount; write it like 2M (tokens) or '$5'")
        return Budget(dollars=dollars, prices=prices)
    try:
        tokens = parse_amount(text.strip())
    except ValueError:
        tokens = 0
    if tokens < 1:
        raise BadInput(f"--budget {text!r} is not an amount; write it like 2M (tokens) or '$5'")
    return Budget(tokens=tokens, prices=prices)
