"""What goes wrong between client and server: what is tried again, what is one row's failure, what stops the work."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from asking import MESSAGES, client, complete, run
from fake_server import FakeServer, Reply, error

from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.exchange import AnswerFailed, Request, without_thinking
from sae.common.errors import BadInput, Unavailable


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTOINTERP_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


# retries


@pytest.mark.parametrize(
    "fault",
    [
        *(error(status, "busy") for status in (408, 409, 429, 500, 502, 503, 529)),
        Reply(drop=True),
        Reply(status=503, body="<html>Bad gateway</html>"),
    ],
    ids=lambda fault: f"{fault.status}{'drop' if fault.drop else ''}",
)
def test_passing_faults_are_tried_again(fault: Reply) -> None:
    with FakeServer() as server:
        server.script.extend([fault, fault])
        answer = complete(client(server))
    assert answer.usage.requests == 3
    assert len(server.requests) == 3


def test_a_fault_that_stays_is_this_requests_failure() -> None:
    with FakeServer() as server:
        server.script.extend([error(500, "exploded")] * 4)
        with pytest.raises(AnswerFailed, match=r"HTTP 500: exploded \(4 tries\)") as caught:
            complete(client(server, tries=4))
        assert caught.value.usage.requests == 4
        assert complete(client(server)).text


def test_a_server_that_keeps_failing_is_given_up() -> None:
    with FakeServer(error(500, "exploded")) as server:

        async def work(c: LlmClient) -> int:
            for failures in range(100):
                try:
                    await c.complete(MESSAGES, 20)
                except AnswerFailed:
                    continue
                except Unavailable:
                    return failures
            return -1

        assert run(work, client(server, tries=2, patience=5)) == 4


def test_a_server_that_goes_away_stops_the_work() -> None:
    with FakeServer() as server:

        async def work(c: LlmClient) -> None:
            await c.complete(MESSAGES, 20)
            await asyncio.to_thread(server.stop)
            await c.complete(MESSAGES, 21)

        with pytest.raises(Unavailable, match="finished work is kept"):
            run(work, client(server, tries=2))


@pytest.mark.parametrize(
    "headers",
    [
        {"retry-after": "0.4"},
        {"retry-after-ms": "400"},
        {"retry-after": "a date"},
    ],
    ids=["seconds", "milliseconds", "date"],
)
def test_retry_after_is_honoured(headers: dict[str, str]) -> None:
    at_a_date = headers.get("retry-after") == "a date"
    if at_a_date:
        headers = {"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=300), usegmt=True)}
    with FakeServer() as server:
        server.script.append(error(429, "slow down", headers=headers))
        if at_a_date:
            with pytest.raises(Unavailable, match=r"asks for a pause of \d+ s"):
                complete(client(server))
        else:
            complete(client(server))
            assert server.requests[1].at - server.requests[0].at >= 0.4


def test_retry_after_holds_the_whole_client_back() -> None:
    with FakeServer() as server:

        async def work(c: LlmClient) -> None:
            await c.check()
            server.script.append(error(429, "slow down", headers={"retry-after": "0.4"}))
            first = asyncio.create_task(c.complete(MESSAGES, 20))
            await asyncio.sleep(0.15)
            await c.complete(MESSAGES, 21)
            await first

        run(work, client(server))
    begun = [seen.at for seen in server.requests]
    assert min(begun[1:]) - begun[0] >= 0.4


def test_a_silent_server_times_out() -> None:
    with FakeServer() as server:
        server.script.append(Reply(delay=6.0))
        answer = complete(client(server, timeout=1.5))
    assert answer.usage.requests == 2


# refusals


def test_one_refusal_fails_one_question_all_refusals_stop() -> None:
    with FakeServer() as server:
        server.script.append(error(400, "maximum context length is 4096 tokens, 'max_tokens' is too large"))
        with pytest.raises(AnswerFailed, match=r"refused the request \(HTTP 400: maximum context"):
            complete(client(server))
        assert len(server.requests) == 1, "a refusal is not tried again"

        async def work(c: LlmClient) -> None:
            for n in range(3):
                server.script.append(error(400, "no such thing"))
                try:
                    await c.complete(MESSAGES, 20 + n)
                except AnswerFailed:
                    assert n < 2

        with pytest.raises(
            BadInput, match=r"answers none of the first questions: .* \(HTTP 400: no such thing\); check"
        ):
            run(work, client(server))


# answers that are none


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Reply(body=[1, 2]), "not a chat completion"),
        (Reply(content=None), "empty"),
        (Reply(content="  \n"), "empty"),
        (Reply(content='{"labels": [1', finish_reason="length"), r"cut off at (20|40|80) tokens"),
        (Reply(content="", finish_reason="length", message={"reasoning_content": "hm"}), "before any text"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_unusable_answers_are_retried_then_fail(fault: Reply, reason: str, tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "cache.sqlite")
    with FakeServer() as server:
        server.script.append(fault)
        assert complete(client(server)).usage.requests == 2
        server.script.extend([fault] * 3)
        with pytest.raises(AnswerFailed, match=reason) as caught:
            complete(client(server, cache=cache))
        assert caught.value.usage.requests == 3
        key = Request(MESSAGES, 20).key("fake-model")
        assert cache.get(key) is None, "what failed is asked anew by the next run"


def test_a_cut_answer_is_asked_with_more_tokens() -> None:
    with FakeServer() as server:
        server.script.extend([Reply(content="a", finish_reason="length")] * 2)
        complete(client(server))
    assert [seen.body["max_tokens"] for seen in server.requests] == [20, 40, 80]


def test_a_refusal_of_more_tokens_names_the_cut() -> None:
    with FakeServer() as server:
        refusal = error(400, "'max_tokens' is too large: this model's maximum context length is 60")
        server.script.extend([Reply(content="a", finish_reason="length"), refusal])
        with pytest.raises(AnswerFailed, match=r"cut off at 20 tokens; .* more tokens: .* is too large") as caught:
            complete(client(server))
    assert caught.value.usage.requests == 2


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("a", "length", completion_tokens=7), "cut off at 7 tokens, where the model's context is full"),
        (Reply('{"labels": [' + "\n" * 150, "length"), "cut off at 20 tokens, the last 150 characters white space"),
    ],
)
def test_cut_that_more_tokens_cannot_fix_is_final(reply: Reply, reason: str) -> None:
    with FakeServer(reply) as server:
        with pytest.raises(AnswerFailed, match=reason):
            complete(client(server))
        assert len(server.requests) == 1


def test_what_failed_attempts_cost_is_counted() -> None:
    with FakeServer() as server:
        server.script.extend([error(503), Reply(content=None)])
        answer = complete(client(server))
    assert (answer.usage.requests, answer.usage.prompt_tokens) == (3, 200)


def test_thinking_is_not_the_answer() -> None:
    assert without_thinking("<think>a\nb</think>\n\n yes") == "yes"
    assert without_thinking("opened in the prompt</think>yes") == "yes"
    assert without_thinking("yes") == "yes"
    with pytest.raises(AnswerFailed, match="still thinking"):
        without_thinking("<think>and on and on")
