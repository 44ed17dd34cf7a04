"""A console of a given width and colour that keeps what is printed on it, and its text."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

ANSI = re.compile(r"\x1b\[[0-9;]*m")
COLOURS = ("truecolor", "256", "standard", None)
ACTS_ON_A_TERMINAL = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of characters that a terminal obeys, or that are not whole."""


def console(width: int, colour: Any = None, encoding: str = "utf-8") -> Console:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    return Console(
        file=stream,
        width=width,
        color_system=colour,
        force_terminal=colour is not None,
        highlight=False,
        legacy_windows=False,
    )


def text_of(printed: Console) -> str:
    printed.file.flush()
    assert isinstance(printed.file, io.TextIOWrapper)
    raw = printed.file.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode(printed.file.encoding)
