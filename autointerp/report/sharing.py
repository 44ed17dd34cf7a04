"""Show how much is shared: overlap under every definition and by chance, similarity, unshared latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from autointerp.findings import shape
from autointerp.report import blocks as doc
from autointerp.report import charts
from autointerp.report.charts import STYLE_OF_CLASS
from autointerp.report.dictionaries import explain_missing, name_change
from autointerp.report.numbers import (
    chance_level,
    count,
    human,
    percent,
    percent_interval,
    threshold_of,
)
from sae.common.amounts import decimal, estimate, interval, is_known
from sae.common.estimate import Estimate

RULES = {
    "strict": "encoder and decoder pick the same partner, both cosines > {t}",
    "both": "both matched cosines > {t}, each under its own matching",
    "decoder": "matched decoder cosine > {t} alone",
    "lenient": "encoder and decoder pick the same partner, any cosine",
    "nearest": "nearest latents, matched or not: both cosines > {t}",
}
_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_LARGEST_MAP = 8  # runs in a table of pairs


def overlap(found: shape.Sharing) -> doc.Section:
    title = f"How much is shared {name_change(found)}"
    says = (
        "Each latent of one SAE is paired with one latent of the other, once by encoder and once by decoder direction; "
        "it is shared when the pair is close."
    )
    tree = found.overlap
    if tree is None:
        return doc.Section(title, says, explain_missing(found, "overlap"))
    body: list[doc.Block] = [_definitions(tree)]
    if len(found.compared) < len(found.runs):
        body += explain_missing(found, "overlap")
    for entry in found.forced if isinstance(found, shape.StudyFindings) else []:
        runs = " and ".join(entry.runs)
        body += [f"Also aligned, by --force, with a run of another study: {runs}.", doc.Command(entry.command)]
    threshold = threshold_of(tree.threshold)
    rules = doc.Facts([(name, rule.format(t=threshold)) for name, rule in RULES.items()])
    return doc.Section(title, says, body, [rules, *_pairs(tree), *_growth(tree), _other_thresholds(tree)])


def _definitions(tree: shape.Overlap) -> doc.Table:
    rows: doc.Rows = []
    for name in ("strict", "both", "decoder", "lenient"):
        row, style = tree.by(name), "strong" if name == tree.definition else ""
        level = _with_range(chance_level(row.null), chance_level(row.null_range))
        own = [doc.Span(name, style), doc.Span(percent(row.value.value), style)]
        others = [doc.quiet(level), doc.quiet(percent(row.over_all_latents.value))]
        rows.append([*own, percent_interval(row.value.interval), *others, _bar(row.value.value)])
    null, nearest = chance_level(tree.nulls), tree.max_cosine
    by_chance = doc.quiet(_with_range(null.max_cosine, null.max_cosine_range) if null else "–")
    bounds = percent_interval(nearest.interval)
    rows.append(["nearest", percent(nearest.value), bounds, by_chance, "", _bar(nearest.value)])
    words = "Shares are of alive latents. Chance level: the sibling rotated at random."
    words += " Brackets: range over pairs." if len(tree.strict.pairs) > 1 else ""
    extra = doc.Column("of all latents", "number", is_extra=True), doc.Column("", "chart", is_extra=True)
    heads: doc.Heads = ["", ">shared latents", "95 % interval", "chance level", *extra]
    return doc.Table(heads, rows, [words] if null else [])


def _bar(value: float) -> doc.Chart:
    length = value if is_known(value) else 0.0
    return doc.Chart(lambda width, _: [charts.bar(length, min(width, 16), STYLE_OF_CLASS["all"])])


def _with_range(value: float | None, bounds: Sequence[float | None] | None) -> str:
    return f"{percent(value)} {percent_interval(bounds)}".rstrip()


def _name_chance(value: float | None, bounds: Sequence[float | None] | None) -> str:
    return f" (chance level {_with_range(value, bounds)})"


def _pairs(tree: shape.Overlap) -> Iterator[doc.Block]:
    """Show the share of each pair of runs: rows for up to three runs, a square for more, the range for many."""
    definition, row = tree.definition, tree.by(tree.definition)
    pairs = {pair: of.value for pair, of in row.pairs.items()}
    values = [*filter(is_known, pairs.values())]
    if len(pairs) < 2 or not values:
        return
    names = list(dict.fromkeys(name for pair in pairs for name in pair.split("--")))
    by_chance = chance_level(row.pairs_null) or {}
    levels = [*filter(is_known, by_chance.values())]
    notes = [f"Chance level: {percent(min(levels))} to {percent(max(levels))} over pairs."] if levels else []
    if len(names) == 3:
        rows = _with_chance(definition, list(pairs.values()), [by_chance[pair] for pair in pairs] if levels else [])
        yield doc.Table(["by pair", *(f">{pair.replace('--', ' & ')}" for pair in pairs)], rows)
    elif len(names) <= _LARGEST_MAP:
        beginnings = {name.rpartition("_")[0] for name in names}
        short = [name.rpartition("_")[2] for name in names] if len(beginnings) == 1 else names
        rows = [
            [name, *(_one_pair(pairs.get(f"{a}--{b}", pairs.get(f"{b}--{a}"))) for b in names)]
            for a, name in zip(names, short, strict=True)
        ]
        yield doc.Table([f"{definition}, %", *(f">{name}" for name in short)], rows, notes)
    else:
        words = f"{definition}: {len(pairs)} pairs, from {percent(min(values))} to {percent(max(values))}. "
        yield words + " ".join(notes)


def _one_pair(value: float | None) -> str:
    return "·" if value is None or not is_known(value) else f"{100 * value:.1f}"


def _with_chance(name: str, values: Sequence[float | None], chance: Sequence[float], style: str = "") -> doc.Rows:
    """Return a row of percentages, and one with their chance levels if these are known."""
    rows: doc.Rows = [[name, *(doc.Span(percent(value), style) for value in values)]]
    return [*rows, [doc.quiet("chance level"), *(doc.quiet(percent(value)) for value in chance)]] if chance else rows


def _growth(tree: shape.Overlap) -> Iterator[doc.Block]:
    """Show the shares found in one SAE, in every SAE and in exactly n, as more SAEs are compared."""
    n, null = len(tree.only_one), chance_level(tree.nulls)
    if n < 3:
        return
    rows = [
        *_with_chance("found in one alone", tree.only_one[1:], null.only_one[1:] if null else [], "one"),
        *_with_chance("found in every one", tree.all_of_n[1:], null.all_of_n[1:] if null else [], "all"),
    ]
    yield doc.Table(["SAEs compared", *(f">{i}" for i in range(2, n + 1))], rows)
    rows = _with_chance(tree.definition, tree.exactly_n, null.exactly_n if null else [])
    yield doc.Table([f"in exactly n of {n}", *(f">{i}" for i in range(1, n + 1))], rows)


def _other_thresholds(tree: shape.Overlap) -> doc.Table:
    """Show the share at other thresholds, with the decoder definition's chance level, which bounds the others'."""
    sweep, null = tree.sweep, chance_level(tree.nulls)
    names = ("strict", "both", "decoder")
    rows: doc.Rows = []
    for value in _THRESHOLDS:
        i = sweep["threshold"].index(value)
        cells = [doc.Span(percent(sweep[name][i]), "strong" if name == tree.definition else "") for name in names]
        rows.append([decimal(value, 1), *cells, *([doc.quiet(percent(null.sweep["decoder"][i]))] if null else [])])
    heads = ["threshold", *(f">{name}" for name in names), *([">decoder by chance"] if null else [])]
    note = "Chance levels of strict and both are at most that of decoder: they ask for more."
    return doc.Table(heads, rows, [note] if null else [])


def similarity(found: shape.Sharing) -> doc.Section:
    title = "How similar partners are"
    says = (
        "Cosine of each alive latent with its partner, mean of encoder and decoder: 1 is the same direction. "
        "Two humps mean that latents either return or do not."
    )
    tree, shared = found.similarity, found.overlap
    if tree is None or shared is None:
        return doc.Section(title, says, explain_missing(found, "overlap"))
    cosines, threshold = tree.histogram, shared.threshold
    null, of_overlap = chance_level(tree.null), chance_level(shared.nulls)
    chance = _name_chance(of_overlap.same_partner, of_overlap.same_partner_range) if of_overlap else ""
    words = (
        f"Encoder and decoder pick the same partner for {percent(shared.same_partner)} of the latents"
        f"{chance}. The mean cosine is {decimal(tree.mean_same_partner)} there and "
        f"{decimal(tree.mean_different_partner)} elsewhere. {_modes(tree.bimodality)}"
    )
    rows: doc.Rows = []
    for key, name in _MEAN_COSINES.items():
        by_chance = doc.quiet(estimate(getattr(null, key, None), getattr(null, f"{key}_range", None)))
        value = getattr(tree, key)
        cells = (value.value, value.interval) if isinstance(value, Estimate) else (value, None)
        rows.append([name, decimal(cells[0]), interval(cells[1]), by_chance])
    notes = []
    if is_known(tree.pw_mcc.sd):
        sd = chance_level(tree.pw_mcc.null_sd)
        level = f"; by chance {decimal(sd, 4)}" if is_known(sd) else ""
        notes = [f"Standard deviation of PW-MCC over pairs of SAEs: {decimal(tree.pw_mcc.sd, 4)}{level}."]
    table = doc.Table(["mean cosine", ">value", "95 % interval", "chance level"], rows, notes)
    chart = doc.Chart(lambda width, colour: _similarity_chart(cosines, threshold, width, colour))
    return doc.Section(title, says, [chart, words], [table])


_MEAN_COSINES = {
    "mean_encoder": "encoders, matched",
    "mean_max_encoder": "encoders, nearest",
    "mean_decoder": "decoders (PW-MCC)",
    "mean_max_decoder": "decoders, nearest",
    "mean_same_partner": "same partner",
    "mean_different_partner": "different partners",
}


def _modes(dip: shape.Bimodality) -> str:
    """Say whether there are two modes, with the test."""
    if not is_known(dip.value.value) or not is_known(dip.p_value):
        return "There are too few cosines to tell one mode from two."
    p = "p < .001" if dip.p_value < 0.001 else f"p = {decimal(dip.p_value)}"
    result = "The cosines have more than one mode" if dip.p_value < 0.05 else "A single mode cannot be ruled out"
    null = chance_level(dip.null)
    chance = f" (by chance {decimal(null.of_sample)})" if null else ""
    return f"{result}: dip {decimal(dip.value.value)} {interval(dip.value.interval)}{chance}, {p}."


def _similarity_chart(cosines: shape.CosineHistogram, threshold: float, width: int, has_colour: bool) -> Iterator[Text]:
    """Draw cosines from 0 to 1, by same or different partner. The few below 0 are in the first column."""
    first = next(i for i, edge in enumerate(cosines.edges) if edge >= 0)
    same, other = ([sum(c[: first + 1]), *c[first + 1 :]] for c in (cosines.same_partner, cosines.different_partner))
    cell = max(1, min(5, width // len(same)))
    width = cell * len(same)
    layers = charts.Layer(other, STYLE_OF_CLASS["one"], "░"), charts.Layer(same, STYLE_OF_CLASS["all"], "█")
    yield from charts.stacked_columns(*layers, 7, cell=cell, colour=has_colour)
    ticks = [charts.Tick(threshold * width, threshold_of(threshold), "bold")]
    ticks += [charts.Tick(x * width, decimal(x, 1)) for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    yield from charts.axis(width, ticks)
    yield Text()
    yield charts.legend(("same partner", "different partners"), has_colour)


def counterparts(found: shape.StudyFindings | shape.Alignment) -> doc.Section | None:
    """Show what other SAEs have in place of unshared latents: totals over all pairs."""
    tree = found.counterparts
    if tree is None:
        return None
    says = (
        "Compared by where latents fire, not by their weights. Each unshared latent (strict, .7) is a case for every "
        "SAE that does not share it."
    )
    null = (tree.null or {}).get("shifted")
    chances = {row.relation: row.fraction.value for row in null.relations} if null else {}
    rows: doc.Rows = []
    for row in tree.relations:
        name = row.relation
        if row.n or name != "rare":
            cells = [_RELATIONS.get(name, name), count(row.n), percent(row.fraction.value)]
            level = _with_range(chances.get(name), null.relations_range[name] if null else None)
            rows.append([*cells, percent_interval(row.fraction.interval), doc.quiet(level), decimal(row.rebuilt, 2)])
    heads = ["in the other SAE", ">cases", ">share", "95 % interval", "chance level", ">rebuilt"]
    rebuilt, same = tree.rebuilt, tree.same_partner
    level = f" (by chance {decimal(rebuilt.null, 2)})" if is_known(rebuilt.null) else ""
    paired = _name_chance(null.same_partner.decoder, null.same_partner_range) if null else ""
    body: list[doc.Block] = [
        doc.Table(heads, rows),
        (
            "Rebuilt: the share of the latent's decoder direction that at most four latents of the other SAE explain, "
            f"{decimal(rebuilt.mean.value, 2)} on average{level}."
        ),
        (
            f"Pairing by firing together (Jaccard) gives {percent(same.decoder)} of the latents the same partner as "
            f"the decoders{paired}: {percent(same.shared)} of the shared, {percent(same.unshared)} of the "
            "unshared."
        ),
    ]
    details: list[doc.Block] = [_firing_together(tree, null), doc.quiet(_describe_comparison(tree))]
    return doc.Section("What other SAEs have in place of unshared latents", says, body, details)


def _firing_together(tree: shape.FiringTogether, null: shape.FiringNull | None) -> doc.Table:
    rows: doc.Rows = []
    for name in ("shared", "unshared"):
        # Every pair is seen from both sides, so the mean of p_here is that of p_there.
        own, chance = tree.of_decoder_partner[name], null and null.of_decoder_partner[name]
        cells = [decimal(getattr(of, key), 2) if of else "" for key in ("jaccard", "p_there") for of in (own, chance)]
        rows.append([f"decoder's partner, {name}", *cells])
    for key, label in (("jaccard", "partner by firing"), ("max_jaccard", "nearest by firing")):
        level = estimate(getattr(null, key), getattr(null, f"{key}_range"), 2) if null else ""
        rows.append([label, decimal(getattr(tree, key), 2), level, "", ""])
    return doc.Table(["firing with the …", ">Jaccard", ">by chance", ">P(other | this)", ">by chance"], rows)


def _describe_comparison(tree: shape.Counterparts) -> str:
    """Describe the comparison: the number of tokens, its precision, and its chance level."""
    words = ""
    if tree.n_tokens is not None and (gap := tree.jaccard_gap_per_latent) is not None:
        most = f"below {decimal(0.0001, 4)}" if gap < 0.0001 else f"at most {decimal(gap, 4)}"
        words = (
            f"Compared over {human(tree.n_tokens)} tokens. The best possible pairing by firing has a mean Jaccard "
            f"greater by {most}. "
        )
    return words + ("By chance: the other SAE's firings moved far along the tokens." if tree.null else "")


_RELATIONS = {
    "same": "one fires at the same tokens",
    "split": "several narrower ones cover it",
    "absorbed": "a wider one has absorbed it",
    "broader": "a wider one contains it",
    "new": "no counterpart",
    "rare": "too few firings to tell",
}


def alignment_page(found: shape.Alignment) -> list[doc.Block | doc.Section | None]:
    """Return the page that ``align`` prints: the report's sections about sharing."""
    warning = warn_apart(found.apart)
    return [*warning, overlap(found), similarity(found), counterparts(found)]


def warn_apart(apart: str | None) -> list[doc.Block]:
    words = f"Aligned by --force: {apart}. The runs differ in more than the seed."
    return [[doc.Span("! ", "warn"), words]] if apart else []
