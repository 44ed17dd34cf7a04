"""Show how well latents can be explained, which were scored, and how the scores relate to sharing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.text import Text

from autointerp.explaining.patterns import shorten
from autointerp.findings import shape
from autointerp.journal.method import CHANCE
from autointerp.report import blocks as doc
from autointerp.report import charts
from autointerp.report.charts import ACCENT
from autointerp.report.dictionaries import explain_missing
from autointerp.report.numbers import class_label, count, estimate_of, human, percent, percent_interval, plural, rate
from sae.common.amounts import decimal, interval, is_known
from sae.common.estimate import Estimate

N_SHOWN, _N_BRIEF = 5, 2
_NAMES = {"frozen": "frozen decoder", "untrained": "untrained SAE"}
_WHAT = {
    "frozen": ("an SAE whose random decoder was never trained", "training the decoder"),
    "untrained": ("an SAE that was not trained at all", "training"),
}
NEGATIVES = {"hard": "a neighbour fires", "same_token": "same token"}


def scores(found: shape.StudyFindings) -> doc.Section:
    title = "How well the latents can be explained"
    says = (
        "A judge reads only the explanation and says of unseen contexts whether the latent fires there; the score is "
        "its balanced accuracy (.5 is guessing, 1 perfect). The control uses another latent's explanation."
    )
    tree = found.scores
    if tree is None or not tree.n_scored:
        rest = [*_flags(tree), *_other_scorers(tree)] if tree else []
        body = [*explain_missing(found, "score"), *_outcome(tree), *rest]
        return doc.Section(title, says, body)
    chart = doc.Chart(lambda width, _: _histograms(tree, width))
    body = [*_sample(tree), chart, _score_table(tree), *_describe_controls(tree), *_flags(tree)]
    details = [*_by_negatives(tree), *_other_scorers(tree), *_score_notes(found, tree)]
    return doc.Section(title, says, body, details)


def _sample(tree: shape.Scores) -> Iterator[doc.Block]:
    """Describe the population of the figures: all eligible latents, or only the scored ones."""
    sample, n = tree.sample, plural(tree.n_scored, "latent")
    if sample is None:
        yield f"{n}, not drawn as a recorded sample: the figures are of these latents, unweighted."
        return
    (draw, *more) = sample.draws
    kind = "eligible" if draw["sharing"] == "any" or more else f"eligible {draw['sharing']}"
    partners = f" partners of latents of {draw['partners_of']}" if draw.get("partners_of") else ""
    if sample.n_done == sample.population:
        yield f"{n}: all {count(sample.population)} {kind}{partners}; {sample.n_failed} failed."
    else:
        drawn = f"a stratified sample ({draw['strata']}) of {count(sample.population)} {kind}{partners}"
        yield f"{n}, {drawn}; weighted, so the figures estimate all of these."
    if sample.n_waiting:
        yield doc.quiet(f"{count(sample.n_waiting)} of the {count(sample.n_drawn)} drawn have no score yet.")
    if sample.n_outside:
        outside = plural(sample.n_outside, "scored latent")
        yield doc.quiet(f"{outside} outside the sample: shown one by one, and in none of these figures.")


def _score_notes(found: shape.StudyFindings, tree: shape.Scores) -> Iterator[doc.Block]:
    """Describe adaptive judging and reliability, and name the command for the scores of another explainer."""
    if (precision := tree.precision) is not None:
        most = precision.rounds
        at_most = f", of at most {most['n_active']} + {most['n_inactive']}" if most else ""
        narrow, cap, out = precision.stopped.values()
        width, mean = decimal(precision.half_width).rstrip("0"), f"{precision.mean_contexts:.0f}"
        yield (
            f"Contexts were judged in rounds until a score's 95 % interval was ±{width}: {mean} contexts a latent on "
            f"average{at_most}. {plural(narrow, 'latent')} ended narrow enough, {cap:,} at the cap, {out:,} with no "
            "contexts left."
        )
    reliability = tree.reliability
    if reliability is not None and is_known(reliability.value.value):
        words = "the rank correlation of these scores with those of another draw of contexts."
        yield f"Reliability {estimate_of(reliability.value, 2)}: {words}"
    yield from _repeats(tree)
    for other in found.methods.other_explainers:
        n, above = plural(other.n_scored, "latent"), other.above
        words = f"Explanations by {other.explainer} are scored too ({n})."
        if above is not None:
            both = "its latent" if above.n == 1 else f"the {above.n:,} latents with both"
            words += f" Over {both}, the scores here are {estimate_of(above, sign=True)} above those."
        yield f"{words} This shows their scores:"
        yield doc.Command(other.command)


def _repeats(tree: shape.Scores) -> Iterator[doc.Block]:
    """Show how far other draws, replicates and judges agree with these scores."""
    if not tree.repeats:
        return
    rows: doc.Rows = []
    for row in tree.repeats:
        judge = f"judge {row.judge}" + (f" ({row.model})" if row.model else "")
        name = judge if row.by == "judge" else f"{row.by} {getattr(row, row.by)}"
        rows.append([name, count(row.n), estimate_of(row.equal), estimate_of(row.spearman, 2)])
    notes = [
        "On the contexts that both judged. Draws and replicates after 0 are sampled at a temperature above 0.",
        "`report` shows the scores of another one with --draw, --replicate or --judge.",
    ]
    yield doc.Table(["compared with", ">latents", "equal answers", "correlation of scores"], rows, notes)


def _outcome(tree: shape.Scores | None) -> Iterator[doc.Block]:
    if tree is not None and tree.n_asked:
        yield (
            f"Of {plural(tree.n_asked, 'latent')} asked for: {tree.n_explained} explained, "
            f"{tree.n_failed} failed, {tree.n_ineligible} with too few contexts."
        )


def _flags(tree: shape.Scores) -> Iterator[doc.Block]:
    """List the latents whose explanation is suspicious, by the reason; they are in the figures."""
    if tree.flags:
        rows: doc.Rows = [[count(row.n), row.reason, doc.quiet(_name_some(row.latents))] for row in tree.flags]
        yield doc.Table([">latents", doc.Column("explained, but flagged", "fold"), "which"], rows)


def _name_some(latents: Sequence[int]) -> str:
    return ", ".join(map(str, latents[:6])) + (", …" if len(latents) > 6 else "")


def _histograms(tree: shape.Scores, width: int) -> Iterator[Text]:
    """Draw own scores, and the control's below, on one axis that starts at the first non-empty tenth."""
    control, edges, counts = tree.control, tree.histogram.edges, tree.histogram.bars
    swapped = control.histogram.bars if control else [0] * len(counts)
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


def _score_table(tree: shape.Scores) -> doc.Table:
    """Show the mean under the own explanations, each control's mean, and the differences."""
    rows: doc.Rows = [[doc.Span("own explanation", "accent"), *_figures(tree), ""]]
    for name, row, above in list_controls(tree):
        rows.append([name, *_figures(row), estimate_of(above, sign=True)])
    quartiles = doc.Column("quartiles", is_extra=True)
    return doc.Table(["", ">latents", ">mean", "95 % interval", quartiles, ">AUROC", "own minus this"], rows)


def _figures(row: shape.ScoreFigures) -> list[str]:
    quartiles = " / ".join(decimal(q.value, 2) for q in row.quartiles)
    figures = [count(row.n_scored), decimal(row.mean.value), interval(row.mean.interval), quartiles]
    return [*figures, decimal(row.auroc_mean)]


def _other_scorers(tree: shape.Scores) -> Iterator[doc.Block]:
    """Show the scores of other scorers, each with its own swapped control."""
    if not tree.other_scorers:
        return
    rows: doc.Rows = []
    for row in tree.other_scorers:
        above = row.control.above_control if row.control else None
        cells = [estimate_of(row, 2), estimate_of(row.control, 2), estimate_of(above, 2, sign=True)]
        rows.append([row.scorer, count(row.n_scored), *cells, decimal(row.auroc_mean)])
    who = {(str(row.explainer), str(row.judge)) for row in tree.other_scorers}
    by = "; ".join(f"{explainer}, judged by {judge}" for explainer, judge in sorted(who))
    heads = ["also scored by", ">latents", "own explanation", "swapped control", "own minus swapped"]
    note = f"Explained by {by}. Scores of different scorers test different things and cannot be compared."
    yield doc.Table([*heads, doc.Column("AUROC", "number", is_extra=True)], rows, [note])


def _describe_controls(tree: shape.Scores) -> Iterator[doc.Block]:
    """Describe the comparison, warn if the swapped control is not .5, and name the commands for missing controls."""
    control = tree.control
    if control is None:
        yield "No swapped control was scored: a score alone is not evidence of interpretability."
    elif control.leaks:
        yield [
            doc.Span("! ", "warn"),
            f"The swapped control scores {estimate_of(control)} and not .5: the judge finds some answers without "
            "the explanation. The difference from the control is still valid. By chance alone, one study in twenty "
            "shows this warning.",
        ]
    if control is not None and is_known(control.above_control.fraction):
        share = f"{100 * control.above_control.fraction:.0f} %"
        yield f"{share} of the latents score higher with their own explanation than with the swapped one."
    for row in tree.control_saes:
        yield _compare_with_control_sae(row)
        if row.n_failed or row.n_ineligible:
            words = f"{row.run}: {row.n_failed} failed, {row.n_ineligible} with too few contexts."
            yield doc.Sentence(doc.quiet(words), indent=2)
    if (baseline := tree.baseline) is not None:
        yield _compare_with_baseline(baseline)
    if (lacking := tree.lacking_controls) is not None:
        yield doc.quiet(lacking.says)
        if lacking.command:
            yield doc.Command(lacking.command)


def _by_negatives(tree: shape.Scores) -> Iterator[doc.Block]:
    """Show the scores over harder negatives, and how far the own mean is above each control."""
    if not tree.negatives:
        return
    rows: doc.Rows = [
        [
            *(NEGATIVES[kind], count(row.n_scored), decimal(row.mean.value), interval(row.mean.interval)),
            *(decimal(row.tnr.value), decimal(row.auroc_mean), decimal(row.random_mean), count(row.n_missing)),
        ]
        for kind, row in tree.negatives.items()
    ]
    heads = ["negatives", ">latents", ">mean", "95 % interval", ">TNR", ">AUROC", ">random", ">too few"]
    note = "random: the same latents' score over random negatives; too few: latents without enough of the kind."
    yield doc.Table(heads, rows, [note])
    controls = list(list_controls(tree))
    rows = [["random", *(estimate_of(above, 2, sign=True) for _, _, above in controls)]]
    for kind in tree.negatives:
        above = (_above_of_kind(tree, kind, row) for _, row, _ in controls)
        rows.append([NEGATIVES[kind], *(estimate_of(of, 2, sign=True) for of in above)])
    if controls:
        yield doc.Table(["own score minus", *(name for name, _, _ in controls)], rows)


def _above_of_kind(tree: shape.Scores, kind: str, row: shape.SwappedControl | shape.Control) -> shape.Mean | None:
    if isinstance(row, shape.SwappedControl):
        return tree.negatives[kind].above_control
    return row.negatives[kind].above if kind in row.negatives else None


def list_controls(tree: shape.Scores) -> Iterator[tuple[str, shape.SwappedControl | shape.Control, Estimate]]:
    """Return each control's name, its figures, and how far the own mean is above them."""
    if (control := tree.control) is not None:
        yield "swapped control", control, control.above_control.mean
    for row in tree.control_saes:
        yield _NAMES[row.kind], row, row.above.mean
    if (baseline := tree.baseline) is not None:
        yield "n-gram baseline", baseline, baseline.above.mean


def _compare_with_control_sae(row: shape.ControlSae) -> str:
    above, (what, cause) = row.above.mean, _WHAT[row.kind]
    difference = f"({estimate_of(above, sign=True)})"
    if not above.interval:
        return f"{plural(row.n_scored, 'latent')} of {what} scored: too few to compare with."
    if above.low > 0:
        return f"The latents score higher than those of {what} {difference}: this difference comes from {cause}."
    if above.high < 0:
        return f"The latents score lower than those of {what} {difference}: training did not make them clearer."
    return f"The latents score no higher than those of {what} {difference}: such scores do not show training."


def _compare_with_baseline(row: shape.Control) -> str:
    above = row.above.mean
    difference = f"({estimate_of(above, sign=True)}, {plural(row.n_scored, 'latent')})"
    how = "lower" if above.low > 0 else "higher" if above.high < 0 else "as well"
    return f"On the same contexts n-grams alone, which cost nothing, score {how} {difference}."


# --- which latents are scored, and how the scores relate to sharing -------------------------------------------------


def counted(found: shape.StudyFindings) -> doc.Section:
    title = "Who was scored"
    says = (
        "A latent that fires in too few different contexts cannot be tested. Such latents are mostly rare, so the "
        "scored latents are not a fair sample of all."
    )
    tree = found.scores
    if tree is None:
        return doc.Section(title, says, explain_missing(found, "explain"))
    n_runs = len(found.compared)
    kinds = ["latents", "alive", "eligible", "explained", "scored", *(["failed"] if tree.n_failed else [])]
    heads = [doc.Column(kind, "number", is_extra=kind in ("latents", "explained")) for kind in kinds]
    above = [] if tree.control is None else ["own minus swapped"]

    def cells(row: shape.Scores | shape.ScoresOfClass, difference: shape.Difference | None) -> list[str]:
        differences = [estimate_of(difference, 2, sign=True) for _ in above]
        return [*(count(getattr(row, f"n_{kind}")) for kind in kinds), estimate_of(row, 2), *differences]

    rows: doc.Rows = [
        [doc.Span(class_label(name, n_runs), name), *cells(row, row.above_control)]
        for name, row in (tree.by_class or {}).items()
    ]
    rows.append(["all", *cells(tree, tree.control.above_control if tree.control else None)])
    notes = [f"Eligible: counted over {tree.eligible_of}."]
    if tree.n_ineligible:
        notes.append(f"{plural(tree.n_ineligible, 'latent')} asked for had too few contexts.")
    body: list[doc.Block] = [doc.Table(["", *heads, "mean score", *above], rows, notes)]
    if tree.waiting and tree.n_scored:
        body.append(f"{plural(tree.waiting.n, 'explained latent')} not scored yet:")
        body.append(doc.Command(tree.waiting.command))
    return doc.Section(title, says, body, list(_too_few(tree.too_few, n_runs)))


def _too_few(tree: dict[str, shape.TooFew] | None, n_runs: int) -> Iterator[doc.Block]:
    """Count the alive latents with too few contexts for a score, by shared class."""
    if tree is None or not tree["together"].n:
        return
    rows: doc.Rows = []
    for name, row in sorted(tree.items(), key=lambda item: item[0] == "together"):
        label = "all" if name == "together" else doc.Span(class_label(name, n_runs), name)
        rates = [row.median_frequency, row.median_frequency_of_eligible]
        cells = [count(row.n), percent(row.fraction.value), percent_interval(row.fraction.interval)]
        rows.append([label, *cells, *(rate(of) if is_known(of) else "" for of in rates)])
    reasons = " · ".join(f"{reason}: {n}" for reason, n in tree["together"].reasons.items())
    heads = ["too few contexts", ">latents", ">share of alive", "95 % interval", ">median rate", ">of eligible"]
    yield doc.Table(heads, rows, [reasons])


def relation(found: shape.StudyFindings) -> doc.Section:
    title = "How scores relate to similarity"
    says = (
        "Rank correlation (Spearman) of a latent's score with its similarity to its partners in the other seeds. Both "
        "may merely follow how often it fires, so that is also held fixed."
    )
    tree = found.relation
    if tree is None:
        return doc.Section(title, says, _no_relation(found))
    n, pooled = tree.n, tree.pooled
    main = _correlations([("score and similarity", tree.spearman, n), (" frequency fixed", tree.partial, n)])
    rest = [
        ("corrected for noise", tree.corrected, n),
        (" frequency fixed, corrected", tree.partial_corrected, n),
        (" within frequency strata", tree.within_strata, n),
        *((f"  {rate(of.low)} to {rate(of.high)}", of.value, of.n) for of in tree.strata),
        ("score and frequency", tree.frequency, n),
    ]
    if pooled is not None:  # over the scores of several runs
        rest += [
            (f"{len(pooled.runs)} runs together", pooled.spearman, pooled.n),
            (" corrected for noise", pooled.corrected, pooled.n),
            (" frequency fixed", pooled.partial, pooled.n),
        ]
    rest = [row for row in rest if "corrected" not in row[0] or is_known(row[1].value)]
    body = [main, *_shared_and_unshared(tree), *_by_similarity(tree)]
    return doc.Section(title, says, body, [_correlations(rest), *_relation_notes(found, tree)])


def _correlations(rows: Sequence[tuple[str, Estimate, int]]) -> doc.Table:
    """Show labels, correlations with their intervals, and numbers of latents. Spaces before a label make it quieter."""
    scale = doc.Chart(lambda width, _: [Text(f"−1{'0':^{_odd(width) - 4}}+1")])
    cells: doc.Rows = []
    for label, row, n in rows:
        style = "strong" if not label.startswith(" ") else "quiet" if label.startswith("  ") else ""
        figures = [decimal(row.value, 2, sign=True), interval(row.interval, 2, sign=True), count(n)]
        cells.append([doc.Span(label, style), *figures, whisker(row, -1, 1, 0)])
    chart = doc.Column(scale, "chart", is_extra=True)
    return doc.Table(["", ">Spearman", "95 % interval", ">latents", chart], cells)


def _odd(width: int) -> int:
    return width - 1 + width % 2


def whisker(found: Estimate, start: float, stop: float, mark: float = math.nan) -> doc.Chart:
    """Draw an estimate with its interval; the width is odd, so the middle has a cell of its own."""
    low, high = found.interval or (found.value, found.value)
    return doc.Chart(lambda width, _: [charts.whisker(found.value, low, high, start, stop, _odd(width), mark=mark)])


def _shared_and_unshared(tree: shape.Relation) -> Iterator[doc.Block]:
    apart = tree.shared_and_unshared
    if is_known(apart.plain.value):
        words = f"Shared latents minus unshared: {estimate_of(apart.plain, sign=True)}"
        if is_known(apart.matched.value):
            words += f"; at equal firing frequency {estimate_of(apart.matched, sign=True)}"
        yield f"{words} ({apart.n_shared} and {apart.n_unshared} latents)."


def _relation_notes(found: shape.StudyFindings, tree: shape.Relation) -> Iterator[doc.Block]:
    if is_known(tree.reliability.value) and not is_known(tree.corrected.value):
        of_scores = found.scores and found.scores.reliability
        reliability = of_scores.value if of_scores else tree.reliability
        yield f"Reliability {decimal(reliability.value, 2)}: too small to correct the correlation for noise."
    if (pooled := tree.pooled) is not None:
        words = f"The runs' {pooled.n} latents are {pooled.n_units} with their partners counted as one."
        yield doc.quiet(words)


def _no_relation(found: shape.StudyFindings) -> list[doc.Block]:
    if found.scores is None or not found.scores.n_scored:
        return explain_missing(found, "score")
    if found.similarity is None:
        return explain_missing(found, "overlap")
    return ["Fewer than three latents are scored."]


def _by_similarity(tree: shape.Relation) -> Iterator[doc.Block]:
    """Show the mean score in quarters of similarity."""
    bins = tree.bins
    if len(bins) < 2:
        return
    bounds = [b for row in bins for b in (row.mean.interval or [row.mean.value])]
    start, stop = min([CHANCE, *bounds]), max(bounds)
    above = ["own minus swapped"] if any(row.above_control for row in bins) else []
    rows: doc.Rows = []
    for row in bins:
        cells = [f"{decimal(row.low, 2)} to {decimal(row.high, 2)}", count(row.n), decimal(row.mean.value)]
        differences = [estimate_of(row.above_control, 2, sign=True) for _ in above]
        rows.append([*cells, interval(row.mean.interval), *differences, whisker(row.mean, start, stop)])
    scale = doc.Chart(lambda width, _: [Text(f"{decimal(start, 2)}{decimal(stop, 2):>{_odd(width) - 3}}")])
    heads = ["similarity", ">latents", ">mean score", "95 % interval", *above]
    yield doc.Table([*heads, doc.Column(scale, "chart", is_extra=True)], rows)


def interesting(found: shape.StudyFindings) -> doc.Section:
    title = "Unshared latents that are easy to explain"
    says = (
        f"Alive latents of {found.focus} without a shared partner, by the lower end of their score's interval. "
        "Contexts run from the strongest activation to the middle of its range."
    )
    tree = found.interesting
    if tree is None:
        return doc.Section(title, says, _no_relation(found))
    if not tree:
        none = "None: no unshared latent scores above chance and above its swapped control with 95 % confidence."
        return doc.Section(title, says, [none])
    body = [block for i, entry in enumerate(tree[:_N_BRIEF]) for block in _one(entry, is_apart=i > 0)]
    details = [block for entry in tree[_N_BRIEF:N_SHOWN] for block in _one(entry, is_apart=True)]
    if rest := ", ".join(str(entry.latent) for entry in tree[N_SHOWN:]):
        details.append(doc.Sentence(doc.quiet(f"Next: {rest}."), is_apart=True))
    return doc.Section(title, says, body, [*details, doc.quiet("One of them in full:"), doc.Command(found.show or "")])


def _one(entry: shape.Interesting, is_apart: bool) -> Iterator[doc.Block]:
    facts = [
        f"score {estimate_of(entry.score, 2)}",
        *([f"swapped {decimal(entry.control, 2)}"] if is_known(entry.control) else []),
        f"similarity {decimal(entry.similarity, 2)}",
        f"fires {rate(entry.firing_frequency)}",
        *entry.flags,
    ]
    name = doc.Span(f"latent {entry.latent}", "strong", entry.latent)
    yield doc.Sentence([name, "  ", doc.quiet(" · ".join(facts))], is_apart=is_apart)
    words = entry.explanation
    yield doc.Sentence(shorten(words) if words else doc.quiet("(its explanation is not in the journal)"), indent=2)
    for context in entry.contexts:
        yield doc.Context(context.tokens, context.activations)
    if not entry.contexts:
        yield doc.Sentence(doc.quiet("(its contexts are not available: no firing store, or no tokenizer)"), indent=4)


def failures(found: shape.StudyFindings) -> doc.Section | None:
    """List the failures by reason; ``None`` if there are none."""
    tree = found.failures
    if not (tree.n or tree.n_answers):
        return None
    rows: doc.Rows = []
    for row in tree.reasons:
        rows.append([row.stage, count(row.n), row.reason, doc.quiet(_name_some(row.latents))])
    heads: doc.Heads = ["stage", ">latents", doc.Column("reason", "fold"), "which"]
    body: list[doc.Block] = [doc.Table(heads, rows)] if rows else []
    if n := tree.n_answers:
        body.append(f"{plural(n, 'answer')} of the judge failed within scored latents and are not counted.")
    if tree.retry:
        body += ["This retries only what failed:", doc.Command(tree.retry)]
    return doc.Section("What failed", "No failure counts as a zero: failed latents are in none of the figures.", body)


def cost(found: shape.StudyFindings) -> Iterator[str]:
    """Show the usage of language models, one line per stage."""
    for row in found.methods.cost:
        yield (
            f"{row['stage']}: {row['model']}, {human(row['requests'])} requests, "
            f"{human(row['prompt_tokens'])} prompt tokens ({human(row['cached_tokens'])} cached), "
            f"{human(row['completion_tokens'])} completion tokens"
        )
