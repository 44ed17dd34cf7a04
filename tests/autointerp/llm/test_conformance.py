"""How language-model servers differ, one row each: what one does, what it is then sent, what the user sees, the cost.

Every row judges six contexts in requests of two, one request at a time, and then six others in a later command that
shares the response cache: what was learned about the server must not be paid for twice.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, completion, error, sensible, token

from autointerp.contexts.sampler import Context
from autointerp.explaining.explainers.llm import LlmExplainer
from autointerp.llm import servers
from autointerp.llm.capabilities import THINKING_TOKENS
from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.options import LlmOptions
from autointerp.scoring.judges.llm import LlmJudge
from sae.common.errors import UserError

KEY = "k3y-0123456789-abcdefgh"
LABELS = "101100"
ROOM = 200 + 20 * 2  # completion tokens of two labels
_BODY = dict[str, Any]
Answer = Callable[[_BODY], Reply | str]


@dataclass(frozen=True)
class Row:
    """A server and what comes of it."""

    answers: Answer = sensible
    script: tuple[Reply, ...] = ()  # served before any answer
    server: dict[str, Any] = field(default_factory=dict)  # of FakeServer
    judge: dict[str, Any] = field(default_factory=dict)  # of LlmJudge; ``auto``: it is chosen after a probe
    client: dict[str, Any] = field(default_factory=dict)
    key: str = ""

    explains: bool = False  # explanations are asked for, not labels

    sent: dict[str, Any] = field(default_factory=dict)  # in the last request; ``None``: not in it, ``...``: some value
    sees: str = LABELS  # the labels, or a pattern of the reason why there are none
    has_p: bool = True  # P(active) comes with the labels
    says: str = ""  # a pattern of the line that is printed meanwhile
    requests: int = 3
    later: str = ""  # what the user sees then, if that is something else
    again: int | None = 3  # requests of the later command; ``None``: there is none


# --- servers ----------------------------------------------------------------------------------------------------------


def completed(body: _BODY, **fields: Any) -> Reply:
    """The sensible answer, with other fields of :class:`Reply`."""
    reply = sensible(body)
    assert isinstance(reply, Reply)
    return replace(reply, **fields)


def rewritten(body: _BODY, change: Callable[[_BODY], object]) -> Reply:
    """The sensible answer as a server writes it whose layout is another."""
    found = completion(completed(body), 10)
    change(found)
    return Reply(body=found)


def refuses(name: str, status: int, message: str, **fields: Any) -> Answer:
    """A server that refuses a parameter; or a system message."""

    def answer(body: _BODY) -> Reply | str:
        is_sent = name in body or (name == "system" and body["messages"][0]["role"] == "system")
        return error(status, message, **fields) if is_sent else sensible(body)

    return answer


def limits_logprobs(message: str) -> Answer:
    """A server that gives the log-probabilities of five tokens."""
    return lambda body: error(400, message) if body.get("top_logprobs", 0) > 5 else sensible(body)


def in_choice(**fields: Any) -> Answer:
    return lambda body: rewritten(body, lambda found: found["choices"][0].update(fields))


def without_usage(*names: str) -> Answer:
    return lambda body: rewritten(
        body, lambda found: [found["usage"].pop(name) for name in names] if names else found.pop("usage")
    )


def in_reasoning(name: str, text: str | None = None, **fields: Any) -> Answer:
    """A server that puts the answer, or another ``text``, where the thinking belongs."""
    return lambda body: completed(
        body, content=None, message={name: text or completed(body).content}, **({"logprobs": None} | fields)
    )


def thinks_first(body: _BODY) -> Reply:
    """A model that thinks before it answers; log-probabilities are of all its tokens."""
    reply = completed(body)
    thought = [token("Is"), token("0", t0=-0.1, t1=-2.4), token("?\n")]
    return replace(reply, message={"reasoning": "Is 0?"}, logprobs=[*thought, *(reply.logprobs or ())])


def without_itself(position: dict[str, Any]) -> dict[str, Any]:
    return {**position, "top_logprobs": [x for x in position["top_logprobs"] if x["token"] != position["token"]]}


def needs_room(body: _BODY) -> Reply:
    """A model that thinks for 1,000 tokens."""
    return completed(body) if body["max_tokens"] > 1000 else Reply("", "length")


def llama_cpp_before_2025(body: _BODY) -> Reply:
    def change(found: _BODY) -> None:
        tokens = found["choices"][0].pop("logprobs")["content"]
        found["completion_probabilities"] = [
            {"content": x["token"], "probs": [{"tok_str": y["token"], "prob": 0.4} for y in x["top_logprobs"]]}
            for x in tokens
        ]

    return rewritten(body, change)


def llama_cpp(body: _BODY) -> Reply:
    return rewritten(
        body, lambda found: found.update(completion_probabilities=found["choices"][0].pop("logprobs")["content"])
    )


NO_LOGPROBS = {"logprobs": None, "top_logprobs": None}
LOADING = Reply(status=503, body={"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})
WITH_SCHEMA: Answer = refuses("response_format", 500, "EngineCore encountered an issue")
MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
EXTRA = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 0}]
SAMPLED = {"temperature": 0.5}
POLICY = {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}
FLAGGED = {"code": 403, "metadata": {"reasons": ["violence"], "flagged_input": "..."}}

ROWS = {
    # An optional parameter is refused: send without it, and remember that.
    "logprobs, HTTP 403": Row(
        refuses("logprobs", 403, "You are not allowed to request logprobs from this model"),
        requests=4,
        sent=NO_LOGPROBS,
        has_p=False,
        says="does not take 'logprobs': continuing without it",
    ),
    "logprobs, HTTP 200 with code 400": Row(
        lambda body: (
            Reply(
                body={
                    "error": {
                        "code": 400,
                        "message": "Provider returned error",
                        "metadata": {"raw": ('{"error": "logprobs is not supported"}')},
                    }
                }
            )
            if "logprobs" in body
            else sensible(body)
        ),
        requests=4,
        sent=NO_LOGPROBS,
        has_p=False,
    ),
    "at most 5 logprobs": Row(
        limits_logprobs("top_logprobs must be at most 5"),
        judge={"protocol": "single"},
        requests=7,
        sent={"logprobs": True, "top_logprobs": 5},
        says="gives the log-probabilities of at most 5 tokens",
        again=6,
    ),
    "at most 5 logprobs, as vLLM says it": Row(
        limits_logprobs("Requested sample logprobs of 20, which is greater than max allowed: 5"),
        judge={"protocol": "single"},
        requests=7,
        sent={"top_logprobs": 5},
        again=6,
    ),
    "at most 5 logprobs, and no number said": Row(
        limits_logprobs("top_logprobs is too large"),
        judge={"protocol": "single"},
        requests=7,
        sent=NO_LOGPROBS,
        has_p=False,
        again=6,
    ),
    "schema keyword": Row(
        refuses("response_format", 400, "Invalid schema for response_format 'answer': 'minItems' is not permitted."),
        requests=4,
        sent={"response_format": None, "logprobs": True},
        says="does not take 'response_format'",
    ),
    "schema keyword, as Gemini says it": Row(
        lambda body: (
            Reply(status=400, body=[{"error": {"code": 400, "message": 'Unknown name "maxItems"'}}])
            if "response_format" in body
            else sensible(body)
        ),
        requests=4,
        sent={"response_format": None},
    ),
    "max_tokens": Row(
        refuses("max_tokens", 400, MAX_TOKENS, param="max_tokens", code="unsupported_parameter"),
        requests=4,
        sent={"max_tokens": None, "max_completion_tokens": ROOM},
    ),
    "temperature": Row(
        refuses("temperature", 400, "Only the default (1) value is supported.", param="temperature"),
        requests=4,
        sent={"temperature": None},
        says="does not take 'temperature'",
    ),
    "seed": Row(
        refuses("seed", 400, "Unrecognized request argument supplied: seed"),
        judge=SAMPLED,
        requests=4,
        sent={"seed": None, "temperature": 0.5},
    ),
    "seed, as pydantic says it": Row(
        lambda body: Reply(status=422, body={"detail": EXTRA}) if "seed" in body else sensible(body),
        judge=SAMPLED,
        requests=4,
        sent={"seed": None},
    ),
    "system message": Row(
        refuses("system", 400, "System role not supported"), requests=4, says="does not take 'system'"
    ),
    "system message, as OpenAI says it": Row(
        refuses("system", 400, "Unsupported value: 'messages[0].role' does not support 'system' with this model."),
        requests=4,
        says="does not take 'system'",
    ),
    "an answer that does not fit the schema, as Groq says it": Row(
        script=(error(400, "Generated JSON does not match the expected schema", code="json_validate_failed"),),
        requests=4,
        sent={"logprobs": True, "response_format": ...},
    ),
    "three parameters": Row(
        server={"rejects": ("logprobs", "response_format", "temperature")},
        requests=6,
        sent={**NO_LOGPROBS, "response_format": None, "temperature": None, "max_tokens": ROOM},
        has_p=False,
    ),
    "a bad request that mentions parameters": Row(
        lambda body: error(400, f"invalid request: {sorted(body)}"),
        sees="answers none of the first questions: the server refused the request .*HTTP 400: invalid request",
        requests=12,  # each of the three without response_format, without logprobs, without temperature
        again=12,  # nothing was learned: no request succeeded
    ),
    # The server breaks down where a parameter is sent.
    "HTTP 500 with a schema": Row(
        WITH_SCHEMA, requests=5, sent={"response_format": None}, says="does not take 'response_format'"
    ),
    "HTTP 502 with logprobs": Row(
        refuses("logprobs", 502, "bad gateway"), requests=5 + 5 + 1, sent=NO_LOGPROBS, has_p=False
    ),
    "HTTP 500 once": Row(script=(error(500, "hiccup"),), requests=4, sent={"logprobs": True, "response_format": ...}),
    "HTTP 500 twice in a row": Row(
        script=(error(500, "hiccup"),) * 2, requests=5, sent={"logprobs": True, "response_format": ...}
    ),
    # Busy or loading: wait.
    "HTTP 429": Row(script=(error(429, "slow down"),), requests=4),
    "HTTP 200 with code 429": Row(script=(Reply(body={"error": {"code": 429, "message": "busy"}}),), requests=4),
    "HTTP 200 with code '503'": Row(script=(Reply(body={"error": {"code": "503", "message": "away"}}),), requests=4),
    "HTTP 200 with code 502 in the choice": Row(
        script=(Reply(body={"choices": [{"message": {"content": "par"}, "error": {"code": 502, "message": "away"}}]}),),
        requests=4,
    ),
    "loading": Row(
        script=(LOADING,) * 4,
        client={"tries": 2},
        requests=7,
        says="the server is loading the model: waiting",
    ),
    "the first answer is slow": Row(
        lambda body: completed(body, delay=0.4),
        server={"models": ("qwen2.5:7b",)},
        sent={"model": "qwen2.5:7b"},
        says="has not answered yet: it may be loading the model; waiting up to 300 s",
    ),
    # No request would succeed: stop, in the server's own words.
    "no key": Row(
        script=(error(401, "missing bearer token"),),
        sees=r"wants an API key \(HTTP 401: missing bearer token\); set AUTOINTERP_API_KEY",
        requests=1,
        again=None,
    ),
    "wrong key": Row(
        script=(error(401, "Incorrect API key provided: k3y-01****efgh. See http://x/keys."),),
        key=KEY,
        sees=r"refused the API key \(HTTP 401: Incorrect API key provided: \[key\] See http://x/keys.\); check it",
        requests=1,
        again=None,
    ),
    "wrong key, its end echoed": Row(
        script=(error(401, "no key ends in (efgh), sorry"),),
        key=KEY,
        sees=r"refused the API key \(HTTP 401: no key ends in \[key\] sorry\)",
        requests=1,
        again=None,
    ),
    "wrong key, HTTP 400": Row(
        script=(error(400, "API key not valid. Please pass a valid API key."),),
        key=KEY,
        sees=r"refused the API key \(HTTP 400: API key not valid",
        requests=1,
        again=None,
    ),
    "key limit": Row(
        script=(error(403, "Key limit exceeded (total limit)."),),
        key=KEY,
        sees=r"denies access \(HTTP 403: Key limit exceeded \(total limit\)\.\); check the rights and limits",
        requests=1,
        again=None,
    ),
    "no credit, HTTP 402": Row(
        script=(error(402, "Insufficient credits"),), sees="has no credit left", requests=1, again=None
    ),
    "no credit, HTTP 200 with code 402": Row(
        script=(Reply(body={"error": {"code": 402, "message": "Insufficient credits"}}),),
        sees=r"has no credit left \(HTTP 402: Insufficient credits\)",
        requests=1,
        again=None,
    ),
    "no credit, HTTP 429": Row(
        script=(error(429, "You exceeded your current quota", type="insufficient_quota"),),
        sees="has no credit left",
        requests=1,
        again=None,
    ),
    "another model": Row(
        server={"models": ("gemma3:4b", "llama3:8b")},
        client={"model": "gemma3"},
        sees="knows no model 'gemma3' .*it serves 'gemma3:4b'",
        requests=1,
        again=None,
    ),
    "another model, HTTP 400": Row(
        script=(error(400, "gemma3 is not a valid model ID"),),
        server={"models": ("gemma3:4b",)},
        client={"model": "gemma3"},
        sees=r"knows no model 'gemma3' \(HTTP 400\); it serves 'gemma3:4b'",
        requests=1,
        again=None,
    ),
    "a name that holds that of a parameter": Row(
        lambda body: error(404, f"The model `{body['model']}` does not exist"),
        server={"models": ("a",)},
        client={"model": "json-schema-seed"},
        sees="knows no model 'json-schema-seed'",
        requests=1,
        again=None,
    ),
    "no API": Row(server={"models": None}, sees="no OpenAI-compatible API at", requests=0, again=None),
    "a web page": Row(
        lambda _: Reply(body="<html>Sign in</html>"),
        sees="answers none of the first questions: the server's reply is not JSON; check --llm-url",
        requests=9,
        again=None,
    ),
    "context too small": Row(
        server={"context_length": 64},
        sees="answers none of the first questions: the prompt is too long for the model: .* its context holds 64",
        requests=0,
        again=None,
    ),
    "context too small, by the server's count": Row(
        lambda _: error(400, "This model's maximum context length is 64 tokens. However, you requested 900 tokens"),
        sees="the server refused the request .HTTP 400: This model's maximum context length is 64",
        requests=3,
        again=None,
    ),
    # The answer is in another place.
    "reasoning parser takes the answer": Row(in_reasoning("reasoning_content"), has_p=False),
    "reasoning parser takes the answer with its tokens": Row(
        lambda body: completed(body, content=None, message={"reasoning": completed(body).content})
    ),
    "reasoning parser takes a text": Row(
        in_reasoning("reasoning_content", "The labels are 1 and 0: [1, 0]"),
        sees="'reasoning_content' is not: .* for thinking; start it without --reasoning-parser, or pass --llm-body",
        again=None,
    ),
    "content in parts": Row(
        lambda body: completed(
            body,
            content=[{"type": "thinking", "text": "[0, 0]"}, {"type": "text", "text": completed(body).content}],  # type: ignore[arg-type]
        ),
        sent={"max_tokens": ROOM + THINKING_TOKENS},
    ),
    "llama.cpp's log-probabilities": Row(llama_cpp),
    "llama.cpp's log-probabilities before 2025": Row(llama_cpp_before_2025),
    "logprobs without content": Row(in_choice(logprobs={"content": None}), has_p=False),
    "logprobs as a legacy completion has them": Row(in_choice(logprobs={"tokens": ["1"]}), has_p=False),
    "the chosen token is not among the likeliest": Row(
        lambda body: completed(body, logprobs=[without_itself(x) for x in completed(body).logprobs or ()])
    ),
    "finish_reason null": Row(in_choice(finish_reason=None)),
    "finish_reason STOP": Row(in_choice(finish_reason="STOP")),
    "finish_reason MAX_TOKENS": Row(
        lambda _: Reply('{"labels": [1', "MAX_TOKENS"), sees="cut off at 10 tokens", again=None
    ),
    "no usage": Row(without_usage()),
    "no completion_tokens": Row(without_usage("completion_tokens", "prompt_tokens_details")),
    # The model thinks.
    "thinking in its own field": Row(thinks_first, sent={"max_tokens": ROOM + THINKING_TOKENS}, says="thinks before"),
    "thinking that is only counted": Row(
        lambda body: rewritten(
            body, lambda found: found["usage"].update(completion_tokens_details={"reasoning_tokens": 99})
        ),
        sent={"max_tokens": ROOM + THINKING_TOKENS},
        says=f"each answer may take {THINKING_TOKENS:,} tokens more",
    ),
    "thinking in tags": Row(
        lambda body: completed(body, content=f"<think>[0, 0]</think>{completed(body).content}"),
        sent={"max_tokens": ROOM + THINKING_TOKENS},
    ),
    "thinking turned off, with empty tags": Row(
        lambda body: completed(body, content=f"<think>\n\n</think>{completed(body).content}"), sent={"max_tokens": ROOM}
    ),
    "thinking that takes all tokens": Row(
        needs_room, requests=4, sent={"max_tokens": ROOM + THINKING_TOKENS}, says="thinks before"
    ),
    "thinking before a single label": Row(
        thinks_first, judge={"protocol": "single"}, requests=6, again=6, sent={"max_tokens": 4 + THINKING_TOKENS}
    ),
    "thinking in tags before a single label": Row(
        lambda body: completed(body, content=f"<think>0?</think>{completed(body).content}"),
        judge={"protocol": "single"},
        requests=6,
        again=6,
        has_p=False,  # the tokens of the label are not looked for in those of the thinking
    ),
    "an explanation in the thinking": Row(
        lambda _: Reply(None, message={"reasoning": "[EXPLANATION]: Perhaps cats."}),
        explains=True,
        sees="answers none of the first questions: the answer is empty and 'reasoning' is not",
        again=None,
    ),
    "an explanation in the thinking, and one after it": Row(
        lambda _: Reply("<think>[EXPLANATION]: Perhaps cats.</think>[EXPLANATION]: Dogs."),
        explains=True,
        sees="^Dogs.$",
        sent={"max_tokens": 1000 + THINKING_TOKENS},
    ),
    "thinking found by the probe": Row(
        thinks_first,
        server={"thinks": True},
        judge={"protocol": "auto"},
        requests=2 + 3,  # by the batch protocol
        says="thinks before",
    ),
    # Refused by the model or a filter: a failed context, never a zero.
    "some contexts too long, later": Row(
        script=(),
        answers=lambda body: error(400, "maximum context length is 64") if "text 10" in str(body) else sensible(body),
        again=3,
        sees=LABELS,
        later="^the server refused the request .HTTP 400: maximum context length is 64",
    ),
    "finish_reason content_filter": Row(
        lambda _: Reply(finish_reason="content_filter"), sees="content filter withheld", requests=9, again=9
    ),
    "Azure's filter": Row(
        lambda _: error(400, "The response was filtered", **POLICY),
        sees="content filter refused the prompt .HTTP 400: The response was filtered",
        again=3,
    ),
    "OpenRouter's moderation": Row(
        lambda _: error(403, "Your input was flagged", **FLAGGED), sees="content filter refused the prompt", again=3
    ),
    "a refusal": Row(
        lambda _: Reply(None, message={"refusal": "I cannot"}), sees="the model refused: I cannot", requests=9, again=9
    ),
    "HTTP 200 with an error in words": Row(
        lambda _: Reply(body={"error": "upstream is down"}),
        sees="the server's reply is an error: upstream is down",
        requests=9,
        again=9,
    ),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_conformance(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("AUTOINTERP_API_KEY", row.key)
    monkeypatch.setattr(servers, "_SLOW", 0.1)
    with FakeServer(row.answers, **row.server) as server:
        server.script.extend(row.script)
        for n, first, sees in ((row.requests, 0, row.sees), (row.again, 100, row.later or row.sees)):
            if n is None:
                break
            before = len(server.requests) + len(server.probes)
            seen = judge(server, row, tmp_path / "cache.sqlite", first)
            said = capsys.readouterr().err
            assert re.search(sees, seen) if sees[0] not in "01" else seen == sees + "p" * row.has_p
            assert "\n" not in seen
            assert KEY[:4] not in seen
            assert len(server.requests) + len(server.probes) - before == n
            if not first:
                assert re.search(row.says, said)
                assert all(said.count(line) == 1 for line in said.splitlines())
        for name, value in row.sent.items():
            found = server.requests[-1].body.get(name)
            assert found == value or (value is ... and found is not None), name


def judge(server: FakeServer, row: Row, cache: Path, first: int) -> str:
    """Return the labels of six contexts, ``p`` behind them if each has P(active); or why there are none."""
    contexts = [
        Context(i, (f"text {i} ", "cat" if label == "1" else "dog"), (0.0, 0.0), False, None, "active")
        for i, label in enumerate(LABELS, first)
    ]

    async def main() -> str:
        client = LlmClient(
            server.url, **{"backoff": 0.001, "concurrency": 1, "cache": ResponseCache(cache), **row.client}
        )
        async with client:
            settings = {"protocol": "batch", "contexts_per_request": 2, **row.judge}
            if row.explains:
                explained = [await LlmExplainer(client).explain(0, contexts[i : i + 2], []) for i in (0, 2, 4)]
                return "; ".join(sorted({x.failure or x.text or "" for x in explained}))
            if settings["protocol"] == "auto":
                made = await LlmJudge.open(client, LlmOptions())
            else:
                made = LlmJudge(client, **settings)
            judged = []
            for i in range(0, len(contexts), 2):
                judged += await made.judge('Text that contains "cat".', contexts[i : i + 2])
        reasons = {j.failure for j in judged if j.failure is not None}
        if reasons:
            assert all(j.label is None and j.p is None and j.failure for j in judged), "a failure is never a zero"
            return reasons.pop()
        labels = "".join(str(int(bool(j.label))) for j in judged)
        return labels + "p" * all(j.p is not None for j in judged)

    try:
        return asyncio.run(main())
    except UserError as error:
        return str(error)
