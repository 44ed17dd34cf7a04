"""Show report blocks in a terminal: at most 100 columns wide, wrapped where it is narrower, plain text when piped."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import rich.table
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from autointerp.report import blocks as doc
from autointerp.report.charts import ACCENT, STYLE_OF_CLASS
from autointerp.report.visible import Marking, highlighted, marking, shown

WIDTH = 100
_STYLES = {"strong": "bold", "quiet": "dim", "accent": ACCENT, "warn": "bold red", **STYLE_OF_CLASS}
#: ASCII in place of block characters, for outputs that cannot hold these.
_ASCII = str.maketrans(
    "▁▂▃▄▅▆▇█▏▎▍▌▋▊▉▒▓░─━┴├┤┊●•·–−±«»…‰↵⇥↔",
    "..::++##.::++##%@:-=+[]|o*.--~<>.%\\>=",
)
_LEAST_CHART, _LARGEST_CHART, _LEAST_FOLD = 9, 41, 16
_PROMPT = "  $ "


@dataclass(frozen=True)
class Page:
    """The usable width in cells, whether there is colour, and how active tokens are marked."""

    width: int
    has_colour: bool
    marking: Marking

    @classmethod
    def of(cls, console: Console) -> Page:
        has_colour = console.color_system is not None and not console.no_color
        return cls(max(40, min(console.width, WIDTH)), has_colour, marking(console))


def print_page(parts: Iterable[doc.Block | doc.Section | None], console: Console | None = None) -> None:
    """Print report blocks and sections; ``None`` among them is skipped."""
    # Rich guesses nothing from the text: numbers in an explanation are not to be coloured as numbers.
    console = console or Console(highlight=False, markup=False, emoji=False)
    page = Page.of(console)
    console.width = max(console.width, page.width)  # Rich prints nothing on a terminal without columns
    body = Group(*_arranged(parts, page))
    if console.color_system is not None and not console.options.ascii_only:
        console.print(body, width=page.width)
        return
    plain = Console(file=io.StringIO(), width=page.width, color_system=None, force_terminal=False, highlight=False)
    with plain.capture() as captured:
        plain.print(body)
    text = "\n".join(line.rstrip() for line in captured.get().splitlines())
    if console.options.ascii_only:
        text = text.translate(_ASCII).encode(console.encoding, "replace").decode(console.encoding)
    console.out(text, highlight=False)


def _arranged(parts: Iterable[doc.Block | doc.Section | None], page: Page) -> Iterator[RenderableType]:
    """Separate blocks by empty lines, except sentences, commands and contexts."""
    previous: doc.Block | doc.Section | None = None
    close = doc.Sentence | doc.Command | doc.Context
    for part in doc.make_sentences(parts):
        if isinstance(part, doc.Section):
            rule = "─" * max(0, page.width - cell_len(part.title) - 1)
            yield Text()
            yield Text.assemble(shown(part.title, "bold"), " ", (rule, "dim"), no_wrap=True)
            if part.says:
                yield shown(part.says, "dim")
            yield Text()
            yield from _arranged([*part.body, *part.details], page)
        else:
            is_close = isinstance(previous, close | doc.Title) and isinstance(part, close)
            if previous is not None and (not is_close or (isinstance(part, doc.Sentence) and part.is_apart)):
                yield Text()
            yield from _drawn(part, page)
        previous = part


def _drawn(block: doc.Block, page: Page) -> Iterator[RenderableType]:
    match block:
        case doc.Sentence():
            yield Padding(_text(block.words), (0, 0, 0, block.indent))
        case doc.Command():
            for i, words in enumerate(over_lines(shown(block.command).plain, page.width - len(_PROMPT))):
                start = " " * len(_PROMPT) if i else _PROMPT
                yield Text.assemble((start, "dim"), (words, "bold"), overflow="fold")
        case doc.Points():
            yield _grid([(Text("•", ACCENT), _text(words)) for words in block.points], gap=1)
        case doc.Facts():
            facts = [(shown(name, "dim"), _text(said)) for name, said in block.facts]
            yield Padding(_grid(facts), (0, 0, 0, block.indent))
        case doc.Context():
            peak = f"{max(block.activations, default=0.0):6.2f}  " if block.has_peak else ""
            width = page.width - block.indent - len(peak)
            line = highlighted(block.tokens, block.activations, page.marking, width=width)
            yield Padding(Text.assemble((peak, "dim"), line, no_wrap=True), (0, 0, 0, block.indent))
        case doc.Table():
            yield _table(block, page)
            for note in block.notes:
                yield shown(note, "dim")
        case doc.Chart():
            for line in block.draw(page.width - 4, page.has_colour):
                yield Padding(line, (0, 0, 0, 2))
        case doc.Title():
            says = shown(f"   {block.says}", "bold")
            yield Text.assemble(shown(block.name, f"bold {ACCENT}"), says)
            yield Text("━" * page.width, ACCENT, no_wrap=True)


def _text(words: doc.Words) -> Text:
    """Return ``words`` as rich text, with hidden characters made visible."""
    parts = [
        shown(span.text, " ".join(_STYLES.get(word, word) for word in span.style.split())) for span in doc.spans(words)
    ]
    return Text.assemble(*parts)


def _grid(rows: Sequence[tuple[Text, Text]], gap: int = 2) -> rich.table.Table:
    grid = rich.table.Table(box=None, pad_edge=False, show_header=False, padding=(0, gap, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _table(table: doc.Table, page: Page) -> rich.table.Table:
    """Render the columns that fit; charts take the remaining width."""
    columns = table.columns
    texts: list[list[Text | doc.Chart]] = []
    for i, column in enumerate(columns):
        cells = [column.name, *(row[i] for row in table.rows)]
        texts.append([cell if isinstance(cell, doc.Chart) else _text(cell) for cell in cells])
    widths = [_width(column, cells) for column, cells in zip(columns, texts, strict=True)]
    kept = list(range(len(columns)))

    def needed(gap: int) -> int:
        return sum(widths[i] for i in kept) + gap * (len(kept) - 1)

    for i in reversed(range(len(columns))):
        if needed(2) > page.width and columns[i].is_extra:
            kept.remove(i)
    gap = 2 if needed(2) <= page.width else 1
    charts = [i for i in kept if columns[i].kind == "chart"]
    room = (page.width - needed(gap)) // max(1, len(charts)) + _LEAST_CHART
    drawn = rich.table.Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    drawn.show_header = any(isinstance(texts[i][0], doc.Chart) or columns[i].name for i in kept)
    # Columns of long texts only are equally wide.
    width = (page.width - gap) // len(kept) if all(columns[i].kind == "fold" for i in kept) else None
    for i in kept:
        head = _draw(texts[i][0], room, page)
        drawn.add_column(
            head,
            justify="right" if columns[i].kind == "number" else "left",
            overflow="fold",
            no_wrap=columns[i].kind == "chart",
            min_width=min(widths[i], 6),
            width=width,
        )
    for row in range(1, len(table.rows) + 1):
        drawn.add_row(*(_draw(texts[i][row], room, page) for i in kept))
    return drawn


def _width(column: doc.Column, cells: Sequence[Text | doc.Chart]) -> int:
    if column.kind in ("chart", "key"):
        return _LEAST_CHART if column.kind == "chart" else 2
    longest = max(cell.cell_len for cell in cells if isinstance(cell, Text))
    return min(longest, _LEAST_FOLD) if column.kind == "fold" else longest


def _draw(cell: Text | doc.Chart, room: int, page: Page) -> Text:
    if isinstance(cell, Text):
        return cell
    return next(iter(cell.draw(max(_LEAST_CHART, min(room, _LARGEST_CHART)), page.has_colour)), Text())


def over_lines(command: str, width: int) -> list[str]:
    """Break a command into lines of at most ``width`` cells, all but the last ending in a backslash.

    An option stays on the line of its first value if possible. A word longer than a line stays whole.
    """
    if cell_len(command) <= width:
        return [command]
    words = [shlex.quote(word) for word in shlex.split(command)]
    parts: list[str] = []
    for i, word in enumerate(words):
        has_option = i > 0 and words[i - 1].startswith("-") and "=" not in words[i - 1] and not word.startswith("-")
        if has_option and cell_len(f"    {parts[-1]} {word} \\") <= width:
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
