"""Make text from models and corpora safe to show.

Such text may hold rich markup, terminal escapes, line breaks, or marks that reverse the reading direction. Signs
replace them: ``↵`` for a line break, ``␛`` for an escape, ``‹U+202E›`` for a reversal. Markup needs no escaping inside
``rich.text.Text``, which does not parse it; a plain string given to rich would.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

# Unicode categories control, format, surrogate, private and unassigned: always replaced.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_OWN_SIGN = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}


def _sign(character: str) -> str:
    code = ord(character)
    if character in _OWN_SIGN:
        return _OWN_SIGN[character]
    if code < 0x20:
        return chr(0x2400 + code)
    return f"‹U+{code:04X}›"


def visible(text: str) -> str:
    """Return ``text`` in one line, with a sign for every control character."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_sign(c) if unicodedata.category(c) in _HIDDEN else c for c in text)


def shown(text: str, style: str = "") -> Text:
    """Return :func:`visible` text in one style; signs for characters are dim."""
    if text.isascii() and text.isprintable():
        return Text(text, style)
    out = Text(style=style)
    for character in text:
        if unicodedata.category(character) in _HIDDEN:
            out.append(_sign(character), "dim")
        else:
            out.append(character)
    return out


class Marking(NamedTuple):
    """How to show activation: a style for a strength in (0, 1], and the marks around a strong token."""

    style: Callable[[float], str]
    before: str
    after: str


# Black on amber reads the same on light and on dark terminals.
_SHADES = ((0.75, "black on #ff9f1c"), (0.5, "black on #ffc15e"), (0.3, "black on #ffe0a3"), (0.0, "underline"))
_OF_FEW_COLOURS = ((0.5, "black on yellow"), (0.3, "bold yellow"), (0.0, "underline"))


def marking(console: Console) -> Marking:
    """Return shading if the console has colour, else « » around strong tokens."""
    if console.no_color or console.color_system is None:
        return Marking(lambda _: "", "«", "»")
    shades = _OF_FEW_COLOURS if console.color_system == "standard" else _SHADES
    return Marking(lambda strength: next(style for least, style in shades if strength >= least), "", "")


def highlighted(
    tokens: Sequence[str], activations: Sequence[float], how: Marking, *, width: int | None = None, strong: float = 0.3
) -> Text:
    """Show one context in one line, tokens shaded by activation relative to the context's largest.

    Tokens at or above ``strong`` of the largest are marked, neighbours as one. With ``width`` (cells) the line is cut
    around the strongest token, with ``…`` at the cuts.
    """
    peak = max(activations, default=0.0)
    strengths = [a / peak if peak > 0 and a > 0 else 0.0 for a in activations]
    is_strong = [False, *(s >= strong for s in strengths), False]
    pieces = [
        Text.assemble(
            how.before if is_strong[i] > is_strong[i - 1] else "",
            shown(token, how.style(strength) if strength > 0 else ""),
            how.after if is_strong[i] > is_strong[i + 1] else "",
        )
        for i, (token, strength) in enumerate(zip(tokens, strengths, strict=True), start=1)
    ]
    if width is None or sum(p.cell_len for p in pieces) <= width:
        return Text("", no_wrap=True).join(pieces)
    centre = max(range(len(strengths)), key=lambda i: strengths[i]) if peak > 0 else len(strengths) // 2
    return _window(pieces, centre, width)


def _window(pieces: Sequence[Text], centre: int, width: int) -> Text:
    """Return the pieces around ``centre`` that fit ``width`` cells, twice as many cells before it as after."""
    room = width - 2 - pieces[centre].cell_len
    first = last = centre
    used_before = used_after = 0
    while True:
        prefer_before = used_before <= 2 * used_after
        for before in (prefer_before, not prefer_before):
            at = first - 1 if before else last + 1
            if not 0 <= at < len(pieces) or used_before + used_after + pieces[at].cell_len > room:
                continue
            if before:
                first, used_before = at, used_before + pieces[at].cell_len
            else:
                last, used_after = at, used_after + pieces[at].cell_len
            break
        else:
            break
    cuts = ("…" if first > 0 else "", "dim"), ("…" if last < len(pieces) - 1 else "", "dim")
    line = Text.assemble(cuts[0], *pieces[first : last + 1], cuts[1], no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line
