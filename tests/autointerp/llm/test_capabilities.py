"""What servers can do is found out: by two tiny questions before the protocol is chosen, and from every answer."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, token

from autointerp.llm.capabilities import Capabilities
from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.exchange import AnswerFailed, Request
from autointerp.llm.options import LlmOptions
from autointerp.scoring.judges.llm import LlmJudge


def probed(server: FakeServer, cache: Path | None = None) -> Capabilities:
    async def main() -> Capabilities:
        kept = None if cache is None else ResponseCache(cache)
        try:
            async with LlmClient(server.url, backoff=0.001, cache=kept) as client:
                return await client.probe()
        finally:
            if kept is not None:
                kept.close()

    return asyncio.run(main())


def asked(server: FakeServer, *requests: Request) -> Capabilities:
    async def main() -> Capabilities:
        async with LlmClient(server.url, backoff=0.001) as client:
            for request in requests:
                await client.ask(request, lambda answer: answer)
            return client.capabilities

    return asyncio.run(main())


def question(**fields: Any) -> Request:
    return Request(({"role": "user", "content": "Statement: x"},), max_tokens=20, **fields)


ABLE: dict[str, Any] = {
    "json_schema": True,
    "logprobs": 2,
    "cached_tokens": True,
    "label_first": True,
    "context_length": 4096,
    "thinks": False,
    "most_logprobs": None,
    "without": [],
}


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ({}, {}),
        ({"gives_logprobs": False}, {"logprobs": 0}),
        ({"rejects": ("logprobs",)}, {"logprobs": 0, "without": ["logprobs"]}),
        ({"holds_schemas": False}, {"json_schema": False}),
        ({"rejects": ("response_format",)}, {"json_schema": False, "without": ["response_format"]}),
        ({"counts_cached": False}, {"cached_tokens": False}),
        ({"context_length": None}, {"context_length": None}),
        ({"thinks": True}, {"label_first": False, "logprobs": 1, "thinks": True}),
    ],
)
def test_what_a_server_can_do_is_found_out(fault: dict[str, Any], found: dict[str, Any]) -> None:
    with FakeServer(**{"context_length": 4096, **fault}) as server:
        assert probed(server).as_dict() == {**ABLE, **found}
        assert not server.requests


def test_it_is_asked_once_a_day(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with FakeServer() as server:
        first = probed(server, path)
        n = len(server.probes)
        assert n == 2
        assert probed(server, path) == first
        assert len(server.probes) == n
        connection = sqlite3.connect(path)
        with connection:
            connection.execute("UPDATE capability SET created = '2000-01-01T00:00:00+00:00'")
        connection.close()
        assert probed(server, path) == first
        assert len(server.probes) == 2 * n
    with FakeServer(gives_logprobs=False) as other:
        assert probed(other, path).logprobs == 0, "another server, though of the same model"


def test_every_answer_tells() -> None:
    schema = {"type": "object", "properties": {"labels": {}}, "required": ["labels"]}
    with FakeServer(Reply('{"labels": []}', logprobs=[token("1", t1=-0.1, t0=-3.0)])) as server:
        assert asked(server, question()).list_missing() == []
        found = asked(server, question(json_schema=schema, logprobs=5))
        assert (found.json_schema, found.logprobs, found.cached_tokens) == (True, 2, True)
        server.answer = lambda _: Reply("[]")
        found = asked(server, question(json_schema=schema, logprobs=5))
        assert (found.json_schema, found.logprobs) == (False, 0)
    with FakeServer("ok", counts_cached=False) as server:
        found = asked(server, question())
    assert (found.json_schema, found.logprobs, found.cached_tokens) == (None, None, False)


def test_one_answer_without_is_enough() -> None:
    found = Capabilities(json_schema=True, logprobs=20, cached_tokens=True)
    with FakeServer("[]", counts_cached=False, gives_logprobs=False) as server:
        worse = asked(server, question(logprobs=5))
    assert worse.logprobs == 0
    found.note_refusal("logprobs")
    found.note_refusal("response_format")
    assert len(found.list_missing()) == 2
    assert all("\n" not in line for line in found.list_missing())


@pytest.mark.parametrize(
    ("fault", "protocol"),
    [
        ({}, "single"),
        ({"counts_cached": False}, "single"),  # on this machine: vLLM keeps prefixes without saying so
        ({"gives_logprobs": False}, "batch"),
        ({"rejects": ("logprobs",)}, "batch"),
        ({"thinks": True}, "batch"),
    ],
)
def test_auto_is_single_where_cheap_with_probabilities(fault: dict[str, Any], protocol: str) -> None:
    async def main() -> str:
        async with LlmClient(server.url, backoff=0.001) as client:
            return (await LlmJudge.open(client, LlmOptions())).protocol

    with FakeServer(**fault) as server:
        assert asyncio.run(main()) == protocol


@pytest.mark.parametrize(("counts", "protocol"), [(True, "single"), (False, "batch")])
def test_auto_is_single_only_with_known_prefix_caching(
    counts: bool, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlmClient, "is_local", property(lambda _: False))

    async def main() -> str:
        async with LlmClient(server.url, backoff=0.001) as client:
            return (await LlmJudge.open(client, LlmOptions())).protocol

    with FakeServer(counts_cached=counts) as server:
        assert asyncio.run(main()) == protocol


def test_a_prompt_that_cannot_fit_is_not_sent() -> None:
    async def main() -> str:
        async with LlmClient(server.url) as client:
            await client.complete([{"role": "user", "content": "short"}], 10)
            with pytest.raises(AnswerFailed) as caught:
                await client.complete([{"role": "user", "content": "x " * 5000}], 10)
            return caught.value.reason

    with FakeServer("ok", context_length=1000) as server:
        reason = asyncio.run(main())
        assert len(server.requests) == 1
    assert "the prompt is too long for the model: about 1250 tokens at least" in reason
    assert "its context holds 1000" in reason


def test_the_least_tokens_of_a_character_are_learnt() -> None:
    """The server counts 100 tokens in 1,000 characters: 8,000 of such characters may fit into 1,000 tokens."""

    async def main() -> None:
        async with LlmClient(server.url) as client:
            await client.complete([{"role": "user", "content": "x" * 1000}], 10)
            await client.complete([{"role": "user", "content": "x" * 8001}], 10)

    with FakeServer("ok", context_length=1000) as server:
        asyncio.run(main())
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("entry", "length"),
    [
        ({"max_model_len": 4096}, 4096),
        ({"context_length": 8192}, 8192),
        ({"meta": {"n_ctx": 2048, "n_ctx_train": 32768}}, 2048),  # llama.cpp
        ({"meta": {"n_ctx": 2048}, "max_model_len": 1024}, 1024),
        ({"meta": "n_ctx"}, None),
        ({"meta": {"n_ctx": True}}, None),
    ],
)
def test_context_length_is_read_off_the_list_of_models(entry: dict[str, Any], length: int | None) -> None:
    found = Capabilities()
    found.learn_length(entry)
    assert found.context_length == length


def test_another_model_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = Capabilities()
    for _ in range(2):
        found.learn_model("asked", "other")
        found.forget()
    assert capsys.readouterr().err.count("answers as 'other'") == 1
