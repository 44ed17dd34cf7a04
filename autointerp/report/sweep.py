"""Show a sweep: its points as tables, overlap as a chart over the swept setting, its findings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from autointerp.journal.method import ENOUGH_TO_CALL_DEAD
from autointerp.report import charts, paper
from autointerp.report.blocks import (
    Block,
    Cell,
    Chart,
    Facts,
    Heads,
    Rows,
    Section,
    Sentence,
    Table,
    Title,
    numbers,
    quiet,
    strong,
)
from autointerp.report.charts import STYLE_OF_CLASS
from autointerp.report.numbers import chance_level, count, human, listed, percent, percent_interval, plural
from sae.common.amounts import decimal, interval
from sae.study.recipes import AXES

Found = Mapping[str, Any]
_HEIGHT = 10
_WIDEST_BAR = 7


def sweep_page(found: Found) -> list[Block | Section | None]:
    head = [*_head(found), paper.findings(found), _trained(found), _shared(found)]
    return [*head, _overlap_chart(found), _scored(found), _by_point(found)]


def _head(found: Found) -> Iterator[Block]:
    n, seeds = len(found["points"]), found["seeds"]
    yield Title(
        found["sweep"],
        f"{plural(n, 'point')} × {plural(len(seeds), 'seed')} = {n * len(seeds)} SAEs on one stream",
    )
    hookpoints = listed(list(dict.fromkeys(str(point["hookpoint"]) for point in found["points"])))
    axes = [(AXES[axis].words, ", ".join(_write(axis, v) for v in values)) for axis, values in found["axes"].items()]
    subject = f"{found['subject']['model']} · {hookpoints}"
    yield Facts([("subject model", subject), *axes, ("seeds", " ".join(map(str, seeds)))])


def _write(axis: str, value: Any) -> str:
    """Format a value of an axis for a table or chart."""
    if axis == "training.tokens":
        return human(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _leading(found: Found) -> list[str]:
    """Return the axes that distinguish points: of those that advance together, the first."""
    return [axis for axis in found["axes"] if axis not in found["together"][1:]]


def _label(found: Found, point: Found, axes: Sequence[str] | None = None) -> str:
    return " ".join(_write(axis, point["values"][axis]) for axis in (_leading(found) if axes is None else axes))


def _axis_names(found: Found) -> str:
    return ", ".join(AXES[axis].words for axis in _leading(found))


def _by_point(found: Found) -> Section | None:
    table = paper.by_point([(_label(found, point), point["findings"]) for point in found["points"]])
    if table is None:
        return None
    says = f"Agrees in direction (+), disagrees (−), cannot tell (?), by {_axis_names(found)}; --json has the reasons."
    return Section("The other findings at each point", says, [table])


def _trained(found: Found) -> Section:
    says = "Means over seeds; FVU is the share of variance that the SAE fails to reproduce, L0 the latents per token."
    is_enough = all((point["harvested"] or 0) >= ENOUGH_TO_CALL_DEAD for point in found["points"])
    rows: Rows = []
    for point in found["points"]:
        runs = point["runs"]
        names = runs[0] if len(runs) == 1 else f"{runs[0]} … {runs[-1].rpartition('_')[2]}"
        cells = [count(point["alive"]), decimal(point["fvu"]), decimal(point["l0"], 2)]
        cells += [percent(point["dead_fraction"]), human(point["tokens"])]
        rows.append([strong(_label(found, point)), *cells, quiet(names)])
    heads: Heads = [
        _axis_names(found),
        *numbers("alive", "FVU", "L0", "dead" if is_enough else "silent", "tokens"),
        "runs",
    ]
    return Section("How well the SAEs are trained", says, [Table(heads, rows)])


def _shared(found: Found) -> Section:
    title = "How much is shared"
    says = (
        "Fraction of alive latents that two seeds share, mean over pairs of seeds, by definition; cosine threshold .7."
    )
    compared = [point for point in found["points"] if point["shared"] is not None]
    if not compared:
        return Section(title, says, [Sentence("Each point needs two seeds: give --seeds 0 1 2.")])
    rows: Rows = []
    cosines: Rows = []
    for point in compared:
        shared, label = point["shared"], strong(_label(found, point))
        both = shared["both"]
        cells: list[Cell] = [percent(both["value"]), percent_interval(both["interval"])]
        cells.append(quiet(percent(chance_level(both["null"]))))
        cells += [percent(shared[name]["value"]) for name in ("strict", "decoder", "lenient")]
        rows.append([label, *cells, percent(point["max_cosine"]["value"])])
        means = [point["cosines"][name] for name in ("mean_decoder", "mean_encoder")]
        cosines.append([label, *(cell for of in means for cell in (decimal(of["value"]), interval(of["interval"])))])
    axis = _axis_names(found)
    notes = ["lenient: both matchings pick one partner, any cosine; nearest: matched or not. Intervals: over latents."]
    names = ("both", "95 %", "chance level", "strict", "decoder", "lenient", "nearest")
    shares = Table([axis, *numbers(*names)], rows, notes)
    return Section(
        title, says, [shares, Table([axis, *numbers("decoder cosine", "95 %", "encoder cosine", "95 %")], cosines)]
    )


def _overlap_chart(found: Found) -> Section | None:
    """Draw the paper's figure 4 for the first numeric axis: the fraction shared on a logarithmic scale."""
    numeric = [axis for axis in _leading(found) if all(isinstance(v, int | float) for v in found["axes"][axis])]
    axis = numeric[0] if numeric else None
    points = [point for point in found["points"] if point["shared"] is not None]
    if axis is None or not points:
        return None
    body: list[Block] = []
    rest = [other for other in _leading(found) if other != axis]
    for group in dict.fromkeys(_label(found, point, rest) for point in points):
        inside = sorted((p for p in points if _label(found, p, rest) == group), key=lambda p: p["values"][axis])
        body += [Sentence(strong(group))] if group else []
        body.append(Chart(lambda width, colour, of=inside: _bars(axis, of, width, colour)))  # type: ignore[misc]
    body.append(Chart(lambda _, colour: [charts.legend(("both cosines > .7", "same partner"), colour)]))
    says = f"Fraction of alive latents shared by two seeds, by {AXES[axis].words} (logarithmic)."
    return Section(f"Overlap by {AXES[axis].words}", says, body)


def _bars(axis: str, points: Sequence[Found], width: int, has_colour: bool) -> Iterator[Text]:
    """Draw a bar for each point, 0 to 1: the share with both cosines above .7, before that with the same partner."""
    width -= 6
    bar, places = _places([math.log(point["values"][axis]) for point in points], width)
    both, same = [0.0] * width, [0.0] * width
    for place, point in zip(places, points, strict=True):
        front, back = (point["shared"][name]["value"] or 0.0 for name in ("both", "lenient"))
        for cell in range(place, place + bar):
            both[cell], same[cell] = front, max(0.0, back - front)
    layers = charts.Layer(both, STYLE_OF_CLASS["all"], "█"), charts.Layer(same, STYLE_OF_CLASS["one"], "░")
    for i, line in enumerate(charts.stacked_columns(*layers, _HEIGHT, colour=has_colour, top=1.0)):
        level = f"{decimal(1 - i / _HEIGHT, 1):>4} ┤" if i % 2 == 0 else "     │"
        yield Text.assemble((level, "dim"), line)
    ticks = [
        charts.Tick(place + bar // 2, _write(axis, point["values"][axis]))
        for place, point in zip(places, points, strict=True)
    ]
    rule, labels = charts.axis(width, ticks)
    yield Text.assemble(("   0 ┼", "dim"), rule)
    yield Text.assemble(" " * 6, labels)


def _places(at: Sequence[float], width: int) -> tuple[int, list[int]]:
    """Return the width of the bars and the first cell of each; evenly spaced if they would overlap on the scale."""
    if len(at) == 1:
        return _WIDEST_BAR, [(width - _WIDEST_BAR) // 2]
    low, span = min(at), max(at) - min(at)
    for is_even in (False, True):
        shares = [i / (len(at) - 1) for i in range(len(at))] if is_even else [(x - low) / span for x in at]
        for bar in range(_WIDEST_BAR, 0, -2):
            places = [round(share * (width - bar)) for share in shares]
            if all(b - a > bar for a, b in itertools.pairwise(places)):
                return bar, places
    return 1, [min(i, width - 1) for i in range(len(at))]


def _scored(found: Found) -> Section | None:
    scored = [point for point in found["points"] if point["scores"] is not None]
    if not scored:
        return None
    judges = listed(sorted({str(point["scores"]["judge"]) for point in scored}))
    says = (
        f"Balanced accuracy of detection, and its rank correlation with the similarity to other seeds. Judge: {judges}."
    )
    rows: Rows = []
    for point in scored:
        of, relation = point["scores"], point["scores"]["spearman"] or {}
        spearman = [decimal(relation.get("spearman"), 2, sign=True), interval(relation.get("interval"), 2, sign=True)]
        mean = [count(of["n_scored"]), decimal(of["mean"]), interval(of["interval"])]
        rows.append([strong(_label(found, point)), *mean, quiet(decimal(of["control"])), *spearman])
    heads: Heads = numbers("latents", "mean", "95 %", "swapped", "Spearman", "95 %")
    return Section("How well the latents can be explained", says, [Table([_axis_names(found), *heads], rows)])


def forecast_page(found: Found) -> list[Block]:
    """Show a sweep's dry run: each point's tokens and training time."""
    n = len(found["points"])
    title = Title(
        found["sweep"],
        f"{plural(n, 'point')} × {plural(len(found['seeds']), 'seed')} = {found['n_saes']} SAEs",
    )
    rows: Rows = [
        [point["name"], human(point["tokens"]), _duration(point["training_seconds"])] for point in found["points"]
    ]
    rows.append([quiet("subject model"), human(found["stream_tokens"]), _duration(found["stream_seconds"])])
    words = f"No estimate of time: {found['no_estimate'] or ''}"
    if found["no_estimate"] is None:
        steps, seconds = plural(found["probe_steps"], "timed step"), _duration(found["training_seconds"])
        words = (
            f"From {steps} of each: {seconds} of training in all, without the revival of dead latents, harvest, "
            "alignment and scores."
        )
    return [title, Table(["study", *numbers("tokens", "training")], rows), Sentence(words)]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
