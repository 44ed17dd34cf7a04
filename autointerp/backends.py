"""Which explainer and which judge: by name, or the n-gram baseline, or a language model where one was named.

A key in the environment alone configures nothing and spends nothing: ``auto`` is a language model only where an
endpoint or a model was named by flag. An endpoint is an address, or a vLLM server that is started for the command.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autointerp.cost import Budget
from autointerp.explainers import EXPLAINERS
from autointerp.explainers.base import Explainer
from autointerp.judges import JUDGES
from autointerp.judges.base import Judge
from autointerp.method import BASELINE, Method
from sae.errors import BadInput
from sae.registry import Registry

if TYPE_CHECKING:
    from autointerp.explainers.base import ModelExplainer
    from autointerp.judges.base import ModelJudge
    from autointerp.llm.client import LlmClient
    from autointerp.llm.serving import OneServer

PROTOCOLS = ("auto", "batch", "single")
VLLM_TIMEOUT = 1800.0
"""Seconds until a server has to be ready: a large model takes minutes to load, and as long again to be compiled."""


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
    vllm: str | None = None
    """Serve this model for the command: a folder, a hub name or ``bundled``. ``model`` is then what it is called."""
    judge_vllm: str | None = None
    vllm_python: Path | None = None
    vllm_args: str = ""
    vllm_timeout: float = VLLM_TIMEOUT
    servers: OneServer | None = field(default=None, repr=False, compare=False)
    """Keeps the server from one part of a command to the next; see :func:`kept_server`."""
    contexts_per_request: int | None = None
    """In a request of the batch protocol; ``None`` leaves it to the judge."""
    budget: Budget | None = None
    """What the command may spend, the same object for explainer and judge."""

    def __post_init__(self) -> None:
        for flag, vllm, url in (("", self.vllm, self.url), ("judge-", self.judge_vllm, self.judge_url)):
            if vllm is not None and url:
                raise BadInput(f"--{flag}vllm starts a server, --{flag or 'llm-'}url names one; give one of the two")
        if self.vllm is not None and self.judge_model is not None and not self.judge_is_elsewhere:
            raise BadInput(
                f"--judge-model {self.judge_model!r}: the server of --vllm {self.vllm!r} has one model alone; "
                "give --judge-vllm or --judge-url"
            )

    @property
    def named(self) -> bool:
        return bool(self.url) or self.model is not None or self.vllm is not None

    @property
    def judge_is_elsewhere(self) -> bool:
        """Whether the judge has an endpoint of its own."""
        return bool(self.judge_url) or self.judge_vllm is not None

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
        served = [
            ("--vllm", self.vllm),
            ("--judge-vllm", self.judge_vllm),
            ("--vllm-python", self.vllm_python),
            ("--vllm-args", self.vllm_args),
            ("--vllm-timeout", f"{self.vllm_timeout:g}" if self.vllm_timeout != VLLM_TIMEOUT else None),
        ]
        words = [word for flag, value in given if value and "@" not in str(value) for word in (flag, str(value))]
        if self.vllm or self.judge_vllm:
            words += [word for flag, value in served if value for word in (flag, str(value))]
        return words

    def for_judge(self) -> LlmOptions:
        """The same, with the judge's own endpoint and model where it has them."""
        if not self.judge_is_elsewhere:
            return replace(self, model=self.judge_model or self.model)
        return replace(
            self,
            url=self.judge_url,
            vllm=self.judge_vllm,
            model=self.judge_model,
            judge_url=None,
            judge_vllm=None,
            judge_model=None,
        )


@contextmanager
def kept_server(options: LlmOptions) -> Iterator[LlmOptions]:
    """``options`` by which explainer and judge share a server where they name the same model; it ends with the block.

    Without this each has its own, for as long as it is open.
    """
    if options.vllm is None and options.judge_vllm is None:
        yield options
        return
    from autointerp.llm.serving import OneServer

    with OneServer() as servers:
        yield replace(options, servers=servers)


def _several(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


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
    from autointerp.llm.serving import serving

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
