"""Reading what stands behind a flag: amounts, lists of latents, paths. Each value is exact or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from sae.common.errors import suggest
from sae.common.registry import Registry

LISTS = frozenset({"--seeds", "--text", "--against", "--hookpoint", "--sae"})


def spread_lists(arguments: list[str]) -> list[str]:
    """``--seeds 0 1 2`` as ``--seeds 0 --seeds 1 --seeds 2``, which is how click takes lists."""
    spread: list[str] = []
    inside = None
    for argument in arguments:
        if argument in LISTS:
            inside = argument
        elif inside and not argument.startswith("-"):
            spread += [inside, argument]
        else:
            inside = None
            spread.append(argument)
    return spread


def absolute(name: str) -> str:
    """A path that exists, from the root on, so that later stages find it from any folder; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def new_file(option: str, path: Path) -> Path:
    """A file to be written, in a folder that there is, and that takes files: a mistyped one is not made.

    It is tried at once, before the work whose result would have no place to go.
    """
    import tempfile

    from sae.common.errors import BadInput

    path = path.expanduser()
    folder = path.absolute().parent
    if not folder.is_dir():
        raise BadInput(f"{option} {str(path)!r}: there is no folder {str(folder)!r}; make it first, or name another")
    if path.is_dir():
        raise BadInput(f"{option} {str(path)!r} is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(
            f"{option} {str(path)!r} cannot be written ({(error.strerror or '').lower()}); name another place"
        ) from None
    return path


def amount(option: str, text: str | None, least: int = 1) -> int | None:
    """``2M``, ``500k``, ``1e6`` or ``123``, as a whole number of at least ``least``."""
    from sae.common.amounts import parse_amount
    from sae.common.errors import BadInput

    if text is None:
        return None
    try:
        value = parse_amount(text)
        if value < least:
            raise ValueError(f"{text!r} is not an amount; write it like 500k, 2M or 1000000")
    except ValueError as error:
        raise BadInput(f"{option} {error}") from None
    return value


def indices(text: str | None) -> tuple[int, ...]:
    """``3,17,40-60`` as numbers."""
    from sae.common.errors import BadInput

    found: list[int] = []
    if text is not None and not text.strip(" ,"):
        raise BadInput(f"--indices {text!r} names no latent; write it like 3,17,40-60")
    for part in (text or "").replace(" ", ",").split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        try:
            span = range(int(first), (int(last) if dash else int(first)) + 1)
            if not 1 <= len(span) <= 10**7:
                raise ValueError
            found += span
        except (ValueError, OverflowError):
            raise BadInput(f"--indices {part!r} is not a latent or a range; write it like 3,17,40-60") from None
    return tuple(dict.fromkeys(found))


def known(names: Registry[Any], *more: str) -> Callable[[Any], Any]:
    """A check of an option's value, or values: each one of ``names`` or of ``more``; the nearest are offered."""

    def check(given: Any) -> Any:
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value not in more and value not in names:
                raise typer.BadParameter(f"{value!r} is not known; choose {suggest(value, [*more, *names])}")
        return given

    return check
