"""Which explainer and which judge: by name, or the n-gram baseline, or a language model where one was named.

A key in the environment alone configures nothing and spends nothing: ``auto`` is a language model only where an
endpoint or a model was named by flag. An endpoint is an address, or a vLLM server that is started for the command.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autointerp.explaining.explainers import EXPLAINERS
from autointerp.explaining.explainers.base import Explainer
from autointerp.journal.method import BASELINE, Method
from autointerp.llm.options import LlmOptions
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.judges.base import Judge
from sae.common.errors import BadInput
from sae.common.registry import Registry

if TYPE_CHECKING:
    from autointerp.explaining.explainers.base import ModelExplainer
    from autointerp.llm.client import LlmClient
    from autointerp.scoring.judges.base import ModelJudge

PROTOCOLS = ("auto", "batch", "single")


@contextmanager
def kept_server(options: LlmOptions) -> Iterator[LlmOptions]:
    """``options`` by which explainer and judge share a server where they name the same model; it ends with the block.

    Without this each has its own, for as long as it is open.
    """
    if options.vllm is None and options.judge_vllm is None:
        yield options
        return
    from autointerp.llm.local.serving import OneServer

    with OneServer() as servers:
        yield replace(options, servers=servers)


def resolve(backend: str, options: LlmOptions, what: str) -> str:
    """The name of an explainer or judge (``what``): ``auto`` as ``llm`` or ``ngram``, any other as it is.

    A name that is not known, or that needs a language model where none was named, is an error that says what to give.
    """
    if backend == "auto":
        return "llm" if options.named else BASELINE
    known: Registry[Explainer] | Registry[Judge] = EXPLAINERS if what == "explainer" else JUDGES
    known.checked(backend, f"--{what}", "auto")
    if known[backend].asks_model and not options.named:
        raise BadInput(
            f"--{what} {backend} needs a language model: give --llm-url (such as http://127.0.0.1:8000/v1), --vllm or "
            "--llm-model; a key in the environment alone configures nothing"
        )
    return backend


def of_no_effect(name: str, flags: list[str], what: str) -> None:
    """Raise where flags about a language model were given beside an explainer or judge (``what``) that asks none."""
    known: Registry[Explainer] | Registry[Judge] = EXPLAINERS if what == "explainer" else JUDGES
    if flags and not known[name].asks_model:
        raise BadInput(
            f"{flags[0]} has no effect: the {what} {name} asks no language model; leave it out, or choose another "
            f"--{what}"
        )


def words_of(name: str, options: LlmOptions, what: str) -> list[str]:
    """The flag that chooses this explainer or judge again, for a command to print; none where ``auto`` does."""
    return [] if name == resolve("auto", options, what) else [f"--{what}", name]


@asynccontextmanager
async def open_explainer(backend: str, options: LlmOptions, cache: Path) -> AsyncIterator[Explainer]:
    """The explainer for the length of a block; an endpoint that does not answer is told before any work."""
    kind = EXPLAINERS[resolve(backend, options, "explainer")]
    if not kind.asks_model:
        yield kind()
        return
    async with _open_client(options, cache) as client:
        yield await cast("type[ModelExplainer]", kind).open(client, options)


@asynccontextmanager
async def open_judge(backend: str, options: LlmOptions, cache: Path) -> AsyncIterator[Judge]:
    """The judge for the length of a block; see :func:`open_explainer`."""
    if options.protocol not in PROTOCOLS:
        raise BadInput(f"--protocol {options.protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    chosen = options.for_judge()
    kind = JUDGES[resolve(backend, chosen, "judge")]
    if chosen.servers is not None and not (kind.asks_model and chosen.vllm):
        chosen.servers.close()  # the explainer's, which nobody asks any more
    if not kind.asks_model:
        yield kind()
        return
    async with _open_client(chosen, cache) as client:
        yield await cast("type[ModelJudge]", kind).open(client, chosen)


@asynccontextmanager
async def _open_client(options: LlmOptions, cache: Path) -> AsyncIterator[LlmClient]:
    """The client of a server that runs already, or of one that is started for its first question."""
    from autointerp.llm.client import open_client

    if options.vllm is None:
        async with open_client(options, cache) as client:
            yield client
        return
    from autointerp.llm.local.serving import serving

    async with (
        serving(options, cache.parent) as server,
        open_client(replace(options, model=server.name), cache, server.ready) as client,
    ):
        yield client


def capabilities(method: Method) -> dict[str, Any] | None:
    """What a method's servers can do, to be stored with its results; ``None`` for a method that asks none."""
    found = getattr(method, "capabilities", None)
    return None if found is None else found.as_dict()


def lacks(method: Method) -> list[str]:
    """What a method's servers turned out not to do, and what was done instead: a sentence each."""
    found = getattr(method, "capabilities", None)
    return [] if found is None else found.lacks()
