"""Judge contexts by asking a language model whether an explanation fits (Paulo et al. 2024, arXiv 2410.13928).

Two protocols:

``batch``    several contexts per request, answered by a list of zeros and ones. Cheap. If the server gives
             log-probabilities, each label's token gives P(active) = P(1) / (P(0) + P(1)); else there is no P.
             A label that is not among the likeliest tokens gets its upper bound, so P errs towards one half.
``single``   one context per request, answered by one token, which gives P(active). More expensive, but no
             verdict can depend on a neighbouring context.

In fuzzing (same paper) the model says whether the marked tokens are those on which the latent is active: the same
protocols with other prompts.

The model sees the explanation and text, nothing else. A list of the wrong length, an answer without a list or a token
that is neither label is a failure, never a "no", and is asked again on the next run.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from autointerp.contexts.marking import choose_marks, mark_text
from autointerp.journal.usage import Usage
from autointerp.llm.capabilities import Capabilities
from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import Answer, AnswerFailed, Request, has_thinking, without_thinking
from autointerp.llm.prompts import conversation
from autointerp.scoring.judges.base import Judgement
from sae.common.errors import BadInput
from sae.common.files import digest
from sae.common.progress import say_once

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context
    from autointerp.llm.options import LlmOptions

Protocol = Literal["batch", "single"]

CONTEXTS = 5
"""In a request of the batch protocol, where nobody says how many."""
_FORMAT = 2  # part of the settings hash: raise it when the same question would be asked or read differently
_LISTS = re.compile(r"\[[^\[\]]*\]")
_AROUND_LABELS = " \t\r\n[]{},:\"'Ġ▁"  # what tokenizers glue to a digit in a list
_SINGLE_LABEL = re.compile(r"\W*([01])(?!\w)")

Verdicts = list[tuple[bool, float | None]]
"""For each context the label and P(active), ``None`` where the server gives no log-probabilities."""


@dataclass
class LlmJudge:
    """An :class:`autointerp.scoring.judges.base.Judge` that asks a language model.

    Raises BadInput for an unknown protocol, or no contexts in a request.
    """

    name = "llm"
    asks_model: ClassVar[bool] = True
    reads: ClassVar[str | None] = None

    client: LlmClient
    """The model; checked before the first question."""
    protocol: Protocol = "batch"
    contexts_per_request: int = CONTEXTS
    """Of the ``batch`` protocol; the last request may have fewer."""
    temperature: float = 0.0
    replicate: int = 0
    """Number of this one of several independent judgements, which differ if ``temperature`` is above 0."""
    marked: bool = False
    """Ask about marked tokens; every context must then have ``marks``."""

    def __post_init__(self) -> None:
        if self.protocol not in ("batch", "single"):
            raise BadInput(f"judge protocol {self.protocol!r}: choose batch or single")
        if self.contexts_per_request < 1:
            raise BadInput(f"contexts per request = {self.contexts_per_request}: must be at least 1")
        if self.protocol == "single":
            self.contexts_per_request = 1
        self._conversation = conversation(f"{'fuzz' if self.marked else 'judge'}_{self.protocol}")
        self.prompt_hash = self._conversation.hash
        decides: dict[str, Any] = {k: getattr(self, k) for k in ("protocol", "contexts_per_request", "temperature")}
        decides |= {"marked": True} if self.marked else {}
        self.settings_hash = digest({"format": _FORMAT, **decides, **self.client.settings})

    @classmethod
    async def open(cls, client: LlmClient, options: LlmOptions) -> Self:
        """Return the judge for the options' protocol, with its model checked.

        ``auto`` is ``batch`` if the number of contexts per request was given, else :func:`best_protocol`.
        """
        await client.check()
        protocol = options.protocol
        if protocol == "auto" and options.contexts_per_request is None:
            protocol = best_protocol(await client.probe(), client.is_local)
        return cls._of(client, protocol, options.contexts_per_request)

    @classmethod
    def plan(cls, client: LlmClient, options: LlmOptions) -> dict[str, Self]:
        """Plan like :meth:`open`, from stored capabilities; both protocols if those do not decide."""
        protocols: tuple[str, ...] = (options.protocol,)
        if options.protocol == "auto" and options.contexts_per_request is None:
            client.load_capabilities()
            is_known = client.capabilities.label_first is not None
            protocols = (best_protocol(client.capabilities, client.is_local),) if is_known else ("single", "batch")
        judges = [cls._of(client, protocol, options.contexts_per_request) for protocol in protocols]
        return {judge.protocol: judge for judge in judges}

    @classmethod
    def _of(cls, client: LlmClient, protocol: str, size: int | None) -> Self:
        return cls(client, "single" if protocol == "single" else "batch", contexts_per_request=size or CONTEXTS)

    @property
    def model(self) -> str:
        return self.client.model

    @property
    def capabilities(self) -> Capabilities:
        """The known capabilities of the model's servers."""
        return self.client.capabilities

    def of_marks(self) -> Self:
        """Return the same model and protocol, asked about marked tokens."""
        return replace(self, marked=True)

    def repeated(self, number: int, temperature: float) -> Self:
        """Return the same judge, asked for replicate ``number`` at ``temperature``."""
        if self.protocol == "single" and self.capabilities.logprobs != 0:
            say_once(
                "replicates by --protocol single differ little: its labels come from log-probabilities, not from "
                "sampling; --protocol batch samples them"
            )
        return replace(self, replicate=number, temperature=temperature)

    async def judge(self, explanation_text: str, contexts: Sequence[Context]) -> list[Judgement]:
        """Return one judgement per context; requests run in parallel as far as the client allows."""
        size = self.contexts_per_request
        batches = [contexts[start : start + size] for start in range(0, len(contexts), size)]
        tasks = [asyncio.ensure_future(self._judge_batch(explanation_text, batch)) for batch in batches]
        try:
            answered = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return [judgement for batch in answered for judgement in batch]

    async def _judge_batch(self, explanation: str, contexts: Sequence[Context]) -> list[Judgement]:
        n = len(contexts)
        try:
            verdicts, answer = await self.client.ask(
                self.request(explanation, contexts), lambda answer: self._read(answer, n)
            )
        except AnswerFailed as failed:
            return [Judgement(None, None, failed.reason, usage) for usage in _on_first(failed.usage, n)]
        return [
            Judgement(p, label, usage=usage)
            for (label, p), usage in zip(verdicts, _on_first(answer.usage, n), strict=True)
        ]

    def request(self, explanation: str, contexts: Sequence[Context]) -> Request:
        """Return the request for these contexts."""
        texts, words = _written(contexts, self.marked)
        values: dict[str, Any] = {**words, "explanation": explanation}
        if self.protocol == "single":
            values["snippet"] = texts[0]
            asked: dict[str, Any] = {"max_tokens": 4, "logprobs": 20, "may_be_cut": True}
        else:
            values["snippets"] = texts
            asked = {"max_tokens": 200 + 20 * len(texts), "logprobs": 5, "json_schema": labels_schema(len(texts))}
        return Request(
            self._conversation.messages(**values),
            temperature=self.temperature,
            seed=self.replicate if self.temperature > 0 else None,
            replicate=self.replicate,
            affinity=explanation,
            **asked,
        )

    def answer_like(self, request: Request) -> str:
        """Return a list of labels, or one label if the request asks for no list."""
        if request.json_schema is None:
            return "0"
        return json.dumps({"labels": [0] * request.json_schema["properties"]["labels"]["maxItems"]})

    def _read(self, answer: Answer, n: int) -> Verdicts:
        return [parse_single(answer)] if self.protocol == "single" else parse_batch(answer, n)


def best_protocol(found: Capabilities, local: bool) -> Protocol:
    """Return the best protocol for servers with these capabilities, on this machine or not.

    ``single`` if the servers give log-probabilities of a label that comes first and cache the common prefix of requests
    (they are on this machine, or report cached prompt tokens); else ``batch``. Single verdicts are better, with a
    P(active) of each context by itself, and then cost about as much as batches. Prompt tokens per context of 32 tokens
    (60 with layout), with few-shot examples of about 700 (single) and 850 (batch) and an explanation of 30:

    =================================  =====================  ===========================
                                       single                 batch of 5
    =================================  =====================  ===========================
    no prefix cache                    700 + 30 + 60 = 790    (850 + 30) / 5 + 60 = 236
    prefix cache: new tokens           30 + 60 = 90           30 / 5 + 60 = 66
    =================================  =====================  ===========================
    """
    kept = local or bool(found.cached_tokens)
    return "single" if found.label_first and found.logprobs and kept and not found.thinks else "batch"


def explain_protocol(found: Capabilities, local: bool) -> str:
    """Return the reason for :func:`best_protocol`: a clause."""
    if not found.logprobs:
        return "there are no log-probabilities, so a request for each context would gain nothing"
    if not found.label_first:
        return "an answer does not begin with the label, so its first token has no P(active)"
    if best_protocol(found, local) == "batch":
        return "the server does not report cached prompt tokens, so a request for each context may cost 3 times as much"
    cached = "runs on this machine" if local else "caches the beginning of prompts"
    return f"the label's log-probabilities give P(active) of each context by itself, and the server {cached}"


def labels_schema(n: int) -> dict[str, Any]:
    """JSON schema of ``{"labels": [0, 1, …]}`` with exactly ``n`` of them."""
    labels = {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": n, "maxItems": n}
    return {"type": "object", "properties": {"labels": labels}, "required": ["labels"], "additionalProperties": False}


def parse_batch(answer: Answer, n: int) -> Verdicts:
    """Parse ``n`` labels from an answer, with or without words around them.

    :raises AnswerFailed: there is no list of zeros and ones, or its length is not ``n``.
    """
    labels = _labels(without_thinking(answer.text))
    if labels is None:
        raise AnswerFailed("the answer holds no list of zeros and ones")
    if len(labels) != n:
        raise AnswerFailed(f"{len(labels)} labels for {n} context{'s' if n > 1 else ''}")
    return list(zip(labels, _label_probabilities(answer, labels), strict=True))


def _labels(text: str) -> list[bool] | None:
    """The answer as JSON if it is that, else the last list in it."""
    for candidate in (text, *reversed(_LISTS.findall(text))):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, Mapping):
            value = value.get("labels", next(iter(value.values()), None) if len(value) == 1 else None)
        # In Python 1 == True == 1.0: all three are accepted here.
        if isinstance(value, list) and all(
            x in ("0", "1") or (isinstance(x, int | float) and x in (0, 1)) for x in value
        ):
            return [bool(int(x)) for x in value]
    return None


def _label_probabilities(answer: Answer, labels: list[bool]) -> list[float | None]:
    """P(active) from the token of each label; all ``None`` if the tokens are ambiguous."""
    nothing: list[float | None] = [None] * len(labels)
    if answer.tokens is None or answer.top_logprobs is None:
        return nothing
    places = [i for i, token in enumerate(answer.tokens) if token.strip(_AROUND_LABELS) in ("0", "1")]
    places = places[len(places) - len(labels) :]  # the list is the last thing in the answer
    if [answer.tokens[i].strip(_AROUND_LABELS) == "1" for i in places] != labels:
        return nothing
    return [_p_active(answer.top_logprobs[i], answer.tokens[i]) for i in places]


def parse_single(answer: Answer) -> tuple[bool, float | None]:
    """Parse label and P(active) from the first token that is not white space; from the text if there are no tokens.

    :raises AnswerFailed: neither label is among that token's likeliest alternatives.
    """
    text = without_thinking(answer.text)
    if answer.tokens is not None and answer.top_logprobs is not None and not has_thinking(answer.text):
        first = next((i for i, token in enumerate(answer.tokens) if token.strip(_AROUND_LABELS)), 0)
        p = _p_active(answer.top_logprobs[first], answer.tokens[first])
        if p is None:
            raise AnswerFailed(f"neither 0 nor 1 is among the {len(answer.top_logprobs[first])} likeliest answers")
        return p >= 0.5, p
    found = _SINGLE_LABEL.match(text)
    if found is None:
        raise AnswerFailed("the answer is neither 0 nor 1")
    return found[1] == "1", None


def _p_active(alternatives: Mapping[str, float], chosen: str) -> float | None:
    """Return P(1) / (P(0) + P(1)) over the alternatives for one token; ``None`` if neither is among them.

    A missing label gets its upper bound: the least likely listed alternative, the probability that the listed ones
    leave, or the other label's. ``chosen`` is no bound: a schema may have forced it.
    """
    mass = {"0": 0.0, "1": 0.0}
    for token, logprob in alternatives.items():
        label = token.strip(_AROUND_LABELS)
        if label in mass:
            mass[label] += math.exp(min(logprob, 0.0))
    if not any(mass.values()):
        return None
    listed = [math.exp(min(logprob, 0.0)) for logprob in alternatives.values()]
    others = [math.exp(min(logprob, 0.0)) for token, logprob in alternatives.items() if token != chosen]
    most = min([max(0.0, 1.0 - sum(listed)), max(mass.values()), *others])
    zero, one = (x if x > 0 else most for x in (mass["0"], mass["1"]))
    return one / (zero + one)


def _written(contexts: Sequence[Context], marked: bool) -> tuple[list[str], dict[str, str]]:
    """The texts as the model is shown them, and what its prompt must know of their marks."""
    if not marked:
        return [context.text for context in contexts], {}
    opening, closing = choose_marks([context.text for context in contexts])
    texts = []
    for context in contexts:
        if context.marks is None:
            raise ValueError(f"window {context.window} has no marks to judge")
        texts.append(mark_text(context.tokens, context.marks, opening, closing))
    return texts, {"opening": opening, "closing": closing}


def _on_first(usage: Usage, n: int) -> list[Usage]:
    """A request's usage on its first context, nothing on the others, so that sums are right."""
    return [usage, *[Usage()] * (n - 1)]
