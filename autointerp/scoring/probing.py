"""Find out what a language-model server can do, what that costs, and how `score` would ask it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autointerp.llm.exchange import AnswerFailed, Request
from autointerp.llm.local.model import find_model
from autointerp.llm.opening import open_any_client
from autointerp.llm.options import LlmOptions
from autointerp.llm.prompts import conversation
from autointerp.llm.tokens import find_tokenizer
from autointerp.scoring.judges.llm import best_protocol, explain_protocol
from sae.common.errors import Unavailable


@dataclass(frozen=True)
class ServerReport:
    """What the servers of one model can do, from one request for each question. ``None``: not known."""

    urls: list[str]
    model: str
    models: list[str] | None  # that the servers list; ``None`` where they list none
    context_length: int | None  # tokens of prompt and answer together
    answer: str  # to a question in plain text
    json_schema: bool
    logprobs: int  # alternatives of each token; 0 for no log-probabilities
    label_first: bool  # a label that is asked for is the first token
    cached_tokens: bool | None  # whether the server reports them
    thinks: bool  # before it answers
    answer_tokens: int  # tokens written for the plain answer, thinking included; 0 if not reported
    counted_by: str
    exact: bool  # whether prompts are counted by the model's own tokenizer and template
    requests: int
    prompt_tokens: int
    completion_tokens: int
    seconds_per_request: float
    protocol: str  # that `score` would choose
    because: str
    missing: list[str]  # capabilities, each with its substitute

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


async def probe_servers(options: LlmOptions, root: Path) -> ServerReport:
    """Ask the servers of ``options`` what they can do, and keep that for the commands under ``root``.

    :raises Unavailable: nothing answers, or not in plain text.
    :raises BadInput: there is no such API or no such model.
    """
    place = None if options.vllm is None else find_model(options.vllm, options.vllm_args, options.model).place
    root.mkdir(parents=True, exist_ok=True)
    async with open_any_client(options, root / "cache.sqlite") as client:
        plain = Request(conversation("probe").messages(question="word"), max_tokens=200, may_be_cut=True)
        try:
            _, answer = await client.ask_anew(plain, lambda answer: answer)
        except AnswerFailed as failed:
            raise Unavailable(f"{client.url} gives no answer in plain text: {failed.reason}") from None
        found = await client.probe(anew=True)
        tokenize = await find_tokenizer(client, options, place=place)
        spent = client.usage
        return ServerReport(
            urls=client.urls,
            model=client.model,
            models=client.served,
            context_length=found.context_length,
            answer=answer.text,
            json_schema=bool(found.json_schema),
            logprobs=found.logprobs or 0,
            label_first=bool(found.label_first),
            cached_tokens=found.cached_tokens,
            thinks=bool(found.thinks),
            answer_tokens=answer.usage.completion_tokens,
            counted_by=tokenize.name,
            exact=tokenize.exact,
            requests=spent.requests,
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
            seconds_per_request=spent.seconds / max(1, spent.requests),
            protocol=best_protocol(found, client.is_local),
            because=explain_protocol(found, client.is_local),
            missing=[*found.list_missing(), *([tokenize.note] if tokenize.note else [])],
        )
