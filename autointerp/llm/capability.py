"""What a model's servers can do, found out and not assumed.

Servers that speak one protocol differ in what they honour: JSON schemas, log-probabilities (and how many), counts of
cached prompt tokens, the length of the context. What they do is read off every answer; where it has to be known
beforehand, to choose how a judge is asked, two tiny questions find it out. What is missing is done without (lists are
parsed out of plain text, labels stand in for probabilities), said in a command's closing lines and stored with the
scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autointerp.journal.method import Method
from autointerp.llm.exchange import Answer, AnswerFailed, Request

_FEWEST_TOKENS = 1 / 8
"""Of a character, before anything has been counted: no tokenizer makes less of ordinary text."""


@dataclass
class Capabilities:
    """``None`` is not known yet. Of several servers, what all of them can do."""

    json_schema: bool | None = None
    """Answers are held to a JSON schema."""
    logprobs: int | None = None
    """Alternatives that come back for a token; 0 where there are no log-probabilities."""
    cached_tokens: bool | None = None
    """The server says how many tokens of a prompt it had cached."""
    label_first: bool | None = None
    """Asked for a label, the model gives it as its first token, without thinking before it."""
    context_length: int | None = None
    """Tokens of prompt and answer together."""

    def take_over(self, found: Mapping[str, Any]) -> None:
        """Fill in what is not known yet from an earlier :meth:`as_dict`."""
        for name in ("json_schema", "logprobs", "cached_tokens", "label_first"):
            if getattr(self, name) is None:
                setattr(self, name, found.get(name))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lacks(self) -> list[str]:
        """What was asked for and is not there, and what is done instead: a sentence each."""
        told = []
        if self.json_schema is False:
            told.append("the server does not hold answers to a JSON schema: they are read as plain text")
        if self.logprobs == 0:
            told.append("the server gives no log-probabilities: labels stand in for P(active)")
        if self.cached_tokens is False:
            told.append("the server does not say how many prompt tokens it had cached: they are counted as not cached")
        return told

    def went_without(self, parameter: str) -> None:
        """A server does not take ``parameter``."""
        if parameter == "response_format":
            self.json_schema = False
        if parameter == "logprobs":
            self.logprobs = 0

    def learn(self, request: Request, reply: Mapping[str, Any], answer: Answer) -> None:
        """Read off an answer what the server did of what it was asked for."""
        usage = reply.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
        counted = isinstance(details, Mapping) and details.get("cached_tokens") is not None
        self.cached_tokens = counted if self.cached_tokens is None else self.cached_tokens and counted
        if request.logprobs:
            found = 0 if answer.top_logprobs is None else max(map(len, answer.top_logprobs), default=0)
            self.logprobs = found if self.logprobs is None else min(self.logprobs, found)
        if request.json_schema is not None and answer.finish_reason == "stop":
            held = _fits(answer.text, request.json_schema)
            self.json_schema = held if self.json_schema is None else self.json_schema and held

    def learn_length(self, listed: Mapping[str, Any]) -> None:
        """The context's length, where the list of models tells it: vLLM ``max_model_len``, others by other names."""
        for name in ("max_model_len", "context_length", "context_window"):
            length = listed.get(name)
            if isinstance(length, int) and length > 0:
                self.context_length = length if self.context_length is None else min(self.context_length, length)
                return


class Measure:
    """Tells prompts that cannot fit before they are sent. Careful: it knows characters, and servers count tokens."""

    def __init__(self) -> None:
        self._fewest = _FEWEST_TOKENS
        self._counted = False

    def learn(self, characters: int, prompt_tokens: int) -> None:
        if characters >= 1000 and prompt_tokens > 0:  # 0: not reported, or not believed
            # Somewhat less than the least ever seen: the next text may be of another kind.
            ratio = 0.8 * prompt_tokens / characters
            self._fewest = min(self._fewest, ratio) if self._counted else ratio
            self._counted = True

    def check(self, request: Request, context_length: int | None) -> None:
        """:raises AnswerFailed: the prompt is too long for the model, by all that is known of its tokens."""
        if context_length is None:
            return
        least = int(request.characters * self._fewest)
        if least >= context_length:
            raise AnswerFailed(
                f"the prompt is too long for the model: about {least} tokens at least, and its context holds "
                f"{context_length}; not sent",
                final=True,
            )


def _fits(text: str, schema: Mapping[str, Any]) -> bool:
    """Whether ``text`` is an object with the schema's fields: enough to tell a server that honours schemas."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(schema.get("required", ())) <= set(value)


def capabilities_of(method: Method) -> Capabilities | None:
    """Return what the servers of an explainer or judge can do; ``None`` for one that asks no model."""
    return getattr(method, "capabilities", None)


def lacks_of(method: Method) -> list[str]:
    """Return what the servers of an explainer or judge cannot do, and what was done instead: a sentence each."""
    found = capabilities_of(method)
    return [] if found is None else found.lacks()
