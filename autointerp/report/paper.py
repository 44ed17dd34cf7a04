"""The paper's findings, measured here: the findings table, as the terminal shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from autointerp.findings.paper.finding import AGREES, DISAGREES, SIGNED, UNDECIDED
from autointerp.report.layout import ACCENT, QUIET, STYLE_OF_CLASS, Page, command_line, grid, indented, plural, section
from autointerp.report.visible import visible
from sae.common.amounts import estimate, is_known

_STYLES = {AGREES: ACCENT, DISAGREES: STYLE_OF_CLASS["one"], UNDECIDED: QUIET}


def findings(found: Mapping[str, Any], page: Page) -> RenderableType | None:
    """Every row: what was found here with its interval, the paper's value, the verdict, and why."""
    rows: Sequence[Mapping[str, Any]] = found["findings"]
    if not rows:
        return None
    says = (
        "Each finding of Paulo & Belrose (arXiv 2501.16615), decided by a written rule on an interval: it agrees in "
        "direction, disagrees, or the data at hand cannot tell."
    )
    counts = Counter(row["verdict"] for row in rows)
    told = ", ".join(f"{counts[verdict]} {words}" for verdict, words in _TALLY if counts[verdict])
    body: list[RenderableType] = [Text(f"Of {plural(len(rows), 'finding')}: {told}.")]
    for row in rows:
        body += _one(row)
    return section(page, "The paper's findings, measured here", says, *body)


_TALLY = (AGREES, "in agreement"), (DISAGREES, "in disagreement"), (UNDECIDED, "undecided")


def _one(row: Mapping[str, Any]) -> list[RenderableType]:
    head = Text.assemble((f"\n{row['id']:<13}", "bold"), (row["verdict"], _STYLES[row["verdict"]]))
    if is_known(row["value"]):
        head.append(f"   {value(row)}")
    lines: list[RenderableType] = [head, indented(Text(f"{row['finding']}; paper: {row['reference']}"))]
    if is_known(row["value"]):
        lines.append(indented(Text(f"here: {row['measure']}", QUIET)))
    lines.append(indented(Text(visible(row["why"]), QUIET)))
    return [*lines, indented(command_line(row["command"]), 0)] if row["command"] else lines


_MARKS = {AGREES: "+", DISAGREES: "−", UNDECIDED: "?"}


def by_point(points: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], page: Page) -> RenderableType | None:
    """The verdict of every point of a sweep on each finding about a study: one mark each, where they fit."""
    ids = list(dict.fromkeys(row["id"] for _, rows in points for row in rows))
    if not ids or sum(len(label) + 2 for label, _ in points) + 13 > page.width:
        return None
    table = grid("", *((visible(label), "right") for label, _ in points))
    for name in ids:
        cells = []
        for _, rows in points:
            verdict = next((row["verdict"] for row in rows if row["id"] == name), None)
            cells.append(Text(_MARKS[verdict], _STYLES[verdict]) if verdict else Text("–", QUIET))
        table.add_row(name, *cells)
    return table


def value(row: Mapping[str, Any]) -> str:
    """The value with its interval, in the finding's unit."""
    return estimate(row["value"], (row["low"], row["high"]), sign=row["unit"] == SIGNED)
