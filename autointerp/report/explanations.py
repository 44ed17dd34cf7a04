"""Show how well latents can be explained, which were scored, and how the scores relate to sharing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from autointerp.explaining.patterns import shorten
from autointerp.journal.method import CHANCE
from autointerp.report import charts, controls
from autointerp.report.blocks import (
    Block,
    Chart,
    Column,
    Command,
    Context,
    Heads,
    Rows,
    Section,
    Sentence,
    Span,
    Table,
    numbers,
    quiet,
)
from autointerp.report.charts import ACCENT
from autointerp.report.dictionaries import explain_missing
from autointerp.report.numbers import class_label, count, human, percent, percent_interval, plural, rate
from sae.common.amounts import decimal, estimate, interval, is_known

Findings = Mapping[str, Any]
Tree = Mapping[str, Any]
N_SHOWN, _N_BRIEF = 5, 2


def scores(found: Findings) -> Section:
    title = "How well the latents can be explained"
    says = (
        "A judge reads only the explanation and says of unseen contexts whether the latent fires there; the score is "
        "its balanced accuracy (.5 is guessing, 1 perfect). The control uses another latent's explanation."
    )
    tree = found["scores"]
    if tree is None or not tree["n_scored"]:
        body = [*explain_missing(found, "score"), *_outcome(tree), *(controls.other_scorers(tree) if tree else ())]
        return Section(title, says, body)
    chart = Chart(lambda width, _: _histograms(tree, width))
    body = [*_sample(tree), chart, controls.score_table(tree), *controls.describe_controls(tree)]
    details = [*controls.by_negatives(tree), *controls.other_scorers(tree)]
    return Section(title, says, body, [*details, *_rounds(tree), *_reliability(tree), *_other_explainers(found)])


def _sample(tree: Tree) -> Iterator[Block]:
    """Describe the population of the figures: all eligible latents, or only the scored ones."""
    sample, n = tree["sample"], plural(tree["n_scored"], "latent")
    if sample is None:
        yield Sentence(f"{n}, not drawn as a recorded sample: the figures are of these latents, unweighted.")
        return
    (draw, *more) = sample["draws"]
    kind = "eligible" if draw["sharing"] == "any" or more else f"eligible {draw['sharing']}"
    partners = f" partners of latents of {draw['partners_of']}" if draw.get("partners_of") else ""
    if sample["n_done"] == sample["population"]:
        yield Sentence(f"{n}: all {count(sample['population'])} {kind}{partners}; {sample['n_failed']} failed.")
    else:
        drawn = f"a stratified sample ({draw['strata']}) of {count(sample['population'])} {kind}{partners}"
        yield Sentence(f"{n}, {drawn}; weighted, so the figures estimate all of these.")
    if sample["n_waiting"]:
        yield Sentence(
            quiet(f"{count(sample['n_waiting'])} of the {count(sample['n_drawn'])} drawn have no score yet.")
        )
    if sample["n_outside"]:
        outside = plural(sample["n_outside"], "scored latent")
        yield Sentence(quiet(f"{outside} outside the sample: shown one by one, and in none of these figures."))


def _rounds(tree: Tree) -> Iterator[Block]:
    """Describe adaptive judging: how many contexts it took, and why it ended."""
    precision = tree["precision"]
    if precision is None:
        return
    most = precision.get("rounds")
    at_most = f", of at most {most['n_active']} + {most['n_inactive']}" if most else ""
    narrow, cap, out = precision["stopped"].values()
    width, mean = decimal(precision["half_width"]).rstrip("0"), f"{precision['mean_contexts']:.0f}"
    yield Sentence(
        f"Contexts were judged in rounds until a score's 95 % interval was ±{width}: {mean} contexts a latent on "
        f"average{at_most}. {plural(narrow, 'latent')} ended narrow enough, {cap:,} at the cap, {out:,} with no "
        "contexts left."
    )


def _reliability(tree: Tree) -> Iterator[Block]:
    reliability = tree["reliability"]
    if reliability is not None and is_known(reliability["value"]):
        yield Sentence(
            f"Reliability {estimate(reliability['value'], reliability['interval'], 2)}: the rank correlation of these "
            "scores with those of another draw of contexts."
        )


def _other_explainers(found: Findings) -> Iterator[Block]:
    for other in found["methods"]["other_explainers"]:
        n = plural(other["n_scored"], "latent")
        yield Sentence(f"Explanations by {other['explainer']} are scored too ({n}). This shows their scores:")
        yield Command(other["command"])


def _outcome(tree: Tree | None) -> Iterator[Block]:
    if tree is not None and tree["n_asked"]:
        yield Sentence(
            f"Of {plural(tree['n_asked'], 'latent')} asked for: {tree['n_explained']} explained, "
            f"{tree['n_failed']} failed, {tree['n_ineligible']} with too few contexts."
        )


def _bars(shape: Tree) -> Sequence[float]:
    """Return the latents counted in each bar; with a sample, of all eligible ones."""
    bars: Sequence[float] = shape.get("estimated", shape["counts"])
    return bars


def _histograms(tree: Tree, width: int) -> Iterator[Text]:
    """Draw own scores, and the control's below, on one axis that starts at the first non-empty tenth."""
    control, edges, counts = tree["control"], tree["histogram"]["edges"], _bars(tree["histogram"])
    swapped: Sequence[float] = _bars(control["histogram"]) if control else [0] * len(counts)
    first = next((i for i, both in enumerate(zip(counts, swapped, strict=True)) if any(both)), 0) // 5 * 5
    first = min(first, edges.index(CHANCE) // 5 * 5)
    n = len(counts) - first
    cell = max(1, min(3, width // n))
    start, span = edges[first], edges[-1] - edges[first]
    ticks = [charts.Tick((CHANCE - start) / span * cell * n, "chance .5", "bold")]
    ticks += [charts.Tick((x / 10 - start) / span * cell * n, decimal(x / 10, 1)) for x in range(11) if x / 10 >= start]
    yield from _named(charts.columns(counts[first:], 5, cell=cell, styles=ACCENT), "own explanation", ACCENT)
    if control:
        yield from _named(charts.columns(swapped[first:], 3, cell=cell, styles="dim"), "swapped control", "dim")
    yield from charts.axis(cell * n, ticks)


def _named(lines: Sequence[Text], name: str, style: str) -> Iterator[Text]:
    """Put a chart's name in its upper left corner, or above it if that corner is taken."""
    if lines[0].plain[: len(name) + 3].strip():
        yield Text(name, style)
        yield from lines
    else:
        yield Text.assemble((name, style), lines[0][len(name) :])
        yield from lines[1:]


def counted(found: Findings) -> Section:
    title = "Who was scored"
    says = (
        "A latent that fires in too few different contexts cannot be tested. Such latents are mostly rare, so the "
        "scored latents are not a fair sample of all."
    )
    tree = found["scores"]
    if tree is None:
        return Section(title, says, explain_missing(found, "explain"))
    n_runs = len(found["compared"])
    kinds = ["latents", "alive", "eligible", "explained", "scored", *(["failed"] if tree["n_failed"] else [])]
    heads: Heads = [Column(kind, "number", is_extra=kind in ("latents", "explained")) for kind in kinds]
    above = [] if tree["control"] is None else ["own minus swapped"]

    def cells(row: Tree, difference: Tree | None) -> list[str]:
        own = [estimate(row["mean"], row["interval"], 2)]
        if above:
            own.append(estimate(difference["mean"], difference["interval"], 2, sign=True) if difference else "–")
        return [*(count(row[f"n_{kind}"]) for kind in kinds), *own]

    rows: Rows = [
        [Span(class_label(name, n_runs), name), *cells(row, row["above_control"])]
        for name, row in (tree["by_class"] or {}).items()
    ]
    rows.append(["all", *cells(tree, tree["control"] and tree["control"]["above_control"])])
    notes = [f"Eligible: counted over {tree['eligible_of']}."]
    if tree["n_ineligible"]:
        notes.append(f"{plural(tree['n_ineligible'], 'latent')} asked for had too few contexts.")
    body: list[Block] = [Table(["", *heads, "mean score", *above], rows, notes)]
    if tree["waiting"] and tree["n_scored"]:
        body.append(Sentence(f"{plural(tree['waiting']['n'], 'explained latent')} not scored yet:"))
        body.append(Command(tree["waiting"]["command"]))
    return Section(title, says, body, list(_too_few(tree["too_few"], n_runs)))


def _too_few(tree: Tree | None, n_runs: int) -> Iterator[Block]:
    """Count the alive latents with too few contexts for a score, by shared class."""
    if tree is None or not tree["together"]["n"]:
        return
    rows: Rows = []
    for name, row in sorted(tree.items(), key=lambda item: item[0] == "together"):
        label = Span("all") if name == "together" else Span(class_label(name, n_runs), name)
        own, others = (
            rate(row[key]) if is_known(row[key]) else "" for key in ("median_frequency", "median_frequency_of_eligible")
        )
        bounds = percent_interval(row["interval"]) if row["interval"] else ""
        rows.append([label, count(row["n"]), percent(row["fraction"]), bounds, own, others])
    heads: Heads = ["too few contexts", *numbers("latents", "share of alive"), "95 % interval"]
    reasons = " · ".join(f"{reason}: {n}" for reason, n in tree["together"]["reasons"].items())
    yield Table([*heads, *numbers("median rate", "of eligible")], rows, [reasons])


def relation(found: Findings) -> Section:
    title = "How scores relate to similarity"
    says = (
        "Rank correlation (Spearman) of a latent's score with its similarity to its partners in the other seeds. Both "
        "may merely follow how often it fires, so that is also held fixed."
    )
    tree = found["relation"]
    if tree is None:
        return Section(title, says, _no_relation(found))
    whole, held = ("score and similarity", _whole(tree), tree["n"]), (" frequency fixed", tree["partial"], tree["n"])
    body: list[Block] = [_correlations([whole, held]), *_shared_and_unshared(tree), *_by_similarity(tree)]
    rest = [
        *_corrected(tree, "corrected", "corrected for noise"),
        *_corrected(tree, "partial_corrected", " frequency fixed, corrected"),
        (" within frequency strata", tree["within_strata"], tree["n"]),
        *((f"  {rate(s['low'])} to {rate(s['high'])}", s, s["n"]) for s in tree["strata"]),
        ("score and frequency", tree["frequency"], tree["n"]),
        *_pooled(tree["pooled"]),
    ]
    return Section(title, says, body, [_correlations(rest), *_notes(found, tree)])


_Row = tuple[str, Tree, int]


def _whole(tree: Tree) -> Tree:
    return {"value": tree["spearman"], "interval": tree["interval"]}


def _correlations(rows: Sequence[_Row]) -> Table:
    scale = Chart(lambda width, _: [Text(f"−1{'0':^{_odd(width) - 4}}+1")])
    cells: Rows = []
    for label, row, n in rows:
        style = "strong" if not label.startswith(" ") else "quiet" if label.startswith("  ") else ""
        value, bounds = decimal(row["value"], 2, sign=True), interval(row["interval"], 2, sign=True)
        cells.append([Span(label, style), value, bounds, count(n), whisker(row["value"], row["interval"], -1, 1, 0)])
    heads: Heads = [
        "",
        *numbers("Spearman"),
        "95 % interval",
        *numbers("latents"),
        Column(scale, "chart", is_extra=True),
    ]
    return Table(heads, cells)


def _odd(width: int) -> int:
    return width - 1 + width % 2


def whisker(
    value: float | None, bounds: Sequence[float | None] | None, start: float, stop: float, mark: float = math.nan
) -> Chart:
    """Draw an estimate with its interval; the width is odd, so the middle has a cell of its own."""
    low, high = bounds or (value, value)
    middle, low, high = (math.nan if x is None else x for x in (value, low, high))
    return Chart(lambda width, _: [charts.whisker(middle, low, high, start, stop, _odd(width), ACCENT, mark=mark)])


def _corrected(tree: Tree, key: str, label: str) -> Iterator[_Row]:
    if is_known(tree[key]["value"]):
        yield label, tree[key], tree["n"]


def _pooled(tree: Tree | None) -> Iterator[_Row]:
    """Show the relation over the scores of several runs."""
    if tree is not None:
        yield f"{len(tree['runs'])} runs together", _whole(tree), tree["n"]
        yield from _corrected(tree, "corrected", " corrected for noise")
        yield " frequency fixed", tree["partial"], tree["n"]


def _shared_and_unshared(tree: Tree) -> Iterator[Block]:
    apart = tree["shared_and_unshared"]
    if is_known(apart["plain"]["value"]):
        words = f"Shared latents minus unshared: {_difference(apart['plain'])}"
        if is_known(apart["matched"]["value"]):
            words += f"; at equal firing frequency {_difference(apart['matched'])}"
        yield Sentence(f"{words} ({apart['n_shared']} and {apart['n_unshared']} latents).")


def _difference(row: Tree) -> str:
    return estimate(row["value"], row["interval"], sign=True)


def _notes(found: Findings, tree: Tree) -> Iterator[Block]:
    if is_known(tree["reliability"]["value"]) and not is_known(tree["corrected"]["value"]):
        reliability = found["scores"]["reliability"] or tree["reliability"]
        value = decimal(reliability["value"], 2)
        yield Sentence(f"Reliability {value}: too small to correct the correlation for noise.")
    if (pooled := tree["pooled"]) is not None:
        words = f"The runs' {pooled['n']} latents are {pooled['n_units']} with their partners counted as one."
        yield Sentence(quiet(words))


def _no_relation(found: Findings) -> list[Block]:
    if found["scores"] is None or not found["scores"]["n_scored"]:
        return explain_missing(found, "score")
    if found["similarity"] is None:
        return explain_missing(found, "overlap")
    return [Sentence("Fewer than three latents are scored.")]


def _by_similarity(tree: Tree) -> Iterator[Block]:
    """Show the mean score in quarters of similarity."""
    bins = tree["bins"]
    if len(bins) < 2:
        return
    bounds = [b for row in bins for b in (row["interval"] or [row["mean"]])]
    start, stop = min([CHANCE, *bounds]), max(bounds)
    has_control = any(row.get("above_control") for row in bins)
    rows: Rows = []
    for row in bins:
        above = row.get("above_control")
        difference = estimate(above["mean"], above["interval"], 2, sign=True) if above else "–"
        rows.append(
            [
                f"{decimal(row['low'], 2)} to {decimal(row['high'], 2)}",
                *(count(row["n"]), decimal(row["mean"]), interval(row["interval"])),
                *([difference] if has_control else []),
                whisker(row["mean"], row["interval"], start, stop),
            ]
        )
    scale = Chart(lambda width, _: [Text(f"{decimal(start, 2)}{decimal(stop, 2):>{_odd(width) - 3}}")])
    heads: Heads = ["similarity", *numbers("latents", "mean score"), "95 % interval"]
    yield Table([*heads, *(["own minus swapped"] if has_control else []), Column(scale, "chart", is_extra=True)], rows)


def interesting(found: Findings) -> Section:
    title = "Unshared latents that are easy to explain"
    says = (
        f"Alive latents of {found['focus']} without a shared partner, by the lower end of their score's interval. "
        "Contexts run from the strongest activation to the middle of its range."
    )
    tree = found["interesting"]
    if tree is None:
        return Section(title, says, _no_relation(found))
    if not tree:
        none = "None: no unshared latent scores above chance and above its swapped control with 95 % confidence."
        return Section(title, says, [Sentence(none)])
    body = [block for i, entry in enumerate(tree[:_N_BRIEF]) for block in _one(entry, is_apart=i > 0)]
    details = [block for entry in tree[_N_BRIEF:N_SHOWN] for block in _one(entry, is_apart=True)]
    if rest := tree[N_SHOWN:]:
        details.append(Sentence(quiet(f"Next: {', '.join(str(entry['latent']) for entry in rest)}."), is_apart=True))
    return Section(title, says, body, [*details, Sentence(quiet("One of them in full:")), Command(found["show"])])


def _one(entry: Tree, is_apart: bool) -> Iterator[Block]:
    facts = [
        f"score {estimate(entry['score'], entry['interval'], 2)}",
        *([f"swapped {decimal(entry['control'], 2)}"] if is_known(entry["control"]) else []),
        f"similarity {decimal(entry['similarity'], 2)}",
        f"fires {rate(entry['firing_frequency'])}",
    ]
    yield Sentence(
        [Span(f"latent {entry['latent']}", "strong", entry["latent"]), "  ", quiet(" · ".join(facts))],
        is_apart=is_apart,
    )
    words = entry["explanation"]
    yield Sentence(shorten(words) if words else quiet("(its explanation is not in the journal)"), indent=2)
    for context in entry["contexts"]:
        yield Context(context["tokens"], context["activations"])
    if not entry["contexts"]:
        yield Sentence(quiet("(its contexts are not available: no firing store, or no tokenizer)"), indent=4)


def failures(found: Findings) -> Section | None:
    """List the failures by reason; ``None`` if there are none."""
    tree = found["failures"]
    if tree is None or not (tree["n"] or tree["n_answers"]):
        return None
    rows: Rows = []
    for row in tree["reasons"]:
        some = ", ".join(str(n) for n in row["latents"][:6]) + (", …" if len(row["latents"]) > 6 else "")
        rows.append([row["stage"], count(row["n"]), row["reason"], quiet(some)])
    heads: Heads = ["stage", *numbers("latents"), Column("reason", "fold"), "which"]
    body: list[Block] = [Table(heads, rows)] if rows else []
    if tree["n_answers"]:
        words = f"{plural(tree['n_answers'], 'answer')} of the judge failed within scored latents and are not counted."
        body.append(Sentence(words))
    if tree["retry"]:
        body += [Sentence("This retries only what failed:"), Command(tree["retry"])]
    return Section("What failed", "No failure counts as a zero: failed latents are in none of the figures.", body)


def cost(found: Findings) -> Iterator[str]:
    """Show the usage of language models, one line per stage."""
    for row in found["methods"]["cost"]:
        yield (
            f"{row['stage']}: {row['model']}, {human(row['requests'])} requests, "
            f"{human(row['prompt_tokens'])} prompt tokens ({human(row['cached_tokens'])} cached), "
            f"{human(row['completion_tokens'])} completion tokens"
        )
