"""What a failed request means: wait and try again, give up on this one, or stop everything.

    Transient         the server is busy, slow or away for the moment: the same request may succeed later
    AnswerFailed      this request cannot succeed as it is (too long, filtered): a row with its reason
    Unavailable,      every request would fail the same way (no server, refused key, no such model): stop at once,
    BadInput          before anything is spent, with one line for the user

Nothing here quotes what a server says to a refused key, because some echo parts of it.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import openai

from autointerp.llm.endpoint import KEY_VARIABLES, Key
from autointerp.llm.exchange import AnswerFailed, one_line
from autointerp.llm.transport import Unread, broke_off, never_connected
from sae.common.errors import Unavailable

LONGEST_WAIT = 120.0
"""A server that asks for a longer pause than this, in seconds, is better met by running the command again later."""


class Transient(Exception):
    """Worth trying again. ``wait`` is the pause the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        self.unreachable = unreachable
        """No connection could be made at all."""


class NoServer(Unavailable):
    """Nothing answers at an address; another may do."""


def no_server(url: str, reason: str) -> NoServer:
    return NoServer(
        f"no LLM server answers at {url} ({reason}); start it or correct the URL, then run the same command "
        "again: what is finished is kept"
    )


def said(error: openai.APIStatusError, key: Key | None = None) -> str:
    """The server's own message out of an error reply: one bounded line, empty where it gave none."""
    body: Any = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or ""
    text = str(body or "") if key is None else key.hidden_in(str(body or ""))
    return "" if "<html" in text.lower() or "<!doctype" in text.lower() else one_line(text)


def translate(error: openai.APIError | Unread, url: str, key: Key | None) -> Exception:
    """An error of the SDK, as one of the kinds above. (404 is the caller's, who knows what was looked for.)"""
    if isinstance(error, Unread):
        return Transient(f"the server's reply cannot be read: {one_line(error, 120)}")
    if isinstance(error, openai.APIConnectionError):
        unreachable = never_connected(error)
        if isinstance(error, openai.APITimeoutError) and not broke_off(error):
            return Transient("the server did not answer in time", unreachable=unreachable)
        cause = str(error.__cause__ or "")
        told = f"the connection failed: {one_line(cause, 120)}" if cause and unreachable else "the connection broke off"
        return Transient(told, unreachable=unreachable)
    if not isinstance(error, openai.APIStatusError):
        return AnswerFailed(f"the server's reply cannot be read: {one_line(error.message, 120)}")
    status, message = error.status_code, said(error, key)
    if status in (401, 403):
        how = f"set {KEY_VARIABLES[0]} or name a key file"
        return Unavailable(
            f"{url} refused the API key (HTTP {status}); check it: {how}"
            if key is not None
            else f"{url} wants an API key (HTTP {status}); {how}"
        )
    told = f"HTTP {status}: {message}" if message else f"HTTP {status}"
    if status == 402 or error.code in ("insufficient_quota", "billing_hard_limit_reached"):
        return Unavailable(f"{url} says the account has no credit left ({told}); what is finished is kept")
    if status in (408, 409, 425, 429) or status >= 500:
        wait = retry_after(error)
        if wait > LONGEST_WAIT:
            return Unavailable(
                f"{url} asks for a pause of {wait:.0f} s ({told}); run the same command again then: "
                "what is finished is kept"
            )
        return Transient(told, wait)
    return AnswerFailed(f"the server refused the request ({told})", final=True)


def retry_after(error: openai.APIStatusError) -> float:
    """The pause asked for by ``Retry-After`` (seconds or a date) or ``retry-after-ms``, in seconds; else 0."""
    headers = error.response.headers
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        value = headers.get("retry-after", "0")
        if re.fullmatch(r"\s*[\d.]+\s*", value):
            return float(value)
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


_OPTIONAL = {
    "response_format": re.compile(r"response_format|json_schema|structured.output|guided|grammar", re.IGNORECASE),
    "logprobs": re.compile(r"logprobs?", re.IGNORECASE),
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b", re.IGNORECASE),
}
_NEW_TOKEN_WORD = re.compile(r"max_completion_tokens.*instead|unsupported.*'max_tokens'", re.IGNORECASE | re.DOTALL)


def objection(error: openai.APIStatusError, body: dict[str, Any]) -> str | None:
    """The parameter of ``body`` that the server does not take and that can be done without, or ``None``.

    ``max_tokens`` stands for: the server wants it under its newer name.
    """
    if error.status_code not in (400, 404, 405, 415, 422, 501):
        return None
    words = f"{error.param or ''} {said(error)}"
    if "max_tokens" in body and _NEW_TOKEN_WORD.search(words):
        return "max_tokens"
    return next((name for name, pattern in _OPTIONAL.items() if name in body and pattern.search(words)), None)
