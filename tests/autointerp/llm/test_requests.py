"""Requests as values: what names them in the cache, and the bytes that are sent."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from autointerp.llm.exchange import Request
from sae.common.files import digest

TEXT = st.text(max_size=20)
MESSAGES = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "user"]), TEXT),
    min_size=1,
    max_size=4,
)
REQUESTS = st.builds(
    Request,
    MESSAGES.map(tuple),
    max_tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.5]),
    json_schema=st.sampled_from([None, {"type": "object", "a": [1]}]),
    logprobs=st.integers(0, 20),
    seed=st.none() | st.integers(0, 3),
    replicate=st.integers(0, 3),
    may_be_cut=st.booleans(),
    affinity=TEXT,
)


BODIES = st.dictionaries(st.sampled_from(["zeta", "effort", "seed"]), st.none() | st.integers(), max_size=2)


@given(REQUESTS, TEXT, BODIES)
def test_the_key_digests_everything_an_answer_depends_on(request: Request, model: str, body: dict[str, Any]) -> None:
    fields = {
        name: getattr(request, name)
        for name in ("max_tokens", "temperature", "json_schema", "logprobs", "seed", "replicate", "may_be_cut")
    }
    of_body = {"body": body} if body else {}
    assert request.key(model, body) == digest({"model": model, "messages": list(request.messages), **fields, **of_body})


@given(REQUESTS)
def test_the_bytes_are_the_request(request: Request) -> None:
    parameters: dict[str, Any] = request.parameters("m", {"seed"})
    sent = json.loads(request.content(parameters))
    assert sent == {**parameters, "messages": list(request.messages)}
    assert sent["model"] == "m"
    assert "seed" not in sent
    assert request.characters == sum(len(message["content"]) for message in request.messages)


def test_the_bytes_before_the_question_are_the_same() -> None:
    prefix = ({"role": "system", "content": "Judge “this”."}, {"role": "user", "content": "One?\n"})
    bodies = [
        Request((*prefix, {"role": "user", "content": question}), max_tokens=4).content({"model": "m"})
        for question in ("a", "b")
    ]
    first, second = (
        body[: body.index(b'"content":"' + question)] for body, question in zip(bodies, (b"a", b"b"), strict=True)
    )
    assert first == second
