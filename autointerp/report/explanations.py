"""Show how well latents can be explained, which were scored, and how the scores relate to sharing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from autointerp.explaining.patterns import shorten
from autointerp.journal.method import CHANCE
from autointerp.report import blocks as doc
from autointerp.report import charts
from autointerp.report.charts import ACCENT
from autointerp.report.dictionaries import explain_missing
from autointerp.report.numbers import class_label, count, estimate_of, human, percent, percent_interval, plural, rate
from sae.common.amounts import decimal, estimate, interval, is_known

Tree = Mapping[str, Any]
N_SHOWN, _N_BRIEF = 5, 2
_NAMES = {"frozen": "frozen decoder", "untrained": "untrained SAE"}
_WHAT = {
    "frozen": ("an SAE whose random decoder was never trained", "training the decoder"),
    "untrained": ("an SAE that was not trained at all", "training"),
}
NEGATIVES = {"hard": "a neighbour fires", "same_token": "same token"}


def scores(found: Tree) -> doc.Section:
    title = "How well the latents can be explained"
    says = (
        "A judge reads only the explanation and says of unseen contexts whether the latent fires there; the score is "
        "its balanced accuracy (.5 is guessing, 1 perfect). The control uses another latent's explanation."
    )
    tree = found["scores"]
    if tree is None or not tree["n_scored"]:
        body = [*explain_missing(found, "score"), *_outcome(tree), *(_other_scorers(tree) if tree else ())]
        return doc.Section(title, says, body)
    chart = doc.Chart(lambda width, _: _histograms(tree, width))
    body = [*_sample(tree), chart, _score_table(tree), *_describe_controls(tree)]
    details = [*_by_negatives(tree), *_other_scorers(tree), *_score_notes(found, tree)]
    return doc.Section(title, says, body, details)


def _sample(tree: Tree) -> Iterator[doc.Block]:
    """Describe the population of the figures: all eligible latents, or only the scored ones."""
    sample, n = tree["sample"], plural(tree["n_scored"], "latent")
    if sample is None:
        yield f"{n}, not drawn as a recorded sample: the figures are of these latents, unweighted."
        return
    (draw, *more) = sample["draws"]
    kind = "eligible" if draw["sharing"] == "any" or more else f"eligible {draw['sharing']}"
    partners = f" partners of latents of {draw['partners_of']}" if draw.get("partners_of") else ""
    if sample["n_done"] == sample["population"]:
        yield f"{n}: all {count(sample['population'])} {kind}{partners}; {sample['n_failed']} failed."
    else:
        drawn = f"a stratified sample ({draw['strata']}) of {count(sample['population'])} {kind}{partners}"
        yield f"{n}, {drawn}; weighted, so the figures estimate all of these."
    if sample["n_waiting"]:
        yield doc.quiet(f"{count(sample['n_waiting'])} of the {count(sample['n_drawn'])} drawn have no score yet.")
    if sample["n_outside"]:
        outside = plural(sample["n_outside"], "scored latent")
        yield doc.quiet(f"{outside} outside the sample: shown one by one, and in none of these figures.")


def _score_notes(found: Tree, tree: Tree) -> Iterator[doc.Block]:
    """Describe adaptive judging and reliability, and name the command for the scores of another explainer."""
    if (precision := tree["precision"]) is not None:
        most = precision.get("rounds")
        at_most = f", of at most {most['n_active']} + {most['n_inactive']}" if most else ""
        narrow, cap, out = precision["stopped"].values()
        width, mean = decimal(precision["half_width"]).rstrip("0"), f"{precision['mean_contexts']:.0f}"
        yield (
            f"Contexts were judged in rounds until a score's 95 % interval was ±{width}: {mean} contexts a latent on "
            f"average{at_most}. {plural(narrow, 'latent')} ended narrow enough, {cap:,} at the cap, {out:,} with no "
            "contexts left."
        )
    reliability = tree["reliability"]
    if reliability is not None and is_known(reliability["value"]):
        words = "the rank correlation of these scores with those of another draw of contexts."
        yield f"Reliability {estimate_of(reliability, 2)}: {words}"
    for other in found["methods"]["other_explainers"]:
        n = plural(other["n_scored"], "latent")
        yield f"Explanations by {other['explainer']} are scored too ({n}). This shows their scores:"
        yield doc.Command(other["command"])


def _outcome(tree: Tree | None) -> Iterator[doc.Block]:
    if tree is not None and tree["n_asked"]:
        yield (
            f"Of {plural(tree['n_asked'], 'latent')} asked for: {tree['n_explained']} explained, "
            f"{tree['n_failed']} failed, {tree['n_ineligible']} with too few contexts."
        )


def _histograms(tree: Tree, width: int) -> Iterator[Text]:
    """Draw own scores, and the control's below, on one axis that starts at the first non-empty tenth."""
    shape, control = tree["histogram"], tree["control"]
    # With a sample, a bar has the estimated number of all eligible latents.
    edges, counts = shape["edges"], shape.get("estimated", shape["counts"])
    shape = control["histogram"] if control else {"counts": [0] * len(counts)}
    swapped = shape.get("estimated", shape["counts"])
    first = next((i for i, both in enumerate(zip(counts, swapped, strict=True)) if any(both)), 0) // 5 * 5
    first = min(first, edges.index(CHANCE) // 5 * 5)
    n = len(counts) - first
    cell = max(1, min(3, width // n))
    start, span = edges[first], edges[-1] - edges[first]
    ticks = [charts.Tick((CHANCE - start) / span * cell * n, "chance .5", "bold")]
    ticks += [charts.Tick((x / 10 - start) / span * cell * n, decimal(x / 10, 1)) for x in range(11) if x / 10 >= start]
    yield from _named(charts.columns(counts[first:], 5, cell=cell, style=ACCENT), "own explanation", ACCENT)
    if control:
        yield from _named(charts.columns(swapped[first:], 3, cell=cell, style="dim"), "swapped control", "dim")
    yield from charts.axis(cell * n, ticks)


def _named(lines: Sequence[Text], name: str, style: str) -> Iterator[Text]:
    """Put a chart's name in its upper left corner, or above it if that corner is taken."""
    if lines[0].plain[: len(name) + 3].strip():
        yield Text(name, style)
        yield from lines
    else:
        yield Text.assemble((name, style), lines[0][len(name) :])
        yield from lines[1:]


# --- controls -----------------------------------------------------------------------------------------------------
# Dictionaries that learnt nothing score high too, so each control is scored by the same protocol.


def _score_table(tree: Tree) -> doc.Table:
    """Show the mean under the own explanations, each control's mean, and the differences."""
    rows: doc.Rows = [[doc.Span("own explanation", "accent"), *_figures(tree), ""]]
    for name, row, above in list_controls(tree):
        rows.append([name, *_figures(row), estimate_of(above, sign=True)])
    quartiles = doc.Column("quartiles", is_extra=True)
    return doc.Table(["", ">latents", ">mean", "95 % interval", quartiles, ">AUROC", "own minus this"], rows)


def _figures(row: Tree) -> list[str]:
    quartiles = " / ".join(decimal(q, 2) for q in row["quartiles"])
    figures = [count(row["n_scored"]), decimal(row["mean"]), interval(row["interval"]), quartiles]
    return [*figures, decimal(row["auroc_mean"])]


def _other_scorers(tree: Tree) -> Iterator[doc.Block]:
    """Show the scores of other scorers, each with its own swapped control."""
    if not tree["other_scorers"]:
        return
    rows: doc.Rows = []
    for row in tree["other_scorers"]:
        control = row["control"]
        above = control["above_control"] if control else None
        cells = [estimate_of(row, 2), estimate_of(control, 2), estimate_of(above, 2, sign=True)]
        rows.append([row["scorer"], count(row["n_scored"]), *cells, decimal(row["auroc_mean"])])
    who = {(str(row["explainer"]), str(row["judge"])) for row in tree["other_scorers"]}
    by = "; ".join(f"{explainer}, judged by {judge}" for explainer, judge in sorted(who))
    heads = ["also scored by", ">latents", "own explanation", "swapped control", "own minus swapped"]
    note = f"Explained by {by}. Scores of different scorers test different things and cannot be compared."
    yield doc.Table([*heads, doc.Column("AUROC", "number", is_extra=True)], rows, [note])


def _describe_controls(tree: Tree) -> Iterator[doc.Block]:
    """Describe the comparison, warn if the swapped control is not .5, and name the commands for missing controls."""
    control = tree["control"]
    if control is None:
        yield "No swapped control was scored: a score alone is not evidence of interpretability."
    elif control["leaks"]:
        yield [
            doc.Span("! ", "warn"),
            f"The swapped control scores {estimate_of(control)} and not .5: the judge finds some answers without the "
            "explanation. The difference from the control is still valid. By chance alone, one study in twenty shows "
            "this warning.",
        ]
    if control is not None and is_known(control["above_control"]["fraction"]):
        share = f"{100 * control['above_control']['fraction']:.0f} %"
        yield f"{share} of the latents score higher with their own explanation than with the swapped one."
    for row in tree["control_saes"]:
        yield _compare_with_control_sae(row)
        if row["n_failed"] or row["n_ineligible"]:
            words = f"{row['run']}: {row['n_failed']} failed, {row['n_ineligible']} with too few contexts."
            yield doc.Sentence(doc.quiet(words), indent=2)
    if (baseline := tree["baseline"]) is not None:
        yield _compare_with_baseline(baseline)
    if (lacking := tree["lacking_controls"]) is not None:
        yield doc.quiet(lacking["says"])
        if lacking["command"]:
            yield doc.Command(lacking["command"])


def _by_negatives(tree: Tree) -> Iterator[doc.Block]:
    """Show the scores over harder negatives, and how far the own mean is above each control."""
    if not tree["negatives"]:
        return
    rows: doc.Rows = [
        [
            *(NEGATIVES[kind], count(row["n_scored"]), decimal(row["mean"]), interval(row["interval"])),
            *(decimal(row["tnr"]["value"]), decimal(row["auroc_mean"]), decimal(row["random_mean"])),
            count(row["n_missing"]),
        ]
        for kind, row in tree["negatives"].items()
    ]
    heads = ["negatives", ">latents", ">mean", "95 % interval", ">TNR", ">AUROC", ">random", ">too few"]
    note = "random: the same latents' score over random negatives; too few: latents without enough of the kind."
    yield doc.Table(heads, rows, [note])
    controls = list(list_controls(tree))
    rows = [["random", *(estimate_of(above, 2, sign=True) for _, _, above in controls)]]
    for kind in tree["negatives"]:
        above = (_above_of_kind(tree, kind, name, row) for name, row, _ in controls)
        rows.append([NEGATIVES[kind], *(estimate_of(of, 2, sign=True) for of in above)])
    if controls:
        yield doc.Table(["own score minus", *(name for name, _, _ in controls)], rows)


def _above_of_kind(tree: Tree, kind: str, name: str, row: Tree) -> Any:
    if name == "swapped control":
        return tree["negatives"][kind]["above_control"]
    return (row["negatives"].get(kind) or {}).get("above")


def list_controls(tree: Tree) -> Iterator[tuple[str, Tree, Tree]]:
    """Return each control's name, its figures, and how far the own mean is above them."""
    if (control := tree["control"]) is not None:
        yield "swapped control", control, control["above_control"]
    for row in tree["control_saes"]:
        yield _NAMES[row["kind"]], row, row["above"]
    if (baseline := tree["baseline"]) is not None:
        yield "n-gram baseline", baseline, baseline["above"]


def _compare_with_control_sae(row: Tree) -> str:
    above, (what, cause) = row["above"], _WHAT[row["kind"]]
    difference = f"({estimate_of(above, sign=True)})"
    if not above["interval"]:
        return f"{plural(row['n_scored'], 'latent')} of {what} scored: too few to compare with."
    low, high = above["interval"]
    if low > 0:
        return f"The latents score higher than those of {what} {difference}: this difference comes from {cause}."
    if high < 0:
        return f"The latents score lower than those of {what} {difference}: training did not make them clearer."
    return f"The latents score no higher than those of {what} {difference}: such scores do not show training."


def _compare_with_baseline(row: Tree) -> str:
    above = row["above"]
    difference = f"({estimate_of(above, sign=True)}, {plural(row['n_scored'], 'latent')})"
    if not above["interval"] or above["interval"][0] <= 0 <= above["interval"][1]:
        return f"On the same contexts n-grams alone, which cost nothing, score as well {difference}."
    side = "lower" if above["interval"][0] > 0 else "higher"
    return f"On the same contexts n-grams alone, which cost nothing, score {side} {difference}."


# --- which latents are scored, and how the scores relate to sharing -------------------------------------------------


def counted(found: Tree) -> doc.Section:
    title = "Who was scored"
    says = (
        "A latent that fires in too few different contexts cannot be tested. Such latents are mostly rare, so the "
        "scored latents are not a fair sample of all."
    )
    tree = found["scores"]
    if tree is None:
        return doc.Section(title, says, explain_missing(found, "explain"))
    n_runs = len(found["compared"])
    kinds = ["latents", "alive", "eligible", "explained", "scored", *(["failed"] if tree["n_failed"] else [])]
    heads = [doc.Column(kind, "number", is_extra=kind in ("latents", "explained")) for kind in kinds]
    above = [] if tree["control"] is None else ["own minus swapped"]

    def cells(row: Tree, difference: Tree | None) -> list[str]:
        differences = [estimate_of(difference, 2, sign=True) for _ in above]
        return [*(count(row[f"n_{kind}"]) for kind in kinds), estimate_of(row, 2), *differences]

    rows: doc.Rows = [
        [doc.Span(class_label(name, n_runs), name), *cells(row, row["above_control"])]
        for name, row in (tree["by_class"] or {}).items()
    ]
    rows.append(["all", *cells(tree, tree["control"] and tree["control"]["above_control"])])
    notes = [f"Eligible: counted over {tree['eligible_of']}."]
    if tree["n_ineligible"]:
        notes.append(f"{plural(tree['n_ineligible'], 'latent')} asked for had too few contexts.")
    body: list[doc.Block] = [doc.Table(["", *heads, "mean score", *above], rows, notes)]
    if tree["waiting"] and tree["n_scored"]:
        body.append(f"{plural(tree['waiting']['n'], 'explained latent')} not scored yet:")
        body.append(doc.Command(tree["waiting"]["command"]))
    return doc.Section(title, says, body, list(_too_few(tree["too_few"], n_runs)))


def _too_few(tree: Tree | None, n_runs: int) -> Iterator[doc.Block]:
    """Count the alive latents with too few contexts for a score, by shared class."""
    if tree is None or not tree["together"]["n"]:
        return
    rows: doc.Rows = []
    for name, row in sorted(tree.items(), key=lambda item: item[0] == "together"):
        label = "all" if name == "together" else doc.Span(class_label(name, n_runs), name)
        rates = [row[key] for key in ("median_frequency", "median_frequency_of_eligible")]
        cells = [count(row["n"]), percent(row["fraction"]), percent_interval(row["interval"])]
        rows.append([label, *cells, *(rate(of) if is_known(of) else "" for of in rates)])
    reasons = " · ".join(f"{reason}: {n}" for reason, n in tree["together"]["reasons"].items())
    heads = ["too few contexts", ">latents", ">share of alive", "95 % interval", ">median rate", ">of eligible"]
    yield doc.Table(heads, rows, [reasons])


def relation(found: Tree) -> doc.Section:
    title = "How scores relate to similarity"
    says = (
        "Rank correlation (Spearman) of a latent's score with its similarity to its partners in the other seeds. Both "
        "may merely follow how often it fires, so that is also held fixed."
    )
    tree = found["relation"]
    if tree is None:
        return doc.Section(title, says, _no_relation(found))
    n, pooled = tree["n"], tree["pooled"]
    main = _correlations([("score and similarity", tree, n), (" frequency fixed", tree["partial"], n)])
    rest = [
        ("corrected for noise", tree["corrected"], n),
        (" frequency fixed, corrected", tree["partial_corrected"], n),
        (" within frequency strata", tree["within_strata"], n),
        *((f"  {rate(of['low'])} to {rate(of['high'])}", of, of["n"]) for of in tree["strata"]),
        ("score and frequency", tree["frequency"], n),
    ]
    if pooled is not None:  # over the scores of several runs
        rest += [
            (f"{len(pooled['runs'])} runs together", pooled, pooled["n"]),
            (" corrected for noise", pooled["corrected"], pooled["n"]),
            (" frequency fixed", pooled["partial"], pooled["n"]),
        ]
    rest = [row for row in rest if "corrected" not in row[0] or is_known(row[1]["value"])]
    body = [main, *_shared_and_unshared(tree), *_by_similarity(tree)]
    return doc.Section(title, says, body, [_correlations(rest), *_relation_notes(found, tree)])


def _correlations(rows: Sequence[tuple[str, Tree, int]]) -> doc.Table:
    """Show labels, correlations with their intervals, and numbers of latents. Spaces before a label make it quieter."""
    scale = doc.Chart(lambda width, _: [Text(f"−1{'0':^{_odd(width) - 4}}+1")])
    cells: doc.Rows = []
    for label, row, n in rows:
        style = "strong" if not label.startswith(" ") else "quiet" if label.startswith("  ") else ""
        value, bounds = row.get("spearman", row.get("value")), row["interval"]
        figures = [decimal(value, 2, sign=True), interval(bounds, 2, sign=True), count(n)]
        cells.append([doc.Span(label, style), *figures, whisker(value, bounds, -1, 1, 0)])
    chart = doc.Column(scale, "chart", is_extra=True)
    return doc.Table(["", ">Spearman", "95 % interval", ">latents", chart], cells)


def _odd(width: int) -> int:
    return width - 1 + width % 2


def whisker(
    value: float | None, bounds: Sequence[float | None] | None, start: float, stop: float, mark: float = math.nan
) -> doc.Chart:
    """Draw an estimate with its interval; the width is odd, so the middle has a cell of its own."""
    low, high = bounds or (value, value)
    middle, low, high = (math.nan if x is None else x for x in (value, low, high))
    return doc.Chart(lambda width, _: [charts.whisker(middle, low, high, start, stop, _odd(width), mark=mark)])


def _shared_and_unshared(tree: Tree) -> Iterator[doc.Block]:
    apart = tree["shared_and_unshared"]
    if is_known(apart["plain"]["value"]):
        words = f"Shared latents minus unshared: {estimate_of(apart['plain'], sign=True)}"
        if is_known(apart["matched"]["value"]):
            words += f"; at equal firing frequency {estimate_of(apart['matched'], sign=True)}"
        yield f"{words} ({apart['n_shared']} and {apart['n_unshared']} latents)."


def _relation_notes(found: Tree, tree: Tree) -> Iterator[doc.Block]:
    if is_known(tree["reliability"]["value"]) and not is_known(tree["corrected"]["value"]):
        reliability = found["scores"]["reliability"] or tree["reliability"]
        yield f"Reliability {decimal(reliability['value'], 2)}: too small to correct the correlation for noise."
    if (pooled := tree["pooled"]) is not None:
        words = f"The runs' {pooled['n']} latents are {pooled['n_units']} with their partners counted as one."
        yield doc.quiet(words)


def _no_relation(found: Tree) -> list[doc.Block]:
    if found["scores"] is None or not found["scores"]["n_scored"]:
        return explain_missing(found, "score")
    if found["similarity"] is None:
        return explain_missing(found, "overlap")
    return ["Fewer than three latents are scored."]


def _by_similarity(tree: Tree) -> Iterator[doc.Block]:
    """Show the mean score in quarters of similarity."""
    bins = tree["bins"]
    if len(bins) < 2:
        return
    bounds = [b for row in bins for b in (row["interval"] or [row["mean"]])]
    start, stop = min([CHANCE, *bounds]), max(bounds)
    above = ["own minus swapped"] if any(row.get("above_control") for row in bins) else []
    rows: doc.Rows = []
    for row in bins:
        cells = [f"{decimal(row['low'], 2)} to {decimal(row['high'], 2)}", count(row["n"]), decimal(row["mean"])]
        differences = [estimate_of(row.get("above_control"), 2, sign=True) for _ in above]
        chart = whisker(row["mean"], row["interval"], start, stop)
        rows.append([*cells, interval(row["interval"]), *differences, chart])
    scale = doc.Chart(lambda width, _: [Text(f"{decimal(start, 2)}{decimal(stop, 2):>{_odd(width) - 3}}")])
    heads = ["similarity", ">latents", ">mean score", "95 % interval", *above]
    yield doc.Table([*heads, doc.Column(scale, "chart", is_extra=True)], rows)


def interesting(found: Tree) -> doc.Section:
    title = "Unshared latents that are easy to explain"
    says = (
        f"Alive latents of {found['focus']} without a shared partner, by the lower end of their score's interval. "
        "Contexts run from the strongest activation to the middle of its range."
    )
    tree = found["interesting"]
    if tree is None:
        return doc.Section(title, says, _no_relation(found))
    if not tree:
        none = "None: no unshared latent scores above chance and above its swapped control with 95 % confidence."
        return doc.Section(title, says, [none])
    body = [block for i, entry in enumerate(tree[:_N_BRIEF]) for block in _one(entry, is_apart=i > 0)]
    details = [block for entry in tree[_N_BRIEF:N_SHOWN] for block in _one(entry, is_apart=True)]
    if rest := ", ".join(str(entry["latent"]) for entry in tree[N_SHOWN:]):
        details.append(doc.Sentence(doc.quiet(f"Next: {rest}."), is_apart=True))
    return doc.Section(title, says, body, [*details, doc.quiet("One of them in full:"), doc.Command(found["show"])])


def _one(entry: Tree, is_apart: bool) -> Iterator[doc.Block]:
    facts = [
        f"score {estimate(entry['score'], entry['interval'], 2)}",
        *([f"swapped {decimal(entry['control'], 2)}"] if is_known(entry["control"]) else []),
        f"similarity {decimal(entry['similarity'], 2)}",
        f"fires {rate(entry['firing_frequency'])}",
    ]
    name = doc.Span(f"latent {entry['latent']}", "strong", entry["latent"])
    yield doc.Sentence([name, "  ", doc.quiet(" · ".join(facts))], is_apart=is_apart)
    words = entry["explanation"]
    yield doc.Sentence(shorten(words) if words else doc.quiet("(its explanation is not in the journal)"), indent=2)
    for context in entry["contexts"]:
        yield doc.Context(context["tokens"], context["activations"])
    if not entry["contexts"]:
        yield doc.Sentence(doc.quiet("(its contexts are not available: no firing store, or no tokenizer)"), indent=4)


def failures(found: Tree) -> doc.Section | None:
    """List the failures by reason; ``None`` if there are none."""
    tree = found["failures"]
    if tree is None or not (tree["n"] or tree["n_answers"]):
        return None
    rows: doc.Rows = []
    for row in tree["reasons"]:
        some = ", ".join(str(n) for n in row["latents"][:6]) + (", …" if len(row["latents"]) > 6 else "")
        rows.append([row["stage"], count(row["n"]), row["reason"], doc.quiet(some)])
    heads: doc.Heads = ["stage", ">latents", doc.Column("reason", "fold"), "which"]
    body: list[doc.Block] = [doc.Table(heads, rows)] if rows else []
    if n := tree["n_answers"]:
        body.append(f"{plural(n, 'answer')} of the judge failed within scored latents and are not counted.")
    if tree["retry"]:
        body += ["This retries only what failed:", doc.Command(tree["retry"])]
    return doc.Section("What failed", "No failure counts as a zero: failed latents are in none of the figures.", body)


def cost(found: Tree) -> Iterator[str]:
    """Show the usage of language models, one line per stage."""
    for row in found["methods"]["cost"]:
        yield (
            f"{row['stage']}: {row['model']}, {human(row['requests'])} requests, "
            f"{human(row['prompt_tokens'])} prompt tokens ({human(row['cached_tokens'])} cached), "
            f"{human(row['completion_tokens'])} completion tokens"
        )
