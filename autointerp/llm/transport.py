"""Connections to one server: opened through ``openai``, bounded in what they take in, and their failures told apart.

Over aiohttp where that is installed (``openai[aiohttp]``): it costs half the processor time a request. Requests are
handed over as bytes and replies taken as bytes: through its typed methods the SDK walks every message of every
request, which takes more time than all the rest together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2
import openai

from autointerp.journal.usage import Usage
from autointerp.llm.endpoint import Key, is_loopback
from autointerp.llm.exchange import AnswerFailed

try:
    import aiohttp
except ImportError:  # everything works without it, at a lower rate
    aiohttp = None  # type: ignore[assignment]

LARGEST = 8 * 2**20
"""A reply longer than this, in bytes, is no answer. The longest real ones, with log-probabilities, take 2 MiB."""
_LARGEST_COMPRESSED = LARGEST // 64
_LARGEST_ERROR = 2**16
"""Of an error page no more is read than this: it is shown as one line."""

_JSON = {"Content-Type": "application/json"}


class Unread(Exception):
    """The transport failed in a way that the SDK does not know: a reply that is no HTTP, say."""


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
                raise AnswerFailed(
                    f"the server's reply is larger than {self._limit / 2**20:.3g} MiB", Usage(requests=1)
                )
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    """An httpx hook: runs when the head of a reply is there and nothing of its body has been read."""
    compressed = response.headers.get("content-encoding", "identity") != "identity"
    limit = _LARGEST_COMPRESSED if compressed else LARGEST
    failed = response.status_code >= 400
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream, _LARGEST_ERROR if failed else limit, cut=failed and not compressed)


def open_api(url: str, key: Key | None, timeout: float, connections: int) -> openai.AsyncOpenAI:
    """The SDK's client for ``url``; retries are left to us.

    :param timeout: seconds for one reply.
    :param connections: kept open at most.
    """
    make = openai.DefaultAsyncHttpxClient if aiohttp is None else openai.DefaultAioHttpClient
    return openai.AsyncOpenAI(
        # A server without keys still gets the header that the SDK insists on.
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
    """The body of the reply.

    :raises TimeoutError: it was not there after ``timeout`` seconds.
    :raises openai.APIError: an error status, or no connection.
    :raises Unread: the reply is no HTTP.
    :raises AnswerFailed: the reply is too large.
    """
    try:
        async with asyncio.timeout(timeout):
            reply = await api.post(path, cast_to=httpx2.Response, content=content, options={"headers": _JSON})
            return reply.content
    except Exception as error:
        if aiohttp is not None and isinstance(error, aiohttp.ClientError):
            raise Unread(str(error)) from None
        raise


def never_connected(error: openai.APIConnectionError) -> bool:
    """Whether no connection could be made at all; else one was made and then failed."""
    cause = error.__cause__
    below = None if cause is None else cause.__cause__
    if aiohttp is not None and isinstance(below, aiohttp.ClientError):
        # By its own kind: the bridge calls everything that happens to a connection a failed connect.
        return isinstance(below, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
    return isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)


def broke_off(error: openai.APIConnectionError) -> bool:
    """Whether a connection was there and was lost: which aiohttp's bridge reports as a timeout."""
    below = None if error.__cause__ is None else error.__cause__.__cause__
    return (
        aiohttp is not None and isinstance(below, aiohttp.ClientConnectionError) and not isinstance(below, TimeoutError)
    )
