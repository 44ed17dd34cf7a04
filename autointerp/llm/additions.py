"""Read what a user adds to every request: headers, whose values are secrets, and fields of the body, which are not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from autointerp.llm.exchange import KEY_LIKE
from sae.common.commands import hide_header
from sae.common.errors import BadInput

KEY_HEADERS = frozenset({"authorization", "api-key"})  # a header that identifies the sender in place of the API key
SECRET_NAMES = re.compile(
    r"key|token|secret|passw|credential|(?:^|[^a-z])(?:sig|signature|auth|code|pass|pwd)(?:$|[^a-z])", re.IGNORECASE
)

_LONGEST_VALUE = 8000  # characters of a header
_HEADER_NAME = re.compile(r"[A-Za-z][\w.-]{0,99}", re.ASCII)
_OWN_HEADERS = re.compile(
    r"host|content-.*|transfer-encoding|connection|keep-alive|upgrade|te|trailer|expect|accept-encoding|proxy-.*",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
_OWN_FIELDS = ("messages", "model", "n", "stream", "max_tokens", "max_completion_tokens")
_SECRET_FIELDS = re.compile(
    r"(?:api|access|auth|secret|private).?key|secret|password|authorization|(?:access|auth|bearer|api).?token",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Header:
    """A header of every request. Its value is a secret and does not print."""

    name: str
    value: str = field(repr=False)
    shown: str = field(default="", compare=False)  # the flag's value as it may be printed

    @property
    def secrets(self) -> list[str]:
        """The texts to remove from replies: the value, and what follows its scheme (``Bearer``).

        Words and dates stay, because an answer may hold them.
        """
        parts = self.value.split()
        texts = [self.value, *parts[1:]] if len(parts) == 2 else [self.value]
        return [t for t in texts if len(t) >= (20 if t.isalpha() else 6 if any(map(str.isalpha, t)) else 12)]


def read_headers(
    flag: str, given: Sequence[str] | None, environment: Mapping[str, str] = os.environ
) -> tuple[Header, ...]:
    """Read headers written as ``NAME=VALUE``; ``$NAME`` and ``${NAME}`` in a value are variables of ``environment``.

    :raises BadInput: a header that is not one, that the program sets itself, or whose variable is not set. The message
        quotes no value, and no text that could be one.
    """
    found: dict[str, Header] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not _HEADER_NAME.fullmatch(name) or not any(map(str.isalnum, value)):
            raise BadInput(f"{flag}: write NAME=VALUE, such as {flag} 'api-key=$AZURE_KEY'; in quotes, with no colon")
        if _OWN_HEADERS.fullmatch(name):
            raise BadInput(f"{flag} {name}: the program sets this header itself; remove it")
        if name.lower() in found:
            raise BadInput(f"{flag} {name} is given twice; give every header once")
        shown = hide_header(text)

        def expand(variable: re.Match[str], named: str = f"{flag} {name}", is_shown: bool = shown == text) -> str:
            read = environment.get(variable[1] or variable[2], "").strip()
            if not read:
                which = f"the environment variable {variable[1] or variable[2]}" if is_shown else "a variable in it"
                raise BadInput(f"{named}: {which} is not set; export it first")
            return read

        value = _VARIABLE.sub(expand, value).strip()
        if len(value) > _LONGEST_VALUE or not all(" " <= c <= "~" for c in value):
            raise BadInput(f"{flag} {name}: the value must be one line of printable ASCII, and not too long")
        found[name.lower()] = Header(name, value, shown)
    return tuple(found.values())


def read_body(flag: str, given: str | None) -> dict[str, Any] | None:
    """Read the object that is merged into every request; ``None`` if it is not given.

    :raises BadInput: not a JSON object, or one that sets what the program decides or that holds a secret.
    """
    if given is None:
        return None
    example = f'such as {flag} \'{{"reasoning_effort": "none"}}\''
    try:
        body = json.loads(given, parse_constant=_refuse)
        written = json.dumps(body, allow_nan=False)
    except (ValueError, RecursionError):
        raise BadInput(f"{flag} is not JSON; give an object, {example}") from None
    if not isinstance(body, dict):
        raise BadInput(f"{flag} is not a JSON object; give one, {example}")
    own = next((name for name in _OWN_FIELDS if name in body), None)
    if own is not None:
        raise BadInput(f"{flag}: the program itself decides {own!r}; remove it")
    if KEY_LIKE.search(written) or any(map(_SECRET_FIELDS.search, _list_names(body))):
        raise BadInput(f"{flag} holds a key or a password, and is stored and shown; give secrets with a header flag")
    return body


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN and Infinity are not JSON


def _list_names(value: Any) -> list[str]:
    """Return the names of all fields in a JSON value."""
    if isinstance(value, dict):
        return [*value, *(name for part in value.values() for name in _list_names(part))]
    return [name for part in value for name in _list_names(part)] if isinstance(value, list) else []
