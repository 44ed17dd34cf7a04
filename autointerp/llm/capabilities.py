"""What servers can do, read off every answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from pydantic import Field

from autointerp.llm.exchange import Answer, AnswerFailed, Request, fits_schema, one_line
from sae.common.progress import say

_LEAST_TOKENS = 1 / 8  # tokens of a character before anything was counted: no tokenizer makes fewer of ordinary text
THINKING_TOKENS = 4096  # that a model which thinks before it answers may write in addition to the answer
_MOST_NAMES = 3  # of models in :attr:`Capabilities.other_models`


@dataclass
class Capabilities:
    """What all servers of a model can do, read off every answer; ``None`` is not known yet.

    A missing capability is done without (lists are parsed out of plain text, labels stand in for probabilities),
    reported in a command's closing lines and stored with the scores.
    """

    json_schema: bool | None = None  # answers are held to a JSON schema
    logprobs: Annotated[int, Field(ge=0)] | None = None  # alternatives that come back for a token; 0: none
    cached_tokens: bool | None = None  # the server reports how many tokens of a prompt it had cached
    label_first: bool | None = None  # a label that is asked for is the first token, without thinking before it
    context_length: Annotated[int, Field(ge=0)] | None = None  # tokens of prompt and answer together
    thinks: bool | None = None  # the model thinks before it answers
    most_logprobs: Annotated[int, Field(ge=1)] | None = None  # alternatives that may be asked for, if limited
    without: list[str] = field(default_factory=list)  # parameters that are not sent; see ``replies.Refused``
    tokens_per_character: float | None = field(default=None, repr=False)  # at least, as far as it was counted
    other_models: list[str] = field(default_factory=list, repr=False)  # that answered in place of the one asked

    def take_over(self, known: Mapping[str, Any]) -> None:
        """Fill in unknown fields from an earlier :meth:`as_dict`."""
        for name in ("json_schema", "logprobs", "cached_tokens", "label_first", "most_logprobs"):
            if getattr(self, name) is None:
                setattr(self, name, known.get(name))
        self.without += [name for name in known.get("without", ()) if name not in self.without]
        if known.get("thinks"):
            self.note_thinking()
        elif self.thinks is None:
            self.thinks = known.get("thinks")

    def forget(self) -> None:
        """Forget what was learned from answers, to probe again."""
        kept = Capabilities(context_length=self.context_length, other_models=self.other_models)
        self.__dict__.update(vars(kept))

    def as_dict(self) -> dict[str, Any]:
        """Return what is stored and reported."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr} | {"without": sorted(self.without)}

    def list_missing(self) -> list[str]:
        """Return the missing capabilities, each with its substitute: a sentence each."""
        missing = []
        if self.json_schema is False:
            missing.append("the server does not hold answers to a JSON schema: they are read as plain text")
        if self.logprobs == 0:
            missing.append("the server gives no log-probabilities: labels stand in for P(active)")
        if self.cached_tokens is False:
            missing.append("the server does not report how many prompt tokens it had cached: they count as not cached")
        if others := set(self.without) - {"response_format", "logprobs", "max_tokens"}:
            names = ", ".join(map(repr, sorted(others)))
            missing.append(f"the server does not take {names}: the requests had none, and its own defaults apply")
        if self.other_models:
            missing.append(f"answers came under another model name: {', '.join(map(repr, self.other_models))}")
        return missing

    def note_refusal(self, parameter: str) -> None:
        """Remember not to send ``parameter`` again."""
        if parameter not in self.without:
            self.without.append(parameter)
        if parameter == "response_format":
            self.json_schema = False
        if parameter == "logprobs":
            self.logprobs = 0

    def note_thinking(self) -> None:
        if not self.thinks:
            self.thinks = True
            say(f"the model thinks before it answers: each answer may take {THINKING_TOKENS:,} tokens more")

    def give_room(self, request: Request) -> Request:
        """Return the request with tokens for thinking, if the model thinks."""
        return replace(request, max_tokens=request.max_tokens + THINKING_TOKENS) if self.thinks else request

    def learn(self, request: Request, answer: Answer) -> None:
        """Read off an answer which parts of the request the server honoured."""
        self.cached_tokens = answer.counts_cached and self.cached_tokens is not False
        if request.logprobs:
            n = 0 if answer.top_logprobs is None else max(map(len, answer.top_logprobs), default=0)
            self.logprobs = n if self.logprobs is None else min(self.logprobs, n)
        if request.json_schema is not None and answer.finish_reason == "stop":
            self.json_schema = fits_schema(answer.text, request.json_schema) and self.json_schema is not False
        if answer.thought:
            self.note_thinking()

        characters, n_tokens = request.characters, answer.usage.prompt_tokens
        if characters >= 1000 and n_tokens > 0:  # 0: not reported, or implausible
            # Somewhat less than the minimum so far: the next text may be of another kind.
            self.tokens_per_character = min(self.tokens_per_character or math.inf, 0.8 * n_tokens / characters)

    def check_length(self, request: Request) -> None:
        """Find a prompt that cannot fit the context before it is sent, by a lower bound on its tokens.

        :raises AnswerFailed: it is too long.
        """
        least = int(request.characters * (self.tokens_per_character or _LEAST_TOKENS))
        if self.context_length is not None and least >= self.context_length:
            raise AnswerFailed(
                f"the prompt is too long for the model: about {least} tokens at least, and its context holds "
                f"{self.context_length}; not sent",
                final=True,
                systematic=True,
            )

    def learn_model(self, asked: str, answered: Any) -> None:
        """Note a model that answered in place of the one ``asked``: a dated version, or quite another one."""
        name = one_line(answered) if isinstance(answered, str) else ""
        if name not in ("", asked, *self.other_models) and len(self.other_models) < _MOST_NAMES:
            self.other_models.append(name)
            say(f"asked for model {asked!r}, the server answers as {name!r}")

    def learn_length(self, entry: Mapping[str, Any]) -> None:
        """Read the context length off a list of models: vLLM, llama.cpp (in ``meta``) and others have names for it."""
        more = entry.get("meta")
        named = {**more, **entry} if isinstance(more, dict) else entry
        for name in ("max_model_len", "context_length", "context_window", "n_ctx"):
            length = named.get(name)
            if type(length) is int and length > 0:
                self.context_length = length if self.context_length is None else min(self.context_length, length)
                return
