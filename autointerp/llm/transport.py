"""Send bytes to a server and read its reply: addresses, keys and connections. :mod:`autointerp.llm.replies` reads on.

A key comes from the environment or from a file and goes into request headers only. Without an address there is no
client, so a key alone never spends money. Some servers echo the key: it is removed from every reply.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import httpx2
import openai

from autointerp.journal.usage import Usage
from autointerp.llm.exchange import AnswerFailed, Transient, one_line
from autointerp.llm.options import KEY_VARIABLES
from sae.common.errors import BadInput, NotFound
from sae.common.files import check_regular

LARGEST_REPLY = 8 * 2**20  # Bytes of a reply at most. The longest real ones, with log-probabilities, have 2 MiB.
_LARGEST_COMPRESSED = LARGEST_REPLY // 64
_LARGEST_ERROR = 2**16  # bytes read of an error page: it is shown as one line


# --- addresses and keys -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A secret that does not print."""

    value: str = field(repr=False)
    origin: str  # its source in words, safe to show

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


class Reply(NamedTuple):
    """A reply of any status."""

    status: int
    headers: Mapping[str, str]
    body: Any  # its JSON value; its text if it is not JSON


class Connections:
    """The SDK's clients of one client of ours, in the running event loop, without the SDK's retries.

    Requests and replies are bytes, because the SDK's typed methods take more time than everything else together.
    """

    def __init__(self, key: Key | None, timeout: float, limit: int) -> None:
        self.loop = asyncio.get_running_loop()
        self._key, self._timeout, self._limit = key, timeout, limit
        self._apis: dict[bool, openai.AsyncOpenAI] = {}

    def _get_api(self, url: str) -> openai.AsyncOpenAI:
        """Return the client for this machine, without a proxy, or that for any other."""
        is_here = is_loopback(url)
        if is_here not in self._apis:
            limits = httpx2.Limits(max_connections=self._limit, max_keepalive_connections=self._limit)
            self._apis[is_here] = openai.AsyncOpenAI(
                api_key="none" if self._key is None else self._key.value,  # the SDK insists on one
                base_url=url,
                max_retries=0,
                timeout=openai.Timeout(self._timeout, connect=10.0),
                default_headers={"Accept-Encoding": "identity", "Content-Type": "application/json"},
                http_client=openai.DefaultAioHttpClient(
                    trust_env=not is_here, event_hooks={"response": [_bound]}, limits=limits
                ),
            )
        return self._apis[is_here]

    async def close(self) -> None:
        for api in self._apis.values():
            await api.close()

    async def send(self, url: str, content: bytes | None = None, most_seconds: float = float("inf")) -> Reply:
        """Post ``content`` to ``url``, or get ``url``, and return the reply, whatever its status.

        :raises Transient: no connection, no complete reply in time, or none that is HTTP.
        :raises AnswerFailed: the reply is too large.
        """
        api, seconds = self._get_api(url), min(self._timeout, most_seconds)
        try:
            async with asyncio.timeout(seconds):
                if content is None:
                    reply = await api.get(url, cast_to=httpx2.Response)
                else:
                    reply = await api.post(url, cast_to=httpx2.Response, content=content)
        except openai.APIStatusError as error:
            reply = error.response
        except TimeoutError:
            # A server that does not even list its models in time is as good as none.
            raise Transient(f"no answer within {seconds:g} s", is_unreachable=content is None) from None
        except (openai.APIError, aiohttp.ClientError) as error:
            raise _explain_break(error) from None
        return Reply(reply.status_code, reply.headers, self._parse(reply.content))

    def _parse(self, raw: bytes) -> Any:
        """Return the JSON value of ``raw``, or its text, without the key."""
        redact = str if self._key is None else self._key.redact
        text = redact(raw.decode(errors="replace"))
        try:
            value = json.loads(text)
            if self._key is not None and "\\" in text:  # an echo of the key may have been written in escapes
                value = json.loads(redact(json.dumps(value)))
        except (ValueError, RecursionError):
            return text
        return value


def _explain_break(error: BaseException) -> Transient:
    """Return the meaning of a failed connection. The SDK's error has the transport's as its cause, that aiohttp's."""
    while not isinstance(error, aiohttp.ClientError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Transient(f"the connection failed: {one_line(error, 120)}", is_unreachable=True)
    if isinstance(error, TimeoutError):
        return Transient("the server did not answer in time")
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError):
        return Transient("the connection broke off")
    return Transient(f"the server's reply cannot be read: {one_line(error, 120)}")


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
