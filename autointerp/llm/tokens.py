"""Counting the tokens of a request without sending it, by the best means that there is; and what a prefix cache spares.

In a chat a prompt is what the model's template makes of the messages, so only the model's own tokenizer (here, or
behind the server's ``/tokenize``) counts exactly. Everything else is an estimate and says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autointerp.llm.endpoint import Key, is_loopback, read_key
from autointerp.llm.exchange import Message

if TYPE_CHECKING:
    from autointerp.llm.client import LlmClient
    from autointerp.llm.options import LlmOptions

BLOCK = 16
"""Tokens in a block of vLLM's prefix cache on GPUs (on CPUs it has 128)."""
CHARACTERS = 4.0
"""To a token, where nothing better is known."""
_AROUND = 4  # tokens that a template puts around a message, about

Tokens = Sequence[int | str]
"""Of a prompt, in whatever form tells equal from different."""


@dataclass(frozen=True)
class Tokenize:
    """Turns the messages of a request into tokens."""

    name: str
    """By what is counted, in words."""
    exact: bool
    of_messages: Callable[[Sequence[Message]], Awaitable[Tokens]]
    length: Callable[[str], int]
    """Tokens of a plain text, for what the model will write."""

    async def __call__(self, messages: Sequence[Message]) -> Tokens:
        return await self.of_messages(messages)


@asynccontextmanager
async def tokenizer_of(
    client: LlmClient, options: LlmOptions, per_token: float = 0.0, place: str | None = None
) -> AsyncIterator[Tokenize]:
    """The best way there is to count for the client's model; see this module's head.

    :param per_token: characters to a token as measured on earlier requests; 0 where there were none.
    :param place: the model's folder or hub name, where it is not what the servers call it.
    """
    local = local_tokenizer(place or client.model)
    if local is not None:
        yield local
        return
    url = client.urls[0].removesuffix("/").removesuffix("/v1") + "/tokenize"
    ask = _asking(url, client.model, read_key(options.api_key_file))
    # A name alone means a public service, which has no such address.
    if options.urls:
        try:
            await ask([{"role": "user", "content": "a"}])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        else:
            yield Tokenize(f"the server's own tokenizer ({url})", True, ask, lambda text: -(-len(text) // 2))
            return
    yield by_tiktoken(client.model) or by_characters(per_token)


def _asking(url: str, model: str, key: Key | None) -> Callable[[Sequence[Message]], Awaitable[list[int]]]:
    """What asks vLLM's ``/tokenize``, one request after another."""
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key.value}"})
    proxies = urllib.request.ProxyHandler({} if is_loopback(url) else None)
    opened = urllib.request.build_opener(proxies).open

    def post(messages: Sequence[Message]) -> list[int]:
        body = {"model": model, "messages": list(messages), "add_generation_prompt": True}
        with opened(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=30) as reply:
            return [int(token) for token in json.load(reply)["tokens"]]

    async def ask(messages: Sequence[Message]) -> list[int]:
        return await asyncio.to_thread(post, messages)

    return ask


def local_tokenizer(model: str) -> Tokenize | None:
    """The model's tokenizer and chat template, from a folder or the local hub cache; ``None`` where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    if not getattr(tokenizer, "chat_template", None):
        return None

    async def tokens(messages: Sequence[Message]) -> list[int]:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return Tokenize(f"the tokenizer of {model}", True, tokens, length)


def by_tiktoken(model: str) -> Tokenize | None:
    """OpenAI's tokenizer for ``model``, where the package is there and knows it. The template's tokens are a guess."""
    try:
        tiktoken = importlib.import_module("tiktoken")  # not required, hence unknown to type checkers
        encoding = tiktoken.encoding_for_model(model)
    except Exception:  # not installed, a model of somebody else, or its table is not to be had offline
        return None

    async def tokens(messages: Sequence[Message]) -> list[int | str]:
        return [t for m in messages for t in (*_around(m), *encoding.encode(m["content"], disallowed_special=()))]

    return Tokenize(
        f"tiktoken for {model}, the chat template guessed",
        False,
        tokens,
        lambda text: len(encoding.encode(text, disallowed_special=())),
    )


def by_characters(per_token: float = 0.0) -> Tokenize:
    """So many characters to a token: as measured on earlier requests, else ``CHARACTERS``."""
    size = per_token or CHARACTERS
    how = "as in earlier requests" if per_token else "nothing better is known"

    async def tokens(messages: Sequence[Message]) -> list[str]:
        text = "".join(f"{m['role']} {m['content']}" for m in messages)
        n = round(characters(messages) / size)
        return [text[int(i * size) : int((i + 1) * size)] for i in range(n)]

    return Tokenize(f"{size:.2f} characters to a token ({how}); an estimate", False, tokens, lambda t: -(-len(t) // 2))


def _around(message: Message) -> list[str]:
    return [message["role"]] * _AROUND


def characters(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def block_keys(tokens: Tokens, known: set[bytes], size: int = BLOCK) -> int:
    """How many leading tokens of a prompt a prefix cache has, which then learns the prompt.

    Whole blocks only, and never the last token, from which the answer begins.

    :param known: digests of the blocks seen so far, each with all before it; grows.
    :param size: tokens in a block.
    """
    cached, hit = 0, True
    state = hashlib.blake2b(digest_size=16)
    for end in range(size, len(tokens) + 1, size):
        state.update(repr(tokens[end - size : end]).encode())
        key = state.digest()
        hit = hit and key in known
        if hit and end < len(tokens):
            cached = end
        known.add(key)
    return cached
