"""Count the tokens of a request without sending it, and the tokens that a prefix cache saves.

Only the model's own tokenizer and chat template count exactly: here, or behind the server's ``/tokenize`` (vLLM,
llama.cpp). Everything else is an estimate and says so. Implausible counts of a server are not used.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from autointerp.journal.usage import is_plausible_count
from autointerp.llm.exchange import AnswerFailed, Message, one_line

if TYPE_CHECKING:
    from autointerp.llm.client import LlmClient
    from autointerp.llm.options import LlmOptions

BLOCK = 16  # tokens in a block of vLLM's prefix cache on GPUs (on CPUs it has 128)
CHARACTERS = 4.0  # characters of a token if nothing better is known
_AROUND = 4  # tokens that a chat template puts around a message, about
_SHORT = "a"
_LONG = "The cat sat on the mat and looked at the moon. " * 80  # 3,760 characters, some 900 tokens
_LEAST_OF_ENGLISH = 1 / 16  # tokens of a character of ``_LONG``, at least: a tokenizer that makes fewer cuts texts off
_TEMPLATE = 4096  # tokens that a chat template with its own system prompt puts around messages, at most
Tokens = Sequence[int | str]  # the tokens of a prompt, in any form that can be compared


class NotCounted(Exception):
    """A server gave no count of tokens. The message is the reason."""


class NotBelieved(NotCounted):
    """A server's count of tokens is impossible. The message names the count and its text."""


@dataclass(frozen=True)
class Tokenize:
    """Turns the messages of a request into tokens."""

    name: str  # the tokenizer, in words
    exact: bool
    of_messages: Callable[[Sequence[Message]], Coroutine[Any, Any, Tokens]]
    length: Callable[[str], int]  # counts the tokens of a plain text, for the model's answers
    note: str = ""  # the reason why no better way is used, a sentence or empty


async def find_tokenizer(
    client: LlmClient, options: LlmOptions, per_token: float = 0.0, place: str | None = None
) -> Tokenize:
    """Return the best way to count tokens for the client's model.

    :param per_token: characters of a token in earlier requests; 0 if there were none.
    :param place: the model's folder or hub name, if the servers call it otherwise.
    """
    local = load_local_tokenizer(place or client.model, _get_template_settings(client))
    if local is not None:
        return local
    note = ""
    if options.urls:  # a name alone means a public service, which has no such address
        of_server = await ask_server(client)
        if isinstance(of_server, Tokenize):
            return of_server
        note = of_server
    return estimate_tokens(client.model, per_token, note)


def estimate_tokens(model: str, per_token: float, note: str) -> Tokenize:
    """Return an estimate, for a model without a known tokenizer."""
    return load_tiktoken(model, note) or count_by_characters(per_token, note)


# --- the tokenizer of a server ----------------------------------------------------------------------------------------

Post = Callable[[str, dict[str, Any]], Awaitable[Any]]  # a path of the server and a body → the parsed reply


async def ask_server(client: LlmClient) -> Tokenize | str:
    """Return the server's own tokenizer, in the first dialect with plausible counts for a short and a long text.

    :returns: if there is none, a sentence with the reason; empty for a server without a tokenizer.
    """
    settings = _get_template_settings(client)
    extra = {"chat_template_kwargs": settings} if settings else {}
    address, mark, query = client.urls[0].partition("?")
    address = address.removesuffix("/").removesuffix("/v1")
    doubt = ""
    for how, exact, dialect in _DIALECTS:

        async def ask(messages: Sequence[Message], dialect: Any = dialect) -> list[int]:
            try:
                tokens: list[int] = await dialect(
                    lambda path, body: client.post(f"{address}{path}{mark}{query}", body | extra),
                    client.model,
                    messages,
                )
            except (AnswerFailed, ValueError, LookupError, TypeError, AttributeError) as error:
                raise NotCounted(one_line(error)) from None
            _check_count(len(tokens), count_characters(messages))
            return tokens

        try:
            short, long = [await ask([{"role": "user", "content": text}]) for text in (_SHORT, _LONG)]
            n_more = len(long) - len(short)
            if n_more < _LEAST_OF_ENGLISH * len(_LONG):
                raise NotBelieved(f"{n_more:,} tokens more for {len(_LONG):,} characters more")
            _check_count(n_more, len(_LONG))
        except NotBelieved as error:
            doubt = doubt or str(error)
        except NotCounted:
            pass
        else:
            name = f"the server's own tokenizer ({address}/tokenize){how}"
            return Tokenize(name, exact, ask, _estimate_length)
    return f"the server's /tokenize is not believed ({doubt}): prompt tokens are an estimate" if doubt else ""


def _get_template_settings(client: LlmClient) -> dict[str, Any]:
    """Return the chat template's settings in ``--llm-body``, which change the prompt."""
    settings = client.body.get("chat_template_kwargs")
    return settings if isinstance(settings, dict) else {}


def _check_count(n_tokens: int, n_characters: int) -> None:
    """Raise :class:`NotBelieved` for a count that a text of this length cannot have."""
    if not is_plausible_count(n_tokens, n_characters, _TEMPLATE):
        unit = "character" if n_characters == 1 else "characters"
        raise NotBelieved(f"{n_tokens:,} tokens for {n_characters:,} {unit}")


async def _ask_vllm(post: Post, model: str, messages: Sequence[Message]) -> list[int]:
    """vLLM applies the chat template itself."""
    body = {"model": model, "messages": list(messages), "add_generation_prompt": True}
    return _read_ids(await post("/tokenize", body))


async def _ask_llama_cpp(post: Post, _model: str, messages: Sequence[Message]) -> list[int]:
    """llama.cpp's ``/tokenize`` takes only text; its ``/apply-template`` turns messages into text."""
    prompt = (await post("/apply-template", {"messages": list(messages)}))["prompt"]
    if not isinstance(prompt, str) or any(m["content"].strip() not in prompt for m in messages):
        raise ValueError("no prompt that holds the messages")
    return _read_ids(await post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True}))


async def _ask_llama_cpp_text(post: Post, _model: str, messages: Sequence[Message]) -> list[int]:
    """llama.cpp before ``/apply-template``: the tokens of the texts, and a guess for the template."""
    tokens: list[int] = []
    for message in messages:
        tokens += [-1] * _AROUND + _read_ids(await post("/tokenize", {"content": message["content"]}))
    return tokens


_DIALECTS = (
    ("", True, _ask_vllm),
    ("", True, _ask_llama_cpp),
    (", the chat template guessed", False, _ask_llama_cpp_text),
)


def _read_ids(reply: Any) -> list[int]:
    """Return the ``tokens`` of a reply.

    :raises NotBelieved: they are not token ids, or their number differs from the reply's own ``count``.
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


# --- other tokenizers -------------------------------------------------------------------------------------------------


def load_local_tokenizer(model: str, settings: Mapping[str, Any] = MappingProxyType({})) -> Tokenize | None:
    """Load the model's tokenizer and chat template from a folder or the local hub cache; ``None`` if missing.

    ``settings`` are the chat template's.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    if not getattr(tokenizer, "chat_template", None):
        return None

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    async def tokens(messages: Sequence[Message]) -> list[int]:
        how = {**settings, "tokenize": False, "add_generation_prompt": True}
        return encode(tokenizer.apply_chat_template(list(messages), **how))

    return Tokenize(f"the tokenizer of {model}", True, tokens, lambda text: len(encode(text)))


def load_tiktoken(model: str, note: str = "") -> Tokenize | None:
    """Load OpenAI's tokenizer for ``model``, if the package is installed and knows it. The template is a guess."""
    try:
        tiktoken = importlib.import_module("tiktoken")  # not required, hence unknown to type checkers
        encoding = tiktoken.encoding_for_model(model)
    except Exception:  # not installed, another provider's model, or offline without its table
        return None

    def encode(text: str) -> list[Any]:
        return list(encoding.encode(text, disallowed_special=()))

    async def tokens(messages: Sequence[Message]) -> list[int | str]:
        found: list[int | str] = []
        for message in messages:
            found += [message["role"]] * _AROUND + encode(message["content"])
        return found

    name = f"tiktoken for {model}, the chat template guessed"
    return Tokenize(name, False, tokens, lambda text: len(encode(text)), note)


def count_by_characters(per_token: float = 0.0, note: str = "") -> Tokenize:
    """Estimate by the characters of a token in earlier requests, else by ``CHARACTERS``."""
    size = per_token or CHARACTERS
    how = "as in earlier requests" if per_token else "nothing better is known"

    async def tokens(messages: Sequence[Message]) -> list[str]:
        text = "".join(f"{m['role']} {m['content']}" for m in messages)
        n = round(count_characters(messages) / size)
        return [text[int(i * size) : int((i + 1) * size)] for i in range(n)]

    return Tokenize(f"{size:.2f} characters to a token ({how}); an estimate", False, tokens, _estimate_length, note)


def _estimate_length(text: str) -> int:
    """Estimate the tokens of a list of labels: one for two characters."""
    return -(-len(text) // 2)


def count_characters(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def count_cached(tokens: Tokens, known: set[bytes], size: int = BLOCK) -> int:
    """Return how many leading tokens of a prompt a prefix cache has, and add the prompt to it.

    Counts whole blocks of ``size`` tokens, and never the last token, from which the answer begins. ``known`` are the
    digests of the blocks so far, each with everything before it; it grows.
    """
    cached, is_hit = 0, True
    state = hashlib.blake2b(digest_size=16)
    for end in range(size, len(tokens) + 1, size):
        state.update(repr(tokens[end - size : end]).encode())
        key = state.digest()
        is_hit = is_hit and key in known
        if is_hit and end < len(tokens):
            cached = end
        known.add(key)
    return cached
