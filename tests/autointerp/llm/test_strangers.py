"""Whatever a server sends or a user types becomes a value or one line, and never shows the key."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from asking import client, complete
from fake_server import FakeServer, Reply, completion, token
from hypothesis import given
from hypothesis import strategies as st

from autointerp.explaining.explainers.llm import parse_explanation
from autointerp.llm.additions import Header
from autointerp.llm.exchange import Answer, AnswerFailed, Request, Transient, without_thinking
from autointerp.llm.replies import NoSuchModel, Refused, explain_fault, find_fault, read_answer
from autointerp.llm.transport import Key, list_candidates, read_key
from autointerp.llm.transport import Reply as Received
from autointerp.scoring.judges.llm import parse_batch, parse_single
from sae.common.errors import BadInput, NotFound, UserError

SECRET = "sekret/KEY+0123456789\\x"
REQUEST = Request(({"role": "user", "content": "x" * 100},), 20, json_schema={"properties": {"labels": {}}})
LABELS = json.dumps(completion(Reply('{"labels": [1]}', logprobs=[token("1", t1=-0.1)]), 10))

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
scalars |= st.sampled_from(
    [SECRET, "", 10**400, -1, 5.0, "\ud800", "[EXPLANATION]: a", "length", "content_filter", "stop"]
)
NAMES = [
    "choices",
    "message",
    "content",
    "logprobs",
    "top_logprobs",
    "token",
    "logprob",
    "usage",
    "error",
    "id",
    "data",
]
NAMES += ["reasoning", "reasoning_content", "completion_probabilities", "probs", "tok_str", "prob", "type", "text"]
NAMES += ["finish_reason", "refusal", "detail", "code", "param", "prompt_tokens", "prompt_tokens_details", "model"]
values = st.recursive(
    scalars, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.sampled_from(NAMES), some, max_size=5)
)


@st.composite
def replies(draw: st.DrawFn) -> Any:
    """A chat completion or a list of models, with a few of its values replaced by any others."""
    found = json.loads(draw(st.sampled_from([LABELS, '{"data": [{"id": "m", "max_model_len": 1000}]}', "{}"])))
    for _ in range(draw(st.integers(0, 3))):
        place = found
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(place[key], dict | list) or not draw(st.booleans()):
                break
            place = place[key]
        if key is not None:
            place[key] = draw(values)
    return found


header_values = st.sampled_from(["gzip", "gzip, gzip", "br", "identity", "", "chunked", "5", "-1", "9" * 400, "inf"])
header_values |= st.sampled_from(
    ["application/json; charset=rot13", "text/html; charset=" + SECRET, "http://[::1", SECRET]
)
header_values |= st.sampled_from(["Wed, 21 Oct 9999 07:28:00 -9999", "Fri, 31 Dec 9999 23:59:59 -2359", "file:///x"])
header_values |= st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=20)
HEADERS = ["content-encoding", "transfer-encoding", "content-length", "content-type", "retry-after", "retry-after-ms"]
headers = st.lists(st.tuples(st.sampled_from([*HEADERS, "location", "set-cookie", SECRET]), header_values), max_size=3)


@st.composite
def wire(draw: st.DrawFn) -> bytes:
    """The bytes of a reply: an HTTP head of some kind, and a body of some kind."""
    status = draw(st.sampled_from([200, 200, 200, 307, 400, 401, 404, 429, 500, 999, 101, 204, SECRET]))
    body = json.dumps(draw(replies())).encode() if draw(st.booleans()) else draw(st.binary(max_size=50))
    body = draw(st.sampled_from([bytes, gzip.compress, lambda raw: raw[:-3], lambda raw: b"[" * 5000 + raw]))(body)
    version = draw(st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/9", SECRET]))
    lines = [f"{version} {status} {draw(st.sampled_from(['OK', '', SECRET]))}"]
    lines += [f"{name}: {value}" for name, value in draw(headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def hides_key(*shown: object) -> None:
    for text in map(str, shown):
        assert SECRET not in text
        assert SECRET.upper() not in text.upper()


def is_one_line(text: str) -> None:
    hides_key(text)
    assert "\n" not in text
    assert len(text) < 700


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.mark.fuzz
@given(raw=wire(), named=st.booleans(), in_header=st.booleans())
def test_any_reply_is_an_answer_or_one_line(server: FakeServer, raw: bytes, named: bool, in_header: bool) -> None:
    server.script.clear()
    server.raw_models = None if named else raw
    server.answer = lambda _: Reply(raw=raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOINTERP_API_KEY", "EMPTY" if in_header else SECRET)
        headers = (Header("Authorization", f"Bearer {SECRET}"),) if in_header else ()
        try:
            made = client(server, model="m" if named else None, headers=headers, tries=1, answer_tries=1, timeout=5)
            answer = complete(made, logprobs=5)
            hides_key(answer, made.model, *made.capabilities.list_missing())
            assert answer.text.encode()
            made.model.encode()
        except (UserError, AnswerFailed) as error:
            is_one_line(str(error))


@pytest.mark.fuzz
@given(body=replies() | values, status=st.integers(100, 599), head=headers)
def test_any_value_has_a_meaning(body: Any, status: int, head: list[tuple[str, str]]) -> None:
    fault = find_fault(Received(status, dict(head), body))
    if fault is None:
        try:
            answer = read_answer(body, 1.0, REQUEST)
        except AnswerFailed:
            return
        assert answer.text.strip()
        assert answer.usage.tokens >= 0
        for reader in (parse_explanation, parse_single, lambda given: parse_batch(given, 1)):
            with suppress(AnswerFailed):
                reader(answer)
    else:
        meaning = explain_fault(fault, {"logprobs": True, "max_tokens": 1}, "http://x", True, [Key(SECRET, "here")])
        assert isinstance(meaning, UserError | AnswerFailed | Transient | Refused | NoSuchModel)


@pytest.mark.fuzz
@given(text=st.text(max_size=40) | st.from_regex(r"(https?:)?//?[^/]{0,20}(:\d*)?(/.*)?", fullmatch=True))
def test_any_address_is_base_addresses_or_one_line(text: str) -> None:
    try:
        assert all(url.startswith(("http://", "https://")) for url in list_candidates(text))
    except BadInput as error:
        is_one_line(str(error))


@pytest.mark.fuzz
@given(
    key=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=40),
    between=st.text(st.sampled_from(" \t\n\0\u200b\u00e9"), max_size=2),
    spell=st.sampled_from([str, str.upper, str.swapcase, lambda text: quote(text, safe="")]),
)
def test_the_key_is_removed_in_any_spelling(key: str, between: str, spell: Any) -> None:
    redacted = Key(key, "here").redact(f"before {between.join(map(spell, key))} after")
    assert redacted == "before [key] after"


EQUAL = {"s": "ſ", "i": "ıİ", "k": "\N{KELVIN SIGN}"}  # regardless of case
SPELLINGS = {
    "as it is": str,
    "in lower case": str.lower,
    "in upper case": str.upper,
    "with escapes": lambda c: f"%{ord(c):02x}",
    "with equal letters": lambda c: (EQUAL.get(c.lower()) or c)[0],
    "with other equal letters": lambda c: (EQUAL.get(c.lower()) or c)[-1],
}
BETWEEN = [
    "",
    " \t",
    "\u200b",
    "\u00e9",
    "\ud800",
    "\\",
    "\\u0123",
    "\\u4567",
    "\\u89aB",
    "\\uCDeF",
    "\\b\\f",
    "\\n\\r\\t",
    "\\B\\F\\N\\R\\T\\UCDEF",
]


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("value", ["sk-Kiss/0a9Ifb", "\\%i\"s+k'F9abS=", "0123456789abcdef"])
def test_the_quick_check_overlooks_no_spelling(value: str, spell: Any) -> None:
    key = Key(value, "here")
    everywhere = set(range(len(value)))
    for between in BETWEEN:
        for odd in [everywhere, *({i} for i in everywhere)]:
            written = [spell(c) + between if i in odd else c for i, c in enumerate(value)]
            text = "".join(written)
            assert "[key]" in key.redact(text)
            for part in (text, text[1:]):
                assert key.redact(part) == key._pattern.sub("[key]", part)


@pytest.mark.fuzz
@given(
    key=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=40),
    cut=st.integers(0, 36),
    spell=st.sampled_from([str, str.upper, str.swapcase]),
    around=st.sampled_from(["{}", "({})", "ends_in={}.", '"{}"', "***{}"]),
)
def test_no_part_of_the_key_is_shown(key: str, cut: int, spell: Any, around: str) -> None:
    part = spell(key)[min(cut, len(key) - 4) :]
    shown = Key(key, "here").redact_parts(f"no {around.format(part)} a")
    assert shown in ("no [key] a", f"no {around.format('[key]')} a")


def test_a_long_key_is_removed_whole() -> None:
    key = Key("0123456789/abcdef." * 400, "here")
    started = time.monotonic()
    assert key.redact(f'{{"a": "b {key.value}", "c": 1}}') == '{"a": "b [key]", "c": 1}'
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "url",
    [
        *("http://[::1", "http://[127.0.0.1]/", "http://[[::1]:1", "http://a..b", "http://" + "a" * 300, "http://."),
        *("http://\u2488.com", "http://[::1]]:1", "http://127.1", "http://999.1.1.1", "\\\\host", "http://a\\b"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_at_once(url: str) -> None:
    started = time.monotonic()
    with pytest.raises(BadInput, match=r"not an http address|cannot be asked"):
        complete(client(url, backoff=60))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/{}/v1", "http://{}", "{}", "http://127.0.0.1:{}"])
@pytest.mark.parametrize("place", ["url", "model"])
def test_a_key_in_the_address_or_model_is_not_shown(url: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sekret-0123456789")
    with pytest.raises(BadInput, match=r"holds the key from the environment variable OPENAI_API_KEY") as caught:
        client(url.format("sekret-0123456789" if place == "url" else "x"), model=f"m-{'sekret-0123456789'}")
    assert "sekret" not in str(caught.value)


def test_a_key_given_as_key_file_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="the file of --api-key-file cannot be read") as caught:
        read_key(Path("sekret-0123456789"))
    assert "sekret" not in str(caught.value)
    (tmp_path / "large").write_bytes(b"k" * 10_000_000)
    with pytest.raises(BadInput, match="not a key"):
        read_key(tmp_path / "large")
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbfsekret\r\n")
    assert read_key(tmp_path / "windows") == Key("sekret", f"file {str(tmp_path / 'windows')!r}")


MODELS: list[tuple[Any, str]] = [
    ("[" * 5000 + "]" * 5000, "no list of models"),
    ({"data": {"id": "m"}}, "no list of models"),
    ({"data": [{"id": value} for value in (True, None, 5, {"a": 1}, "", "  ", "a\nb", "m" * 1000)]}, "serves no model"),
    ({"data": [{"id": "m"}, {"id": "m"}, {"id": "\u202em"}, 7]}, ""),
    ('{"data": [{"id": "m", "max_model_len": true}]}', ""),
    ('{"data": [{"id": "m", "max_model_len": -5, "context_length": NaN}]}', ""),
    ("\ufeff" + '{"data": [{"id": "m"}]}', ""),
]


@pytest.mark.parametrize(("listed", "reason"), MODELS)
def test_a_list_of_models_is_read_strictly(listed: Any, reason: str) -> None:
    with FakeServer("fine") as server:
        server.models_reply = lambda *_: Reply(body=listed)  # type: ignore[method-assign]
        server.models = ["m"]
        if not reason:
            assert complete(client(server)).text == "fine"
        else:
            with pytest.raises(BadInput, match=reason):
                complete(client(server))


@pytest.mark.parametrize("charset", ["rot13", "zlib_codec", "hex", "idna", "utf-16", "undefined", "x" * 10_000])
def test_no_charset_of_the_server_is_used(charset: str) -> None:
    with FakeServer(Reply("fine", headers={"content-type": f"application/json; charset={charset}"})) as server:
        if len(charset) < 1000:
            assert complete(client(server)).text == "fine"
        else:
            with pytest.raises(AnswerFailed, match="not HTTP"):
                complete(client(server, tries=1))


@pytest.mark.parametrize(
    ("logprob", "others"),
    [
        (5.0, []),
        (float("inf"), []),
        (float("nan"), []),
        (True, []),
        ("-1", []),
        (-0.1, [0.0, 0.0]),
        (-0.1, [-9.0] * 500),
    ],
)
def test_impossible_log_probabilities_are_no_verdict(logprob: Any, others: list[float]) -> None:
    top = [{"token": str(i), "logprob": value} for i, value in enumerate(others)]
    reply = Reply("1", logprobs=[{"token": "1", "logprob": logprob, "top_logprobs": top}])
    with FakeServer(reply) as server, pytest.raises(AnswerFailed, match="the server's log-probabilities cannot be"):
        complete(client(server), logprobs=5)


def test_another_model_in_the_reply_is_noted() -> None:
    with FakeServer(models=("asked",)) as server:  # which answers as "fake-model"
        made = client(server)
        complete(made)
        assert "answers came under another model name: 'fake-model'" in made.capabilities.list_missing()


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<think></think>", "*_\n", "[explanation", " \n", "[", "[[1", "<<a", "⟦", "#"]
)
def test_no_answer_takes_long_to_read(piece: str) -> None:
    answer = Answer(piece * (1_000_000 // len(piece)) + "[EXPLANATION]: x", "stop")
    started = time.monotonic()
    for reader in (parse_explanation, parse_single, lambda given: parse_batch(given, 2)):
        with suppress(AnswerFailed):
            reader(answer)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("a<think>b</think>c", "ac"),
        ("a</think>b", "b"),
        ("a<think>b</reasoning>c<Think>d</THINK>e</think>f", "f"),
        ("<think><think>a</think>b</think>c", "c"),
    ],
)
def test_thinking_is_cut_out(text: str, rest: str) -> None:
    assert without_thinking(text) == rest
    with pytest.raises(AnswerFailed, match="still thinking"):
        without_thinking(text + "<think>")
