"""Which explainer and which judge: the n-gram baseline, or a language model where one was named.

A key in the environment alone configures nothing and spends nothing: ``auto`` is a language model only where an
endpoint or a model was named by flag.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from autointerp.cost import Budget
from autointerp.explainers.base import Explainer
from autointerp.judges.base import Judge
from sae.errors import BadInput

PROTOCOLS = ("auto", "batch", "single")


@dataclass(frozen=True)
class LlmOptions:
    """What the user said about language models. All unset: there is none."""

    url: str | None = None
    model: str | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    api_key_file: Path | None = None
    concurrency: int = 32
    requests_per_second: float | None = None
    protocol: str = "auto"
    contexts_per_request: int = 5
    """In a request of the batch protocol."""
    budget: Budget | None = None
    """What the command may spend, the same object for explainer and judge."""

    @property
    def named(self) -> bool:
        return self.url is not None or self.model is not None

    def words(self) -> list[str]:
        """The flags that name the models again, for a command to print. A key is in none of them: an address that
        carries one is left for the user to give."""
        given = {
            "--llm-url": self.url,
            "--llm-model": self.model,
            "--judge-url": self.judge_url,
            "--judge-model": self.judge_model,
            "--api-key-file": self.api_key_file,
        }
        return [word for flag, value in given.items() if value and "@" not in str(value) for word in (flag, str(value))]

    def for_judge(self) -> LlmOptions:
        """The same, with the judge's own endpoint and model where it has them."""
        model = self.judge_model or (self.model if self.judge_url is None else None)
        return replace(self, url=self.judge_url or self.url, model=model)


def resolve(backend: str, options: LlmOptions, what: str) -> str:
    """``auto`` as ``llm`` or ``ngram``; ``llm`` without a model is an error that says what to give."""
    if backend == "auto":
        return "llm" if options.named else "ngram"
    if backend == "llm" and not options.named:
        raise BadInput(
            f"--{what} llm needs a language model: give --llm-url (such as http://127.0.0.1:8000/v1) or --llm-model; "
            "a key in the environment alone configures nothing"
        )
    return backend


@asynccontextmanager
async def open_explainer(backend: str, options: LlmOptions, cache: Path) -> AsyncIterator[Explainer]:
    """The explainer for the length of a block; an endpoint that does not answer is told before any work."""
    if resolve(backend, options, "explainer") == "ngram":
        from autointerp.explainers.ngram import NgramExplainer

        yield NgramExplainer()
        return
    from autointerp.explainers.llm import LlmExplainer
    from autointerp.llm.client import open_client

    async with open_client(options, cache) as client:
        yield LlmExplainer(client)


@asynccontextmanager
async def open_judge(backend: str, options: LlmOptions, cache: Path) -> AsyncIterator[Judge]:
    """The judge for the length of a block; see :func:`open_explainer`."""
    if options.protocol not in PROTOCOLS:
        raise BadInput(f"--protocol {options.protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    chosen = options.for_judge()
    if resolve(backend, chosen, "judge") == "ngram":
        from autointerp.judges.ngram import NgramJudge

        yield NgramJudge()
        return
    from autointerp.judges.llm import open_llm_judge
    from autointerp.llm.client import open_client

    async with open_client(chosen, cache) as client:
        yield await open_llm_judge(client, options.protocol, options.contexts_per_request)
