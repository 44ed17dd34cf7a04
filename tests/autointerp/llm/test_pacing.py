"""The limits on requests a second and tokens a minute, by a clock that the tests turn."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest
from fake_server import FakeServer, Reply
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import Request
from autointerp.llm.limits import FIRST_GUESS, Pace
from sae.common.errors import BadInput


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def pace(clock: Clock, tokens_per_minute: float) -> Pace:
    return Pace(None, tokens_per_minute, clock=clock, sleep=clock.sleep)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5000), min_size=5, max_size=40), st.integers(100, 20_000), st.floats(0.05, 2.0))
def test_no_minute_has_more_tokens_than_allowed(sizes: list[int], limit: int, tokens_of_a_character: float) -> None:
    """Each request is answered before the next leaves, so that nothing is left to settle but the last estimate."""
    clock = Clock()
    paced = pace(clock, limit)
    left: list[tuple[float, float]] = []

    async def main() -> None:
        for size in sizes:
            reserved = await paced.wait(size)
            real = size * tokens_of_a_character
            left.append((clock.now, real))
            paced.settle(reserved, size, max(1, round(real)))

    asyncio.run(main())
    largest = max(tokens for _, tokens in left)
    for i, (start, _) in enumerate(left):
        within = sum(tokens for at, tokens in left[i:] if at < start + 60)
        assert within <= limit + largest + len(left)


def test_the_allowance_is_used() -> None:
    clock = Clock()
    paced = pace(clock, 6000)

    async def main() -> None:
        for _ in range(100):
            reserved = await paced.wait(1000)
            paced.settle(reserved, 1000, 500)

    began = clock.now
    asyncio.run(main())
    # 100 requests of 500 tokens at 100 a second: the last of them leaves when those before it are paid for.
    assert clock.now - began == pytest.approx(99 * 5, rel=0.02)


def test_estimates_follow_what_the_server_counts() -> None:
    clock = Clock()
    paced = pace(clock, 6000)

    async def main() -> list[float]:
        estimates = []
        for _ in range(60):
            reserved = await paced.wait(1000)
            estimates.append(reserved)
            paced.settle(reserved, 1000, 700)
        return estimates

    estimates = asyncio.run(main())
    assert estimates[0] == FIRST_GUESS * 1000
    assert estimates[-1] == pytest.approx(700, rel=0.01)


def test_a_long_wait_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    paced = pace(Clock(), 1)

    async def main() -> None:
        for _ in range(2):
            await paced.wait(1000)

    asyncio.run(main())
    assert "the next request waits 5 h 00 min: a limit on tokens" in capfd.readouterr().err


def test_a_server_that_counts_nothing_leaves_the_estimate() -> None:
    clock = Clock()
    paced = pace(clock, 600)

    async def main() -> None:
        for _ in range(11):
            paced.settle(await paced.wait(100), 100, 0)

    began = clock.now
    asyncio.run(main())
    assert clock.now - began == pytest.approx(10 * FIRST_GUESS * 100 / 10)


def test_nobody_is_overtaken_and_nobody_starves() -> None:
    clock = Clock()
    paced = pace(clock, 600)
    order: list[int] = []
    sizes = [10_000 if i % 7 == 3 else random.Random(i).randrange(1, 50) for i in range(40)]

    async def one(i: int) -> None:
        await paced.wait(sizes[i])
        order.append(i)

    async def main() -> None:
        await asyncio.gather(*map(one, range(len(sizes))))

    asyncio.run(main())
    assert order == list(range(len(sizes)))


def test_a_pause_that_servers_ask_for_holds_all() -> None:
    clock = Clock()
    paced = pace(clock, 1e9)
    until = clock.now + 7

    async def main() -> None:
        await paced.wait(1, lambda: until - clock.now)

    asyncio.run(main())
    assert clock.now == pytest.approx(until)


@pytest.mark.parametrize("rate", [10.0, 100.0, 500.0])
def test_requests_a_second(rate: float) -> None:
    paced = Pace(rate)
    n = int(rate) if rate > 20 else 5
    times: list[float] = []

    async def one() -> None:
        await paced.wait(1)
        times.append(time.monotonic())

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(n)))

    asyncio.run(main())
    taken = times[-1] - times[0]
    at_once = max(1, int(rate / 20))
    assert taken >= (n - at_once) / rate * 0.99
    assert taken < 2 * n / rate + 0.5  # on a busy machine


def test_both_limits_hold_for_a_client() -> None:
    """600 tokens a minute, and answers that cost 110 each: the third leaves when two are paid for."""

    async def main(made: LlmClient) -> None:
        async with made:
            request = Request(({"role": "user", "content": "x" * 10},), max_tokens=4)
            await asyncio.gather(*(made.ask(request, lambda answer: answer) for _ in range(3)))

    with FakeServer(Reply("ok")) as server:
        began = time.monotonic()
        asyncio.run(main(LlmClient(server.url, concurrency=1, tokens_per_minute=6600, requests_per_second=1000)))
        taken = time.monotonic() - began
        assert len(server.requests) == 3
    assert 2.0 <= taken < 6.0


@pytest.mark.parametrize(
    "wrong",
    [
        {name: value}
        for name in ("tokens_per_minute", "requests_per_second")
        for value in (0, -1.0, float("nan"), 5e-324, 1e-300, float("-inf"), float("inf"))
    ],
)
def test_limits_that_let_nothing_through_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="must be from"):
        LlmClient("http://127.0.0.1:9", **wrong)
