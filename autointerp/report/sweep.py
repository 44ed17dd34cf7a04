"""A sweep in the terminal: its points as tables, what is shared as a chart over the swept setting, its findings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from autointerp.journal.method import ENOUGH_TO_CALL_DEAD
from autointerp.report import blocks, paper
from autointerp.report.layout import (
    ACCENT,
    QUIET,
    STYLE_OF_CLASS,
    Page,
    count,
    grid,
    human,
    indented,
    legend,
    listed,
    percent,
    percent_interval,
    plural,
    section,
)
from autointerp.report.terminal import emit
from autointerp.report.visible import shown, visible
from sae.common.amounts import decimal, interval
from sae.study.sweep import AXES

Table = Mapping[str, Any]
_HEIGHT = 10
_WIDEST_BAR = 7


def show_sweep(found: Table, console: Console) -> None:
    page = Page.of(console)
    parts = [_head(found, page), paper.findings(found, page), _trained(found, page), _shared(found, page)]
    parts += [_chart(found, page), _scored(found, page), _by_point(found, page)]
    emit(Group(*(part for part in parts if part is not None), Text()), console, page.width)


def _head(found: Table, page: Page) -> RenderableType:
    n, seeds = len(found["points"]), found["seeds"]
    title = Text.assemble(
        (visible(found["sweep"]), f"bold {ACCENT}"),
        (f"   {plural(n, 'point')} × {plural(len(seeds), 'seed')} = {n * len(seeds)} SAEs on one stream", "bold"),
    )
    table = grid(("", "left"), ("", "fold"), head=False)
    table.add_row(Text("subject", QUIET), shown(f"{found['subject']['model']} · {_hookpoints(found)}"))
    for axis, values in found["axes"].items():
        table.add_row(Text(AXES[axis].words, QUIET), shown(", ".join(_written(axis, v) for v in values)))
    table.add_row(Text("seeds", QUIET), " ".join(map(str, seeds)))
    return Group(title, Text("━" * page.width, ACCENT, no_wrap=True), table)


def _hookpoints(found: Table) -> str:
    return listed(list(dict.fromkeys(str(point["hookpoint"]) for point in found["points"])))


def _written(axis: str, value: Any) -> str:
    """A value of an axis in a table or under a chart."""
    if axis == "training.tokens":
        return human(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _leading(found: Table) -> list[str]:
    """The axes that tell points apart: of those that advance together, the first."""
    return [axis for axis in found["axes"] if axis not in found["together"][1:]]


def _label(found: Table, point: Table, axes: Sequence[str] | None = None) -> str:
    wanted = _leading(found) if axes is None else axes
    return " ".join(_written(axis, point["values"][axis]) for axis in wanted)


def _axis_words(found: Table) -> str:
    return ", ".join(AXES[axis].words for axis in _leading(found))


def _by_point(found: Table, page: Page) -> RenderableType | None:
    table = paper.by_point([(_label(found, point), point["findings"]) for point in found["points"]], page)
    if table is None:
        return None
    says = f"Agrees in direction (+), disagrees (−), cannot tell (?), by {_axis_words(found)}; --json has the reasons."
    return section(page, "The other findings at each point", says, table)


def _trained(found: Table, page: Page) -> RenderableType:
    says = "Means over seeds; FVU is the share of variance that the SAE fails to reproduce, L0 the latents per token."
    enough = all((point["harvested"] or 0) >= ENOUGH_TO_CALL_DEAD for point in found["points"])
    heads = ("alive", "FVU", "L0", "dead" if enough else "silent", "tokens")
    table = grid(_axis_words(found), *((name, "right") for name in heads), "runs")
    for point in found["points"]:
        runs = point["runs"]
        named = runs[0] if len(runs) == 1 else f"{runs[0]} … {runs[-1].rpartition('_')[2]}"
        table.add_row(
            Text(visible(_label(found, point)), "bold"),
            count(point["alive"]),
            decimal(point["fvu"]),
            decimal(point["l0"], 2),
            percent(point["dead_fraction"]),
            human(point["tokens"]),
            Text(visible(named), QUIET),
        )
    return section(page, "How well the SAEs are trained", says, table)


def _shared(found: Table, page: Page) -> RenderableType:
    says = (
        "Fraction of alive latents that two seeds share, mean over pairs of seeds, by definition; cosine threshold .7."
    )
    compared = [point for point in found["points"] if point["shared"] is not None]
    if not compared:
        return section(page, "How much comes back", says, Text("It takes two seeds of a point: give --seeds 0 1 2."))
    names = ("both", "95 %", "chance", "strict", "decoder", "same p.", "nearest")
    table = grid(_axis_words(found), *((name, "right") for name in names))
    cosines = grid(
        _axis_words(found), *((name, "right") for name in ("decoder cosine", "95 %", "encoder cosine", "95 %"))
    )
    for point in compared:
        shared, label = point["shared"], Text(visible(_label(found, point)), "bold")
        table.add_row(
            label,
            percent(shared["both"]["value"]),
            percent_interval(shared["both"]["interval"]),
            Text(percent(shared["both"]["null"].get("rotated")), QUIET),
            *(percent(shared[name]["value"]) for name in ("strict", "decoder", "lenient")),
            percent(point["max_cosine"]["value"]),
        )
        told = (point["cosines"][name] for name in ("mean_decoder", "mean_encoder"))
        cosines.add_row(label, *(cell for of in told for cell in (decimal(of["value"]), interval(of["interval"]))))
    notes = "same p.: both matchings pick one partner, any cosine; nearest: taken or not. Intervals: over latents.\n"
    return section(page, "How much comes back", says, table, Text(notes, QUIET), cosines)


# --- chart ---------------------------------------------------------------------------------------------------------


def _chart(found: Table, page: Page) -> RenderableType | None:
    """The paper's figure 4 for each numeric axis: the fraction shared over the setting, on a logarithmic scale."""
    numeric = [axis for axis in _leading(found) if all(isinstance(v, int | float) for v in found["axes"][axis])]
    axis = numeric[0] if numeric else None
    points = [point for point in found["points"] if point["shared"] is not None]
    if axis is None or not points:
        return None
    body: list[RenderableType] = []
    rest = [other for other in _leading(found) if other != axis]
    for group in dict.fromkeys(_label(found, point, rest) for point in points):
        inside = [point for point in points if _label(found, point, rest) == group]
        body += [Text(f"\n{visible(group)}", "bold")] if group else []
        body += list(_bars(axis, sorted(inside, key=lambda p: p["values"][axis]), page))
    fills = ("█", "█") if page.colour else ("█", "░")
    names = "both cosines > .7", "same partner"
    styles = STYLE_OF_CLASS["all"], STYLE_OF_CLASS["one"]
    body += [Text(), legend([(fill, style, name) for fill, style, name in zip(fills, styles, names, strict=True)])]
    says = f"Fraction of alive latents shared by two seeds, by {AXES[axis].words} (logarithmic)."
    return section(page, f"Overlap by {AXES[axis].words}", says, *body)


def _bars(axis: str, points: Sequence[Table], page: Page) -> Iterator[RenderableType]:
    """A bar for each point: what both cosines share in front of what has the same partner; 0 to 1."""
    width = page.width - 8
    bar, places = _places([math.log(point["values"][axis]) for point in points], width)
    both, same = [0.0] * width, [0.0] * width
    for place, point in zip(places, points, strict=True):
        front, back = (point["shared"][name]["value"] or 0.0 for name in ("both", "lenient"))
        for cell in range(place, place + bar):
            both[cell], same[cell] = front, max(0.0, back - front)
    layers = blocks.Layer(both, STYLE_OF_CLASS["all"], "█"), blocks.Layer(same, STYLE_OF_CLASS["one"], "░")
    for i, line in enumerate(blocks.stacked_columns(*layers, _HEIGHT, colour=page.colour, top=1.0)):
        level = 1 - i / _HEIGHT
        yield Text.assemble((f"{decimal(level, 1):>4} ┤" if i % 2 == 0 else "     │", QUIET), line)
    ticks = [
        blocks.Tick(p + bar // 2, _written(axis, point["values"][axis]))
        for p, point in zip(places, points, strict=True)
    ]
    rule, labels = blocks.axis(width, ticks)
    yield Text.assemble(("   0 ┼", QUIET), rule)
    yield indented(labels, 6)


def _places(at: Sequence[float], width: int) -> tuple[int, list[int]]:
    """How wide the bars are, and the first cell of each; evenly spaced where the scale would put one on another."""
    if len(at) == 1:
        return _WIDEST_BAR, [(width - _WIDEST_BAR) // 2]
    low, span = min(at), max(at) - min(at)
    for even in (False, True):
        shares = [i / (len(at) - 1) for i in range(len(at))] if even else [(x - low) / span for x in at]
        for bar in range(_WIDEST_BAR, 0, -2):
            places = [round(share * (width - bar)) for share in shares]
            if all(b - a > bar for a, b in itertools.pairwise(places)):
                return bar, places
    return 1, [min(i, width - 1) for i in range(len(at))]


# --- scores --------------------------------------------------------------------------------------------------------


def _scored(found: Table, page: Page) -> RenderableType | None:
    scored = [point for point in found["points"] if point["scores"] is not None]
    if not scored:
        return None
    judges = listed(sorted({visible(str(point["scores"]["judge"])) for point in scored}))
    says = (
        f"Balanced accuracy of detection, and its rank correlation with the similarity to other seeds. Judge: {judges}."
    )
    table = grid(
        _axis_words(found), *((name, "right") for name in ("latents", "mean", "95 %", "swapped", "Spearman", "95 %"))
    )
    for point in scored:
        of, relation = point["scores"], point["scores"]["spearman"] or {}
        table.add_row(
            Text(visible(_label(found, point)), "bold"),
            count(of["n_scored"]),
            decimal(of["mean"]),
            interval(of["interval"]),
            Text(decimal(of["control"]), QUIET),
            decimal(relation.get("spearman"), 2, sign=True),
            interval(relation.get("interval"), 2, sign=True),
        )
    return section(page, "How well the latents can be explained", says, table)


# --- dry run -------------------------------------------------------------------------------------------------------


def show_forecast(found: Table, console: Console) -> None:
    page = Page.of(console)
    n = len(found["points"])
    title = Text.assemble(
        (visible(found["sweep"]), f"bold {ACCENT}"),
        (f"   {plural(n, 'point')} × {plural(len(found['seeds']), 'seed')} = {found['n_saes']} SAEs", "bold"),
    )
    table = grid("study", ("tokens", "right"), ("training", "right"))
    for point in found["points"]:
        table.add_row(visible(point["name"]), human(point["tokens"]), _duration(point["training_seconds"]))
    table.add_row(Text("subject model", QUIET), human(found["stream_tokens"]), _duration(found["stream_seconds"]))
    told = f"No estimate of time: {visible(found['no_estimate'] or '')}"
    if found["no_estimate"] is None:
        steps, seconds = plural(found["probe_steps"], "timed step"), _duration(found["training_seconds"])
        told = (
            f"By {steps} of each: {seconds} of training in all, without the revival of dead latents, harvest, "
            "alignment and scores."
        )
    emit(Group(title, Text(), table, Text(f"\n{told}")), console, page.width)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
