"""What the terminal report says, as parts of a page: its tables and sentences, word for word and number for number.

The terminal's parts are built out of a handful of rich's classes. Taking them apart here, instead of writing the same
tables a second time, is why page and terminal cannot disagree, and why a table that is added to the one is in the
other. Charts made of block characters are left out: the page draws figures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from autointerp.report.blocks import Drawn
from autointerp.report.layout import STYLE_OF_CLASS, Command, Page, Section
from autointerp.report.visible import Marking, visible

#: For the widest terminal, in colour: nothing is left out for want of room.
WIDE = Page(120, True, Marking(lambda _: "", "", ""))
_CLASSES = {"bold": "strong", "dim": "quiet", **{hue: f"in-{name}" for name, hue in STYLE_OF_CLASS.items()}}


@dataclass(frozen=True)
class Piece:
    """A stretch of text in one style. ``css`` are class names of the page's style sheet."""

    text: str
    css: str = ""


@dataclass(frozen=True)
class Words:
    """A sentence, or a cell of a table."""

    pieces: tuple[Piece, ...]
    kind: str = "words"

    @property
    def plain(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class CommandWords:
    """A command to copy."""

    command: str
    kind: str = "command"


@dataclass(frozen=True)
class Grid:
    """A table: headings, then rows; ``right`` says which columns hold numbers."""

    head: tuple[Words, ...]
    rows: tuple[tuple[Words, ...], ...]
    right: tuple[bool, ...]
    kind: str = "table"


Block = Words | CommandWords | Grid


def blocks(part: RenderableType | None) -> Iterator[Block]:
    """The blocks of a part of the terminal report, in order. Raises TypeError for what no part is made of."""
    if isinstance(part, Section):
        for inner in part.body:
            yield from blocks(inner)
    elif isinstance(part, Group):
        for inner in part.renderables:
            yield from blocks(inner)
    elif isinstance(part, Padding):
        yield from blocks(part.renderable)
    elif isinstance(part, Command):
        yield CommandWords(part.command)
    elif isinstance(part, Table):
        if (grid := _grid(part)) is not None:
            yield grid
    elif isinstance(part, Text | str):
        yield from _sentences(part)
    elif part is not None:
        raise TypeError(f"the page cannot show a {type(part).__name__}")


def _sentences(text: Text | str) -> Iterator[Words]:
    if isinstance(text, Drawn):
        return
    for line in (Text(text) if isinstance(text, str) else text).split("\n"):
        if line.plain.strip():
            yield Words(_pieces(line))


def _grid(table: Table) -> Grid | None:
    """``None`` where most columns are charts: the rest would be a legend without its chart."""
    kept = [column for column in table.columns if not _is_chart(column)]
    if 2 * len(kept) <= len(table.columns) and len(kept) < len(table.columns):
        return None
    columns = [[_cell(cell) for cell in column.cells] for column in kept]
    rows = [row for row in zip(*columns, strict=True) if any(cell.plain.strip() for cell in row)]
    head = tuple(_cell(column.header) for column in kept) if table.show_header else ()
    return Grid(head, tuple(rows), tuple(column.justify == "right" for column in kept)) if rows else None


def _is_chart(column: Column) -> bool:
    filled = [cell for cell in column.cells if not isinstance(cell, str) or cell]
    return bool(filled) and all(isinstance(cell, Drawn) for cell in filled)


def _cell(cell: RenderableType) -> Words:
    if isinstance(cell, Drawn):
        return Words(())
    if isinstance(cell, Text | str):
        return Words(_pieces(Text(cell) if isinstance(cell, str) else cell))
    found = [block for block in blocks(cell) if isinstance(block, Words)]
    return Words(tuple(piece for block in found for piece in block.pieces))


def _pieces(text: Text) -> tuple[Piece, ...]:
    """The text in stretches of one style each; what it was coloured with, as class names."""
    whole = _css(str(text.style))
    marks = sorted({0, len(text.plain), *(edge for span in text.spans for edge in (span.start, span.end))})
    found = []
    for begin, end in itertools.pairwise(marks):
        styles = [_css(str(span.style)) for span in text.spans if span.start <= begin < span.end]
        css = " ".join(dict.fromkeys(word for words in (whole, *styles) for word in words.split()))
        if words := shown(text.plain[begin:end]):
            found.append(Piece(words, css))
    return tuple(found)


def shown(text: object) -> str:
    """Text for the page: nothing hidden in it, and a number never parted from its per cent."""
    return _NUMBER.sub("\u00a0", visible(str(text)))


_NUMBER = re.compile(r"(?<=\d) (?=[%‰])")


def _css(style: str) -> str:
    return " ".join(_CLASSES[word] for word in style.split() if word in _CLASSES)
