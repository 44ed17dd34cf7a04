"""Build a request's bytes and cache key, and read its reply.

A reply without a usable answer (cut off, empty, refused, an error inside a 200) raises :class:`AnswerFailed`, so that
it is never taken for a "no" or a zero.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autointerp.journal.usage import Usage, is_plausible_count

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""

_MOST_HIDDEN = 100_000
"""Prompt tokens that a server may add (its own system prompt), at most."""
_MOST_THOUGHT = 1_000_000
"""Tokens that a model may write besides its answer, at most."""
_BLANK = 100
"""An answer that ends in more white space than this, in characters, would only have continued it."""


class AnswerFailed(Exception):
    """This one request brought no usable answer. ``reason`` is one line; ``usage`` is its cost."""

    def __init__(self, reason: str, usage: Usage | None = None, *, cut: bool = False, final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.usage = usage or Usage()
        self.cut = cut
        """The answer ran into ``max_tokens``: a larger limit may help, the same again will not."""
        self.final = final
        """Asking again now is of no use: the server was tried often enough, or refuses this very request."""


@dataclass(frozen=True)
class Request:
    """Everything an answer depends on, apart from the model."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    json_schema: Mapping[str, Any] | None = None
    """Schema of the answer, for servers that can hold a model to one; others are asked without it."""
    logprobs: int = 0
    """Alternatives to return for each generated token; 0 for no log-probabilities."""
    seed: int | None = None
    replicate: int = 0
    """Which of several independent answers to the same question this is; only the cache sees it."""
    may_be_cut: bool = False
    """Whether an answer that ran into ``max_tokens`` is usable (if only its first token is wanted)."""
    affinity: str = ""
    """Requests of equal affinity begin alike and go to the same server. Neither the server nor the cache sees it."""

    @property
    def characters(self) -> int:
        """The length of all messages together."""
        return self._written[1]

    def key(self, model: str) -> str:
        """Return the digest under which the answer is cached. 64 hex characters."""
        # Equals sae.common.files.digest of {"model": model, **the fields but affinity}, at a tenth of the time.
        before = {
            "json_schema": self.json_schema,
            "logprobs": self.logprobs,
            "max_tokens": self.max_tokens,
            "may_be_cut": self.may_be_cut,
        }
        after = {"model": model, "replicate": self.replicate, "seed": self.seed, "temperature": self.temperature}
        head, tail = (json.dumps(part, sort_keys=True, separators=(",", ":")) for part in (before, after))
        return hashlib.sha256(f'{head[:-1]},"messages":{self._written[0]},{tail[1:]}'.encode()).hexdigest()

    def parameters(self, model: str, without: Collection[str] = ()) -> dict[str, Any]:
        """Return the body without its messages and the parameters that the server does not take.

        ``max_tokens`` among them means that the server uses its newer name.
        """
        body: dict[str, Any] = {"model": model}
        body["max_completion_tokens" if "max_tokens" in without else "max_tokens"] = self.max_tokens
        if "temperature" not in without:
            body["temperature"] = self.temperature
        if self.json_schema is not None and "response_format" not in without:
            schema = {"name": "answer", "strict": True, "schema": self.json_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.logprobs and "logprobs" not in without:
            body["logprobs"], body["top_logprobs"] = True, self.logprobs
        if self.seed is not None and "seed" not in without:
            body["seed"] = self.seed
        return body

    def content(self, parameters: Mapping[str, Any]) -> bytes:
        """Return the bytes to send: :meth:`parameters` and the messages, as JSON."""
        return f'{json.dumps(parameters)[:-1]}, "messages": {self._written[0]}}}'.encode()

    @functools.cached_property
    def _written(self) -> tuple[str, int]:
        """The messages as JSON, and their length in characters. All but the last are written once for all requests."""
        prefix, characters = _write_prefix(_pairs(self.messages[:-1]))
        last, more = _write_prefix.__wrapped__(_pairs(self.messages[-1:]))
        return f"[{prefix},{last}]" if prefix and last else f"[{prefix}{last}]", characters + more


_Pairs = tuple[tuple[str, str], ...]


def _pairs(messages: Sequence[Message]) -> _Pairs:
    return tuple((message["role"], message["content"]) for message in messages)


@functools.lru_cache(maxsize=32)
def _write_prefix(messages: _Pairs) -> tuple[str, int]:
    """Return messages as JSON without the brackets around them, and their length in characters."""
    written = [f'{{"content":{json.dumps(content)},"role":{json.dumps(role)}}}' for role, content in messages]
    return ",".join(written), sum(len(content) for _, content in messages)


@dataclass(frozen=True)
class Answer:
    """A usable answer: ``text`` is never empty."""

    text: str
    finish_reason: str
    usage: Usage = field(default_factory=Usage, compare=False)
    tokens: tuple[str, ...] | None = None
    """The generated tokens, where log-probabilities came back."""
    top_logprobs: tuple[dict[str, float], ...] | None = None
    """The likeliest alternatives of each generated token (natural logarithms), the token included."""

    @property
    def from_cache(self) -> bool:
        return self.usage.from_cache > 0

    def to_json(self) -> str:
        values = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": vars(self.usage),
            "tokens": self.tokens,
            "top_logprobs": self.top_logprobs,
        }
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, stored: str) -> Answer:
        """Read an answer of the cache. Its cost is not spent again, so its usage is one cached answer."""
        values = json.loads(stored)
        tokens, top = (None if values[name] is None else tuple(values[name]) for name in ("tokens", "top_logprobs"))
        return cls(values["text"], values["finish_reason"], Usage(from_cache=1), tokens, top)


def explain_cut(answer: Answer, sent: Request) -> AnswerFailed:
    """Return why an answer broke off, and whether a larger limit may help."""
    n_written = answer.usage.completion_tokens or sent.max_tokens
    reason = f"the answer was cut off at {n_written} tokens"
    n_blank = len(answer.text) - len(answer.text.rstrip())
    if n_blank > _BLANK:
        # A JSON schema allows endless white space, and weak models write it: a larger limit would get more of it.
        return AnswerFailed(f"{reason}, the last {n_blank} characters white space", final=True)
    if n_written < sent.max_tokens:
        return AnswerFailed(f"{reason}, where the model's context is full", final=True)
    return AnswerFailed(reason, cut=True)


# --- reading a reply --------------------------------------------------------------------------------------------------


def read_answer(body: Any, seconds: float, characters: int = 0) -> Answer:
    """Read the first choice of a chat completion, given as parsed JSON.

    :param seconds: duration of the request.
    :param characters: length of the prompt, to check the server's count of its tokens.
    :raises AnswerFailed: there is no choice or no text, it was refused or filtered, or its layout is wrong.
    """
    try:
        return _read_answer(body, seconds, characters)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        # A field of a wrong type. Some servers send such, and one reply is no reason to stop.
        reason = f"the server's reply cannot be read: {type(error).__name__}: {one_line(error, 100)}"
        raise AnswerFailed(reason, Usage(requests=1, seconds=seconds)) from None


def _read_answer(body: Any, seconds: float, characters: int) -> Answer:
    if not isinstance(body, Mapping):
        raise AnswerFailed("the server's reply is not a chat completion", Usage(requests=1, seconds=seconds))
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, Sequence) and choices else None
    message = first.get("message") if isinstance(first, Mapping) else None
    text = message.get("content") if isinstance(message, Mapping) else None
    usage = _read_usage(body.get("usage"), seconds, characters, len(text) if isinstance(text, str) else 0)
    if not isinstance(first, Mapping):
        error = body.get("error")
        words = error.get("message") if isinstance(error, Mapping) else error
        raise AnswerFailed(f"the server's reply has no choices{f': {one_line(words)}' if words else ''}", usage)
    message = message or {}
    finish_reason = str(first.get("finish_reason") or "stop")
    text = message.get("content")
    if finish_reason == "content_filter":
        raise AnswerFailed("the server's content filter withheld the answer", usage)
    if message.get("refusal"):
        raise AnswerFailed(f"the model refused: {one_line(message['refusal'])}", usage)
    if not isinstance(text, str) or not text.strip():
        if finish_reason == "length":
            n = usage.completion_tokens
            raise AnswerFailed(f"all {n} tokens were used before any text of the answer", usage, cut=True)
        raise AnswerFailed("the answer is empty", usage)
    text = text.encode(errors="replace").decode()  # no database takes half a surrogate pair
    tokens, top = _read_logprobs(first.get("logprobs"))
    return Answer(text, finish_reason, usage, tokens, top)


def _read_usage(reported: Any, seconds: float, n_prompt: int, n_written: int) -> Usage:
    """Return the server's token counts. A missing or impossible one is 0; a budget then counts the maximum.

    :param n_prompt: characters of the prompt.
    :param n_written: characters of the answer.
    """
    if not isinstance(reported, Mapping):
        return Usage(requests=1, seconds=seconds)
    details = reported.get("prompt_tokens_details")
    prompt_tokens = _read_count(reported.get("prompt_tokens"), n_prompt, _MOST_HIDDEN)
    cached = _read_count(details.get("cached_tokens") if isinstance(details, Mapping) else 0, 0, prompt_tokens)
    completion_tokens = _read_count(reported.get("completion_tokens"), n_written, _MOST_THOUGHT)
    return Usage(1, prompt_tokens, cached, completion_tokens, seconds=seconds)


def _read_count(reported: Any, characters: int, more: int) -> int:
    if isinstance(reported, float) and reported.is_integer():
        reported = int(reported)
    is_count = isinstance(reported, int) and not isinstance(reported, bool)
    return reported if is_count and is_plausible_count(reported, characters, more) else 0


def _read_logprob(reported: Any) -> float:
    logprob = float(reported)
    if logprob != logprob:
        raise ValueError("a log-probability is NaN")
    return logprob


def _read_logprobs(reported: Any) -> tuple[tuple[str, ...] | None, tuple[dict[str, float], ...] | None]:
    content = reported.get("content") if isinstance(reported, Mapping) else None
    if not isinstance(content, Sequence) or not content:
        return None, None
    tokens, top = [], []
    for position in content:
        alternatives = {str(x["token"]): _read_logprob(x["logprob"]) for x in position.get("top_logprobs") or ()}
        # Some servers omit a chosen token that is not among the likeliest.
        alternatives.setdefault(str(position["token"]), _read_logprob(position["logprob"]))
        tokens.append(str(position["token"]))
        top.append(alternatives)
    return tuple(tokens), tuple(top)


_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINKING_END = re.compile(r"</(?:think|thinking|reasoning)>", re.IGNORECASE)
_THINKING_START = re.compile(r"<(?:think|thinking|reasoning)>", re.IGNORECASE)


def without_thinking(text: str) -> str:
    """Return the answer proper. A template may open the thinking in the prompt: all before a lone closing tag goes.

    :raises AnswerFailed: the thinking never ends, so there is no answer.
    """
    text = _THINKING.sub("", text)
    text = _THINKING_END.split(text)[-1]
    if _THINKING_START.search(text):
        raise AnswerFailed("the model was still thinking when its answer ended", cut=True)
    return text.strip()


_KEY_LIKE = re.compile(r"\b(?:(?:sk|pk|hf|gsk|xai)[-_]|AIza)[\w*.\-]{6,}", re.IGNORECASE)


def one_line(text: object, limit: int = 200) -> str:
    """Return a server's text for an error message: one bounded line without anything that looks like a key."""
    line = _KEY_LIKE.sub("[key]", " ".join(str(text).split()))
    line = "".join(c for c in line if c.isprintable())
    return line if len(line) <= limit else line[: limit - 1] + "…"
