"""Show the trained SAEs: which latents they share, how often they fire, how training went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.text import Text

from autointerp.findings.shape import Alignment, Comparison, NamedRun, Region, Sharing, StudyFindings
from autointerp.journal.method import ENOUGH_TO_CALL_DEAD
from autointerp.report import blocks as doc
from autointerp.report import charts
from autointerp.report.charts import ACCENT, STYLE_OF_CLASS
from autointerp.report.numbers import (
    chance_level,
    class_label,
    count,
    human,
    listed,
    origin,
    percent,
    rate,
)
from sae.common.amounts import decimal


def membership(found: StudyFindings) -> doc.Section:
    focus, tree = found.focus, found.membership
    title = f"Which SAEs share the latents of {focus}"
    if tree is None:
        return doc.Section(title, "Which other seeds have each latent.", explain_missing(found, "overlap"))
    says = f"Each alive latent of {focus} is in one part, by the SAEs that share it ({tree.definition})."
    parts = tree.parts
    has_null = bool(parts) and chance_level(parts[0].null) is not None

    def pieces(has_colour: bool) -> list[charts.Part]:
        fills = ["█" if has_colour else charts.FILLS[i % len(charts.FILLS)] for i in range(len(parts))]
        return [charts.Part(part.n, _part_style(part, i), fills[i]) for i, part in enumerate(parts)]

    def key(i: int) -> doc.Chart:
        return doc.Chart(lambda _, colour: [Text(pieces(colour)[i].fill * 2, pieces(colour)[i].style)])

    rows: doc.Rows = []
    for i, part in enumerate(parts):
        level = [doc.quiet(percent(chance_level(part.null)))] if has_null else []
        rows.append([key(i), part.label, count(part.n), percent(part.fraction), *level])
    heads: doc.Heads = [doc.Column("", "key"), "shared with", ">latents", ">share of alive"]
    table = doc.Table([*heads, *([">chance level"] if has_null else [])], rows)
    bar = doc.Chart(lambda width, colour: [charts.stacked_bar(pieces(colour), width)])
    return doc.Section(title, says, [bar, table])


def _part_style(part: Region, i: int) -> str:
    """Return orange for one SAE alone, strong blue for all, and paler blues between."""
    between = ["#9fd3f2", "#56b4e9", "#7cc4ee", "#b7def5"]
    return STYLE_OF_CLASS[part.shared_class] if part.shared_class in ("one", "all") else between[i % 4]


def frequency(found: StudyFindings) -> doc.Section:
    title = "How often shared and unshared latents fire"
    says = (
        "Firing frequency (‰: firings per thousand tokens) by whether other seeds have the latents. Histograms are on "
        "a logarithmic scale, each scaled to itself."
    )
    tree = found.frequency_by_class
    if tree is None:
        return doc.Section(title, says, explain_missing(found, "overlap" if found.firing else "harvest"))
    edges = next(iter(tree.values())).histogram.edges
    rows: doc.Rows = []
    for name, row in tree.items():
        label = doc.Span(class_label(name, len(found.compared)), name)
        quartiles = doc.quiet(f"{rate(row.quartiles[0])} – {rate(row.quartiles[2])}")
        histogram = _histogram(row.histogram.counts, name)
        rows.append([label, count(row.n), rate(row.median), quartiles, histogram])
    for line in range(2):
        rows.append(["", "", "", "", doc.Chart(lambda width, _, line=line: [_frequency_axis(edges, width)[line]])])  # type: ignore[misc]
    heads: doc.Heads = ["", ">latents", ">median", "quartiles", doc.Column("firings per token", "chart")]
    return doc.Section(title, says, [doc.Table(heads, rows)])


def _histogram(counts: Sequence[float], name: str) -> doc.Chart:
    return doc.Chart(lambda width, _: [charts.strip(charts.pooled(counts, width), STYLE_OF_CLASS[name])])


def _frequency_axis(edges: Sequence[float], width: int) -> tuple[Text, Text]:
    width = min(width, len(edges) - 1)
    decades = [edge for edge in edges if math.isclose(math.log10(edge), round(math.log10(edge)), abs_tol=1e-6)]
    span = math.log(edges[-1] / edges[0])
    # A label and a gap need six cells, so every second decade has one.
    return charts.axis(width, [charts.Tick(math.log(d / edges[0]) / span * width, _power(d)) for d in decades[::2]])


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if exponent else "1"


def training(found: StudyFindings) -> doc.Section:
    title = "How well the SAEs are trained"
    says = (
        "FVU is the share of the activations' variance that the SAE fails to reproduce (0 is perfect); L0 the latents "
        "active per token; dead latents never fire."
    )
    tree, firing = found.training, found.firing
    if tree is None and not (_imported(found) and firing):
        is_begun = any(entry.stage == "train" for entry in found.missing)
        stage = "train" if is_begun or not _imported(found) else "harvest"
        return doc.Section(title, says, explain_missing(found, stage))
    tokens = firing.tokens if firing else None
    logged: Mapping[str, int] = tree.tokens if tree else {}
    fvu: Mapping[str, float] = tree.fvu if tree else {}
    dead = {**(tree.dead_fraction if tree else {}), **(firing.dead_fraction if firing else {})}
    l0 = {**(firing.mean_l0 if firing else {}), **(tree.l0 if tree else {})}
    word = "dead" if tokens is None or tokens >= ENOUGH_TO_CALL_DEAD else "silent"
    rows: doc.Rows = []
    for run in found.runs:
        name = run.name
        cells = [human(logged.get(name)), decimal(fvu.get(name)), decimal(l0.get(name), 1), percent(dead.get(name))]
        rows.append([doc.Span(name, "strong" if name == found.focus else ""), origin(run.seed), *cells])
    notes = []
    if tokens is not None:
        notes.append(f"Firings were counted over {human(tokens)} tokens.")
    if word == "silent":
        notes.append("These are under 1M tokens, too few to call a latent without a firing dead.")
    of = tree.quality if tree else {}
    if skipping := {name: x for name, x in of.items() if x.get("skipped")}:
        names = [f"{name} {decimal(x['fvu'])} (L0 {x['l0']:.1f})" for name, x in skipping.items()]
        notes.append(f"Skipped tokens are not in FVU and L0. With them, on the first batch: {listed(names)}.")
    if outlying := {name: x for name, x in of.items() if not x.get("skipped")}:
        names = [f"{name} {decimal(x['fvu_without'])} (L0 {x['l0_without']:.1f})" for name, x in outlying.items()]
        notes.append(
            "A few outlier tokens (over 10 times the median norm) hold most of the variance, so FVU mostly measures "
            f"them. Without them, on the first batch: {listed(names)}."
        )
    if unfinished := [run.name for run in found.runs if "trained" not in run.stages]:
        notes.append(f"Not finished: {listed(unfinished)}.")
    body: list[doc.Block] = [doc.Table(["run", ">seed", ">tokens", ">FVU", ">L0", f">{word}"], rows)]
    body += [" ".join(notes)] if notes else []
    return doc.Section(title, says, body, list(training_curves(tree.curves if tree else {})))


#: Column of the training log, its name, whether its logarithm is drawn, how its values are written.
_CURVES: tuple[tuple[str, str, bool, Callable[[float], str]], ...] = (
    ("loss", "loss", True, decimal),
    ("fvu", "FVU", True, decimal),
    ("l0", "L0", False, lambda value: decimal(value, 1)),
    ("dead_fraction", "dead", False, percent),
    ("learning_rate", "learning rate", False, lambda value: f"{value:.2g}"),
)
_SIDE_BY_SIDE = 3


def training_curves(curves: Mapping[str, Mapping[str, list[float]]]) -> Iterator[doc.Block]:
    """Draw each run's training log as small curves, by column, on a scale shared by the runs."""
    names = list(curves)
    scales = {column: _scale(curve[column] for curve in curves.values()) for column, *_ in _CURVES}
    for first in range(0, len(names), _SIDE_BY_SIDE):
        shown = names[first : first + _SIDE_BY_SIDE]
        rows: doc.Rows = []
        for column, label, is_log, write in _CURVES:
            if (scale := scales[column]) is None:
                continue
            low, high = map(write, scale)
            lines = [_curve(curves[name][column], is_log, scale) for name in shown]
            rows.append([label, doc.quiet(low if low == high else f"{low} – {high}"), *lines])
        heads = [doc.Column(_chart_name(name), "chart") for name in shown]
        if rows:
            yield doc.Table(["", ">scale", *heads], rows)


def _curve(values: Sequence[float | None], is_log: bool, scale: tuple[float, float]) -> doc.Chart:
    numbers_ = [math.nan if value is None else value for value in values]
    return doc.Chart(lambda width, _: [charts.sparkline(numbers_, width, ACCENT, log=is_log, span=scale)])


def _scale(values: Any) -> tuple[float, float] | None:
    """Return the smallest and largest value of several curves; ``None`` if nothing is known."""
    known = [value for value in chain.from_iterable(values) if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known else None


def _chart_name(name: str) -> doc.Chart:
    """Cut a name to the width of its curve, keeping the end, which differs between a study's runs."""
    return doc.Chart(lambda width, _: [Text(name if len(name) <= width else "…" + name[1 - width :])])


#: Which missing stages explain that a part is empty; the first that is missing does.
_BECAUSE = {"harvest": ("harvest", "train"), "overlap": ("overlap", "train"), "score": ("explain", "score")}


def explain_missing(found: Sharing, stage: str) -> list[doc.Block]:
    """Return why a part is empty, and the command that provides it."""
    waiting = {entry.stage: entry for entry in found.missing}
    entry = next((waiting[name] for name in _BECAUSE.get(stage, (stage,)) if name in waiting), None)
    return [entry.says, doc.Command(entry.command)] if entry else [doc.quiet("Nothing is recorded.")]


def warn_stale(found: StudyFindings | Comparison) -> Iterator[doc.Block]:
    for entry in found.stale:
        yield doc.strong(f"Out of date: {entry.says}")
        yield doc.Command(entry.command)


def _imported(found: Sharing) -> list[str]:
    return [run.name for run in found.runs if run.seed is None]


def name_change(found: Sharing) -> str:
    """Return how the study's SAEs differ, as the end of a sentence about sharing."""
    is_apart = isinstance(found, Alignment | Comparison) and found.apart
    return "between the SAEs" if _imported(found) or is_apart else "when only the seed changes"


def name_seed(run: NamedRun) -> str:
    return "imported" if run.seed is None else f"seed {run.seed}"


def describe_size(architecture: str, num_latents: int, k: int | None) -> str:
    """Return ``1,024 latents, k 8``, with the architecture where it is not TopK."""
    kind = "" if architecture == "topk" else f"{architecture}, "
    return f"{kind}{num_latents:,} latents" + ("" if k is None else f", k {k}")


def describe_runs(found: StudyFindings | Comparison) -> str:
    """Return ``3 SAEs on the same data, seeds 0 1 2 · 1,024 latents, k 8``."""
    runs, n_imported = found.runs, len(_imported(found))
    seeds = " ".join(str(run.seed) for run in runs if run.seed is not None)
    each = listed(sorted({describe_size(run.architecture, run.num_latents, run.k) for run in runs}))
    if len(runs) == 1:
        return f"1 SAE, {name_seed(runs[0])} · {each}"
    if n_imported:
        trained = f", seeds {seeds} trained here" if seeds else ""
        return f"{len(runs)} SAEs, {n_imported} imported{trained} · {each}"
    return f"{len(runs)} SAEs on the same data, seeds {seeds} · {each}"
