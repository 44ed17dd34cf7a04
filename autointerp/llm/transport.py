"""Send bytes to one server and read the reply: addresses, keys, connections, and the meaning of each failure.

A failed request becomes one of:

    Transient         the server is busy, slow or away for the moment: the same request may succeed later
    AnswerFailed      this request cannot succeed as it is (too long, filtered): a row with its reason
    Unavailable,      every request would fail in the same way (no server, refused key, no such model): stop at once,
    BadInput          before anything is spent, with one line for the user

A key comes from the environment or from a file and goes into request headers only. Without an address there is no
client, so a key alone never spends money. No message quotes a reply to a refused key, because some servers echo parts
of it.

``openai`` uses aiohttp if installed (``openai[aiohttp]``), which halves the processor time of a request. Requests and
replies are bytes, because the SDK's typed methods take more time than everything else together.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2
import openai

from autointerp.journal.usage import Usage
from autointerp.llm.exchange import AnswerFailed, one_line
from sae.common.errors import BadInput, NotFound, Unavailable
from sae.common.files import check_regular

try:
    import aiohttp
except ImportError:  # everything works without it, at a lower rate
    aiohttp = None  # type: ignore[assignment]

KEY_VARIABLES = ("AUTOINTERP_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold a key; the first that is set wins."""

LARGEST_REPLY = 8 * 2**20
"""Bytes of a reply at most. The longest real ones, with log-probabilities, have 2 MiB."""
_LARGEST_COMPRESSED = LARGEST_REPLY // 64
_LARGEST_ERROR = 2**16
"""Bytes read of an error page: it is shown as one line."""
LONGEST_WAIT = 120.0
"""Seconds. If a server asks for a longer pause, the command ends, and can be run again later."""


# --- addresses and keys -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A secret that does not print."""

    value: str = field(repr=False)
    origin: str
    """Its source in words, safe to show."""

    def __str__(self) -> str:
        return f"the key from {self.origin}"

    def redact(self, text: str) -> str:
        """Replace the key in ``text``. Placeholder keys (``EMPTY``) are ordinary words and stay."""
        return text.replace(self.value, "[key]") if len(self.value) >= 12 else text


def read_key(file: Path | None = None, environment: Mapping[str, str] | None = None) -> Key | None:
    """Return the key in ``file`` (its whole content, trimmed), else the one in the environment, else ``None``.

    :raises NotFound: the file cannot be read.
    :raises BadInput: the content cannot be a key (empty, or with blanks or non-ASCII characters).
    """
    if file is not None:
        check_regular(file, "key file")
        try:
            key = Key(file.read_text(errors="replace").strip(), f"file {str(file)!r}")
        except OSError as error:
            raise NotFound(f"key file {str(file)!r} cannot be read: {error.strerror}; check its path") from None
    else:
        values = os.environ if environment is None else environment
        name = next((name for name in KEY_VARIABLES if values.get(name, "").strip()), None)
        if name is None:
            return None
        key = Key(values[name].strip(), f"the environment variable {name}")
    # Checked here because an HTTP library that cannot encode a header quotes it in its error.
    if not key.value or not all("!" <= c <= "~" for c in key.value):
        raise BadInput(f"{key}: not a key (one line of printable ASCII without blanks is expected)")
    return key


def list_candidates(url: str) -> list[str]:
    """Return the base addresses that ``url`` may mean, likeliest first: people give it with and without ``/v1``.

    >>> list_candidates("localhost:8000")
    ['http://localhost:8000/v1', 'http://localhost:8000']
    >>> list_candidates("https://host/api/v1/chat/completions/")
    ['https://host/api/v1']

    :raises BadInput: not an http address, or one with a password or a query.
    """
    given = url.strip()
    parts = urlsplit(given if "://" in given else f"http://{given}")
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is not a number
        usable = False
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise BadInput(
            "the LLM URL has a user name, password or query in it; give the address alone, and a key through "
            f"the environment ({KEY_VARIABLES[0]}) or a file"
        )
    if not usable or any(c.isspace() for c in given):
        raise BadInput(f"LLM URL {given!r} is not an http address; give one like http://localhost:8000/v1")
    path = parts.path.rstrip("/")
    for tail in ("/chat/completions", "/models"):
        path = path.removesuffix(tail)
    base = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    last = path.rsplit("/", 1)[-1]
    if last[:1] == "v" and last[1:2].isdigit():
        return [base]
    # A bare host means its /v1; a longer path was given on purpose and is tried first as it is.
    return [base, f"{base}/v1"] if path else [f"{base}/v1", base]


def is_loopback(url: str) -> bool:
    """Return whether ``url`` is this machine: such requests must not use a proxy of the environment."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


# --- connections ------------------------------------------------------------------------------------------------------


class Unread(Exception):
    """The transport failed in a way that the SDK does not know: a reply that is not HTTP, say."""


class _Bounded(httpx2.AsyncByteStream):
    """A reply's bytes, up to a limit."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: int, cut: bool) -> None:
        self._stream, self._limit, self._cut = stream, limit, cut

    async def __aiter__(self) -> AsyncIterator[bytes]:
        taken = 0
        async for chunk in self._stream:
            taken += len(chunk)
            if taken > self._limit:
                if self._cut:
                    return
                size = f"{self._limit / 2**20:.3g} MiB"
                raise AnswerFailed(f"the server's reply is larger than {size}", Usage(requests=1))
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    """Limit a reply's size: an httpx hook that runs after the headers and before the body."""
    compressed = response.headers.get("content-encoding", "identity") != "identity"
    limit = _LARGEST_COMPRESSED if compressed else LARGEST_REPLY
    failed = response.status_code >= 400
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream, _LARGEST_ERROR if failed else limit, cut=failed and not compressed)


def open_api(url: str, key: Key | None, timeout: float, connections: int) -> openai.AsyncOpenAI:
    """Open the SDK's client for ``url``, without its retries.

    :param timeout: seconds for one reply.
    :param connections: kept open at most.
    """
    make = openai.DefaultAsyncHttpxClient if aiohttp is None else openai.DefaultAioHttpClient
    return openai.AsyncOpenAI(
        # The SDK insists on a key, also for a server without one.
        api_key="none" if key is None else key.value,
        base_url=url,
        max_retries=0,
        timeout=openai.Timeout(timeout, connect=10.0),
        default_headers={"Accept-Encoding": "identity"},
        http_client=make(
            trust_env=not is_loopback(url),
            event_hooks={"response": [_bound]},
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        ),
    )


async def post(api: openai.AsyncOpenAI, path: str, content: bytes, timeout: float) -> bytes:
    """Post ``content`` and return the body of the reply.

    :raises TimeoutError: it was not complete after ``timeout`` seconds.
    :raises openai.APIError: an error status, or no connection.
    :raises Unread: the reply is not HTTP.
    :raises AnswerFailed: the reply is too large.
    """
    headers = {"Content-Type": "application/json"}
    try:
        async with asyncio.timeout(timeout):
            reply = await api.post(path, cast_to=httpx2.Response, content=content, options={"headers": headers})
            return reply.content
    except Exception as error:
        if aiohttp is not None and isinstance(error, aiohttp.ClientError):
            raise Unread(str(error)) from None
        raise


# --- failures ---------------------------------------------------------------------------------------------------------


class Transient(Exception):
    """Worth trying again. ``wait`` is the pause the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0, is_unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait
        self.is_unreachable = is_unreachable
        """No connection could be made at all."""


class NoServer(Unavailable):
    """Nothing answers at an address; another may."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"no LLM server answers at {url} ({reason}); start it or correct the URL, then run the same command "
            "again: finished work is kept"
        )


def translate(error: openai.APIError | Unread, url: str, key: Key | None) -> Exception:
    """Return an error of the SDK as one of the kinds above. (The caller handles 404.)"""
    if isinstance(error, Unread):
        return Transient(f"the server's reply cannot be read: {one_line(error, 120)}")
    if isinstance(error, openai.APIConnectionError):
        return _translate_connection(error)
    if not isinstance(error, openai.APIStatusError):
        return AnswerFailed(f"the server's reply cannot be read: {one_line(error.message, 120)}")
    status, message = error.status_code, _read_message(error, key)
    if status in (401, 403):
        how = f"set {KEY_VARIABLES[0]} or name a key file"
        return Unavailable(
            f"{url} refused the API key (HTTP {status}); check it: {how}"
            if key is not None
            else f"{url} wants an API key (HTTP {status}); {how}"
        )
    reason = f"HTTP {status}: {message}" if message else f"HTTP {status}"
    if status == 402 or error.code in ("insufficient_quota", "billing_hard_limit_reached"):
        return Unavailable(f"{url} says the account has no credit left ({reason}); finished work is kept")
    if status in (408, 409, 425, 429) or status >= 500:
        wait = _read_retry_after(error)
        if wait > LONGEST_WAIT:
            return Unavailable(
                f"{url} asks for a pause of {wait:.0f} s ({reason}); run the same command again then: "
                "finished work is kept"
            )
        return Transient(reason, wait)
    return AnswerFailed(f"the server refused the request ({reason})", final=True)


def _translate_connection(error: openai.APIConnectionError) -> Transient:
    cause = error.__cause__
    below = None if cause is None else cause.__cause__
    is_timeout = isinstance(error, openai.APITimeoutError)
    if aiohttp is not None and isinstance(below, aiohttp.ClientError):
        # The bridge calls every failure of a connection a failed connect, and a lost connection a timeout.
        is_unreachable = isinstance(below, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
        was_lost = isinstance(below, aiohttp.ClientConnectionError) and not isinstance(below, TimeoutError)
        is_timeout = is_timeout and not was_lost
    else:
        is_unreachable = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
    if is_timeout:
        reason = "the server did not answer in time"
    elif is_unreachable and str(cause):
        reason = f"the connection failed: {one_line(cause, 120)}"
    else:
        reason = "the connection broke off"
    return Transient(reason, is_unreachable=is_unreachable)


def _read_message(error: openai.APIStatusError, key: Key | None = None) -> str:
    """Return the server's own message of an error reply: one bounded line, empty where it gave none."""
    body: Any = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error")
    text = str(body or "") if key is None else key.redact(str(body or ""))
    return "" if "<html" in text.lower() or "<!doctype" in text.lower() else one_line(text)


def _read_retry_after(error: openai.APIStatusError) -> float:
    """Return the pause of ``Retry-After`` (seconds or a date) or ``retry-after-ms``, in seconds; else 0."""
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


def find_unsupported(error: openai.APIStatusError, parameters: Mapping[str, Any]) -> str | None:
    """Return the optional one of ``parameters`` that the server refuses, or ``None``.

    ``max_tokens`` means that the server wants it under its newer name.
    """
    if error.status_code not in (400, 404, 405, 415, 422, 501):
        return None
    words = f"{error.param or ''} {_read_message(error)}"
    if "max_tokens" in parameters and _NEW_TOKEN_WORD.search(words):
        return "max_tokens"
    return next((name for name, pattern in _OPTIONAL.items() if name in parameters and pattern.search(words)), None)
