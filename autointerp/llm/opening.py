"""Open the explainer or the judge of a command: by name or ``auto``, with its language model.

A key in the environment alone spends nothing: ``auto`` is a language model only if a flag named an endpoint or a model,
else the n-gram baseline.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autointerp.journal.method import BASELINE, Method
from autointerp.llm.options import LlmOptions
from sae.common.errors import BadInput
from sae.common.registry import Registry

if TYPE_CHECKING:
    from autointerp.llm.capabilities import Capabilities
    from autointerp.llm.client import LlmClient
    from autointerp.llm.local.server import OneServer

M = TypeVar("M", bound=Method)
PROTOCOLS = ("auto", "batch", "single")


def resolve_name(kinds: Registry[M], backend: str, options: LlmOptions) -> str:
    """Return the name of an explainer or judge: ``llm`` or ``ngram`` for ``auto``, any other as it is.

    Raises BadInput if the name is unknown, or needs a language model and none was named.
    """
    if backend == "auto":
        return "llm" if options.is_named else BASELINE
    backend = kinds.check(backend, f"--{kinds.what}", "auto")
    if kinds[backend].asks_model and not options.is_named:
        raise BadInput(
            f"--{kinds.what} {backend} needs a language model: give --llm-url (such as http://127.0.0.1:8000/v1), "
            "--vllm or --llm-model; a key in the environment alone configures nothing"
        )
    return backend


def check_flags(kinds: Registry[M], name: str, flags: list[str]) -> None:
    """Raise BadInput if an explainer or judge that asks no language model got flags about one."""
    if flags and not kinds[name].asks_model:
        raise BadInput(
            f"{flags[0]} has no effect: the {kinds.what} {name} asks no language model; remove it, or choose "
            f"another --{kinds.what}"
        )


def check_repeats(kinds: Registry[M], name: str, flag: str, n: int) -> None:
    """Raise BadInput if ``n`` answers are asked of an explainer or judge that always gives the same one."""
    if n > 1 and not hasattr(kinds[name], "repeated"):
        raise BadInput(
            f"{flag} {n}: the {kinds.what} {name} always answers the same; leave it out, or choose another "
            f"--{kinds.what}"
        )


def get_capabilities(method: Method) -> Capabilities | None:
    """Return what the servers of an explainer or judge can do; ``None`` for one that asks no model."""
    return getattr(method, "capabilities", None)


def list_missing(method: Method) -> list[str]:
    """Return what the servers of an explainer or judge cannot do, and what was done instead: a sentence each."""
    capabilities = get_capabilities(method)
    return [] if capabilities is None else capabilities.list_missing()


@asynccontextmanager
async def open_method(
    kinds: Registry[M], backend: str, options: LlmOptions, cache: Path, servers: OneServer | None = None
) -> AsyncIterator[M]:
    """Open an explainer or judge for the block, and report an endpoint that does not answer.

    ``servers`` keeps a vLLM server beyond the block.
    """
    if options.protocol not in PROTOCOLS:
        raise BadInput(f"--protocol {options.protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    kind: Any = kinds[resolve_name(kinds, backend, options)]
    if servers is not None and not (kind.asks_model and options.vllm):
        servers.close()  # the explainer's server, which is not needed any more
    if not kind.asks_model:
        yield kind()
        return
    async with open_any_client(options, cache, servers) as client:
        yield await kind.open(client, options)


@asynccontextmanager
async def open_any_client(
    options: LlmOptions, cache: Path, servers: OneServer | None = None
) -> AsyncIterator[LlmClient]:
    """Open the client of a running server, or of one that starts at its first question."""
    from autointerp.llm.client import open_client

    if options.vllm is None:
        async with open_client(options, cache) as client:
            yield client
        return
    from autointerp.llm.local.server import open_server

    async with (
        open_server(options, cache.parent, servers) as server,
        open_client(replace(options, model=server.model.name), cache, server.ready) as client,
    ):
        yield client
