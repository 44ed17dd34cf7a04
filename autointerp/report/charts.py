"""Draw charts with block characters, for the terminal.

Pure functions from numbers to ``rich.text.Text``. Every chart is legible without colour (a pipe, a log file, a
colour-blind reader): neighbouring parts of a bar differ in fill as well as in hue, and hue alone never shows a length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

#: Hues that people with any of the common colour-vision deficiencies can tell apart (Okabe and Ito). Orange is found in
#: one SAE alone, blue in every SAE; controls and context are grey.
STYLE_OF_CLASS = {"one": "#e69f00", "some": "#56b4e9", "all": "#2f8fd8"}
ACCENT = "#2f8fd8"

# Eighths of a cell, as heights (columns that grow upwards) and as widths (bars that grow to the right).
HEIGHTS = " ▁▂▃▄▅▆▇█"
WIDTHS = " ▏▎▍▌▋▊▉█"
#: Fills that can be distinguished in one colour, darkest first.
FILLS = "█▒░▓"


class Part(NamedTuple):
    """One piece of a stacked bar: its size (any unit, at least 0), its style and its fill character."""

    size: float
    style: str
    fill: str = "█"


def shares(sizes: Sequence[float], width: int) -> list[int]:
    """Return whole cells for each size, summing to ``width``; every positive size gets at least one if they fit.

    By largest remainders: no part is more than one cell from its true length, except those raised to one cell.
    """
    total = math.fsum(sizes)
    if total <= 0 or width <= 0:
        return [0] * len(sizes)
    exact = [size / total * width for size in sizes]
    cells = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (cells[i] - exact[i], i))
    for i in by_remainder[: width - sum(cells)]:
        cells[i] += 1
    for i, size in enumerate(sizes):
        largest = max(range(len(cells)), key=lambda j: cells[j])
        if size > 0 and cells[i] == 0 and cells[largest] > 1:
            cells[i], cells[largest] = 1, cells[largest] - 1
    return cells


def stacked_bar(parts: Sequence[Part], width: int) -> Text:
    """Draw one bar of ``width`` cells, divided in proportion to the parts."""
    bar = Text(no_wrap=True)
    for part, cells in zip(parts, shares([part.size for part in parts], width), strict=True):
        bar.append(part.fill * cells, part.style)
    return bar


def bar(fraction: float, width: int, style: str = "") -> Text:
    """Draw ``fraction`` (cut to 0–1) of ``width`` cells, to an eighth of a cell; the rest is dotted."""
    fraction = 0.0 if math.isnan(fraction) else min(1.0, max(0.0, fraction))
    full, part = divmod(round(fraction * width * 8), 8)
    drawn = "█" * full + (WIDTHS[part] if part else "")
    return Text.assemble((drawn, style), ("·" * (width - len(drawn)), "dim"), no_wrap=True)


def _levels(counts: Sequence[float], height: int, top: float | None = None) -> list[int]:
    """Return counts in eighths of a cell, the largest filling ``height`` cells; every positive count is visible."""
    peak = max(counts, default=0) if top is None else top
    if peak <= 0:
        return [0] * len(counts)
    return [min(height * 8, max(1, round(count / peak * height * 8))) if count > 0 else 0 for count in counts]


def columns(counts: Sequence[float], height: int, *, cell: int = 1, style: str = "") -> list[Text]:
    """Draw a histogram as ``height`` lines, uppermost first; every bin is ``cell`` cells wide."""
    levels = _levels(counts, height)
    return [
        Text("".join(HEIGHTS[min(8, max(0, level - 8 * row))] * cell for level in levels), style, no_wrap=True)
        for row in reversed(range(height))
    ]


class Layer(NamedTuple):
    """One of two stacked histograms: counts per bin, style, and fill without colour."""

    counts: Sequence[float]
    style: str
    fill: str


def stacked_columns(
    lower: Layer, upper: Layer, height: int, *, cell: int = 1, colour: bool = True, top: float | None = None
) -> list[Text]:
    """Draw two histograms over the same bins, ``upper`` on top of ``lower``; otherwise like :func:`columns`.

    Accurate to an eighth of a cell with colour, else to whole cells of either fill.
    """
    whole = [a + b for a, b in zip(lower.counts, upper.counts, strict=True)]
    tops = _levels(whole, height, top)
    borders = [round(top * a / total) if total else 0 for top, a, total in zip(tops, lower.counts, whole, strict=True)]
    draw = _stacked_cell if colour else _stacked_cell_plain
    lines: list[Text] = []
    for row in reversed(range(height)):
        line = Text(no_wrap=True)
        for border, top in zip(borders, tops, strict=True):
            inside = min(8, max(0, border - 8 * row)), min(8, max(0, top - 8 * row))
            glyph, style = draw(*inside, lower, upper, row == 0)
            line.append(glyph * cell, style)
        lines.append(line)
    return lines


def _stacked_cell(border: int, top: int, lower: Layer, upper: Layer, _: bool) -> tuple[str, str]:
    """Draw a cell filled by ``lower`` up to ``border`` eighths, and then by ``upper`` up to ``top``."""
    if border in (0, top):
        return HEIGHTS[top], upper.style if border == 0 else lower.style
    if top == 8:
        return HEIGHTS[border], f"{lower.style} on {upper.style}"
    # Three shades do not fit in one cell: the thicker layer has it.
    return HEIGHTS[top], lower.style if 2 * border >= top else upper.style


def _stacked_cell_plain(border: int, top: int, lower: Layer, upper: Layer, bottom: bool) -> tuple[str, str]:
    if top < 4 and not (bottom and top):
        return " ", ""
    return lower.fill if 2 * border >= top else upper.fill, ""


def _divide(values: Sequence[float], width: int) -> list[Sequence[float]]:
    """Divide ``values`` into at most ``width`` equal runs."""
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)] if n else []
    return [values[low:high] for low, high in itertools.pairwise(edges)]


def resampled(values: Sequence[float], width: int) -> list[float]:
    """Return at most ``width`` values: the means of equal runs of ``values``, missing ones skipped."""
    runs = [[v for v in run if math.isfinite(v)] for run in _divide(values, width)]
    return [math.fsum(v / len(run) for v in run) if run else math.nan for run in runs]


def pooled(counts: Sequence[float], width: int) -> list[float]:
    """Add ``counts`` up into at most ``width`` bins."""
    return [sum(run) for run in _divide(counts, width)]


def sparkline(
    values: Sequence[float], width: int, style: str = "", *, log: bool = False, span: Sequence[float] = ()
) -> Text:
    """Draw a series in one line, from its smallest value (lowest block) to its largest, with gaps for missing ones.

    ``log`` takes logarithms first, so that the end of a loss curve stays visible. ``span`` is the lowest and highest
    value of a scale shared by several series.
    """

    def scaled(value: float) -> float:
        if not log:
            return value
        return math.log(value) if math.isfinite(value) and value > 0 else math.nan

    series = [scaled(v) for v in resampled(values, width)]
    known = [v for v in series if math.isfinite(v)]
    if not known:
        return Text("")
    known += [v for v in map(scaled, span) if math.isfinite(v)]
    low, high = min(known), max(known)
    step = high / 7 - low / 7
    flat = step <= 1e-9 * max(abs(low), abs(high))  # a difference in the last bits is none to look at
    line = "".join(
        " " if not math.isfinite(v) else HEIGHTS[4 if flat else 1 + round(v / step - low / step)] for v in series
    )
    return Text(line, style, no_wrap=True)


def strip(counts: Sequence[float], style: str = "") -> Text:
    """Draw a histogram in one line, scaled to its own largest bin; empty bins are dots."""
    line = Text(no_wrap=True)
    for level in _levels(counts, 1):
        line.append(HEIGHTS[level] if level else "·", style if level else "dim")
    return line


def whisker(
    value: float, low: float, high: float, start: float, stop: float, width: int, mark: float = math.nan
) -> Text:
    """Draw an estimate with its interval on a scale from ``start`` to ``stop``: ``··┊··├──●──┤·····``.

    ``mark`` is the marked value of the scale (no correlation).
    """

    def cell_of(x: float) -> int:
        return min(width - 1, max(0, int((x - start) / (stop - start) * width)))

    if stop <= start:
        return Text("·" * width, "dim", no_wrap=True)
    drawn = ["·"] * width
    if math.isfinite(mark):
        drawn[cell_of(mark)] = "┊"
    if not all(map(math.isfinite, (value, low, high))):
        return Text("".join(drawn), "dim", no_wrap=True)
    left, middle, right = cell_of(low), cell_of(value), cell_of(high)
    drawn[left : right + 1] = "─" * (right + 1 - left)
    drawn[left], drawn[right] = "├", "┤"
    drawn[middle] = "●"
    inside = "".join(drawn[left : right + 1])
    before, after = "".join(drawn[:left]), "".join(drawn[right + 1 :])
    return Text.assemble((before, "dim"), (inside, ACCENT), (after, "dim"), no_wrap=True)


class Tick(NamedTuple):
    """A label under an axis, at a cell boundary counted from the left."""

    cell: float
    label: str
    style: str = "dim"


def axis(width: int, ticks: Sequence[Tick]) -> tuple[Text, Text]:
    """Draw an axis of ``width`` cells and its labels; a label that would touch an earlier tick's is skipped."""
    rule, labels = ["─"] * width, [" "] * (width + 6)
    styled: list[tuple[int, int, str]] = []
    for tick in ticks:
        at = min(width - 1, max(0, round(tick.cell)))
        begin = max(0, min(at - (len(tick.label) - 1) // 2, len(labels) - len(tick.label)))
        end = begin + len(tick.label)
        if any(letter != " " for letter in labels[max(0, begin - 1) : end + 1]):
            continue
        rule[at] = "┴"
        labels[begin:end] = tick.label
        styled.append((begin, end, tick.style))
    under = Text("".join(labels).rstrip(), no_wrap=True)
    for begin, end, style in styled:
        under.stylize(style, begin, end)
    return Text("".join(rule), "dim", no_wrap=True), under


def legend(names: Sequence[str], has_colour: bool) -> Text:
    """Draw ``██ name   ██ name`` for two layers: the upper in blue or solid, the lower in orange or dotted."""
    text = Text()
    for i, (name, key) in enumerate(zip(names, ("all", "one"), strict=True)):
        text.append("   " if i else "")
        text.append(("█" if has_colour or not i else "░") * 2, STYLE_OF_CLASS[key])
        text.append(f" {name}")
    return text
