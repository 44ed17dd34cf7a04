"""Send bytes to a server and read its reply: addresses, keys and connections. :mod:`autointerp.llm.replies` reads on.

A key comes from the environment or from a file and goes into request headers only. Without an address there is no
client, so a key alone never spends money. Everything that a server sends passes :class:`Connections`, which removes an
echo of the key or of a header, bounds the size after unpacking, follows no redirect, and quotes no bytes that are not
HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import socket
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import aiohttp
import httpx2
import openai

from autointerp.journal.usage import Usage
from autointerp.llm.additions import KEY_HEADERS, SECRET_NAMES, Header
from autointerp.llm.exchange import KEY_LIKE, AnswerFailed, Transient, one_line
from autointerp.llm.options import KEY_VARIABLES
from sae.common.errors import BadInput, NotFound
from sae.common.files import check_regular

LARGEST_REPLY = 8 * 2**20  # Bytes of a reply at most. The longest real ones, with log-probabilities, have 2 MiB.
_LARGEST_ERROR = 2**16  # bytes read of an error page: it is shown as one line
_LONGEST_KEY = 8000  # characters
_SPELLED = 200  # characters of a key that are looked for in any spelling, with what follows
_NOISE = bytes(b for b in range(256) if not 33 <= b <= 126 or chr(b) in "%\\0123456789abcdefnrtuABCDEFNRTU")
_LOWER = bytes(range(256)).lower()
_OTHER_SPELLINGS = "%ſıİ\N{KELVIN SIGN}"  # an escape, and letters that equal s, i and k regardless of case
_PART = 4  # characters of a key in a row that an error message must not show
_MASK = re.compile(r"\*\*|•|xxx|[\w-](?:…|\.\.\.)\w")
_ACCOUNT_HEADERS = ("openai-organization", "openai-project")  # the SDK reads them from the environment
_READ_HEADERS = ("location", "retry-after", "retry-after-ms")


# --- addresses and keys -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A secret that does not print."""

    value: str = field(repr=False)
    origin: str  # its source in words, safe to show

    def __str__(self) -> str:
        return f"the key from {self.origin}"

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        between = r"(?:[^!-~]|\\(?:[bfnrt]|u[0-9a-f]{4})?)*"  # invisible characters and escapes
        characters = (f"(?:%{ord(c):02x}|{re.escape(c)})" for c in self.value[:_SPELLED])
        rest = r"[\w.=+/~-]*" if len(self.value) > _SPELLED else ""
        return re.compile(between.join(characters) + rest, re.IGNORECASE)

    def redact(self, text: str) -> str:
        """Replace the key in ``text``, in any spelling. Placeholder keys (``EMPTY``) are ordinary words and stay."""
        return self._pattern.sub("[key]", text) if self._is_secret and self._may_be_in(text) else text

    def _may_be_in(self, text: str) -> bool:
        """Return whether ``text`` may hold the key in some spelling; a tenth of the time of looking for it."""
        return self._frame in _frame(text) or any(c in text for c in _OTHER_SPELLINGS)

    @functools.cached_property
    def _frame(self) -> bytes:
        return _frame(self.value[:_SPELLED])

    def redact_parts(self, text: str) -> str:
        """Replace each word of ``text`` that shows a part of the key or masks some characters of one."""
        if not self._is_secret:
            return text
        value = self.value.lower()
        parts = {value[i : i + _PART] for i in range(len(value) - _PART + 1)}

        def hide(word: re.Match[str]) -> str:
            said = word[0].lower()
            shows = any(said[i : i + _PART] in parts for i in range(len(said) - _PART + 1))
            return "[key]" if shows or _MASK.search(said) else word[0]

        return re.sub(r"\S+", hide, self.redact(text))

    @property
    def _is_secret(self) -> bool:
        return len(self.value) >= 12 or (len(self.value) >= 6 and any(c.isdigit() for c in self.value))


def _frame(text: str) -> bytes:
    """Return ``text`` in lower case without the characters that escapes consist of, or that may be between escapes."""
    return text.encode(errors="ignore").translate(_LOWER, _NOISE)


def read_key(file: Path | None = None, environment: Mapping[str, str] | None = None) -> Key | None:
    """Return the key in ``file`` (its whole content, trimmed), else the one in the environment, else ``None``.

    :raises NotFound: the file cannot be read.
    :raises BadInput: the content cannot be a key (empty, or with blanks or non-ASCII characters).
    """
    if file is not None:
        check_regular(file, "key file")
        try:
            with file.open("rb") as opened:
                text = opened.read(_LONGEST_KEY + 1).decode("utf-8-sig", errors="replace")
        except (OSError, ValueError) as error:
            # The path is not quoted: it may be the key itself, given by mistake.
            reason = error.strerror if isinstance(error, OSError) else "it is no path"
            raise NotFound(f"the file of --api-key-file cannot be read ({reason}); give the path of a file") from None
        key = Key(text.strip(), f"file {str(file)!r}")
    else:
        values = os.environ if environment is None else environment
        name = next((name for name in KEY_VARIABLES if values.get(name, "").strip()), None)
        if name is None:
            return None
        key = Key(values[name].strip(), f"the environment variable {name}")
    # Checked here because an HTTP library that cannot encode a header quotes it in its error.
    if not 0 < len(key.value) <= _LONGEST_KEY or not all("!" <= c <= "~" for c in key.value):
        raise BadInput(f"{key}: not a key (one line of printable ASCII without blanks is expected)")
    return key


def list_secrets(key: Key | None, headers: Sequence[Header]) -> list[Key]:
    """Return what must not be shown: the key, and the values of the headers."""
    of_headers = [Key(secret, f"the header {header.name}") for header in headers for secret in header.secrets]
    return of_headers if key is None else [key, *of_headers]


def list_candidates(url: str) -> list[str]:
    """Return the base addresses that ``url`` may mean, likeliest first: people give it with and without ``/v1``.

    >>> list_candidates("localhost:8000")
    ['http://localhost:8000/v1', 'http://localhost:8000']
    >>> list_candidates("https://host/api/v1/chat/completions/?api-version=2")
    ['https://host/api/v1?api-version=2']

    :raises BadInput: not an http address, or one with a password or with a secret in its query.
    """
    given = url.strip() if "://" in url else f"http://{url.strip()}"
    if set("@#;") & set(given):
        raise BadInput(
            "the LLM URL has a user name, password or fragment in it; give the address alone, and a key through "
            f"the environment ({KEY_VARIABLES[0]}) or a file"
        )
    _, _, query = given.partition("?")
    if any(not value or SECRET_NAMES.search(name) for name, value in parse_qsl(query, True)) or KEY_LIKE.search(query):
        raise BadInput(
            "the query of the LLM URL has a secret in it (a key, a token, a signature), or a name without a value; "
            "give a secret as a header: --llm-header 'NAME=$VARIABLE'"
        )
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the host or the port is none
        usable = False
    if not usable or not given.isprintable() or set(" \\") & set(given):
        raise BadInput(f"LLM URL {one_line(url)!r} is not an http address; give one like http://localhost:8000/v1")
    path = parts.path.rstrip("/")
    for tail in ("/chat/completions", "/models"):
        path = path.removesuffix(tail)
    base = urlunsplit((parts.scheme, parts.netloc, path, query, ""))
    last = path.rsplit("/", 1)[-1]
    if last[:1] == "v" and last[1:2].isdigit():
        return [base]
    # A bare host means its /v1; a longer path was given on purpose and is tried first as it is.
    return [base, at(base, "/v1")] if path else [at(base, "/v1"), base]


def at(url: str, path: str) -> str:
    """Return the address of ``path`` under ``url``, whose query it keeps."""
    address, mark, query = url.partition("?")
    return f"{address}{path}{mark}{query}"


@functools.lru_cache(maxsize=32)
def is_local(url: str) -> bool:
    """Return whether the host of ``url``, however it is written, is this machine."""
    try:
        found = socket.getaddrinfo((urlsplit(url).hostname or "").rstrip("."), 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)  # the system binds its own addresses only
            return True
    return False


# --- connections ------------------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """A reply of any status."""

    status: int
    headers: Mapping[str, str]  # those of ``_READ_HEADERS``
    body: Any  # its JSON value; its text if it is not JSON


class Connections:
    """The connections of one client, in the running event loop, with ``timeout`` seconds for a reply.

    Every request has the ``headers``; one of ``KEY_HEADERS`` among them replaces the key.

    The ``openai`` client sends bytes and returns bytes, because its typed methods take more time than all the rest.
    """

    def __init__(self, key: Key | None, timeout: float, headers: Sequence[Header] = ()) -> None:
        self.loop = asyncio.get_running_loop()
        self._timeout, self._secrets = timeout, list_secrets(key, headers)
        self._api = _Api(key, timeout, headers)

    async def close(self) -> None:
        await self._api.close()

    async def send(self, url: str, content: bytes | None = None, most_seconds: float = float("inf")) -> Reply:
        """Post ``content`` to ``url``, or get ``url``, and return the reply, whatever its status. Follow no redirect.

        :raises Transient: no connection, no complete reply in time, or none that is HTTP.
        :raises AnswerFailed: the reply is too large.
        :raises BadInput: ``url`` cannot be asked.
        """
        seconds = min(self._timeout, most_seconds)
        try:
            async with asyncio.timeout(seconds):
                if content is None:
                    reply = await self._api.get(url, cast_to=httpx2.Response)
                else:
                    reply = await self._api.post(url, cast_to=httpx2.Response, content=content)
        except openai.APIStatusError as error:
            reply = error.response
        except TimeoutError:
            # A server that does not list its models in time counts as absent.
            raise Transient(f"no answer within {seconds:g} s", is_unreachable=content is None) from None
        except (httpx2.InvalidURL, ValueError):  # aiohttp's is one, and that of a name without an IDNA form
            raise BadInput(f"{url} cannot be asked; correct that address, or the proxy in the environment") from None
        headers = {name: self._redact(value) for name, value in reply.headers.items()}
        return Reply(reply.status_code, headers, self._parse(await reply.aread()))

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = secret.redact(text)
        return text

    def _parse(self, raw: bytes) -> Any:
        """Return the JSON value of ``raw``, or its text, without the key and without halves of surrogate pairs."""
        text = self._redact(raw.decode("utf-8-sig", errors="replace"))
        try:
            value = json.loads(text)
            if "\\u" in text:  # escapes may spell either
                plain = json.dumps(value, ensure_ascii=False).encode(errors="replace").decode()
                value = json.loads(self._redact(plain))
        except (ValueError, RecursionError):
            return text
        return value


class _Api(openai.AsyncOpenAI):
    """The SDK's client. Makes the headers for an address once: making them takes as long as sending."""

    def __init__(self, key: Key | None, timeout: float, headers: Sequence[Header]) -> None:
        own = {header.name.lower(): header.value for header in headers}
        super().__init__(
            api_key="none" if key is None else key.value,  # the SDK insists on one
            base_url="http://127.0.0.1",  # not used: every request has its whole address
            timeout=timeout,
            max_retries=0,
            default_headers={"Accept-Encoding": "identity", **own},
            http_client=_HttpClient(),
        )
        replaces_key = bool(KEY_HEADERS.intersection(own)) and "authorization" not in own
        self._omitted = ("content-length", *(["authorization"] if replaces_key else []))
        self._account = [name for name in _ACCOUNT_HEADERS if name not in own]
        self._empty: dict[tuple[str, str], httpx2.Request] = {}

    def _build_request(self, options: Any, **rest: Any) -> httpx2.Request:
        to = options.method, options.url
        if to not in self._empty:
            self._empty[to] = super()._build_request(options, **rest)
            is_openai = urlsplit(options.url).hostname == "api.openai.com"
            for name in (*self._omitted, *([] if is_openai else self._account)):
                self._empty[to].headers.pop(name, None)
        empty = self._empty[to]
        request = httpx2.Request(empty.method, empty.url, stream=httpx2.ByteStream(options.content or b""))
        request.headers = empty.headers
        return request


class _HttpClient(httpx2.AsyncClient):
    """Sends the requests of the SDK through aiohttp alone: the SDK's own client for it takes twice the processor time.

    Keeps no cookies and follows no redirect.
    """

    def __init__(self) -> None:
        super().__init__(transport=httpx2.AsyncBaseTransport())  # not used
        self._session = aiohttp.ClientSession(
            # No limit, because the requests in flight are limited. Most servers close an idle connection after 5 s.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5.0, ssl=httpx2.create_ssl_context()),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(sock_connect=10.0),
            auto_decompress=False,
        )
        self._find_proxy = functools.cache(_find_proxy)

    async def aclose(self) -> None:
        await self._session.close()

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        url = str(request.url)
        try:
            async with self._session.request(
                request.method,
                url,
                headers=request.headers.multi_items(),
                data=request.read() or None,
                allow_redirects=False,
                proxy=self._find_proxy(url),
            ) as reply:
                content = await _read(reply)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            number = getattr(error, "errno", None) or 0
            reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
            raise Transient(f"the connection failed: {one_line(reason, 120)}", is_unreachable=True) from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ClientHttpProxyError, OSError):
            raise Transient("the connection broke off") from None
        except (aiohttp.ClientResponseError, zlib.error):
            raise Transient("the server's reply cannot be read: it is not HTTP, or not compressed as it says") from None
        headers = {name: reply.headers[name] for name in _READ_HEADERS if name in reply.headers}
        return httpx2.Response(reply.status, headers=headers, stream=httpx2.ByteStream(content), request=request)


def _find_proxy(url: str) -> str | None:
    """Return the proxy of the environment for ``url``; none for this machine. ValueError if aiohttp cannot use it."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is None or is_local(url) or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(proxy).scheme not in ("http", "https"):
        raise ValueError("not an HTTP proxy")
    return proxy


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """Read a body, up to a limit after unpacking: all of an answer, or the beginning of an error page."""
    limit, failed = (LARGEST_REPLY, False) if reply.status < 400 else (_LARGEST_ERROR, True)
    too_large = AnswerFailed(f"the server's reply is larger than {limit / 2**20:.3g} MiB", Usage(requests=1))
    content = bytearray()
    async for piece in reply.content.iter_any():
        content += piece
        if len(content) > limit:
            if failed:
                break
            raise too_large
    if reply.headers.get("content-encoding", "").lower() in ("", "identity"):
        return bytes(content)
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    unpacked = unpacker.decompress(content, limit)
    if not failed and (unpacker.unconsumed_tail or unpacker.unused_data):
        raise too_large
    return unpacked
