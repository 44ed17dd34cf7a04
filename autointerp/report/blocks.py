"""The neutral parts of a report, which ``terminal`` and ``html.page`` render.

Builders pass on the texts of models and corpora unchanged: both renderers replace control characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True)
class Span:
    """Text in one style: words of ``strong quiet accent warn one some all``; the last three are shared classes."""

    text: str
    style: str = ""
    latent: int | None = None
    """a latent that the HTML page opens on a click"""


Words = str | Span | Sequence[str | Span]


@dataclass(frozen=True)
class Chart:
    """Block characters for a terminal, drawn for (width in cells, has colour). The HTML page has figures instead."""

    draw: Callable[[int, bool], Iterable[Text]]


@dataclass(frozen=True)
class Sentence:
    """A paragraph with an indent in a terminal, or an empty line before it (``is_apart``). Most are plain ``Words``."""

    words: Words
    indent: int = 0
    is_apart: bool = False


@dataclass(frozen=True)
class Command:
    """A command to copy."""

    command: str


@dataclass(frozen=True)
class Points:
    """Sentences, each after a bullet."""

    points: Sequence[Words]


@dataclass(frozen=True)
class Facts:
    """Labels, each with its text."""

    facts: Sequence[tuple[str, Words]]
    indent: int = 0


@dataclass(frozen=True)
class Context:
    """One context with an activation for each token. ``has_peak``: the largest activation is printed before it."""

    tokens: Sequence[str]
    activations: Sequence[float]
    indent: int = 4
    has_peak: bool = True


@dataclass(frozen=True)
class Column:
    """A table's column. ``is_extra``: a terminal that is too narrow for all columns drops it."""

    name: str | Chart = ""
    kind: Literal["text", "number", "fold", "chart", "key"] = "text"
    is_extra: bool = False


Heads = Sequence[Column | str]
Cell = Words | Chart
Rows = list[Sequence[Cell]]


@dataclass(frozen=True)
class Table:
    """Rows under headings, and sentences under the rows. The heading ``>name`` is of numbers, set to the right."""

    heads: Heads
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    @property
    def columns(self) -> list[Column]:
        return [
            head if isinstance(head, Column) else Column(head.lstrip(">"), "number" if head[:1] == ">" else "text")
            for head in self.heads
        ]


@dataclass(frozen=True)
class Title:
    """The head of a report: its name and kind."""

    name: str
    says: str


Block = Words | Sentence | Command | Points | Facts | Context | Table | Chart | Title


@dataclass(frozen=True)
class Section:
    """A title, a sentence for readers who do not know the paper, the body, and ``details`` that ``--full`` adds."""

    title: str
    says: str
    body: Sequence[Block] = ()
    details: Sequence[Block] = ()


def spans(words: Words) -> list[Span]:
    """Return ``words`` as a list of spans."""
    parts = [words] if isinstance(words, str | Span) else words
    return [part if isinstance(part, Span) else Span(part) for part in parts]


def quiet(text: str) -> Span:
    return Span(text, "quiet")


def strong(text: str) -> Span:
    return Span(text, "strong")


def make_sentences(parts: Iterable[Block | Section | None]) -> list[Block | Section]:
    """Return ``parts`` with each paragraph that is plain ``Words`` as a sentence, and without ``None``."""
    return [
        Sentence(part) if isinstance(part, str | Span | list | tuple) else part for part in parts if part is not None
    ]
