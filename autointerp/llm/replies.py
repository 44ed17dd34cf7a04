"""The meaning of every reply of a server: an answer, or one of these failures.

    Refused           the server does not take an optional parameter: send again without it
    Transient         the server is busy, slow or away for the moment: the same request may succeed later
    AnswerFailed      this request brought no usable answer: a row with its reason, never a "no" or a zero
    NoSuchModel       the server has no such model, or no such API
    Unavailable,      every request would fail in the same way (refused key, no credit, another address): stop at once
    BadInput

A quirk of a server is one more case in :func:`find_fault`, :func:`explain_fault` or :func:`read_answer`. No message
quotes a reply to a refused key, because some servers echo parts of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from autointerp.journal.usage import Usage, is_plausible_count
from autointerp.llm.exchange import Answer, AnswerFailed, Transient, one_line
from autointerp.llm.options import KEY_VARIABLES
from autointerp.llm.transport import Reply
from sae.common.errors import BadInput, Unavailable

LONGEST_WAIT = 120.0  # Seconds. If a server asks for a longer pause, the command ends, and can be run again later.
_MOST_HIDDEN = 100_000  # prompt tokens that a server may add (its own system prompt), at most
_MOST_THOUGHT = 1_000_000  # tokens that a model may write besides its answer, at most
_ROUNDING = 0.01  # nats that rounding may put a log-probability above 0
_MOST_MASS = 1.1  # the probability of all alternatives of a token, with rounding
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
    words = one_line(fields.get("message") or fields.get("detail") or fields.get("error") or "")
    if 300 <= reply.status < 400:
        words = one_line(reply.headers.get("location", "no address"))
    is_page = "<html" in words.lower() or "<!doctype" in words.lower()
    return Fault(
        status=reply.status,
        message="" if is_page else words,
        code=_read_text(fields.get("code")),
        parameter=_read_text(fields.get("param")),
        wait=_read_wait(reply.headers),
    )


def explain_fault(fault: Fault, parameters: Mapping[str, Any], url: str, has_key: bool) -> Exception:
    """Return the meaning of a fault; see the module's docstring.

    ``parameters`` are those of the request; ``has_key`` is whether it had a key.
    """
    status = fault.status
    if 300 <= status < 400:
        return BadInput(f"{url} redirects to {fault.message}; if that is the right address, give it with --llm-url")
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
                f"{url} asks for a pause of {min(fault.wait, 1e9):.0f} s ({fault}); run the same command again then: "
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
    except (TypeError, ValueError, OverflowError):
        return 0.0


# --- answers ----------------------------------------------------------------------------------------------------------


def read_answer(body: Any, seconds: float, characters: int) -> Answer:
    """Read the first choice of a chat completion, which came after ``seconds``.

    :param characters: length of the prompt, to check the server's count of its tokens.
    :raises AnswerFailed: there is no choice or no text, it was refused or filtered, or its layout is wrong.
    """
    if not isinstance(body, Mapping):
        reason = "not JSON" if isinstance(body, str) else "not a chat completion"
        raise AnswerFailed(f"the server's reply is {reason}", Usage(requests=1, seconds=seconds))
    choices = body.get("choices")
    choice = _read_fields(choices[0] if isinstance(choices, list) and choices else None)
    message = _read_fields(choice.get("message"))
    text, refusal = _read_text(message.get("content")), message.get("refusal")
    finish_reason = _read_text(choice.get("finish_reason")) or "stop"
    usage, counts_cached = _read_usage(_read_fields(body.get("usage")), seconds, characters, len(text))
    if not choice:
        error = body.get("error")
        words = one_line(_read_fields(error).get("message") or error or "")
        raise AnswerFailed(f"the server's reply has no choices{words and f': {words}'}", usage)
    if finish_reason == "content_filter":
        raise AnswerFailed("the server's content filter withheld the answer", usage)
    if refusal:
        raise AnswerFailed(f"the model refused: {one_line(refusal)}", usage)
    if not text.strip():
        if finish_reason == "length":
            n = usage.completion_tokens
            raise AnswerFailed(f"all {n} tokens were used before any text of the answer", usage, cut=True)
        raise AnswerFailed("the answer is empty", usage)
    try:
        tokens, top = _read_logprobs(_read_fields(choice.get("logprobs")).get("content"))
    except ValueError as error:
        raise AnswerFailed(f"the server's log-probabilities cannot be right: {error}", usage) from None
    return Answer(text, finish_reason, usage, tokens, top, counts_cached)


def _read_fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _read_usage(counts: Mapping[str, Any], seconds: float, n_prompt: int, n_written: int) -> tuple[Usage, bool]:
    """Return the server's token counts, and whether it counts cached ones.

    ``n_prompt`` and ``n_written`` are characters. An impossible count is 0; a budget then counts the maximum.
    """
    n_cached = _read_fields(counts.get("prompt_tokens_details")).get("cached_tokens")
    prompt_tokens = _read_count(counts.get("prompt_tokens"), n_prompt, _MOST_HIDDEN)
    completion_tokens = _read_count(counts.get("completion_tokens"), n_written, _MOST_THOUGHT)
    cached_tokens = _read_count(n_cached, 0, prompt_tokens)
    return Usage(1, prompt_tokens, cached_tokens, completion_tokens, seconds=seconds), n_cached is not None


def _read_count(reported: Any, characters: int, more: int) -> int:
    if isinstance(reported, float) and reported.is_integer():
        reported = int(reported)
    is_count = isinstance(reported, int) and not isinstance(reported, bool)
    return reported if is_count and is_plausible_count(reported, characters, more) else 0


@with_config(ConfigDict(strict=True))
class _Alternative(TypedDict):
    token: str
    logprob: Annotated[float, Field(le=_ROUNDING)]  # not NaN either


class _Position(_Alternative):
    top_logprobs: NotRequired[Annotated[list[_Alternative], Field(max_length=100)] | None]  # we ask for 20 at most


_POSITIONS = TypeAdapter(list[_Position] | None)


def _read_logprobs(reported: Any) -> tuple[tuple[str, ...] | None, tuple[dict[str, float], ...] | None]:
    """Return the tokens of an answer, and each token's likeliest alternatives. ValueError if they are impossible."""
    try:
        positions = _POSITIONS.validate_python(reported)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not positions:
        return None, None
    top = []
    for position in positions:
        alternatives = {x["token"]: x["logprob"] for x in position.get("top_logprobs") or ()}
        if sum(map(math.exp, alternatives.values())) > _MOST_MASS:
            raise ValueError("the alternatives of a token have a probability of more than 1 together")
        # Some servers omit a chosen token that is not among the likeliest.
        top.append({position["token"]: position["logprob"]} | alternatives)
    return tuple(position["token"] for position in positions), tuple(top)
