"""The paper's findings, measured on this study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from autointerp.findings.paper.finding import AGREES, DISAGREES, SIGNED, UNDECIDED
from autointerp.report.blocks import Block, Command, Rows, Section, Sentence, Span, Table, numbers, quiet, strong
from autointerp.report.numbers import plural
from sae.common.amounts import estimate, is_known

_STYLES = {AGREES: "accent", DISAGREES: "one", UNDECIDED: "quiet"}
_TALLY = {AGREES: "in agreement", DISAGREES: "in disagreement", UNDECIDED: "undecided"}
_MARKS = {AGREES: "+", DISAGREES: "−", UNDECIDED: "?"}


def findings(found: Mapping[str, Any]) -> Section | None:
    """Every finding: its value here with the interval, the paper's value, the verdict, and why."""
    rows: Sequence[Mapping[str, Any]] = found["findings"]
    if not rows:
        return None
    says = (
        "Each finding of Paulo & Belrose (arXiv 2501.16615), decided by a written rule on an interval: it agrees in "
        "direction, disagrees, or cannot be decided from these data."
    )
    details = [block for row in rows for block in _describe(row)]
    return Section("The paper's findings, measured here", says, [Sentence(tally(rows))], details)


def tally(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    parts = ", ".join(f"{counts[verdict]} {words}" for verdict, words in _TALLY.items() if counts[verdict])
    return f"Of {plural(len(rows), 'finding')}: {parts}."


def _describe(row: Mapping[str, Any]) -> list[Block]:
    has_value = is_known(row["value"])
    value = f"   {estimate(row['value'], (row['low'], row['high']), sign=row['unit'] == SIGNED)}" if has_value else ""
    head: list[str | Span] = [strong(f"{row['id']:<13}"), Span(row["verdict"], _STYLES[row["verdict"]]), value]
    blocks: list[Block] = [
        Sentence(head, is_apart=True),
        Sentence(f"{row['finding']}; paper: {row['reference']}", indent=2),
    ]
    if has_value:
        blocks.append(Sentence(quiet(f"here: {row['measure']}"), indent=2))
    blocks.append(Sentence(quiet(row["why"]), indent=2))
    return [*blocks, Command(row["command"])] if row["command"] else blocks


def by_point(points: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Table | None:
    """The verdict of every point of a sweep on each finding about a study, one mark each."""
    ids = list(dict.fromkeys(row["id"] for _, rows in points for row in rows))
    if not ids:
        return None
    verdicts = [{row["id"]: row["verdict"] for row in rows} for _, rows in points]
    rows: Rows = [
        [name, *(Span(_MARKS[of[name]], _STYLES[of[name]]) if name in of else quiet("–") for of in verdicts)]
        for name in ids
    ]
    return Table(["", *numbers(*(label for label, _ in points))], rows)
