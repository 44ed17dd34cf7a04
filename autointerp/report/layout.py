"""What all parts of the terminal report have in common: the page, its colours, and how a number is written.

A number is written once in one way: fractions as ``26.4 %``, scores and cosines as ``.264``, and an
interval always beside its estimate. What was not measured is a dash, never a zero.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autointerp.report.blocks import FILLS, Drawn
from autointerp.report.visible import Marking, marking, visible
from sae.common import progress
from sae.common.amounts import choose_digits, is_known

#: Hues that people with any of the common colour-vision deficiencies can tell apart (Okabe and Ito).
#: Orange is what is found in one SAE alone, blue what every SAE finds; control and context are grey.
STYLE_OF_CLASS = {"one": "#e69f00", "some": "#56b4e9", "all": "#2f8fd8"}
ACCENT = "#2f8fd8"
QUIET = "dim"
WIDEST = 120


@dataclass(frozen=True)
class Page:
    """Where the report is written: its usable width in cells, whether it has colour, how tokens are marked."""

    width: int
    colour: bool
    marking: Marking

    @classmethod
    def of(cls, console: Console) -> Page:
        colour = console.color_system is not None and not console.no_color
        return cls(max(40, min(console.width, WIDEST)), colour, marking(console))

    @property
    def wide(self) -> bool:
        return self.width >= 100

    def fill(self, i: int) -> str:
        """The fill of the i-th part of a bar: solid where hues tell the parts apart, else a pattern."""
        return "█" if self.colour else FILLS[i % len(FILLS)]


# --- numbers ----------------------------------------------------------------------------------------------


def percent(value: float | None, digits: int = 1) -> str:
    """``26.4 %``; with more digits where it would be written as 0 or 100 and is not."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{choose_digits([value], digits + 2) - 2}f} %"


def percent_interval(bounds: Sequence[float | None] | None) -> str:
    if bounds is None or not all(is_known(b) for b in bounds):
        return ""
    found = [b for b in bounds if b is not None]
    digits = choose_digits(found, 3) - 2
    return f"[{', '.join(f'{100 * b:.{digits}f}' for b in found)}]"


def count(n: float | None) -> str:
    return f"{round(n):,}" if n is not None and math.isfinite(n) else "–"


def human(n: float | None) -> str:
    """A count in at most three digits: ``950``, ``12.3k``, ``2M``."""
    if n is None or not math.isfinite(n):
        return "–"
    return progress.human(n)


def origin(seed: int | None) -> str:
    """A run's seed, or ``imported`` for one that was not trained here."""
    return "imported" if seed is None else str(seed)


def plural(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


# --- parts of a page --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A part of the report: in the terminal a title over a rule, one dim sentence, then the body."""

    title: str
    says: str
    body: tuple[RenderableType, ...]
    width: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rule = "─" * max(0, self.width - len(self.title) - 1)
        yield Text()
        yield Text.assemble((self.title, "bold"), " ", (rule, QUIET), no_wrap=True)
        yield Text(self.says, QUIET)
        yield Text()
        yield from self.body


def section(page: Page, title: str, says: str, *body: RenderableType) -> Section:
    """A title, one sentence for who has not read the paper, and the body."""
    return Section(title, says, body, page.width)


def indented(body: RenderableType, left: int = 2) -> Padding:
    return Padding(body, (0, 0, 0, left))


_PROMPT = "  $ "


@dataclass(frozen=True)
class Command:
    """A command to copy: over several lines, where one is too narrow, as a shell takes them."""

    command: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = over_lines(self.command, options.max_width - len(_PROMPT))
        for i, line in enumerate(lines):
            start = " " * len(_PROMPT) if i else _PROMPT
            yield Text.assemble((start, QUIET), (line, "bold"), overflow="fold")


def over_lines(command: str, width: int) -> list[str]:
    """A command in lines of at most ``width`` cells, all but the last ending in a backslash.

    An option stays beside its first value where that is possible. A word longer than a line is left whole.
    """
    if cell_len(command) <= width:
        return [command]
    words = [shlex.quote(word) for word in shlex.split(command)]
    parts: list[str] = []
    for i, word in enumerate(words):
        valued = i > 0 and words[i - 1].startswith("-") and "=" not in words[i - 1] and not word.startswith("-")
        if valued and cell_len(f"    {parts[-1]} {word} \\") <= width:
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(f"{lines[-1]} {part} \\") <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}" if lines else part)
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def command_line(command: str) -> Command:
    return Command(visible(command))


def absent(says: str, command: str) -> RenderableType:
    """What stands where a stage has not been run yet."""
    return Group(Text(visible(says)), command_line(command))


def grid(*columns: str | tuple[str, str], head: bool = True, gap: int = 2) -> Table:
    """A table without lines. A column is its heading, or (heading, 'left' | 'right' | 'fold')."""
    table = Table(box=None, pad_edge=False, show_header=head, header_style=QUIET, padding=(0, gap, 0, 0))
    for column in columns:
        name, kind = column if isinstance(column, tuple) else (column, "left")
        table.add_column(
            name,
            justify="right" if kind == "right" else "left",
            no_wrap=kind != "fold",
            overflow="fold" if kind == "fold" else "ellipsis",
        )
    return table


def bullets(lines: Sequence[str | Text]) -> Table:
    """Sentences, each behind a point, wrapped under their own beginning."""
    table = grid(("", "left"), ("", "fold"), head=False, gap=1)
    for line in lines:
        table.add_row(Text("•", ACCENT), line if isinstance(line, Text) else Text(line))
    return table


def legend(entries: Sequence[tuple[str, str, str]]) -> Drawn:
    """``█ name  █ name``: (fill, style, words) for each part of a chart."""
    text = Drawn()
    for i, (fill, style, words) in enumerate(entries):
        text.append("   " if i else "")
        text.append(fill * 2, style)
        text.append(f" {visible(words)}")
    return text


def get(tree: Mapping[str, Any] | None, *path: str) -> Any:
    """The value at ``path`` in nested mappings, or ``None`` where any part of it is missing."""
    node: Any = tree
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node
