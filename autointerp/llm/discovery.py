"""Which API is at an address and which model it serves, found before any work is done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import openai

from autointerp.llm.endpoint import Key
from autointerp.llm.exchange import AnswerFailed
from autointerp.llm.faults import NoServer, Transient, no_server, translate
from autointerp.llm.servers import Server, Servers
from autointerp.llm.transport import Unread
from sae.common.errors import BadInput, suggest

Listed = list[Mapping[str, Any]]
"""The entries of a server's list of models; each has an ``id``."""
Trying = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]
"""Calls until the call does not raise :class:`Transient`, or gives up."""
_LIST_SECONDS = 30.0


async def models_at(server: Server, url: str, key: Key | None, timeout: float, trying: Trying) -> Listed | None:
    """The models listed at ``url``, or ``None`` where there is no such list.

    :raises NoServer: nothing answers there.
    :raises Unavailable: the key is refused.
    """
    assert server.api is not None
    api = server.api.with_options(base_url=url)
    seconds = min(timeout, _LIST_SECONDS)

    async def once() -> Any:
        try:
            async with asyncio.timeout(seconds):
                return (await api.models.with_raw_response.list()).text
        except TimeoutError:
            raise Transient(f"no answer in {seconds:g} s", unreachable=True) from None
        except openai.APIStatusError as error:
            if error.status_code in (404, 405, 501):
                return None
            raise translate(error, url, key) from None
        except (openai.APIError, Unread) as error:
            raise translate(error, url, key) from None

    try:
        text = await trying(once)
    except AnswerFailed as error:
        raise no_server(url, error.reason) from None
    try:
        entries = json.loads(text)["data"]
        return [entry for entry in entries if str(entry["id"])]
    except (TypeError, ValueError, KeyError):
        return None  # a web page, or some other API


async def find(
    servers: Servers, model: str | None, list_at: Callable[[Server, str], Awaitable[Listed | None]]
) -> tuple[str, list[Mapping[str, Any]]]:
    """Find every server's API, and the one model that all of them serve. Sets each server's ``url``.

    Of several servers those at which nothing answers are left to rest; they may come back.

    :param model: the model's name; ``None`` takes the one that is served.
    :returns: the model, and what the servers' lists say of it.
    :raises Unavailable: nothing answers at any address, or a key is refused.
    :raises BadInput: no such API at an address, several models and none was named, or servers of different models.
    """
    lists: dict[str, Listed | None] = {}
    absent: NoServer | None = None
    for server in servers.all:
        try:
            lists[server.url] = await _find_one(server, lists, list_at)
        except NoServer as error:
            absent = error
            servers.failed(server, "nothing answers there", at_once=True)
    if not lists and absent is not None:
        raise absent
    named = {url: [str(entry["id"]) for entry in entries] for url, entries in lists.items() if entries is not None}
    if len(servers) == 1 and model is not None:
        chosen = model  # a server may know it by a name that it does not list
    elif model is not None:
        chosen = model
        if any(chosen not in names for names in named.values()):
            raise BadInput(f"not all servers serve {chosen!r}: {_told(named)}; give only those that do")
    else:
        for server in servers.all:
            if server.url in lists and lists[server.url] is None:
                raise _no_api(" or ".join(server.candidates))
        for url, names in named.items():
            if len(names) != 1:
                what = f"{len(names)} models ({suggest('', names, 5)})" if names else "no model"
                raise BadInput(f"{url} serves {what}; name one with --llm-model")
        if len({names[0] for names in named.values()}) > 1:
            raise BadInput(
                f"the servers serve different models: {_told(named)}; give only those of one model, or name it with "
                "--llm-model"
            )
        chosen = next(iter(named.values()))[0]
    entries = [entry for found in lists.values() for entry in found or () if entry["id"] == chosen]
    return chosen, entries


async def _find_one(
    server: Server, others: Mapping[str, Any], list_at: Callable[[Server, str], Awaitable[Listed | None]]
) -> Listed | None:
    for url in server.candidates:
        served = await list_at(server, url)
        if served is not None:
            if url in others:
                raise BadInput(f"LLM URL {url!r} is given twice; give every server once")
            server.url = url
            return served
    return None


def _told(named: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{url} serves {suggest('', names, 3) if names else 'none'}" for url, names in named.items())


def _no_api(where: str) -> BadInput:
    return BadInput(
        f"no OpenAI-compatible API at {where} (no list of models there); "
        "check the URL, or name the model with --llm-model if this server does not list them"
    )
