"""The command llm: what it finds out about servers of several kinds, what it costs, and what it leaves for `score`."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error
from fake_vllm_python import FakeVllm
from tiny_study import cli

from autointerp.llm.capabilities import Capabilities
from autointerp.llm.client import ResponseCache, open_client
from autointerp.llm.options import LlmOptions
from autointerp.scoring.judges.llm import LlmJudge, best_protocol, explain_protocol

EVERYTHING: dict[str, Any] = {
    "model": "fake-model",
    "models": ["fake-model"],
    "answer": "maybe",
    "context_length": 4096,
    "json_schema": True,
    "logprobs": 2,
    "label_first": True,
    "cached_tokens": True,
    "requests": 3,
    "protocol": "single",
    "thinks": False,
    "missing": [],
}
SERVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everything": ({"context_length": 4096}, EVERYTHING),
    "no log-probabilities": ({"gives_logprobs": False}, {"logprobs": 0, "protocol": "batch"}),
    "no schema": ({"holds_schemas": False}, {"json_schema": False, "protocol": "single"}),
    "no counts": ({"counts_cached": False}, {"cached_tokens": False, "protocol": "single"}),
    "thinking": ({"thinks": True}, {"thinks": True, "label_first": False, "protocol": "batch"}),
    "no list of models": ({"models": None}, {"models": None, "context_length": None}),
    "several models": ({"models": ("a", "fake-model", *map(str, range(9)))}, {"model": "fake-model"}),
}


def probe(root: Path, server: FakeServer, *more: str) -> dict[str, Any]:
    found: dict[str, Any] = cli("llm", "--llm-url", server.url, "--root", root, "--json", *more).well().json
    return found


@pytest.mark.parametrize(("kind", "expected"), SERVERS.values(), ids=SERVERS)
def test_abilities_are_found_and_shown(kind: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    with FakeServer(**kind) as server:
        found = probe(tmp_path, server, "--llm-model", "fake-model")
        assert {name: found[name] for name in expected} == expected
        assert found["urls"] == [server.url]
        assert len(server.probes) == found["requests"] == 3
        assert not server.requests
        ran = cli("llm", "--llm-url", server.url, "--llm-model", "fake-model", "--root", tmp_path)
    assert len(ran.well().out.splitlines()) <= 25
    assert f"--protocol {found['protocol']}" in ran.out
    assert all(words[:40] in " ".join(ran.out.split()) for words in found["missing"])
    assert len(found["missing"]) == sum(
        found[name] in wrong
        for name, wrong in (("logprobs", (0,)), ("json_schema", (False,)), ("cached_tokens", (False,)))
    )


def test_the_probe_is_stored_and_asked_anew(tmp_path: Path) -> None:
    with FakeServer(gives_logprobs=False) as server:
        assert probe(tmp_path, server)["protocol"] == "batch"
        cache = ResponseCache(tmp_path / "cache.sqlite")
        assert cache.capabilities(server.url, "fake-model")["logprobs"] == 0
        server.gives_logprobs = True
        assert probe(tmp_path, server)["logprobs"] == 2
        assert cache.capabilities(server.url, "fake-model")["logprobs"] == 2
        cache.close()


def test_a_model_without_an_end_is_asked_once(tmp_path: Path) -> None:
    """One that is not tuned to answer continues for as long as it may."""
    with FakeServer() as server:
        server._probe_reply = lambda seen: server.probes.append(seen) or Reply("on " * 99, "length")  # type: ignore[method-assign,func-returns-value]
        found = probe(tmp_path, server)
    assert (found["label_first"], found["json_schema"], found["protocol"]) == (False, False, "batch")
    assert [seen.body["max_tokens"] for seen in server.probes[:2]] == [200, 4]


def test_score_asks_nothing_again(tmp_path: Path) -> None:
    async def choose() -> str:
        async with open_client(LlmOptions(url=server.url), tmp_path / "cache.sqlite") as client:
            return (await LlmJudge.open(client, LlmOptions(url=server.url))).protocol

    with FakeServer() as server:
        found = probe(tmp_path, server)
        assert asyncio.run(choose()) == found["protocol"]
        assert len(server.probes) == 3


def test_a_vllm_server_is_started_and_asked(tmp_path: Path) -> None:
    vllm = FakeVllm(tmp_path / "fake")
    flags = ("--vllm", "bundled", "--vllm-python", vllm.python)
    found = cli("llm", *flags, "--root", tmp_path, "--json").well().json
    assert found["model"].startswith("pystdlib")
    assert found["exact"]
    assert shlex.split(found["next"])[2:7] == ["explain", *map(str, flags)]
    assert not vllm.living()


def test_the_cost_is_that_of_the_requests(tmp_path: Path) -> None:
    with FakeServer() as server:
        found = probe(tmp_path, server)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (300, 30)
    assert found["seconds_per_request"] > 0


def test_body_headers_and_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sekret-0123456789")
    with FakeServer(key="sekret-0123456789", key_header="api-key") as server:
        flags = ("--llm-body", '{"top_k": 1}', "--llm-header", "api-key=$MY_KEY")
        found = probe(tmp_path, server, *flags)
        assert {seen.body["top_k"] for seen in server.probes} == {1}
    assert found["next"].endswith(
        f"explain --llm-url {server.url} --llm-body '{{\"top_k\": 1}}' --llm-header 'api-key=$MY_KEY' --root {tmp_path}"
    )


BAD: dict[str, tuple[dict[str, Any], Reply | None, tuple[str, ...]]] = {
    "no API": ({"models": None}, None, ("no OpenAI-compatible API at",)),
    "several models": ({"models": ("a", "b")}, None, ("serves 2 models", "'a'", "--llm-model")),
    "an unknown model": ({"models": ("qwn",)}, error(404, "no such model"), ("knows no model 'qwen'", "'qwn'")),
    "a refused key": ({"key": "another"}, None, ("API key",)),
    "no answer": ({}, Reply(""), ("gives no answer in plain text", "empty")),
    "only errors": ({}, error(400, "out of order"), ("gives no answer in plain text", "out of order")),
}


@pytest.mark.parametrize(("kind", "reply", "words"), BAD.values(), ids=BAD)
def test_a_server_that_cannot_be_asked_is_one_line(
    kind: dict[str, Any], reply: Reply | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    named = [] if reply is None else ["--llm-model", "qwen"]
    with FakeServer(**kind) as server:
        if reply is not None:
            server.chat_reply = lambda seen: reply  # type: ignore[method-assign, misc]  # noqa: ARG005
        cli("llm", "--llm-url", server.url, *named, "--root", tmp_path).failed_in_one_line(*words)


def test_no_server_is_one_line(tmp_path: Path) -> None:
    cli("llm", "--root", tmp_path).failed_in_one_line("--llm-url", "--vllm")
    cli("llm", "--llm-url", "http://127.0.0.1:9/v1", "--root", tmp_path).failed_in_one_line("no LLM server answers")


def test_each_reason_belongs_to_one_choice() -> None:
    reasons: dict[str, set[str]] = {}
    for logprobs in (None, 0, 5):
        for label_first in (None, False, True):
            for cached in (None, False, True):
                for local in (False, True):
                    found = Capabilities(logprobs=logprobs, label_first=label_first, cached_tokens=cached)
                    reasons.setdefault(explain_protocol(found, local), set()).add(best_protocol(found, local))
    assert len(reasons) == 5
    assert all(len(choices) == 1 for choices in reasons.values())
