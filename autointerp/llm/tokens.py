"""Counting the tokens of a request without sending it, by the best means that there is; and what a prefix cache spares.

In a chat a prompt is what the model's template makes of the messages, so only the model's own tokenizer (here, or
behind the server's ``/tokenize``, as vLLM and llama.cpp have it) counts exactly. Everything else is an estimate and
says so. A server's count that cannot be right is not used: none for some text, more tokens than its bytes by far, the
same for a short text and a long one.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from autointerp.journal.usage import is_plausible_count
from autointerp.llm.exchange import Message, one_line
from autointerp.llm.transport import Key, is_loopback, read_key

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
    note: str = ""
    """Why no better way is used, a sentence; empty where there is nothing to say."""

    async def __call__(self, messages: Sequence[Message]) -> Tokens:
        return await self.of_messages(messages)


async def tokenizer_of(
    client: LlmClient, options: LlmOptions, per_token: float = 0.0, place: str | None = None
) -> Tokenize:
    """Return the best way to count tokens for the client's model; see this module's head.

    :param per_token: characters to a token as measured on earlier requests; 0 where there were none.
    :param place: the model's folder or hub name, where it is not what the servers call it.
    """
    local = local_tokenizer(place or client.model)
    if local is not None:
        return local
    note = ""
    # A name alone means a public service, which has no such address.
    if options.urls:
        address = client.urls[0].removesuffix("/").removesuffix("/v1")
        of_server = await by_server(address, client.model, read_key(options.api_key_file))
        if isinstance(of_server, Tokenize):
            return of_server
        note = of_server
    return replace(estimated(client.model, per_token), note=note)


def estimated(model: str, per_token: float = 0.0) -> Tokenize:
    """Count by an estimate, where neither a tokenizer nor a server that can be believed is available."""
    return by_tiktoken(model) or by_characters(per_token)


class NotCounted(Exception):
    """A server gave no count of tokens. The message says why."""


class NotBelieved(NotCounted):
    """A server's count of tokens cannot be right. The message says which count, of what."""


Post = Callable[[str, dict[str, Any]], Any]
"""Posts a body to a path of the server and returns the parsed reply."""


async def by_server(address: str, model: str, key: Key | None) -> Tokenize | str:
    """Return the server's own tokenizer, in the first dialect whose counts can be right.

    Each dialect is tried on a short and a long text first.

    :returns: where none is used, a sentence that says why; empty where the server has no tokenizer.
    """
    post = _poster(address, key)
    dialects: list[tuple[str, bool, Callable[[Post, str, Sequence[Message]], list[int]]]] = [
        ("", True, _ask_vllm),
        ("", True, _ask_llama_cpp),
        (", the chat template guessed", False, _ask_llama_cpp_text),
    ]
    doubt = ""
    for how, exact, dialect in dialects:
        ask = _asking(dialect, post, model)
        try:
            short, long = await ask(_user(_SHORT)), await ask(_user(_LONG))
            _check_count(len(long) - len(short), len(_LONG), "more")
        except NotBelieved as error:
            doubt = doubt or str(error)
        except NotCounted:
            pass
        else:
            name = f"the server's own tokenizer ({address}/tokenize){how}"
            return Tokenize(name, exact, ask, lambda text: -(-len(text) // 2))
    return f"the server's /tokenize is not believed ({doubt}): prompt tokens are an estimate" if doubt else ""


_SHORT = "a"
_LONG = "The cat sat on the mat and looked at the moon. " * 80  # 3,760 characters, some 900 tokens
_LEAST_OF_ENGLISH = 1 / 16
"""Tokens to a character of ``_LONG``, at least: no tokenizer makes so few, and one that cuts texts off does."""
_TEMPLATE = 4096
"""Tokens that a chat template with its own system prompt puts around messages, at most."""
_LARGEST_REPLY = 32 << 20
_UNANSWERED = (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What a server that gives no count, or gives one in some other form, ends in."""


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _asking(
    dialect: Callable[[Post, str, Sequence[Message]], list[int]], post: Post, model: str
) -> Callable[[Sequence[Message]], Awaitable[list[int]]]:
    """Return what asks the server, one request after another, and raises :class:`NotCounted`."""

    async def ask(messages: Sequence[Message]) -> list[int]:
        try:
            tokens = await asyncio.to_thread(dialect, post, model, messages)
        except _UNANSWERED as error:
            raise NotCounted(one_line(error)) from None
        _check_count(len(tokens), characters(messages))
        return tokens

    return ask


def _check_count(tokens: int, n_characters: int, more: str = "") -> None:
    """Raise :class:`NotBelieved` for a count that a text of so many characters cannot have.

    :param more: the count is by how much ``_LONG`` has more than ``_SHORT``.
    """
    if more and tokens < _LEAST_OF_ENGLISH * n_characters:
        raise NotBelieved(f"{tokens:,} tokens more for {n_characters:,} characters more")
    if not is_plausible_count(tokens, n_characters, _TEMPLATE):
        raise NotBelieved(
            f"{tokens:,} tokens for {n_characters:,} {'character' if n_characters == 1 else 'characters'}"
        )


def _ask_vllm(post: Post, model: str, messages: Sequence[Message]) -> list[int]:
    """vLLM puts the messages through the chat template itself."""
    return _token_ids(post("/tokenize", {"model": model, "messages": list(messages), "add_generation_prompt": True}))


def _ask_llama_cpp(post: Post, _model: str, messages: Sequence[Message]) -> list[int]:
    """llama.cpp's ``/tokenize`` takes text alone; its ``/apply-template`` makes that of messages."""
    prompt = post("/apply-template", {"messages": list(messages)})["prompt"]
    if not isinstance(prompt, str) or any(m["content"].strip() not in prompt for m in messages):
        raise ValueError("no prompt that holds the messages")
    return _token_ids(post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True}))


def _ask_llama_cpp_text(post: Post, _model: str, messages: Sequence[Message]) -> list[int]:
    """llama.cpp before ``/apply-template``: the tokens of the texts, and a guess at those of the template."""
    tokens: list[int] = []
    for message in messages:
        tokens += [-1] * len(_around(message))  # the template's, whatever they are
        tokens += _token_ids(post("/tokenize", {"content": message["content"]}))
    return tokens


def _token_ids(reply: Any) -> list[int]:
    """The ``tokens`` of a reply.

    :raises NotBelieved: they are no token ids, or as many as the reply's own ``count`` says.
    """
    tokens = reply["tokens"]
    if not isinstance(tokens, list):
        raise ValueError("no list of tokens")
    if any(type(token) is not int or token < 0 for token in tokens):
        raise NotBelieved("tokens that are not numbers from 0 up")
    count = reply.get("count", len(tokens))
    if type(count) is not int or count != len(tokens):
        raise NotBelieved(f"{len(tokens):,} tokens listed and a count of {one_line(count, 20)}")
    return tokens


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not follow a redirect to another host: a redirect is an error."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _poster(address: str, key: Key | None) -> Post:
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key.value}"})
    proxies = urllib.request.ProxyHandler({} if is_loopback(address) else None)
    opened = urllib.request.build_opener(proxies, _NoRedirect).open

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
        with opened(request, timeout=30) as reply:
            return json.loads(reply.read(_LARGEST_REPLY))

    return post


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
