"""Where the server is and what opens it: addresses as people type them, keys that are never shown.

A key comes from the environment or from a file and goes into request headers, nowhere else. It alone configures
nothing: without an address there is no client, so a key left in a shell's environment can never spend money.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from sae.common.errors import BadInput, NotFound

KEY_VARIABLES = ("AUTOINTERP_API_KEY", "OPENAI_API_KEY")
"""Environment variables looked at for a key, the first that is set wins."""


@dataclass(frozen=True)
class Key:
    """A secret that does not print."""

    value: str = field(repr=False)
    origin: str
    """Where it came from, in words: safe to show."""

    def __str__(self) -> str:
        return f"the key from {self.origin}"

    def hidden_in(self, text: str) -> str:
        """``text`` with the key blotted out. Placeholder keys (``EMPTY``) are words like others and stay."""
        return text.replace(self.value, "[key]") if len(self.value) >= 12 else text


def read_key(file: Path | None = None, environment: Mapping[str, str] | None = None) -> Key | None:
    """The key in ``file`` (its whole content, trimmed), else from the environment, else ``None``.

    :raises NotFound: the file cannot be read.
    :raises BadInput: what is there cannot be a key (empty, or with blanks or other than ASCII characters in it).
    """
    if file is not None:
        try:
            found = Key(file.read_text(errors="replace").strip(), f"file {str(file)!r}")
        except OSError as error:
            raise NotFound(f"key file {str(file)!r} cannot be read: {error.strerror}; check its path") from None
    else:
        values = os.environ if environment is None else environment
        name = next((name for name in KEY_VARIABLES if values.get(name, "").strip()), None)
        if name is None:
            return None
        found = Key(values[name].strip(), f"the environment variable {name}")
    # Checked here because an HTTP library that cannot encode a header quotes it in its error.
    if not found.value or not all("!" <= c <= "~" for c in found.value):
        raise BadInput(f"{found}: not a key (one line of printable ASCII without blanks is expected)")
    return found


def candidates(url: str) -> list[str]:
    """The base addresses that ``url`` may mean, likeliest first: people give it with and without ``/v1``.

    >>> candidates("localhost:8000")
    ['http://localhost:8000/v1', 'http://localhost:8000']
    >>> candidates("https://host/api/v1/chat/completions/")
    ['https://host/api/v1']

    :raises BadInput: no http address, or one with a password or a query in it.
    """
    given = url.strip()
    parts = urlsplit(given if "://" in given else f"http://{given}")
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
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
    # A bare host means its /v1; a longer path was given on purpose and is taken at its word first.
    return [base, f"{base}/v1"] if path else [f"{base}/v1", base]


def is_loopback(url: str) -> bool:
    """Whether ``url`` is this machine: such requests must not go through a proxy that the environment names."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
