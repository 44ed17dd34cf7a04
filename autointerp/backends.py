"""Which explainer and which judge: the n-gram baseline, or a language model where one was named.

A key in the environment alone configures nothing and spends nothing: ``auto`` is a language model only where an
endpoint or a model was named by flag.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autointerp.explainers.base import Explainer
from autointerp.judges.base import Judge
from autointerp.method import Method
from sae.errors import BadInput

PROTOCOLS = ("auto", "batch", "single")


@dataclass(frozen=True)
class LlmOptions:
    """What the user said about language models. All unset: there is none."""

    url: str | Sequence[str] | None = None
    """An address, or several that share the load."""
    model: str | None = None
    judge_url: str | Sequence[str] | None = None
    judge_model: str | None = None
    api_key_file: Path | None = None
    concurrency: int = 32
    requests_per_second: float | None = None
    tokens_per_minute: float | None = None
    protocol: str = "auto"

    @property
    def named(self) -> bool:
        return bool(self.url) or self.model is not None

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses; none where only a model was named."""
        return _several(self.url)

    def words(self) -> list[str]:
        """The flags that name the models again, for a command to print. A key is in none of them: an address that
        carries one is left for the user to give."""
        given = [
            *(("--llm-url", url) for url in self.urls),
            ("--llm-model", self.model),
            *(("--judge-url", url) for url in _several(self.judge_url)),
            ("--judge-model", self.judge_model),
            ("--api-key-file", self.api_key_file),
        ]
        return [word for flag, value in given if value and "@" not in str(value) for word in (flag, str(value))]

    def for_judge(self) -> LlmOptions:
        """The same, with the judge's own endpoint and model where it has them."""
        model = self.judge_model or (None if self.judge_url else self.model)
        return replace(self, url=self.judge_url or self.url, model=model)


def _several(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


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
        yield await open_llm_judge(client, options.protocol)


def capabilities(method: Method) -> dict[str, Any] | None:
    """What a method's servers can do, to be stored with its results; ``None`` for a method that asks none."""
    found = getattr(method, "capabilities", None)
    return None if found is None else found.as_dict()


def lacks(method: Method) -> list[str]:
    """What a method's servers turned out not to do, and what was done instead: a sentence each."""
    found = getattr(method, "capabilities", None)
    return [] if found is None else found.lacks()
