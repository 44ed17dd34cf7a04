"""How each seed's training went, as small curves side by side: the seeds of a row share one scale, so a seed that went
another way than its siblings is seen at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from autointerp.report import blocks
from autointerp.report.layout import ACCENT, QUIET, Page, grid, percent
from autointerp.report.visible import visible
from sae.common.amounts import decimal

_NARROWEST, _WIDEST = 9, 40  # cells of a curve
_BESIDE = 36  # what name and range take


def _rate(value: float) -> str:
    return f"{value:.2g}"


#: Column of the training log, its name, whether its logarithm is drawn, how its values are written.
_ROWS: tuple[tuple[str, str, bool, Callable[[float], str]], ...] = (
    ("loss", "loss", True, decimal),
    ("fvu", "FVU", True, decimal),
    ("l0", "L0", False, lambda value: decimal(value, 1)),
    ("dead_fraction", "dead", False, percent),
    ("learning_rate", "learning rate", False, _rate),
)


def training_curves(curves: Mapping[str, Mapping[str, Any]], page: Page) -> Iterator[RenderableType]:
    """One table of ``curves`` (by run, then by column of the training log), or several where the runs are many."""
    names = list(curves)
    abreast = max(1, min(len(names), (page.width - _BESIDE) // (_NARROWEST + 2)))
    width = min(_WIDEST, (page.width - _BESIDE) // abreast - 2)
    spans = {column: _span(curve[column] for curve in curves.values()) for column, *_ in _ROWS}
    for first in range(0, len(names), abreast):
        shown = names[first : first + abreast]
        table = grid("", ("scale", "right"), *(_shortened(visible(name), width) for name in shown))
        for column, label, log, written in _ROWS:
            span = spans[column]
            if span is None:
                continue
            lines = [blocks.sparkline(_numbers(curves[n][column]), width, ACCENT, log=log, span=span) for n in shown]
            low, high = written(span[0]), written(span[1])
            table.add_row(label, Text(low if low == high else f"{low} – {high}", QUIET), *lines)
        yield Text()
        yield table


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _span(values: Any) -> tuple[float, float] | None:
    """The smallest and largest of several curves; ``None`` where nothing is known."""
    known = [value for value in chain.from_iterable(values) if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known else None


def _shortened(name: str, width: int) -> str:
    """``name`` in ``width`` cells; its end, where runs of a study differ, is kept."""
    return name if len(name) <= width else "…" + name[1 - width :]
