"""Show a sweep: its points as tables, overlap as a chart over the swept setting, its findings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from rich.text import Text

from autointerp.findings.paper.finding import AGREES, DISAGREES, UNDECIDED
from autointerp.journal.method import ENOUGH_TO_CALL_DEAD
from autointerp.report import blocks as doc
from autointerp.report import charts
from autointerp.report.charts import STYLE_OF_CLASS
from autointerp.report.numbers import chance_level, count, human, listed, percent, percent_interval, plural
from autointerp.report.report import STYLE_OF_VERDICT, paper_findings
from sae.common.amounts import decimal, duration, interval
from sae.study.recipes import AXES

Tree = Mapping[str, Any]
_MARKS = {AGREES: "+", DISAGREES: "−", UNDECIDED: "?"}
_HEIGHT = 10
_WIDEST_BAR = 7


def sweep_page(found: Tree) -> list[doc.Block | doc.Section | None]:
    head = [*_head(found), paper_findings(found["findings"]), _trained(found), _shared(found)]
    return [*head, _overlap_chart(found), _scored(found), _by_point(found)]


def _title(found: Tree) -> doc.Title:
    n, n_seeds = len(found["points"]), len(found["seeds"])
    words = f"{plural(n, 'point')} × {plural(n_seeds, 'seed')} = {n * n_seeds} SAEs on one stream"
    return doc.Title(found["sweep"], words)


def _head(found: Tree) -> Iterator[doc.Block]:
    yield _title(found)
    hookpoints = listed(list(dict.fromkeys(str(point["hookpoint"]) for point in found["points"])))
    axes = [(AXES[axis].words, ", ".join(_write(axis, v) for v in values)) for axis, values in found["axes"].items()]
    subject = f"{found['subject']['model']} · {hookpoints}"
    yield doc.Facts([("subject model", subject), *axes, ("seeds", " ".join(map(str, found["seeds"])))])


def _write(axis: str, value: Any) -> str:
    """Format a value of an axis for a table or chart."""
    if axis == "training.tokens":
        return human(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _leading(found: Tree) -> list[str]:
    """Return the axes that distinguish points: of those that advance together, the first."""
    return [axis for axis in found["axes"] if axis not in found["together"][1:]]


def _label(found: Tree, point: Tree, axes: Sequence[str] | None = None) -> str:
    return " ".join(_write(axis, point["values"][axis]) for axis in (_leading(found) if axes is None else axes))


def _axis_names(found: Tree) -> str:
    return ", ".join(AXES[axis].words for axis in _leading(found))


def _by_point(found: Tree) -> doc.Section | None:
    """Mark the verdict of every point on each finding about a study."""
    verdicts = [{row["id"]: row["verdict"] for row in point["findings"]} for point in found["points"]]
    ids = list(dict.fromkeys(chain(*verdicts)))
    if not ids:
        return None
    dash = doc.quiet("–")
    marks = {verdict: doc.Span(_MARKS[verdict], style) for verdict, style in STYLE_OF_VERDICT.items()}
    rows: doc.Rows = [[name, *(marks[of[name]] if name in of else dash for of in verdicts)] for name in ids]
    table = doc.Table(["", *(f">{_label(found, point)}" for point in found["points"])], rows)
    says = f"Agrees in direction (+), disagrees (−), undecided (?), by {_axis_names(found)}; --json has the reasons."
    return doc.Section("The other findings at each point", says, [table])


def _trained(found: Tree) -> doc.Section:
    says = "Means over seeds; FVU is the share of variance that the SAE fails to reproduce, L0 the latents per token."
    is_enough = all((point["harvested"] or 0) >= ENOUGH_TO_CALL_DEAD for point in found["points"])
    rows: doc.Rows = []
    for point in found["points"]:
        runs = point["runs"]
        names = runs[0] if len(runs) == 1 else f"{runs[0]} … {runs[-1].rpartition('_')[2]}"
        cells = [count(point["alive"]), decimal(point["fvu"]), decimal(point["l0"], 2)]
        cells += [percent(point["dead_fraction"]), human(point["tokens"])]
        rows.append([doc.strong(_label(found, point)), *cells, doc.quiet(names)])
    dead = ">dead" if is_enough else ">silent"
    heads = [_axis_names(found), ">alive", ">FVU", ">L0", dead, ">tokens", "runs"]
    return doc.Section("How well the SAEs are trained", says, [doc.Table(heads, rows)])


def _shared(found: Tree) -> doc.Section:
    title = "How much is shared"
    says = (
        "Fraction of alive latents that two seeds share, mean over pairs of seeds, by definition; cosine threshold .7."
    )
    compared = [point for point in found["points"] if point["shared"] is not None]
    if not compared:
        return doc.Section(title, says, ["Each point needs two seeds: give --seeds 0 1 2."])
    rows: doc.Rows = []
    cosines: doc.Rows = []
    for point in compared:
        shared, label = point["shared"], doc.strong(_label(found, point))
        both, others = shared["both"], [percent(shared[name]["value"]) for name in ("strict", "decoder", "lenient")]
        chance, nearest = doc.quiet(percent(chance_level(both["null"]))), percent(point["max_cosine"]["value"])
        rows.append([label, percent(both["value"]), percent_interval(both["interval"]), chance, *others, nearest])
        means = [point["cosines"][name] for name in ("mean_decoder", "mean_encoder")]
        cosines.append([label, *(cell for of in means for cell in (decimal(of["value"]), interval(of["interval"])))])
    axis = _axis_names(found)
    notes = ["lenient: both matchings pick one partner, any cosine; nearest: matched or not. Intervals: over latents."]
    heads = [axis, ">both", ">95 %", ">chance level", ">strict", ">decoder", ">lenient", ">nearest"]
    table = doc.Table([axis, ">decoder cosine", ">95 %", ">encoder cosine", ">95 %"], cosines)
    return doc.Section(title, says, [doc.Table(heads, rows, notes), table])


def _overlap_chart(found: Tree) -> doc.Section | None:
    """Draw the paper's figure 4 for the first numeric axis: the fraction shared on a logarithmic scale."""
    numeric = (axis for axis in _leading(found) if all(isinstance(v, int | float) for v in found["axes"][axis]))
    axis = next(numeric, None)
    points = [point for point in found["points"] if point["shared"] is not None]
    if axis is None or not points:
        return None
    body: list[doc.Block] = []
    rest = [other for other in _leading(found) if other != axis]
    for group in dict.fromkeys(_label(found, point, rest) for point in points):
        inside = sorted((p for p in points if _label(found, p, rest) == group), key=lambda p: p["values"][axis])
        body += [doc.strong(group)] if group else []
        body.append(doc.Chart(lambda width, colour, of=inside: _bars(axis, of, width, colour)))  # type: ignore[misc]
    body.append(doc.Chart(lambda _, colour: [charts.legend(("both cosines > .7", "same partner"), colour)]))
    says = f"Fraction of alive latents shared by two seeds, by {AXES[axis].words} (logarithmic)."
    return doc.Section(f"Overlap by {AXES[axis].words}", says, body)


def _bars(axis: str, points: Sequence[Tree], width: int, has_colour: bool) -> Iterator[Text]:
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
    labels = [_write(axis, point["values"][axis]) for point in points]
    ticks = [charts.Tick(place + bar // 2, label) for place, label in zip(places, labels, strict=True)]
    rule, under = charts.axis(width, ticks)
    yield Text.assemble(("   0 ┼", "dim"), rule)
    yield Text.assemble(" " * 6, under)


def _places(at: Sequence[float], width: int) -> tuple[int, list[int]]:
    """Return the width of the bars and the first cell of each; evenly spaced if they would overlap on the scale."""
    if len(at) == 1:
        return _WIDEST_BAR, [(width - _WIDEST_BAR) // 2]
    low, span = min(at), max(at) - min(at)
    for is_even in (False, True):
        shares = [i / (len(at) - 1) for i in range(len(at))] if is_even else [(x - low) / span for x in at]
        for bar in range(_WIDEST_BAR, 0, -2):
            places = [round(share * (width - bar)) for share in shares]
            if all(b - a > bar for a, b in pairwise(places)):
                return bar, places
    return 1, [min(i, width - 1) for i in range(len(at))]


def _scored(found: Tree) -> doc.Section | None:
    scored = [point for point in found["points"] if point["scores"] is not None]
    if not scored:
        return None
    judges = listed(sorted({str(point["scores"]["judge"]) for point in scored}))
    says = (
        f"Balanced accuracy of detection, and its rank correlation with the similarity to other seeds. Judge: {judges}."
    )
    rows: doc.Rows = []
    for point in scored:
        of, relation = point["scores"], point["scores"]["spearman"] or {}
        spearman = [decimal(relation.get("spearman"), 2, sign=True), interval(relation.get("interval"), 2, sign=True)]
        mean = [count(of["n_scored"]), decimal(of["mean"]), interval(of["interval"])]
        rows.append([doc.strong(_label(found, point)), *mean, doc.quiet(decimal(of["control"])), *spearman])
    heads = [_axis_names(found), ">latents", ">mean", ">95 %", ">swapped", ">Spearman", ">95 %"]
    return doc.Section("How well the latents can be explained", says, [doc.Table(heads, rows)])


def forecast_page(found: Tree) -> list[doc.Block]:
    """Show a sweep's dry run: each point's tokens and training time."""
    rows: doc.Rows = [
        [point["name"], human(point["tokens"]), _duration(point["training_seconds"])] for point in found["points"]
    ]
    rows.append([doc.quiet("subject model"), human(found["stream_tokens"]), _duration(found["stream_seconds"])])
    words = f"No estimate of time: {found['no_estimate'] or ''}"
    if found["no_estimate"] is None:
        steps, seconds = plural(found["probe_steps"], "timed step"), _duration(found["training_seconds"])
        words = (
            f"From {steps} of each: {seconds} of training in all, without the revival of dead latents, harvest, "
            "alignment and scores."
        )
    return [_title(found), doc.Table(["study", ">tokens", ">training"], rows), words]


def _duration(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)
