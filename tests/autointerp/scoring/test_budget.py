"""A budget ends a command before it is overdrawn, keeps all that was paid for, and says how to go on."""

from __future__ import annotations

import asyncio
import sys

import pytest
from fake_server import FakeServer, Reply
from test_score_by_llm import ITEMS, N, explain, harvested, run  # noqa: F401

from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import explain_runs
from autointerp.journal.journal import Journal
from autointerp.llm.capabilities import THINKING_TOKENS
from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import AnswerFailed, Request
from autointerp.llm.limits import Budget, BudgetSpent, Prices, parse_budget, read_prices
from autointerp.llm.options import LlmOptions
from autointerp.scoring.score import score_runs
from sae.common.errors import BadInput
from sae.study.run import Run
from sae.study.stage import Compute

COST = 110  # tokens of one answer of the fake server: 100 read, 60 of them cached, and 10 written


def question(number: int = 0) -> Request:
    return Request(({"role": "user", "content": f"{number:0>40}"},), max_tokens=20)


def ask_many(server: FakeServer, budget: Budget, n: int, at_once: int = 8) -> int:
    """How many of ``n`` questions were answered."""

    async def go() -> int:
        async with LlmClient(server.url, budget=budget, concurrency=at_once) as client:
            await client.check()
            asked = (client.ask(question(i), lambda answer: answer.text) for i in range(n))
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(x) for x in found} <= {tuple, BudgetSpent}
            return sum(isinstance(x, tuple) for x in found)

    return asyncio.run(go())


@pytest.mark.parametrize("at_once", [1, 8])
def test_the_budget_is_used_up_and_never_overdrawn(at_once: int) -> None:
    with FakeServer(Reply("fine", delay=0.01)) as server:
        budget = Budget(tokens=20 * COST + 60)
        n = ask_many(server, budget, 40, at_once)
        assert n == len(server.requests)
        assert n * COST <= 20 * COST + 60
        # What stays unspent is less than one more request might have taken: 100 read (at most 108 thought) and 20.
        assert n >= 19


def test_room_for_thinking_is_reserved() -> None:
    async def go(server: FakeServer) -> None:
        async with LlmClient(server.url, budget=Budget(tokens=2 * THINKING_TOKENS)) as client:
            for i in range(40):
                await client.ask(question(i), lambda answer: answer.text)

    with FakeServer(Reply("<think>hm</think>fine", completion_tokens=500)) as server:
        with pytest.raises(BudgetSpent):
            asyncio.run(go(server))
        assert server.requests[-1].body["max_tokens"] == 20 + THINKING_TOKENS
        # Each takes 600; the last one to leave found 4,096 and some left.
        assert 6 <= len(server.requests) <= 7


def test_dollars_count_cached_tokens_at_their_price() -> None:
    prices = Prices(prompt=2.0, completion=10.0, cached=0.5)
    assert prices.of(100, 60, 10) == pytest.approx((40 * 2 + 60 * 0.5 + 10 * 10) / 1e6)
    each = prices.of(100, 60, 10)
    with FakeServer("fine") as server:
        n = ask_many(server, Budget(dollars=10 * each, prices=prices), 40)
    assert 7 <= n <= 10


def test_unusable_answers_are_paid_for_too() -> None:
    async def go(server: FakeServer) -> None:
        async with LlmClient(server.url, budget=Budget(tokens=5 * COST), answer_tries=100) as client:

            def refuse(_: object) -> None:
                raise AnswerFailed("useless")

            with pytest.raises(BudgetSpent, match=r"of 550 tokens is spent \(\d+ prompt"):
                await client.ask(question(), refuse)

    with FakeServer("fine") as server:
        asyncio.run(go(server))
        assert len(server.requests) * COST <= 5 * COST


@pytest.mark.parametrize(
    "counts",
    [
        None,
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": -100, "completion_tokens": -10},
        {"prompt_tokens": 100, "completion_tokens": -(10**9)},
        {"prompt_tokens": 0, "completion_tokens": 10},
        {"prompt_tokens": 100, "completion_tokens": 0},
        {"prompt_tokens": 100, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 10**9}},
    ],
)
def test_implausible_counts_still_end_a_budget(counts: dict[str, object] | None) -> None:
    prices = Prices(prompt=1.0, completion=1.0, cached=0.0)
    body = {"choices": [{"message": {"content": "fine"}}], "usage": counts}
    for budget in (Budget(tokens=1000), Budget(dollars=1000 / 1e6, prices=prices)):
        with FakeServer(Reply(body=body)) as server:
            n = ask_many(server, budget, 100, at_once=1)
        assert 5 <= n <= 30, "a request may take 20 + 8 + 20 tokens before any is counted, and at most 108 + 20"


def test_score_stops_and_the_same_command_resumes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["cli.py", "score", "--sae", "run_a"])
    with FakeServer() as server:
        explain(run, server)
        before = len(server.requests)
        options = LlmOptions(url=server.url, protocol="single", concurrency=4, budget=Budget(tokens=3_000))
        with pytest.raises(BudgetSpent) as stopped:
            score_runs([run], run.root, ("detection",), "llm", options, control_latents=0)
        asked = len(server.requests) - before
        assert 0 < asked * COST <= 3_000
        with Journal(run.journal_path) as journal:
            assert len(journal.verdicts(judge="llm")) == asked, "each answer that was paid for is a verdict"
            usage = journal.usage().set_index("stage").loc["score"]
        assert usage["prompt_tokens"] + usage["completion_tokens"] == asked * COST
        line = str(stopped.value)
        assert "3,000 tokens" in line
        assert f"of {N} explanations are finished" in line
        assert line.endswith("to continue with a new budget: python cli.py score --sae run_a")
        assert stopped.value.exit_code != 0
        again = score_runs(
            [run], run.root, ("detection",), "llm", LlmOptions(url=server.url, protocol="single"), control_latents=0
        )
        assert again.n_done == N
        assert len(server.requests) - before == N * ITEMS, "nothing was asked twice"


def test_explain_stops_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("sys.argv", ["cli.py", "explain", "--sae", "run_a"])
    with FakeServer(Reply("[EXPLANATION]: Words.", completion_tokens=1_500)) as server:
        options = LlmOptions(url=server.url, concurrency=1, budget=Budget(tokens=4_200))
        with pytest.raises(BudgetSpent, match=rf"of {N} latents "):
            explain_runs([run], Choice(n=N), "llm", options, Compute("cpu", 1))
        with Journal(run.journal_path) as journal:
            assert len(journal.explanations(status="ok", explainer="llm")) == len(server.requests) == 2
            assert len(journal.explanations(status="ok", explainer="ngram")) == 2, "the baseline, of these"


@pytest.mark.parametrize(
    ("text", "tokens", "dollars"),
    [("2M", 2_000_000, None), ("500", 500, None), ("$5", None, 5.0), ("$1,000.50", None, 1000.5)],
)
def test_budgets_as_people_write_them(text: str, tokens: int | None, dollars: float | None) -> None:
    found = parse_budget(text, Prices(1, 1))
    assert found is not None
    assert (found.tokens, found.dollars) == (tokens, dollars)


@pytest.mark.parametrize("text", ["", "0", "five", "$", "$-1", "$0", "$nan", "-3", "$inf"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--budget"):
        parse_budget(text, Prices(1, 1))


def test_dollars_need_prices() -> None:
    with pytest.raises(BadInput, match="--price-in"):
        parse_budget("$5", None)
    with pytest.raises(BadInput, match="--price-out"):
        read_prices(1.0, None, None)
    with pytest.raises(BadInput, match="--price-cached"):
        read_prices(1.0, -1.0, 1.0)
    assert read_prices(None, None, None) is None
