"""The meaning of every reply of a server: an answer, or one of these failures.

    Refused           the server does not take an optional parameter: send again without it, and remember that
    Transient         the server is busy, slow, loading or away: the same request may succeed later
    AnswerFailed      this request brought no usable answer: a row with its reason, never a "no" or a zero
    NoSuchModel       the server has no such model, or no such API
    Unavailable,      every request would fail in the same way (refused key, no credit, another address): stop at once
    BadInput

A quirk of a server is one more case in :func:`find_fault`, :func:`explain_fault` or :func:`read_answer`, and one more
row in ``tests/autointerp/llm/test_conformance.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from autointerp.journal.usage import Usage, is_plausible_count
from autointerp.llm.exchange import Answer, AnswerFailed, Request, Transient, fits_schema, has_thinking, one_line
from autointerp.llm.options import KEY_VARIABLES
from autointerp.llm.transport import Key, Reply
from sae.common.errors import BadInput, Unavailable

LONGEST_WAIT = 120.0  # Seconds. If a server asks for a longer pause, the command ends, and can be run again later.
_READ = 2000  # characters of an error message that are searched; fewer are shown
_MOST_HIDDEN = 100_000  # prompt tokens that a server may add (its own system prompt), at most
_MOST_THOUGHT = 1_000_000  # tokens that a model may write besides its answer, at most
_ROUNDING = 0.01  # nats that rounding may put a log-probability above 0
_MOST_MASS = 1.1  # the probability of all alternatives of a token, with rounding


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


_UNKNOWN = "unsupported|unrecogni[sz]ed|unknown|unexpected|not (?:supported|permitted|allowed)|deprecated"
_OPTIONAL = {
    "max_tokens": _compile(
        rf"max_completion_tokens.{{0,40}}instead|(?:{_UNKNOWN}).{{0,80}}\bmax_tokens|\bmax_tokens\b.{{0,80}}(?:{_UNKNOWN})"
    ),
    "response_format": _compile(r"response_format|schema|structured.output|guided|grammar|(?:min|max)Items"),
    "logprobs": _compile(r"logprobs?"),
    "temperature": _compile(r"temperature"),
    "seed": _compile(r"\bseed\b"),
    "system": _compile(
        r"system.(?:role|message|prompt|instruction).*\bnot\b|not support.{0,3}system\b|roles must alternate"
    ),
}
_FILTERED = _compile(r"content.?(?:filter|policy|management)|responsible.?ai|moderation|flagged|prohibited.content")
_INVALID_KEY = _compile(r"api.?key.{0,20}(?:not valid|invalid|incorrect|expired)|(?:invalid|incorrect).{0,5}api.?key")
_MALFORMED = _compile(r"json_validate_failed|failed.generation|failed to (?:generate|validate)")
_NO_CREDIT = _compile(r"insufficient_quota|billing_hard_limit_reached")
_NO_MODEL = _compile(r"(?:invalid|unknown|no such) model\b|not a valid model|not found|does not exist|not available")
_LOADING = _compile(r"\bloading\b|\bnot ready\b|starting up|warming up")
_NUMBER = re.compile(r"(?<![\w.-])\d{1,3}(?![\w-]|\.\d)")
_SPOKEN = ("text", "output_text")  # kinds of parts of a message that are the answer
_PLACES = ("reasoning_content", "reasoning")  # of a message, where servers put the thinking
_FINISHES = {  # the words of Gemini and Anthropic for those of OpenAI
    "max_tokens": "length",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "eos": "stop",
    "safety": "content_filter",
    "prohibited_content": "content_filter",
    "recitation": "content_filter",
    "refusal": "content_filter",
}


class Refused(Exception):
    """The server does not take ``parameter``.

    ``max_tokens``: it wants its newer name. ``system``: it wants no system message.
    ``logprobs`` with ``most``: it gives at most that many alternatives.
    """

    def __init__(self, parameter: str, most: int = 0) -> None:
        super().__init__(parameter)
        self.parameter, self.most = parameter, most


class NoSuchModel(Exception):
    """The server knows no such model, or has no such API."""


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What a server says of a request that failed."""

    status: int  # of HTTP, or the code in the body of a reply whose status says success
    message: str  # the server's own words: one bounded line, empty where it gave none
    code: str  # its names for the fault
    parameter: str
    wait: float  # the pause that it asks for, in seconds

    def __str__(self) -> str:
        return f"HTTP {self.status}: {one_line(self.message)}" if self.message else f"HTTP {self.status}"

    @property
    def is_filtered(self) -> bool:
        """Whether a content filter refused the prompt."""
        words = f"{self.code} {self.message}"
        return self.status in (200, 400, 403, 422, 451) and _FILTERED.search(words) is not None


def find_fault(reply: Reply) -> Fault | None:
    """Return the fault that a reply reports, by its status or in its body; ``None`` for a success."""
    status, body = reply.status, reply.body
    if isinstance(body, list) and len(body) == 1:
        body = body[0]  # Gemini wraps its errors in a list
    error = _find_error(body) if 200 <= status < 300 else body.get("error", body) if isinstance(body, dict) else body
    if error is None:
        return None
    fields: Mapping[str, Any] = error if isinstance(error, Mapping) else {"message": error}
    if 200 <= status < 300:
        status = _read_status(fields) or status
    said = [fields.get("message") or fields.get("detail") or fields.get("error") or ""]
    said.append(_read_fields(fields.get("metadata")).get("raw") or "")  # what a provider behind the server says
    words = one_line(": ".join(str(x) for x in said if x), _READ)
    if 300 <= status < 400:
        words = one_line(reply.headers.get("location", "no address"))
    is_page = "<html" in words.lower() or "<!doctype" in words.lower()
    inner = _read_fields(fields.get("innererror")).get("code")
    return Fault(
        status=status,
        message="" if is_page else words,
        code=" ".join(filter(None, map(_read_text, (fields.get("code"), fields.get("type"), inner)))),
        parameter=_read_text(fields.get("param")),
        wait=_read_wait(reply.headers),
    )


def _find_error(body: Any) -> Any:
    """Return the error in the body of a reply whose status says success; ``None`` if there is none."""
    if not isinstance(body, Mapping):
        return None
    choices = body.get("choices")
    if isinstance(choices, list) and choices:
        return _read_fields(choices[0]).get("error") or None
    return body if body.get("object") == "error" else body.get("error") or None


def _read_status(fields: Mapping[str, Any]) -> int:
    """Return the HTTP status that an error in a body names; 0 if it names none."""
    for name in ("code", "status", "status_code"):
        text = str(fields.get(name))
        if len(text) == 3 and text.isdecimal() and 400 <= int(text) < 600:
            return int(text)
    return 0


def explain_fault(
    fault: Fault, parameters: Mapping[str, Any], url: str, has_key: bool, secrets: Sequence[Key] = ()
) -> Exception:
    """Return the meaning of a fault; see the module's docstring.

    ``parameters`` are those of the request that may be dropped, with ``system`` if it has a system message;
    ``has_key`` is whether it had a key, and ``secrets`` are that and others.
    """
    status, words = fault.status, f"{fault.code} {fault.message}"
    if 300 <= status < 400:
        return BadInput(f"{url} redirects to {fault.message}; if that is the right address, give it with --llm-url")
    if status == 402 or _NO_CREDIT.search(fault.code):
        return Unavailable(f"{url} says the account has no credit left ({fault}); finished work is kept")
    if status in (408, 409, 425, 429) or (status >= 500 and status != 501):
        return _explain_busy(fault, url)
    if fault.is_filtered:
        return AnswerFailed(f"the server's content filter refused the prompt ({fault})", final=True)
    if 400 <= status < 500 and _MALFORMED.search(words):
        return AnswerFailed(f"the server found no valid JSON in the answer ({fault})")
    if status >= 400:
        refused = _find_refused(fault, parameters)
        if refused is not None:
            return refused
        if status in (401, 403) or _INVALID_KEY.search(words):
            return _explain_denied(fault, url, has_key, secrets)
        if status in (404, 405, 501) or _lacks_model(words, str(parameters.get("model"))):
            return NoSuchModel(str(fault))
        return AnswerFailed(f"the server refused the request ({fault})", final=True, systematic=True)
    return AnswerFailed(f"the server's reply is an error: {one_line(fault.message) or 'without a text'}")


def _explain_busy(fault: Fault, url: str) -> Exception:
    if fault.wait > LONGEST_WAIT:
        return Unavailable(
            f"{url} asks for a pause of {min(fault.wait, 1e9):.0f} s ({fault}); run the same command again then: "
            "finished work is kept"
        )
    is_loading = fault.status == 503 and _LOADING.search(fault.message) is not None
    return Transient(str(fault), fault.wait, is_loading=is_loading)


def _explain_denied(fault: Fault, url: str, has_key: bool, secrets: Sequence[Key]) -> Unavailable:
    """Quote the server's words without any part of a secret: some servers echo some of it."""
    how = f"set {KEY_VARIABLES[0]}, name a key file, or give it with --llm-header"
    said = fault
    for secret in secrets:
        said = replace(said, message=secret.redact_parts(said.message))
    if not has_key:
        return Unavailable(f"{url} wants an API key ({said}); {how}")
    if fault.status == 403:
        return Unavailable(f"{url} denies access ({said}); check the rights and limits of the API key, or {how}")
    return Unavailable(f"{url} refused the API key ({said}); check it: {how}")


def _find_refused(fault: Fault, parameters: Mapping[str, Any]) -> Refused | None:
    """Return the optional parameter that a fault is about: the one that it names as such, else one in its words."""
    words = fault.message.replace(str(parameters.get("model") or "\n"), "")  # a name may hold that of a parameter
    patterns = [(name, pattern) for name, pattern in _OPTIONAL.items() if name in parameters]
    found = (name for text in (fault.parameter, words) for name, pattern in patterns if pattern.search(text))
    name = next(found, None)
    if name != "logprobs":
        return None if name is None else Refused(name)
    asked = parameters.get("top_logprobs", 0)
    return Refused(name, max((n for n in map(int, _NUMBER.findall(words)) if n < asked), default=0))


def _lacks_model(words: str, model: str) -> bool:
    return "model_not_found" in words or (model in words and _NO_MODEL.search(words) is not None)


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


def read_answer(body: Any, seconds: float, request: Request) -> Answer:
    """Read the first choice of a chat completion, which came after ``seconds``.

    Thinking is no answer. An answer that a server took for thinking is used if the request's schema shows what it is.

    :raises AnswerFailed: there is no choice or no text, it was refused or filtered, or its layout is wrong.
    """
    if not isinstance(body, Mapping):
        reason = "not JSON" if isinstance(body, str) else "not a chat completion"
        raise AnswerFailed(f"the server's reply is {reason}", Usage(requests=1, seconds=seconds), systematic=True)
    choices = body.get("choices")
    choice = _read_fields(choices[0] if isinstance(choices, list) and choices else None)
    message = _read_fields(choice.get("message"))
    parts = _read_parts(message.get("content"))
    text, refusal = "".join(said for kind, said in parts if kind in _SPOKEN), message.get("refusal")
    place = next((name for name in _PLACES if _read_text(message.get(name)).strip()), "")
    finish_reason = _read_text(choice.get("finish_reason")).lower() or "stop"
    finish_reason = _FINISHES.get(finish_reason, finish_reason)
    counts = _read_fields(body.get("usage"))
    usage, counts_cached = _read_usage(counts, seconds, request.characters, len(text))
    if not choice:
        raise AnswerFailed("the server's reply has no choices", usage, systematic=True)
    if finish_reason == "content_filter":
        raise AnswerFailed("the server's content filter withheld the answer", usage)
    if refusal:
        raise AnswerFailed(f"the model refused: {one_line(refusal)}", usage)
    if place and not text.strip() and request.json_schema and fits_schema(message[place], request.json_schema):
        text, place = message[place].strip(), ""
    if not text.strip():
        if finish_reason == "length":
            n = usage.completion_tokens
            reason = f"all {n} tokens were used before any text of the answer"
            raise AnswerFailed(reason, usage, cut=True, thought=bool(place) or not text)
        if place:
            raise AnswerFailed(
                f"the answer is empty and {place!r} is not: the server takes the answer for thinking; start it without "
                '--reasoning-parser, or pass --llm-body \'{"chat_template_kwargs": {"enable_thinking": false}}\'',
                usage,
                final=True,
                systematic=True,
            )
        raise AnswerFailed("the answer is empty", usage)
    try:
        tokens, top = _read_logprobs(_find_logprobs(body, choice))
    except ValueError as error:
        raise AnswerFailed(f"the server's log-probabilities cannot be right: {error}", usage) from None
    if place and tokens and top:
        start = _find_start(tokens, text)
        tokens, top = (None, None) if start is None else (tokens[start:], top[start:])
    n_thought = _read_fields(counts.get("completion_tokens_details")).get("reasoning_tokens")
    thought = bool(place or n_thought) or has_thinking(text) or any(kind == "thinking" for kind, _ in parts)
    return Answer(text, finish_reason, usage, tokens, top, counts_cached, thought)


def _read_fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _read_parts(content: Any) -> list[tuple[str, str]]:
    """Return the parts of a message, each with its kind; most servers send one text."""
    if not isinstance(content, list):
        return [("text", _read_text(content))]
    return [(_read_text(part.get("type")), _read_text(part.get("text"))) for part in map(_read_fields, content)]


def _find_start(tokens: Sequence[str], text: str) -> int | None:
    """Return the index of the token that begins ``text``, the last thing in ``tokens``; ``None`` if it is not."""
    whole, last = "".join(tokens).rstrip(), text.strip()
    if not whole.endswith(last):
        return None
    before = len(whole) - len(last)
    for i, token in enumerate(tokens):
        before -= len(token)
        if before < 0:
            return i
    return None


def _find_logprobs(body: Mapping[str, Any], choice: Mapping[str, Any]) -> Any:
    """Return the log-probabilities in OpenAI's form; also those that llama.cpp has next to the choices."""
    found = _read_fields(choice.get("logprobs")).get("content")
    own = body.get("completion_probabilities")
    if found or not isinstance(own, list):
        return found
    return [_convert_probabilities(position) if isinstance(position, dict) else position for position in own]


def _convert_probabilities(position: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a token of llama.cpp before 2025: ``{"content": …, "probs": [{"tok_str": …, "prob": …}]}``."""
    if not isinstance(position.get("probs"), list):
        return position
    found = {_read_text(x.get("tok_str")): x.get("prob") for x in map(_read_fields, position["probs"])}
    numbers = {k: math.log(p) for k, p in found.items() if isinstance(p, float | int) and 0 < p < math.inf}
    token = _read_text(position.get("content"))
    top = [{"token": name, "logprob": logprob} for name, logprob in numbers.items()]
    # A token that is not among its likeliest alternatives is less likely than any of them.
    own = numbers.get(token, min(numbers.values(), default=0.0))
    return {"token": token, "logprob": own, "top_logprobs": top}


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
