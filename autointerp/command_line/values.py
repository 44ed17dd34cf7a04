"""Read the values of flags: amounts, lists of latents, paths. A bad value is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from sae.common.amounts import parse_amount
from sae.common.commands import is_secret
from sae.common.errors import BadInput, suggest
from sae.common.files import check_regular, expand_user
from sae.common.registry import Registry

UsageError: Any = typer.BadParameter.__base__  # typer's own copy of click's class, which has no public name
LISTS = frozenset(
    {"--seeds", "--text", "--dataset", "--column", "--weights", "--against", "--hookpoint", "--sae", "--exclude-tokens"}
)


def spread_lists(arguments: list[str]) -> list[str]:
    """Turn ``--seeds 0 1 2`` into ``--seeds 0 --seeds 1 --seeds 2``, as click expects."""
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


def check_words(words: list[str]) -> None:
    """Raise BadInput for a word that is empty or no text: an unset shell variable would name the current folder."""
    for before, word in zip(["", *words], words, strict=False):
        flag, _, value = word.partition("=") if word.startswith("--") and "=" in word else (before, "", word)
        flag = flag if flag.startswith("-") else "an argument"
        if not value.strip() and flag != "--vllm-args":
            raise BadInput(f"{flag} is empty; give a value, or remove it (is a shell variable unset?)")
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            shown = "…" if is_secret(flag) else f"{value!r:.100}"
            raise BadInput(f"{flag} {shown} is not UTF-8 text; give a value that is")


def hide_secrets(text: str, words: list[str]) -> str:
    """Replace in ``text`` the words after a header flag: a header without quotes may be several."""
    inside = False
    for word in words:
        if word.startswith("--"):
            inside = is_secret(word.partition("=")[0])
        elif inside and len(word) > 3:
            text = text.replace(word, "…")
    return text


def check_value(flag: str, name: str, value: Any) -> None:
    """Raise BadInput for a number beyond its bound (see ``sae.settings.LARGEST_FLAGS``), a pipe or a device."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int | float):
            from sae.settings import LARGEST_FLAG, LARGEST_FLAGS

            largest = LARGEST_FLAGS.get(name, LARGEST_FLAG)
            if not -largest <= one <= largest:
                raise BadInput(f"{flag} {one!s:.60}: give a number of at most {largest}")
        elif isinstance(one, str | Path) and not flag.endswith(("-header", "-body")):
            check_regular(expand_user(one), flag)


def absolute(name: str) -> str:
    """Return the absolute form of an existing path, which later stages find from any folder; other names unchanged."""
    path = expand_user(name)
    return str(path.resolve()) if path.exists() else name


def new_file(option: str, path: Path) -> Path:
    """Check, before any work, that a file can be written to ``path`` in an existing folder; return the path."""
    import tempfile

    from sae.study.run import RESERVED

    path = expand_user(path)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise BadInput(f"{option} {str(path)!r}: folder {str(folder)!r} does not exist; make it first, or name another")
    if path.is_dir():
        raise BadInput(f"{option} {str(path)!r} is a folder; name a file in it")
    if path.name in RESERVED or (folder / "run.json").is_file():
        raise BadInput(f"{option} {str(path)!r} is where the program keeps its own files; name another place")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(
            f"{option} {str(path)!r} cannot be written ({(error.strerror or '').lower()}); name another place"
        ) from None
    return path


def amount(option: str, text: str | None, least: int = 1) -> int | None:
    """Return ``2M``, ``500k``, ``1e6`` or ``123`` as an integer of at least ``least``."""
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
    """Return ``3,17,40-60`` as a tuple of integers."""
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
    """Return a callback that accepts values in ``names`` or ``more`` and suggests the nearest for others."""

    def check(given: Any) -> Any:
        if isinstance(given, list):
            return [check(value) for value in given]
        value = given and names.spell(given)
        if value is not None and value not in more and value not in names:
            raise typer.BadParameter(f"{value!r} is not known; choose {suggest(value, [*more, *names])}")
        return value

    return check
