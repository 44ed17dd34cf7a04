"""``--llm-body`` and ``--llm-header``: what they add to each request, and what they refuse."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from asking import MESSAGES, client, complete, line_of
from fake_server import FakeServer, error
from hypothesis import given
from hypothesis import strategies as st

from autointerp.explaining.explainers.llm import LlmExplainer
from autointerp.llm.additions import Header, read_body, read_headers
from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.exchange import AnswerFailed, Request
from autointerp.llm.options import LlmOptions
from autointerp.llm.transport import list_candidates
from autointerp.scoring.judges.llm import LlmJudge
from sae.common.errors import BadInput, UserError

SECRET = "sekret-0123456789abcdef"
THINKING_OFF = {"chat_template_kwargs": {"enable_thinking": False}}


def read(*given: str, **environment: str) -> dict[str, str]:
    return {header.name: header.value for header in read_headers("--llm-header", given, environment)}


# --- headers ----------------------------------------------------------------------------------------------------------


def test_variables_in_headers_are_read_from_the_environment() -> None:
    assert read("api-key=$A", "Authorization=Bearer ${B}", "X-Both=$A-${B}_c", A="one$B", B=" two\n") == {
        "api-key": "one$B",
        "Authorization": "Bearer two",
        "X-Both": "one$B-two_c",
    }
    assert read("X-Price=5$", "X-Sum=a=b=") == {"X-Price": "5$", "X-Sum": "a=b="}


BAD_HEADERS = {
    "no equals sign": ("Authorization", "write NAME=VALUE"),
    "a colon": (f"Authorization: Bearer {SECRET}", "write NAME=VALUE"),
    "a colon and padding": (f"Authorization: Bearer {SECRET}==", "write NAME=VALUE"),
    "the value alone": (f"{SECRET}==", "write NAME=VALUE"),
    "no value": ("api-key=", "write NAME=VALUE"),
    "the reprinted command": ("api-key=…", "write NAME=VALUE"),
    "a header of HTTP": ("Content-Length=5", "Content-Length: the program sets this header itself"),
    "another host": ("HOST=elsewhere", "HOST: the program sets this header itself"),
    "a proxy's": ("Proxy-Authorization=x", "sets this header itself"),
    "a second line": (f"X-A={SECRET}\r\nX-B: {SECRET}", "--llm-header X-A: the value must be one line"),
    "an accent": (f"X-A={SECRET}é", "--llm-header X-A: the value must be one line"),
    "without end": (f"X-A={'k' * 10_000}", "--llm-header X-A: the value must be one line"),
    "an unset variable": ("api-key=$AZURE_KEY", "api-key: the environment variable AZURE_KEY is not set"),
    "an unset variable in a secret": (f"X-A={SECRET}$hunter2", "X-A: a variable in it is not set"),
}


@pytest.mark.parametrize(("given", "reason"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_headers_are_one_line_without_the_value(given: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        read(given)
    line = line_of(caught)
    assert SECRET not in line
    assert "hunter2" not in line
    assert "kkk" not in line


def test_a_header_given_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="--llm-header API-KEY is given twice"):
        read("api-key=a", "API-KEY=b")


@given(st.text(max_size=30), st.sampled_from(["", "api-key", "Authorization", "X-A", ":", "Host", " "]))
def test_any_header_is_read_or_refused_in_one_line(before: str, name: str) -> None:
    try:
        found = read(f"{name}={before}{SECRET}")
    except BadInput as refused:
        said = str(refused)
    else:
        said = "".join(found)
        assert found[name].isascii()
        assert found[name].isprintable()
    assert SECRET not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "value", "authorization"),
    [
        ("api-key", SECRET, None),
        ("Api-Key", SECRET, None),
        ("authorization", f"Bearer {SECRET}", f"Bearer {SECRET}"),
        ("X-Team", "interpretability", "Bearer from-environment"),
        ("user-agent", "a browser", "Bearer from-environment"),
    ],
)
def test_headers_are_sent_and_may_replace_the_key(
    name: str, value: str, authorization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOINTERP_API_KEY", "from-environment")
    with FakeServer() as server:
        made = client(server, headers=(Header(name, value),))
        complete(made)
        assert server.requests[0].headers[name.lower()] == value
        assert server.requests[0].headers.get("authorization") == authorization
        assert value not in repr(Header(name, value)) + repr(LlmOptions(url="u", headers=(Header(name, value),)))


def test_ordinary_words_in_headers_stay_in_answers() -> None:
    answer = "interpretability of 2024-10-21"
    with FakeServer(answer) as server:
        headers = read_headers("--llm-header", ["X-Title=interpretability", "X-Date=2024-10-21"])
        assert complete(client(server, headers=headers)).text == answer


# --- the query of an address ------------------------------------------------------------------------------------------


def test_the_query_of_an_address_is_on_every_path() -> None:
    with FakeServer(
        prefix="/openai/deployments/d", query="api-version=2024-10-21", key=SECRET, key_header="api-key"
    ) as s:
        made = client(f"{s.root}/openai/deployments/d?api-version=2024-10-21", headers=(Header("api-key", SECRET),))
        complete(made)
        assert made.url == f"{s.url}?api-version=2024-10-21"


@pytest.mark.parametrize(
    "query",
    [
        *("key={}", "api_key={}", "subscription-key={}", "token={}", "X-Amz-Signature={}", "sig={}", "code={}"),
        *("{}", "a=1&{}=", "a=1&access_token={}", "version=sk-0123456789abcdef", "PASSWORD={}"),
    ],
)
def test_a_secret_in_a_query_is_refused(query: str) -> None:
    with pytest.raises(BadInput, match="has a secret in it") as caught:
        list_candidates(f"http://host/v1?{query.format(SECRET)}")
    assert SECRET not in line_of(caught)
    assert "sk-" not in line_of(caught)


# --- the body ---------------------------------------------------------------------------------------------------------


def test_the_body_is_merged_and_null_removes() -> None:
    body = {"reasoning_effort": "none", "temperature": None, "logprobs": None, **THINKING_OFF}
    with FakeServer() as server:
        complete(client(server, body=body), logprobs=5)
        sent = server.requests[0].body
    assert sent["reasoning_effort"] == "none"
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert not {"temperature", "logprobs", "top_logprobs"} & set(sent)


def test_a_refused_field_of_the_body_is_never_dropped() -> None:
    with FakeServer(rejects=("temperature",)) as server:
        with pytest.raises(AnswerFailed, match=r"'temperature' is not supported"):
            complete(client(server, body={"temperature": 0.5}))
        assert len(server.requests) == 1
        complete(client(server))  # the program's own is
        assert len(server.requests) == 3


def test_refusals_of_every_request_name_the_body() -> None:
    async def ask(made: LlmClient) -> None:
        async with made:
            for i in range(3):
                try:
                    await made.complete(({"role": "user", "content": str(i)},), 5)
                except AnswerFailed:
                    continue

    refusing = FakeServer(lambda _: error(400, "unknown field 'effort'"))
    with refusing as server, pytest.raises(BadInput, match="check --llm-url, --llm-model, --llm-body"):
        asyncio.run(ask(client(server, body={"effort": 1})))


BAD_BODIES = {
    "no JSON": ("{reasoning_effort: none}", "is not JSON; give an object"),
    "no object": ("[1]", "is not a JSON object"),
    "a number": ("5", "is not a JSON object"),
    "not a number": ('{"a": NaN}', "is not JSON"),
    "infinite": ('{"a": 1e999}', "is not JSON"),
    "without end": ("[" * 100_000, "is not JSON"),
    "messages": ('{"messages": []}', "decides 'messages'"),
    "model": ('{"model": null}', "decides 'model'"),
    "several answers": ('{"n": 2}', "decides 'n'"),
    "a stream": ('{"stream": true}', "decides 'stream'"),
    "the length": ('{"max_tokens": 5}', "decides 'max_tokens'"),
    "a key": ('{"user": "sk-0123456789abcdef"}', "holds a key or a password"),
    "a field for a key": (f'{{"extra": [{{"api_key": "{SECRET}"}}]}}', "holds a key or a password"),
}


@pytest.mark.parametrize(("given", "reason"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_bad_bodies_are_one_line(given: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        read_body("--llm-body", given)
    assert "sk-" not in line_of(caught)
    assert SECRET not in line_of(caught)


@pytest.mark.parametrize("how", ["key", "header"])
def test_a_body_with_the_key_is_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "key":
        monkeypatch.setenv("AUTOINTERP_API_KEY", SECRET)
    headers = (Header("Authorization", f"Bearer {SECRET}"),) if how == "header" else ()
    with pytest.raises(BadInput, match="the body holds the key from") as caught:
        client("http://127.0.0.1:9", headers=headers, body={"user": f"me {SECRET}"})
    assert SECRET not in line_of(caught)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda some: st.lists(some, max_size=2) | st.dictionaries(st.text(max_size=5), some, max_size=2),
)


@given(st.dictionaries(st.sampled_from(["effort", "top_k", "seed", "chat_template_kwargs"]), values, max_size=3))
def test_a_body_survives_being_printed(body: dict[str, Any]) -> None:
    options = LlmOptions(url="u", body=body)
    printed = options.list_words()
    assert printed[:3] == ["--llm-url", "u", "--llm-body"]
    assert printed[3].isprintable()
    assert read_body("--llm-body", printed[3]) == body == json.loads(printed[3])


def test_bodies_have_their_own_hashes_answers_and_capabilities(tmp_path: Path) -> None:
    """An empty one has those of no body, so that runs from before the flag resume."""
    bodies: list[dict[str, Any] | None] = [None, {}, THINKING_OFF, {"seed": None}]
    cache = ResponseCache(tmp_path / "cache.sqlite")
    with FakeServer() as server:
        made = [client(server, model="fake-model", body=body, cache=cache) for body in bodies]
        for one in made:
            complete(one)
            asyncio.run(one.probe())
            asyncio.run(one._servers.close())
        assert len(server.requests) == 3
        assert len(server.probes) == 6
    cache.close()
    request = Request(MESSAGES, 20)
    for found in (
        [one.key(request) for one in made],
        [LlmJudge(one).settings_hash for one in made],
        [LlmExplainer(one).settings_hash for one in made],
        [json.dumps(one.settings) for one in made],
    ):
        assert found[0] == found[1]
        assert len(set(found)) == 3
    assert made[0].key(request) == request.key("fake-model")
    # Those of version 0.1.0.
    assert LlmJudge(made[0], "single").settings_hash.startswith("073db3bbbcd6ade2")
    assert LlmExplainer(made[0]).settings_hash.startswith("9d1d97375fb8086e")


# --- explainer and judge ----------------------------------------------------------------------------------------------

MINE, OTHER = (Header("api-key", "mine", "api-key=$MINE"),), (Header("api-key", "other", "api-key=…"),)


def test_a_judge_elsewhere_gets_only_its_own() -> None:
    options = LlmOptions(url="a", body={"a": 1}, headers=MINE, judge_url="b")
    assert (options.for_judge().body, options.for_judge().headers) == (None, ())
    assert not options.for_judge().list_words()[2:]
    options = LlmOptions(url="a", headers=MINE, judge_url="b", judge_body={"b": 1}, judge_headers=OTHER)
    assert (options.for_judge().body, options.for_judge().headers) == ({"b": 1}, OTHER)
    options = LlmOptions(url="a", headers=MINE, judge_vllm="b")
    assert options.for_judge().headers == ()


def test_a_judge_on_the_same_endpoint_inherits() -> None:
    options = LlmOptions(url="a", body={"a": 1}, headers=MINE, judge_model="m")
    assert (options.for_judge().body, options.for_judge().headers) == ({"a": 1}, MINE)
    options = LlmOptions(url="a", body={"a": 1}, headers=MINE, judge_body={}, judge_headers=OTHER)
    assert (options.for_judge().body, options.for_judge().headers) == ({}, OTHER)
    assert options.list_words() == [
        *("--llm-url", "a", "--llm-body", '{"a": 1}', "--judge-body", "{}"),
        *("--llm-header", "api-key=$MINE", "--judge-header", "api-key=…"),
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"body": {"a": 1}},
        {"headers": MINE},
        {"headers": MINE, "vllm": "bundled"},
        {"judge_headers": MINE, "vllm": "bundled"},
        {"judge_headers": MINE, "url": "a", "judge_vllm": "bundled"},
        {"body": {"a": 1}, "judge_url": "b"},
    ],
)
def test_additions_without_their_server_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--(llm|judge)-(body|header) has no effect without a"):
        LlmOptions(**given)
