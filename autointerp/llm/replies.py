"""The meaning of every reply of a server: an answer, or one of these failures.

    Refused           the server does not take an optional parameter: send again without it
    Transient         the server is busy, slow or away for the moment: the same request may succeed later
    AnswerFailed      this request brought no usable answer: a row with its reason, never a "no" or a zero
    NoSuchModel       the server has no such model, or no such API
    Unavailable       every request would fail in the same way (refused key, no credit): stop at once

A quirk of a server is one more case in :func:`find_fault`, :func:`explain_fault` or :func:`read_answer`. No message
quotes a reply to a refused key, because some servers echo parts of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from autointerp.journal.usage import Usage, is_plausible_count
from autointerp.llm.exchange import Answer, AnswerFailed, Transient, one_line
from autointerp.llm.options import KEY_VARIABLES
from autointerp.llm.transport import Reply
from sae.common.errors import Unavailable

LONGEST_WAIT = 120.0  # Seconds. If a server asks for a longer pause, the command ends, and can be run again later.
_MOST_HIDDEN = 100_000  # prompt tokens that a server may add (its own system prompt), at most
_MOST_THOUGHT = 1_000_000  # tokens that a model may write besides its answer, at most
_OPTIONAL = {
    "response_format": re.compile(r"response_format|json_schema|structured.output|guided|grammar", re.IGNORECASE),
    "logprobs": re.compile(r"logprobs?", re.IGNORECASE),
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b", re.IGNORECASE),
}
_NEW_TOKEN_WORD = re.compile(r"max_completion_tokens.*instead|unsupported.*'max_tokens'", re.IGNORECASE | re.DOTALL)


class Refused(Exception):
    """The server does not take ``parameter``; ``max_tokens``: it wants its newer name."""

    def __init__(self, parameter: str) -> None:
        super().__init__(parameter)
        self.parameter = parameter


class NoSuchModel(Exception):
    """The server knows no such model, or has no such API."""


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What a server says of a request that failed."""

    status: int
    message: str  # the server's own words: one bounded line, empty where it gave none
    code: str
    parameter: str
    wait: float  # the pause that it asks for, in seconds

    def __str__(self) -> str:
        return f"HTTP {self.status}: {self.message}" if self.message else f"HTTP {self.status}"


def find_fault(reply: Reply) -> Fault | None:
    """Return the fault that a reply reports; ``None`` for a success."""
    if 200 <= reply.status < 300:
        return None
    body = reply.body
    error = body.get("error", body) if isinstance(body, Mapping) else body
    fields: Mapping[str, Any] = error if isinstance(error, Mapping) else {"message": error}
    words = str(fields.get("message") or fields.get("detail") or fields.get("error") or "")
    is_page = "<html" in words.lower() or "<!doctype" in words.lower()
    return Fault(
        status=reply.status,
        message="" if is_page else one_line(words),
        code=str(fields.get("code") or ""),
        parameter=str(fields.get("param") or ""),
        wait=_read_wait(reply.headers),
    )


def explain_fault(fault: Fault, parameters: Mapping[str, Any], url: str, has_key: bool) -> Exception:
    """Return the meaning of a fault; see the module's docstring.

    ``parameters`` are those of the request; ``has_key`` is whether it had a key.
    """
    status = fault.status
    if status in (400, 404, 405, 415, 422, 501):
        refused = _find_refused(f"{fault.parameter} {fault.message}", parameters)
        if refused is not None:
            return Refused(refused)
    if status in (404, 405):
        return NoSuchModel(str(fault))
    if status in (401, 403):
        how = f"set {KEY_VARIABLES[0]} or name a key file"
        return Unavailable(
            f"{url} refused the API key (HTTP {status}); check it: {how}"
            if has_key
            else f"{url} wants an API key (HTTP {status}); {how}"
        )
    if status == 402 or fault.code in ("insufficient_quota", "billing_hard_limit_reached"):
        return Unavailable(f"{url} says the account has no credit left ({fault}); finished work is kept")
    if status in (408, 409, 425, 429) or status >= 500:
        if fault.wait > LONGEST_WAIT:
            return Unavailable(
                f"{url} asks for a pause of {fault.wait:.0f} s ({fault}); run the same command again then: "
                "finished work is kept"
            )
        return Transient(str(fault), fault.wait)
    return AnswerFailed(f"the server refused the request ({fault})", final=True)


def _find_refused(words: str, parameters: Mapping[str, Any]) -> str | None:
    if "max_tokens" in parameters and _NEW_TOKEN_WORD.search(words):
        return "max_tokens"
    return next((name for name, pattern in _OPTIONAL.items() if name in parameters and pattern.search(words)), None)


def _read_wait(headers: Mapping[str, str]) -> float:
    """Return the pause of ``Retry-After`` (seconds or a date) or ``retry-after-ms``, in seconds; else 0."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        value = headers.get("retry-after", "0")
        if re.fullmatch(r"\s*[\d.]+\s*", value):
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


# --- answers ----------------------------------------------------------------------------------------------------------


def read_answer(body: Any, seconds: float, characters: int) -> Answer:
    """Read the first choice of a chat completion, which came after ``seconds``.

    :param characters: length of the prompt, to check the server's count of its tokens.
    :raises AnswerFailed: there is no choice or no text, it was refused or filtered, or its layout is wrong.
    """
    nothing = Usage(requests=1, seconds=seconds)
    if isinstance(body, str):
        raise AnswerFailed("the server's reply is not JSON", nothing)
    if not isinstance(body, Mapping):
        raise AnswerFailed("the server's reply is not a chat completion", nothing)
    try:
        return _read_choice(body, seconds, characters)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        # A field of a wrong type. Some servers send such, and one reply is no reason to stop.
        reason = f"the server's reply cannot be read: {type(error).__name__}: {one_line(error, 100)}"
        raise AnswerFailed(reason, nothing) from None


def _read_choice(body: Mapping[str, Any], seconds: float, characters: int) -> Answer:
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, Sequence) and choices else None
    message = first.get("message") if isinstance(first, Mapping) else None
    text = message.get("content") if isinstance(message, Mapping) else None
    usage, counts_cached = _read_usage(
        body.get("usage"), seconds, characters, len(text) if isinstance(text, str) else 0
    )
    if not isinstance(first, Mapping):
        error = body.get("error")
        words = error.get("message") if isinstance(error, Mapping) else error
        raise AnswerFailed(f"the server's reply has no choices{f': {one_line(words)}' if words else ''}", usage)
    message = message or {}
    finish_reason = str(first.get("finish_reason") or "stop")
    text = message.get("content")
    if finish_reason == "content_filter":
        raise AnswerFailed("the server's content filter withheld the answer", usage)
    if message.get("refusal"):
        raise AnswerFailed(f"the model refused: {one_line(message['refusal'])}", usage)
    if not isinstance(text, str) or not text.strip():
        if finish_reason == "length":
            n = usage.completion_tokens
            raise AnswerFailed(f"all {n} tokens were used before any text of the answer", usage, cut=True)
        raise AnswerFailed("the answer is empty", usage)
    text = text.encode(errors="replace").decode()  # no database takes half a surrogate pair
    tokens, top = _read_logprobs(first.get("logprobs"))
    return Answer(text, finish_reason, usage, tokens, top, counts_cached)


def _read_usage(reported: Any, seconds: float, n_prompt: int, n_written: int) -> tuple[Usage, bool]:
    """Return the server's token counts, and whether it counts cached ones.

    ``n_prompt`` and ``n_written`` are characters. An impossible count is 0; a budget then counts the maximum.
    """
    counts = reported if isinstance(reported, Mapping) else {}
    details = counts.get("prompt_tokens_details")
    n_cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    prompt_tokens = _read_count(counts.get("prompt_tokens"), n_prompt, _MOST_HIDDEN)
    completion_tokens = _read_count(counts.get("completion_tokens"), n_written, _MOST_THOUGHT)
    cached_tokens = _read_count(n_cached, 0, prompt_tokens)
    return Usage(1, prompt_tokens, cached_tokens, completion_tokens, seconds=seconds), n_cached is not None


def _read_count(reported: Any, characters: int, more: int) -> int:
    if isinstance(reported, float) and reported.is_integer():
        reported = int(reported)
    is_count = isinstance(reported, int) and not isinstance(reported, bool)
    return reported if is_count and is_plausible_count(reported, characters, more) else 0


def _read_logprobs(reported: Any) -> tuple[tuple[str, ...] | None, tuple[dict[str, float], ...] | None]:
    content = reported.get("content") if isinstance(reported, Mapping) else None
    if not isinstance(content, Sequence) or not content:
        return None, None
    tokens, top = [], []
    for position in content:
        alternatives = {str(x["token"]): float(x["logprob"]) for x in position.get("top_logprobs") or ()}
        # Some servers omit a chosen token that is not among the likeliest.
        alternatives.setdefault(str(position["token"]), float(position["logprob"]))
        if any(map(math.isnan, alternatives.values())):
            raise ValueError("a log-probability is NaN")
        tokens.append(str(position["token"]))
        top.append(alternatives)
    return tuple(tokens), tuple(top)
