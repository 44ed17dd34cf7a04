"""A request, with its bytes and its cache key; its answer; and the errors that there may be in place of one."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from autointerp.journal.usage import Usage

Message = dict[str, str]  # ``{"role": "system" | "user" | "assistant", "content": text}``

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_BLANK = 100  # an answer that ends in more white space than this, in characters, would only have continued it


class AnswerFailed(Exception):
    """This one request brought no usable answer. ``reason`` is one line; ``usage`` is its cost."""

    def __init__(
        self,
        reason: str,
        usage: Usage | None = None,
        *,
        cut: bool = False,
        final: bool = False,
        systematic: bool = False,
        thought: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.usage = usage or Usage()
        self.cut = cut  # the answer ran into ``max_tokens``: a larger limit may help, the same again will not
        self.final = final  # asking again is of no use: it was tried often enough, or this very request is refused
        self.systematic = systematic  # where the first questions all fail so, the settings are wrong
        self.thought = thought  # the model spent its tokens on thinking


class Transient(Exception):
    """Worth trying again. ``wait`` is the pause the server asked for, in seconds."""

    def __init__(
        self, reason: str, wait: float = 0.0, *, is_unreachable: bool = False, is_loading: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait
        self.is_unreachable = is_unreachable  # no connection could be made at all
        self.is_loading = is_loading  # the server loads its model, which may take minutes


@dataclass(frozen=True)
class Request:
    """Everything an answer depends on, apart from the model."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    json_schema: Mapping[str, Any] | None = None  # of the answer; servers that cannot hold a model to it do not get it
    logprobs: int = 0  # alternatives to return for each generated token; 0 for no log-probabilities
    seed: int | None = None
    replicate: int = 0  # which of several independent answers to the same question this is; only the cache sees it
    may_be_cut: bool = False  # whether an answer that ran into ``max_tokens`` is usable
    affinity: str = ""
    """Requests of equal affinity begin alike and go to the same server. Neither the server nor the cache sees it."""

    @property
    def characters(self) -> int:
        """The length of all messages together."""
        return self._written[1]

    def key(self, model: str, body: Mapping[str, Any] = _NOTHING) -> str:
        """Return the digest under which the answer is cached. 64 hex characters. ``body``: see :meth:`parameters`."""
        # Equals sae.common.files.digest of {"model": model, **the fields but affinity}, at a tenth of the time.
        before = {
            **({"body": body} if body else {}),
            "json_schema": self.json_schema,
            "logprobs": self.logprobs,
            "max_tokens": self.max_tokens,
            "may_be_cut": self.may_be_cut,
        }
        after = {"model": model, "replicate": self.replicate, "seed": self.seed, "temperature": self.temperature}
        head, tail = (json.dumps(part, sort_keys=True, separators=(",", ":")) for part in (before, after))
        return hashlib.sha256(f'{head[:-1]},"messages":{self._written[0]},{tail[1:]}'.encode()).hexdigest()

    def parameters(
        self, model: str, without: Collection[str] = (), body: Mapping[str, Any] = _NOTHING
    ) -> dict[str, Any]:
        """Return the parameters to send: those that the server takes, replaced and extended by the user's ``body``.

        ``max_tokens`` in ``without``: the server uses its newer name. ``None`` in ``body`` removes a parameter.
        """
        sent: dict[str, Any] = {"model": model}
        sent["max_completion_tokens" if "max_tokens" in without else "max_tokens"] = self.max_tokens
        if "temperature" not in without:
            sent["temperature"] = self.temperature
        if self.json_schema is not None and "response_format" not in without:
            schema = {"name": "answer", "strict": True, "schema": self.json_schema}
            sent["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.logprobs and "logprobs" not in without:
            sent["logprobs"], sent["top_logprobs"] = True, self.logprobs
        if self.seed is not None and "seed" not in without:
            sent["seed"] = self.seed
        if body:
            sent = {name: value for name, value in {**sent, **body}.items() if value is not None}
            if not sent.get("logprobs"):
                sent.pop("top_logprobs", None)  # refused without the other
        return sent

    def without_system(self) -> Request:
        """Return the request with its system message at the beginning of the first question."""
        system, first, *others = self.messages
        first = {**first, "content": f"{system['content']}\n\n{first['content']}"}
        return replace(self, messages=(first, *others))

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


@with_config(ConfigDict(strict=True))
class _Stored(TypedDict):
    """A cached answer."""

    text: Annotated[str, Field(min_length=1)]
    finish_reason: str
    tokens: tuple[str, ...] | None
    top_logprobs: tuple[dict[str, float], ...] | None


_STORED = TypeAdapter(_Stored)


@dataclass(frozen=True)
class Answer:
    """A usable answer: ``text`` is never empty."""

    text: str
    finish_reason: str
    usage: Usage = field(default_factory=Usage, compare=False)
    tokens: tuple[str, ...] | None = None  # the generated tokens, where log-probabilities came back
    top_logprobs: tuple[dict[str, float], ...] | None = None  # of each token and its likeliest alternatives, in nats
    counts_cached: bool = field(default=False, compare=False)  # whether the server reported cached prompt tokens
    thought: bool = field(default=False, compare=False)  # whether the model thought before it answered

    def to_json(self) -> str:
        names = ("text", "finish_reason", "usage", "tokens", "top_logprobs")
        return json.dumps({name: getattr(self, name) for name in names}, default=vars, separators=(",", ":"))

    @classmethod
    def from_json(cls, stored: str | bytes) -> Answer | None:
        """Read an answer of the cache; ``None`` if it is damaged. Its usage is one cached answer: no cost again."""
        try:
            values = _STORED.validate_json(stored)
        except (ValidationError, TypeError):
            return None
        return cls(
            values["text"], values["finish_reason"], Usage(from_cache=1), values["tokens"], values["top_logprobs"]
        )


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


def fits_schema(text: str, schema: Mapping[str, Any]) -> bool:
    """Return whether ``text`` is an object with the schema's fields and no others."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    fields = set(schema.get("required", ())), set(schema.get("properties", value if isinstance(value, dict) else ()))
    return isinstance(value, dict) and fields[0] <= set(value) <= fields[1]


_THINKING = re.compile(r"<(/?)(?:think|thinking|reasoning)>", re.IGNORECASE)
_NO_THOUGHT = re.compile(r"<(think|thinking|reasoning)>\s*</\1>", re.IGNORECASE)


def has_thinking(text: str) -> bool:
    """Return whether a model thought within its answer. Some write empty tags where thinking is turned off."""
    return "<" in text and _THINKING.search(_NO_THOUGHT.sub("", text)) is not None


def without_thinking(text: str) -> str:
    """Return the answer proper. A template may open the thinking in the prompt: all before a lone closing tag goes.

    :raises AnswerFailed: the thinking never ends, so there is no answer.
    """
    spoken: list[str] = []
    start, thinks = 0, False
    for tag in _THINKING.finditer(text):  # once through the text, whatever it is
        if not tag[1] and not thinks:
            spoken.append(text[start : tag.start()])
        elif tag[1] and not thinks:
            spoken.clear()
        start, thinks = tag.end(), not tag[1]
    if thinks:
        raise AnswerFailed("the model was still thinking when its answer ended", cut=True)
    return "".join([*spoken, text[start:]]).strip()


KEY_LIKE = re.compile(r"\b(?:(?:sk|pk|hf|gsk|xai)[-_]|AIza)[\w*.\-]{6,}", re.IGNORECASE)


def one_line(text: object, limit: int = 200) -> str:
    """Return a server's text for an error message: one bounded line without anything that looks like a key."""
    try:
        line = KEY_LIKE.sub("[key]", " ".join(str(text).split()))
    except RecursionError:
        return "nested too deeply"
    line = "".join(c for c in line if c.isprintable())
    return line if len(line) <= limit else line[: limit - 1] + "…"
