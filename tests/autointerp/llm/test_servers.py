"""Several servers as one: who gets the next request, who rests, and that all of them serve one model."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from asking import free_port
from fake_server import FakeServer, Reply, error
from hypothesis import given
from hypothesis import strategies as st

from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import Answer, AnswerFailed, Request
from autointerp.llm.options import LlmOptions
from autointerp.llm.servers import LONGEST_REST, OVERFLOW, REST, TOLERATED, Servers
from sae.common.errors import BadInput, Unavailable

URLS = ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1", "http://127.0.0.1:3/v1")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def question(text: str = "Statement: x", affinity: str = "") -> Request:
    return Request(({"role": "user", "content": text},), max_tokens=20, affinity=affinity)


def ask(made: LlmClient, requests: Sequence[Request]) -> list[Answer | AnswerFailed]:
    async def one(request: Request) -> Answer | AnswerFailed:
        try:
            return (await made.ask(request, lambda answer: answer))[1]
        except AnswerFailed as failed:
            return failed

    async def main() -> list[Answer | AnswerFailed]:
        async with made:
            return await asyncio.gather(*map(one, requests))

    return asyncio.run(main())


def client(*servers: FakeServer | str, **settings: Any) -> LlmClient:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    return LlmClient(urls, **{"backoff": 0.001, **settings})


# choosing


def test_next_request_goes_to_the_least_busy_server() -> None:
    servers = Servers(URLS)
    slow, fast, _ = servers.all
    servers.all[2].rests_until = float("inf")
    servers.note_answer(slow, 1.0)
    servers.note_answer(fast, 0.25)
    chosen = Counter[str]()
    for _ in range(50):
        server = servers.choose("")
        server.in_flight += 1
        chosen[server.url] += 1
    assert chosen == {slow.url: 10, fast.url: 40}


@given(st.lists(st.text(max_size=10), min_size=1, max_size=5))
def test_one_affinity_stays_on_one_idle_server(affinities: list[str]) -> None:
    servers = Servers(URLS)
    for affinity in affinities:
        if affinity:
            assert len({servers.choose(affinity).url for _ in range(5)}) == 1


def test_affinities_are_spread_over_the_servers() -> None:
    servers = Servers(URLS)
    chosen = Counter(servers.choose(f"explanation {i}").url for i in range(600))
    assert min(chosen[url] for url in URLS) > 140


def test_a_server_lost_moves_only_its_own_affinities() -> None:
    servers = Servers(URLS)
    before = {i: servers.choose(f"explanation {i}") for i in range(100)}
    servers.all[0].rests_until = float("inf")
    after = {i: servers.choose(f"explanation {i}") for i in range(100)}
    assert all(after[i] is before[i] for i in before if before[i] is not servers.all[0])
    assert all(after[i] is not servers.all[0] for i in after)


def test_what_does_not_fit_at_home_overflows() -> None:
    servers = Servers(URLS[:2])
    home = servers.choose("an explanation")
    other = next(server for server in servers.all if server is not home)
    for _ in range(100):
        servers.choose("an explanation").in_flight += 1
    assert other.in_flight > 0
    assert home.in_flight > other.in_flight
    assert home.in_flight <= OVERFLOW * (other.in_flight + 1) + 1


# resting


def test_a_failing_server_rests_and_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    servers = Servers(URLS[:2], clock)
    bad, good = servers.all
    for _ in range(TOLERATED):
        assert bad.rests_until == 0
        servers.note_failure(bad, "HTTP 503")
    assert f"{bad.url} fails (HTTP 503): tried again in 10 s; 1 of 2 servers continue" in capsys.readouterr().err
    good.in_flight = 50
    assert servers.choose("") is good
    clock.now += REST
    assert servers.choose("") is bad
    bad.in_flight = 1
    assert servers.choose("") is good, "one request tries it, not all of them"
    bad.in_flight = 0
    servers.note_failure(bad, "HTTP 503")
    assert bad.rests_until == clock.now + 2 * REST
    clock.now += 2 * REST
    servers.note_answer(bad, 0.1)
    assert "answers again" in capsys.readouterr().err
    assert bad.rests == 0
    for _ in range(20):
        clock.now = max(clock.now, bad.rests_until)
        servers.note_failure(bad, "HTTP 503")
    assert bad.rests_until <= clock.now + LONGEST_REST


def test_the_first_server_to_recover_continues() -> None:
    clock = Clock()
    servers = Servers(URLS[:2], clock)
    servers.note_failure(servers.all[1], "gone", at_once=True)
    clock.now += 1
    servers.note_failure(servers.all[0], "gone", at_once=True)
    assert servers.choose("x") is servers.all[1]


def test_a_single_server_never_rests() -> None:
    servers = Servers(URLS[:1])
    for _ in range(10):
        servers.note_failure(servers.all[0], "HTTP 503")
    assert servers.all[0].rests_until == 0
    assert not servers.any_is_left()


# with real servers


def test_the_load_is_shared() -> None:
    with FakeServer(Reply("ok", delay=0.01)) as first, FakeServer(Reply("ok", delay=0.01)) as second:
        answers = ask(client(first, second, concurrency=8), [question(str(i), str(i)) for i in range(80)])
    assert all(isinstance(answer, Answer) for answer in answers)
    assert len(first.requests) + len(second.requests) == 80
    assert min(len(first.requests), len(second.requests)) > 20


def test_a_faster_server_gets_more() -> None:
    with FakeServer(Reply("ok", delay=0.01)) as fast, FakeServer(Reply("ok", delay=0.2)) as slow:
        ask(client(fast, slow, concurrency=8), [question(str(i), str(i)) for i in range(150)])
    assert len(fast.requests) > 2 * len(slow.requests)
    assert slow.requests


def test_what_one_server_fails_another_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(error(503, "overloaded")) as bad, FakeServer("ok") as good:
        answers = ask(client(bad, good), [question(str(i), str(i)) for i in range(60)])
    assert all(isinstance(answer, Answer) for answer in answers)
    assert len(bad.requests) <= TOLERATED + 8  # those that were under way with the third failure
    assert "tried again in" in capsys.readouterr().err


def test_a_server_that_goes_away_is_done_without() -> None:
    with FakeServer("ok") as good, FakeServer("ok") as leaving:
        made = client(good, leaving)

        async def main() -> list[Answer]:
            async with made:
                await made.check()
                leaving.stop()
                return [(await made.ask(question(str(i), str(i)), lambda answer: answer))[1] for i in range(20)]

        assert len(asyncio.run(main())) == 20
        assert len(good.requests) == 20


def test_missing_server_is_skipped_all_missing_is_error() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    with FakeServer("ok") as server:
        (answer,) = ask(client(nowhere, server), [question()])
    assert isinstance(answer, Answer)
    with pytest.raises(Unavailable, match="no LLM server answers at"):
        ask(client(nowhere, f"http://127.0.0.1:{free_port()}/v1"), [question()])


def test_one_server_pauses_while_the_other_continues() -> None:
    with FakeServer("ok") as busy, FakeServer("ok") as other:
        busy.script.append(error(429, "slow down", headers={"retry-after": "2"}))
        began = time.monotonic()
        ask(client(busy, other, concurrency=4), [question(str(i), str(i)) for i in range(40)])
        taken = time.monotonic() - began
    assert taken < 1.9
    assert len(busy.requests) <= 4
    assert len(other.requests) >= 36


@pytest.mark.parametrize("named", [None, "a"])
def test_servers_of_different_models_are_refused_and_told(named: str | None) -> None:
    with FakeServer(models=("a",)) as first, FakeServer(models=("b",)) as second:
        with pytest.raises(BadInput) as caught:
            ask(client(first, second, model=named), [question()])
        assert not first.requests
        assert not second.requests
    line = str(caught.value)
    assert f"{first.url} serves 'a'; {second.url} serves 'b'" in line


def test_one_server_given_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="is given twice"):
        LlmClient(["127.0.0.1:8000", "http://127.0.0.1:8000/v1"])
    with FakeServer("ok") as server, pytest.raises(BadInput, match="is given twice"):
        ask(client(server.root + "/v1", server.root + "/v1/models/"), [question()])


def test_options_take_one_address_or_several() -> None:
    assert LlmOptions(url="a").urls == ("a",)
    assert LlmOptions(url=("a", "b")).urls == ("a", "b")
    assert not LlmOptions(url=()).is_named
    assert LlmOptions(url=("a", "b"), judge_url=("c",)).list_words() == [
        *("--llm-url", "a", "--llm-url", "b", "--judge-url", "c")
    ]
    assert LlmOptions(url="a", model="m", judge_url="c").for_judge() == LlmOptions(url="c")
