"""The half of the report about meaning: how well latents can be explained, and how that goes with their return."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from autointerp.explaining.patterns import shorten
from autointerp.journal.method import CHANCE
from autointerp.report import blocks, controls
from autointerp.report.dictionaries import class_label, missing, rate
from autointerp.report.layout import (
    ACCENT,
    QUIET,
    STYLE_OF_CLASS,
    Page,
    command_line,
    count,
    grid,
    human,
    indented,
    percent,
    percent_interval,
    plural,
    section,
)
from autointerp.report.visible import highlighted, shown, visible
from sae.common.amounts import decimal, estimate, interval, is_known

Findings = Mapping[str, Any]
N_SHOWN = 5
_OWN_LESS_SWAPPED = "own − swapped"
_IN_TWO_LINES = "own −\nswapped"


def scores(found: Findings, page: Page) -> RenderableType:
    title = "How well the latents can be explained"
    says = (
        "A judge reads only the explanation and says of unseen contexts whether the latent fires there; the score is "
        "its balanced accuracy (.5 is guessing, 1 perfect). The control hands it another latent's explanation."
    )
    tree = found["scores"]
    if tree is None or not tree["n_scored"]:
        others = [] if tree is None else controls.other_scorers(tree, page)
        return section(page, title, says, missing(found, "score"), *_outcome(tree), *others)
    control = tree["control"]
    body: list[RenderableType] = [*_sample(tree), Text(), *_histograms(tree, control, page), Text()]
    body += [controls.score_table(tree, page), *controls.in_words(tree), *controls.by_negatives(tree, page)]
    body += controls.other_scorers(tree, page)
    body += [*_judged_in_rounds(tree), *_reliability(tree), *_other_explainers(found)]
    return section(page, title, says, *body)


def _sample(tree: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What the figures stand for: all eligible latents, or the scored ones alone."""
    sample, n = tree["sample"], plural(tree["n_scored"], "latent")
    if sample is None:
        yield Text(f"{n}, of which no draw is on record: figures are of these latents as they are, unweighted.", QUIET)
        return
    (draw, *more) = sample["draws"]
    kind = "eligible" if draw["sharing"] == "any" or more else f"eligible {draw['sharing']}"
    whose = f" partners of latents of {visible(draw['partners_of'])}" if draw.get("partners_of") else ""
    if sample["n_done"] == sample["population"]:
        yield Text(f"{n}: all {count(sample['population'])} {kind}{whose}, but for {sample['n_failed']} that failed.")
    else:
        drawn = f"a stratified sample ({draw['strata']}) of {count(sample['population'])} {kind}{whose}"
        yield Text(f"{n}, {drawn}; weighted, so that figures estimate all of these.")
    if sample["n_waiting"]:
        yield Text(f"{count(sample['n_waiting'])} of the {count(sample['n_drawn'])} drawn have no score yet.", QUIET)
    if sample["n_outside"]:
        outside = plural(sample["n_outside"], "scored latent")
        yield Text(f"{outside} outside the sample: shown one by one, and in none of these figures.", QUIET)


def _judged_in_rounds(tree: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Of scores to a precision: which, how many contexts that took, and what ended it."""
    told = tree["precision"]
    if told is None:
        return
    most = told.get("rounds")
    at_most = f", of at most {most['n_active']} + {most['n_inactive']}" if most else ""
    narrow, cap, out = told["stopped"].values()
    width, mean = decimal(told["half_width"]).rstrip("0"), f"{told['mean_contexts']:.0f}"
    yield Text(
        f"\nContexts were judged in rounds until a score's 95 % interval was ±{width}: {mean} contexts a latent on "
        f"average{at_most}. {plural(narrow, 'latent')} ended narrow enough, {cap:,} at the cap, {out:,} with no "
        "contexts left."
    )


def _reliability(tree: Mapping[str, Any]) -> Iterator[RenderableType]:
    told = tree["reliability"]
    if told is not None and is_known(told["value"]):
        yield Text(
            f"\nReliability {estimate(told['value'], told['interval'], 2)}: the rank correlation of these scores with "
            "those of another draw of contexts."
        )


def _other_explainers(found: Findings) -> Iterator[RenderableType]:
    """Whose explanations are scored too, and how their scores are seen."""
    for other in found["methods"]["other_explainers"]:
        n = plural(other["n_scored"], "latent")
        yield Text(f"\nExplanations by {visible(other['explainer'])} are scored too ({n}). This shows their scores:")
        yield command_line(other["command"])


def _outcome(tree: Mapping[str, Any] | None) -> Iterator[RenderableType]:
    if tree is not None and tree["n_asked"]:
        yield Text(
            f"\nOf {plural(tree['n_asked'], 'latent')} asked for: {tree['n_explained']} explained, "
            f"{tree['n_failed']} failed, {tree['n_ineligible']} with too few contexts."
        )


def _bars(shape: Mapping[str, Any]) -> Sequence[float]:
    """How many latents each bar stands for: of a sample, of all that are eligible."""
    bars: Sequence[float] = shape.get("estimated", shape["counts"])
    return bars


def _histograms(tree: Mapping[str, Any], control: Mapping[str, Any] | None, page: Page) -> Iterator[RenderableType]:
    """Own scores above, the control below, on one axis that starts at the first tenth with anything in it."""
    edges, counts = tree["histogram"]["edges"], _bars(tree["histogram"])
    swapped: Sequence[float] = _bars(control["histogram"]) if control else [0] * len(counts)
    first = next((i for i, both in enumerate(zip(counts, swapped, strict=True)) if any(both)), 0) // 5 * 5
    first = min(first, edges.index(CHANCE) // 5 * 5)
    n = len(counts) - first
    cell = max(1, min(3, (page.width - 4) // n))
    width = cell * n
    start, span = edges[first], edges[-1] - edges[first]
    ticks = [blocks.Tick((CHANCE - start) / span * width, "chance .5", "bold")]
    ticks += [blocks.Tick((x / 10 - start) / span * width, decimal(x / 10, 1)) for x in range(11) if x / 10 >= start]
    upper = blocks.columns(counts[first:], 5, cell=cell, styles=ACCENT)
    yield from map(indented, _named(upper, "own explanation", ACCENT))
    if control:
        lower = blocks.columns(swapped[first:], 3, cell=cell, styles=QUIET)
        yield from map(indented, _named(lower, "swapped control", QUIET))
    yield from map(indented, blocks.axis(width, ticks))


def _named(lines: Sequence[Text], name: str, style: str) -> Iterator[Text]:
    """A chart with its name written into its upper left corner, or above it where that corner is taken."""
    if lines[0].plain[: len(name) + 3].strip():
        yield blocks.Drawn(name, style)
        yield from lines
    else:
        yield blocks.Drawn.assemble((name, style), lines[0][len(name) :])
        yield from lines[1:]


def counted(found: Findings, page: Page) -> RenderableType:
    title = "Who was scored"
    says = (
        "A latent that fires in too few different contexts cannot be tested, and such latents are mostly the rare "
        "ones: what was scored is not a fair sample of all."
    )
    tree = found["scores"]
    if tree is None:
        return section(page, title, says, missing(found, "explain"))
    kinds = ["latents", "alive", "eligible", "explained", "scored", *(["failed"] if tree["n_failed"] else [])]
    kinds = kinds if page.wide or len(kinds) < 6 else kinds[1:]
    heads = [("in all" if kind == "latents" else kind, "right") for kind in kinds]
    table = grid("", *heads, "mean score", *_above_head(tree, page), gap=2 if page.wide else 1)
    for name, row in (tree["by_class"] or {}).items():
        label = Text(class_label(name, len(found["compared"])), STYLE_OF_CLASS[name])
        table.add_row(
            label, *(count(row[f"n_{kind}"]) for kind in kinds), *_means(tree, row, row["above_control"], page)
        )
    above = tree["control"] and tree["control"]["above_control"]
    table.add_row("together", *(count(tree[f"n_{kind}"]) for kind in kinds), *_means(tree, tree, above, page))
    notes = [f"Eligible: counted over {tree['eligible_of']}."]
    if tree["n_ineligible"]:
        notes.append(f"{plural(tree['n_ineligible'], 'latent')} asked for had too few contexts.")
    body: list[RenderableType] = [table, Text("\n" + " ".join(notes))]
    body += _too_few(tree["too_few"], len(found["compared"]))
    if tree["waiting"] and tree["n_scored"]:
        body.append(Text(f"\n{plural(tree['waiting']['n'], 'explained latent')} not scored yet:"))
        body.append(command_line(tree["waiting"]["command"]))
    return section(page, title, says, *body)


def _above_head(tree: Mapping[str, Any], page: Page) -> list[str]:
    return [] if tree["control"] is None else [_OWN_LESS_SWAPPED if page.wide else _IN_TWO_LINES]


def _means(tree: Mapping[str, Any], row: Mapping[str, Any], above: Mapping[str, Any] | None, page: Page) -> list[str]:
    """The mean score of some latents, and how far it is above their swapped control where there is one at all."""
    own = estimate(row["mean"], row["interval"], 3 if page.wide else 2)
    return [own] if tree["control"] is None else [own, _above(above, page)]


def _above(above: Mapping[str, Any] | None, page: Page) -> str:
    """How far a mean is above the swapped control; with its interval where there is room."""
    return "–" if above is None else estimate(above["mean"], above["interval"] if page.wide else None, 2, sign=True)


def _too_few(tree: Mapping[str, Any] | None, n_runs: int) -> Iterator[RenderableType]:
    """What the scores leave out: the alive latents with too few contexts, by shared class."""
    if tree is None or not tree["together"]["n"]:
        return
    names = "latents", "of alive", "95 % interval", "fire", "those with enough"
    table = grid("too few contexts", *((name, "right") for name in names))
    for name, row in sorted(tree.items(), key=lambda item: item[0] == "together"):
        label = Text("together") if name == "together" else Text(class_label(name, n_runs), STYLE_OF_CLASS[name])
        fire, others = (
            rate(row[key]) if is_known(row[key]) else "" for key in ("median_frequency", "median_frequency_of_eligible")
        )
        bounds = percent_interval(row["interval"]) if row["interval"] else ""
        table.add_row(label, count(row["n"]), percent(row["fraction"]), bounds, fire, others)
    yield Text()
    yield table
    reasons = tree["together"]["reasons"].items()
    yield Text(" · ".join(f"{reason}: {n}" for reason, n in reasons), QUIET)


_LEAST_STRIP = 11  # cells from −1 to 1 in which an interval still says something


def relation(found: Findings, page: Page) -> RenderableType:
    title = "Do latents that come back explain better?"
    says = (
        "Rank correlation (Spearman) of a latent's score with its similarity to its partners in the other seeds. Both "
        "may merely follow how often it fires, so that is also held fixed."
    )
    tree = found["relation"]
    if tree is None:
        return section(page, title, says, _no_relation(found))
    rows: list[tuple[str, Mapping[str, Any], int]] = [
        ("score and similarity", {"value": tree["spearman"], "interval": tree["interval"]}, tree["n"]),
        *_corrected(tree, "corrected", " without the score's noise"),
        (" frequency held fixed", tree["partial"], tree["n"]),
        *_corrected(tree, "partial_corrected", " both"),
        (" within frequency strata", tree["within_strata"], tree["n"]),
        *((f"  {rate(s['low'])} to {rate(s['high'])}", s, s["n"]) for s in tree["strata"]),
        ("score and frequency", tree["frequency"], tree["n"]),
        *_pooled(tree["pooled"]),
    ]
    gap = 2 if page.wide else 1
    left = page.width - max(len(label) for label, _, _ in rows) - 29 - 4 * gap  # 29: what the figures take
    width = min(41, left - 1 + left % 2)  # odd, so that 0 has a cell of its own
    scale = ["−1" + "0".center(width - 4) + "+1"] if width >= _LEAST_STRIP else []
    table = grid("", ("Spearman", "right"), "95 % interval", ("latents", "right"), *scale, gap=gap)
    for label, row, n in rows:
        style = "bold" if not label.startswith(" ") else QUIET if label.startswith("  ") else ""
        value, bounds = decimal(row["value"], 2, sign=True), interval(row["interval"], 2, sign=True)
        table.add_row(Text(label, style), value, bounds, count(n), *([_strip(row, width)] if scale else []))
    of_scores = found["scores"]["reliability"] or tree["reliability"]
    return section(page, title, says, table, *_in_words(tree, of_scores), Text(), *_by_similarity(tree, page))


def _corrected(tree: Mapping[str, Any], key: str, label: str) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    if is_known(tree[key]["value"]):
        yield label, tree[key], tree["n"]


def _pooled(tree: Mapping[str, Any] | None) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    """The same over the scores of several runs."""
    if tree is None:
        return
    yield f"{len(tree['runs'])} runs together", {"value": tree["spearman"], "interval": tree["interval"]}, tree["n"]
    yield from _corrected(tree, "corrected", " without the score's noise")
    yield " frequency held fixed", tree["partial"], tree["n"]


def _in_words(tree: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What no correlation says: the scores' reliability ``told`` where it is too small, and shared against unshared."""
    apart = tree["shared_and_unshared"]
    if is_known(tree["reliability"]["value"]) and not is_known(tree["corrected"]["value"]):
        yield Text(f"\nReliability {decimal(told['value'], 2)}: too small to correct the correlation for noise.")
    if is_known(apart["plain"]["value"]):
        words = f"\nShared latents less unshared: {_difference(apart['plain'])}"
        if is_known(apart["matched"]["value"]):
            words += f"; at equal firing frequency {_difference(apart['matched'])}"
        yield Text(f"{words} ({apart['n_shared']} and {apart['n_unshared']} latents).")
    if (pooled := tree["pooled"]) is not None:
        yield Text(
            f"The runs' {pooled['n']} latents are {pooled['n_units']} with their partners counted as one.", QUIET
        )


def _difference(told: Mapping[str, Any]) -> str:
    return f"{decimal(told['value'], sign=True)} {interval(told['interval'], sign=True)}"


def _no_relation(found: Findings) -> RenderableType:
    if found["scores"] is None or not found["scores"]["n_scored"]:
        return missing(found, "score")
    return missing(found, "overlap") if found["similarity"] is None else Text("Fewer than three latents are scored.")


def _strip(row: Mapping[str, Any], width: int) -> Text:
    value, bounds = row["value"], row["interval"]
    low, high = bounds or (math.nan, math.nan)
    return blocks.whisker(math.nan if value is None else value, low, high, -1, 1, width, ACCENT, mark=0)


def _by_similarity(tree: Mapping[str, Any], page: Page) -> Iterator[RenderableType]:
    bins = tree["bins"]
    if len(bins) < 2:
        return
    bounds = [b for row in bins for b in (row["interval"] or [row["mean"]])]
    start, stop = min([CHANCE, *bounds]), max(bounds)
    width = 30 if page.wide else 18 if page.width >= 76 else 0
    scale = [f"{decimal(start, 2)}{decimal(stop, 2):>{width - 3}}"] if width else []
    swapped = any(row.get("above_control") for row in bins)
    heads = [_OWN_LESS_SWAPPED if page.wide else _IN_TWO_LINES] if swapped else []
    table = grid("similarity", ("latents", "right"), ("mean score", "right"), "95 % interval", *heads, *scale)
    for row in bins:
        low, high = row["interval"] or (row["mean"], row["mean"])
        table.add_row(
            f"{decimal(row['low'], 2)} to {decimal(row['high'], 2)}",
            count(row["n"]),
            decimal(row["mean"]),
            interval(row["interval"]),
            *([_above(row["above_control"], page)] if swapped else []),
            *([blocks.whisker(row["mean"], low, high, start, stop, width, ACCENT)] if width else []),
        )
    yield table


def interesting(found: Findings, page: Page) -> RenderableType:
    focus = visible(found["focus"])
    title = "Found in no other seed, yet easy to explain"
    says = (
        f"Alive latents of {focus} without a shared partner, by the lower end of their score's interval; contexts run "
        "from the strongest activation to the middle of its range."
    )
    tree = found["interesting"]
    if tree is None:
        return section(page, title, says, _no_relation(found))
    if not tree:
        nothing = "None: no unshared latent scores above chance and above its swapped control with 95 % confidence."
        return section(page, title, says, Text(nothing))
    body: list[RenderableType] = []
    for entry in tree[:N_SHOWN]:
        body += [_one(entry, page), Text()]
    rest = len(tree) - N_SHOWN
    if rest > 0:
        numbers = ", ".join(str(entry["latent"]) for entry in tree[N_SHOWN:])
        body.append(Text(f"Next: {numbers}.", QUIET))
    body += [Text("One of them in full:", QUIET), command_line(found["show"])]
    return section(page, title, says, *body)


def _one(entry: Mapping[str, Any], page: Page) -> RenderableType:
    facts = [
        f"score {estimate(entry['score'], entry['interval'], 2)}",
        f"swapped {decimal(entry['control'], 2)}" if is_known(entry["control"]) else "",
        f"similarity {decimal(entry['similarity'], 2)}",
        f"fires {rate(entry['firing_frequency'])}",
    ]
    head = Text.assemble((f"latent {entry['latent']}", "bold"), "  ", (" · ".join(f for f in facts if f), QUIET))
    words = entry["explanation"]
    said = shown(shorten(words)) if words else Text("(its explanation is not in the journal)", QUIET)
    lines: list[RenderableType] = [head, Padding(said, (0, 0, 0, 2))]
    lines += [context_line(context, page, indent=4) for context in entry["contexts"]]
    if not entry["contexts"]:
        lines.append(indented(Text("(its contexts are not at hand: no firing store, or no tokenizer)", QUIET), 4))
    return Group(*lines)


def context_line(context: Mapping[str, Any], page: Page, indent: int = 2, peak: bool = True) -> RenderableType:
    """One context in one line: its largest activation, then its text around it."""
    activations = context["activations"]
    strongest = f"{max(activations, default=0.0):6.2f}  " if peak else ""
    line = highlighted(context["tokens"], activations, page.marking, width=page.width - indent - len(strongest))
    return indented(Text.assemble((strongest, QUIET), line, no_wrap=True), indent)


def failures(found: Findings, page: Page) -> RenderableType | None:
    """What failed, grouped by reason; nothing at all where nothing did."""
    tree = found["failures"]
    if tree is None or not (tree["n"] or tree["n_answers"]):
        return None
    table = grid("stage", ("latents", "right"), ("reason", "fold"), "which")
    for row in tree["reasons"]:
        some = ", ".join(str(n) for n in row["latents"][:6]) + (", …" if len(row["latents"]) > 6 else "")
        table.add_row(row["stage"], count(row["n"]), shown(row["reason"]), Text(some, QUIET))
    body: list[RenderableType] = [table] if tree["reasons"] else []
    if tree["n_answers"]:
        body.append(
            Text(f"{plural(tree['n_answers'], 'answer')} of the judge failed within scored latents and count in none.")
        )
    if tree["retry"]:
        body += [Text("\nThis retries only what failed:"), command_line(tree["retry"])]
    return section(
        page, "What failed", "None of these counts as a zero: they are left out of every figure above.", *body
    )


def cost(found: Findings) -> Iterator[str]:
    """What was asked of language models, one line a stage; nothing for work that asked none."""
    for row in found["methods"]["cost"]:
        yield (
            f"{row['stage']}: {visible(row['model'])}, {human(row['requests'])} requests, "
            f"{human(row['prompt_tokens'])} prompt tokens ({human(row['cached_tokens'])} cached), "
            f"{human(row['completion_tokens'])} completion tokens"
        )
