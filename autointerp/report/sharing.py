"""What comes back: overlap under every definition beside chance, how alike partners are, what became of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from autointerp.report import blocks
from autointerp.report.dictionaries import missing, what_changes
from autointerp.report.layout import (
    ACCENT,
    QUIET,
    STYLE_OF_CLASS,
    Page,
    command_line,
    count,
    get,
    grid,
    human,
    indented,
    legend,
    listed,
    percent,
    percent_interval,
    section,
)
from autointerp.report.visible import visible
from sae.common.amounts import decimal, interval

Findings = Mapping[str, Any]
RULES = {
    "strict": "encoder and decoder pick the same partner, both cosines > {t}",
    "both": "both matched cosines > {t}, each under its own matching",
    "decoder": "matched decoder cosine > {t} alone",
    "lenient": "encoder and decoder pick the same partner, any cosine",
}


def overlap(found: Findings, page: Page) -> RenderableType:
    title = f"How much comes back {what_changes(found)}"
    says = (
        "Each latent of one SAE is paired with one latent of the other, once by encoder and once by decoder direction; "
        "it is shared when the pair is close."
    )
    tree = found["overlap"]
    if tree is None:
        return section(page, title, says, missing(found, "overlap"))
    forced: list[RenderableType] = []
    for entry in found.get("forced") or []:
        pair = visible(" and ".join(entry["runs"]))
        words = f"\nAlso aligned, by --force, with a run of another study: {pair}."
        forced += [Text(words, QUIET), command_line(entry["command"])]
    left_out = [Text(), missing(found, "overlap")] if len(found["compared"]) < len(found["runs"]) else []
    return section(page, title, says, *overlap_table(tree, page), *left_out, *forced)


def overlap_table(tree: Mapping[str, Any], page: Page) -> Iterator[RenderableType]:
    """Every definition with its interval, then the pairs, then what more SAEs change."""
    threshold = decimal(tree["threshold"], 2).rstrip("0")
    heads: list[str | tuple[str, str]] = ["", ("of alive", "right"), "95 % interval", "by chance"]
    if page.wide:
        heads += [("of all", "right"), ""]
    table = grid(*heads, ("shared when", "fold"))
    for name, rule in RULES.items():
        row = tree[name]
        leading = name == tree["definition"]
        cells: list[RenderableType] = [
            Text(name, "bold" if leading else ""),
            Text(percent(row["value"]), "bold" if leading else ""),
            Text(percent_interval(row["interval"])),
            Text(_by_chance(row["null"], row["null_range"]), QUIET),
            Text(rule.format(t=threshold), QUIET),
        ]
        if page.wide:
            of_all = Text(percent(row["over_all_latents"]), QUIET)
            cells[4:4] = [of_all, blocks.bar(row["value"] or 0.0, 16, ACCENT if leading else "")]
        table.add_row(*cells)
    nulls = tree["nulls"]
    nearest = [
        Text("nearest", QUIET),
        Text(percent(tree["max_cosine"])),
        Text(percent_interval(tree["max_cosine_interval"])),
        Text(_by_chance(*({null: of[key] for null, of in nulls.items()} for key in _MAX_COSINE)), QUIET),
        *([Text(), blocks.bar(tree["max_cosine"] or 0.0, 16)] if page.wide else []),
        Text(f"nearest of each, taken or not: both cosines > {threshold}", QUIET),
    ]
    table.add_row(*nearest)
    yield table
    if nulls:
        words = "By chance: with the sibling rotated at random."
        yield Text(words + (_OVER_PAIRS if len(tree["strict"]["pairs"]) > 1 else ""), QUIET)
    yield from _pairs(tree, page)
    yield from _growth(tree)
    yield from _sweep(tree, page)


_MAX_COSINE = "max_cosine", "max_cosine_range"
_OVER_PAIRS = " Brackets: range over pairs."


def _by_chance(of_null: Mapping[str, float | None], over_pairs: Mapping[str, list[float] | None]) -> str:
    """Return the figure with rotated siblings, and its range over pairs where there are several."""
    if of_null.get("rotated") is None:
        return "–"
    return f"{percent(of_null['rotated'])} {percent_interval(over_pairs['rotated'])}".rstrip()


def _pairs(tree: Mapping[str, Any], page: Page) -> Iterator[RenderableType]:
    """What each two share: a row for three SAEs, a heat map for more, the range where that does not fit."""
    definition = tree["definition"]
    pairs: Mapping[str, float | None] = tree[definition]["pairs"]
    values = [v for v in pairs.values() if v is not None]
    if len(pairs) < 2 or not values:
        return
    names = list(dict.fromkeys(name for pair in pairs for name in pair.split("--")))
    yield Text()
    columns = [visible(pair.replace("--", " & ")) for pair in pairs]
    of_null = tree[definition]["pairs_null"]
    labels = {null: f"by chance, {null}" for null in of_null}
    if len(names) == 3 and sum(len(name) + 2 for name in columns) + max(map(len, [definition, *labels.values()])) <= (
        page.width
    ):
        table = grid("by pair", *((name, "right") for name in columns))
        table.add_row(definition, *(percent(value) for value in pairs.values()))
        for null, of in of_null.items():
            table.add_row(Text(labels[null], QUIET), *(Text(percent(of[pair]), QUIET) for pair in pairs))
        yield table
        return
    short = [visible(name) for name in _without_common_beginning(names)]
    if max(len(definition) + 3, *map(len, short)) + sum(max(len(name), 4) + 2 for name in short) > page.width:
        yield Text(f"{definition}: {len(pairs)} pairs, from {percent(min(values))} to {percent(max(values))}")
        yield from _pairs_by_chance(of_null)
        return
    table = grid(f"{definition}, %", *((name, "right") for name in short))
    for a, name in zip(names, short, strict=True):
        cells = [_heat(pairs.get(f"{a}--{b}", pairs.get(f"{b}--{a}")), min(values), max(values), page) for b in names]
        table.add_row(Text(name, "bold"), *cells)
    yield table
    yield from _pairs_by_chance(of_null)


def _pairs_by_chance(of_null: Mapping[str, Mapping[str, float | None]]) -> Iterator[RenderableType]:
    """The range over pairs of each null, in a line: a map of what hardly differs would say nothing."""
    ranges = {null: [value for value in of.values() if value is not None] for null, of in of_null.items()}
    told = [f"{null} {percent(min(of))} to {percent(max(of))}" for null, of in ranges.items() if of]
    if told:
        yield Text(f"By chance, over pairs: {', '.join(told)}.", QUIET)


def _without_common_beginning(names: list[str]) -> list[str]:
    """``run_a``, ``run_b`` → ``a``, ``b``: what tells the runs of a study apart."""
    beginnings = {name.rpartition("_")[0] for name in names}
    return [name.rpartition("_")[2] for name in names] if len(beginnings) == 1 else names


def _heat(value: float | None, low: float, high: float, page: Page) -> Text:
    """A cell of a heat map: the number, and the more of it the brighter its ground. A run with itself is a point."""
    if value is None:
        return Text("·", QUIET)
    words = f"{100 * value:.1f}"
    if not page.colour:
        return Text(words)
    share = (value - low) / (high - low) if high > low else 1.0
    red, green, blue = (round(dark + share * (bright - dark)) for dark, bright in ((18, 47), (42, 143), (66, 216)))
    return Text(words, f"white on #{red:02x}{green:02x}{blue:02x}")


_SWEPT = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def _sweep(tree: Mapping[str, Any], page: Page) -> Iterator[RenderableType]:
    """What is shared at other thresholds; beside it the null of the decoder definition, which bounds the others'."""
    sweep = tree["sweep"]
    at = [sweep["threshold"].index(value) for value in _SWEPT]
    if page.width < _ROOM_FOR_SWEEP:
        yield from _sweep_down(tree, at)
        return
    table = grid("at cosine >", *((decimal(value, 1), "right") for value in _SWEPT))
    for name in ("strict", "both", "decoder"):
        style = "bold" if name == tree["definition"] else ""
        table.add_row(Text(name, style), *(Text(percent(sweep[name][i]), style) for i in at))
    for null, of in tree["nulls"].items():
        table.add_row(Text(f"decoder, {null}", QUIET), *(Text(percent(of["sweep"]["decoder"][i]), QUIET) for i in at))
    yield Text()
    yield table
    if tree["nulls"]:
        yield Text("By chance strict and both are at most what decoder is: they ask for more.", QUIET)


_ROOM_FOR_SWEEP = 76


def _sweep_down(tree: Mapping[str, Any], at: Sequence[int]) -> Iterator[RenderableType]:
    """The same with a row for each threshold, where there is no room for a column each."""
    names = ("strict", "both", "decoder")
    table = grid("at cosine >", *((name, "right") for name in (*names, *tree["nulls"])))
    for value, i in zip(_SWEPT, at, strict=True):
        of_null = (of["sweep"]["decoder"][i] for of in tree["nulls"].values())
        cells = [Text(percent(tree["sweep"][name][i]), "bold" if name == tree["definition"] else "") for name in names]
        table.add_row(decimal(value, 1), *cells, *(Text(percent(x), QUIET) for x in of_null))
    yield Text()
    yield table
    if tree["nulls"]:
        yield Text(f"By chance: {listed(list(tree['nulls']))}, of decoder, which the others are at most.", QUIET)


def _growth(tree: Mapping[str, Any]) -> Iterator[RenderableType]:
    only, every = tree["only_one"], tree["all_of_n"]
    if len(only) < 3:
        return
    table = grid("", *((str(n), "right") for n in range(2, len(only) + 1)))
    table.columns[0].header = "SAEs compared"
    table.add_row("found in one alone", *(Text(percent(v), STYLE_OF_CLASS["one"]) for v in only[1:]))
    for null, of in tree["nulls"].items():
        table.add_row(Text(f"by chance, {null}", QUIET), *(Text(percent(v), QUIET) for v in of["only_one"][1:]))
    table.add_row("found in every one", *(Text(percent(v), STYLE_OF_CLASS["all"]) for v in every[1:]))
    for null, of in tree["nulls"].items():
        table.add_row(Text(f"by chance, {null}", QUIET), *(Text(percent(v), QUIET) for v in of["all_of_n"][1:]))
    yield Text()
    yield table
    n = len(only)
    table = grid(f"in exactly n of {n}", *((str(i), "right") for i in range(1, n + 1)))
    table.add_row(tree["definition"], *(percent(v) for v in tree["exactly_n"]))
    for null, of in tree["nulls"].items():
        table.add_row(Text(f"by chance, {null}", QUIET), *(Text(percent(v), QUIET) for v in of["exactly_n"]))
    yield Text()
    yield table


def similarity(found: Findings, page: Page) -> RenderableType:
    title = "How alike the paired latents are"
    says = (
        "Cosine of each alive latent with its partner, mean of encoder and decoder: 1 is the same direction. "
        "Two humps mean that latents either return or do not."
    )
    tree = found["similarity"]
    if tree is None:
        return section(page, title, says, missing(found, "overlap"))
    lines = _similarity_chart(tree["histogram"], found["overlap"]["threshold"], page)
    same, nulls = (tree["mean_same_partner"], tree["mean_different_partner"]), tree["null"]
    agree, of_overlap = found["overlap"]["same_partner"], found["overlap"]["nulls"]
    chances = [
        f"{null} {_by_chance({null: of['same_partner']}, {null: of['same_partner_range']})}"
        for null, of in of_overlap.items()
    ]
    by_chance = f" (by chance: {', '.join(chances)})" if chances else ""
    words = Text(
        f"\nEncoder and decoder pick the same partner for {percent(agree)} of the latents{by_chance}: mean cosine "
        f"there {decimal(same[0])}, elsewhere {decimal(same[1])}. {_modes(tree['bimodality'])}\n"
    )
    table = grid("mean cosine", ("", "right"), "95 % interval", *((f"{null}", "left") for null in nulls))
    for key, name in _MEAN_COSINES.items():
        chance = (Text(f"{decimal(of[key])} {interval(of[f'{key}_range'])}".rstrip(), QUIET) for of in nulls.values())
        table.add_row(name, decimal(tree[key]), interval(tree[f"{key}_interval"]), *chance)
    for key, name in _BY_PARTNER.items():
        table.add_row(name, decimal(tree[key]), "", *(Text(decimal(of[key]), QUIET) for of in nulls.values()))
    body: list[RenderableType] = [*(indented(line) for line in lines), words, table]
    if tree["pw_mcc"]["sd"] is not None:
        told = "".join(f"; {null} {decimal(sd, 4)}" for null, sd in tree["pw_mcc"]["null_sd"].items())
        body.append(
            Text(f"Standard deviation of PW-MCC over pairs of SAEs: {decimal(tree['pw_mcc']['sd'], 4)}{told}.", QUIET)
        )
    return section(page, title, says, *body)


_MEAN_COSINES = {
    "mean_encoder": "encoders, matched",
    "mean_max_encoder": "encoders, nearest",
    "mean_decoder": "decoders (PW-MCC)",
    "mean_max_decoder": "decoders, nearest",
}
_BY_PARTNER = {"mean_same_partner": "both, same partner", "mean_different_partner": "both, they differ"}


def _modes(dip: Mapping[str, Any]) -> str:
    """Whether there are two modes, as a sentence with the test behind it."""
    if dip["value"] is None or dip["p_value"] is None:
        return "There are too few to tell one mode from two."
    p = "p < .001" if dip["p_value"] < 0.001 else f"p = {decimal(dip['p_value'])}"
    told = "They have more than one mode" if dip["p_value"] < 0.05 else "A single mode cannot be ruled out"
    chance = ", ".join(f"{null} {decimal(of['of_sample'])}" for null, of in dip["null"].items())
    chance = f" (by chance: {chance})" if chance else ""
    return f"{told}: dip {decimal(dip['value'])} {interval(dip['interval'])}{chance}, {p}."


def _similarity_chart(shape: Mapping[str, Any], threshold: float, page: Page) -> Iterator[Text]:
    """Cosines from 0 to 1 (what is below 0, hardly anything, stands in the first column), by same or other partner."""
    first = next(i for i, edge in enumerate(shape["edges"]) if edge >= 0)
    same, other = ([sum(c[: first + 1]), *c[first + 1 :]] for c in (shape["same_partner"], shape["different_partner"]))
    cell = max(1, min(5, (page.width - 4) // len(same)))
    width = cell * len(same)
    layers = blocks.Layer(other, STYLE_OF_CLASS["one"], "░"), blocks.Layer(same, STYLE_OF_CLASS["all"], "█")
    yield from blocks.stacked_columns(*layers, 7, cell=cell, colour=page.colour)
    ticks = [blocks.Tick(threshold * width, decimal(threshold, 2).rstrip("0"), "bold")]
    ticks += [blocks.Tick(x * width, decimal(x, 1)) for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    yield from blocks.axis(width, ticks)
    yield Text()
    fills = ("█", "█") if page.colour else ("█", "░")
    names = "encoder and decoder pick the same partner", "they differ"
    yield legend(list(zip(fills, (STYLE_OF_CLASS["all"], STYLE_OF_CLASS["one"]), names, strict=True)))


def counterparts(found: Findings, page: Page) -> RenderableType | None:
    """What became of the latents that do not return: totals over all pairs."""
    tree = found["counterparts"]
    if tree is None:
        return None
    title = "What became of those that do not return"
    says = (
        "By where latents fire, not by their weights: what fires in another SAE in place of a latent that it does not "
        "share (strict, .7). Each such latent is a case for every SAE that does not share it."
    )
    null = get(tree, "null", "shifted")
    by_chance = {row["relation"]: percent(row["fraction"]) for row in null["relations"]} if null else {}
    if null and page.wide:
        by_chance = {
            name: f"{value} {percent_interval(null['relations_range'][name])}" for name, value in by_chance.items()
        }
    numbers = ("cases", "right"), ("share", "right"), "95 % interval", "by chance", ("rebuilt", "right")
    table = grid("there it …", *numbers)
    for row in tree["relations"]:
        if row["n"] or row["relation"] != "rare":
            cells = count(row["n"]), percent(row["fraction"]), percent_interval(row["interval"])
            chance = Text(by_chance.get(row["relation"], "–"), QUIET)
            name = _RELATION_WORDS.get(row["relation"], row["relation"])
            table.add_row(name, *cells, chance, decimal(row["rebuilt"], 2))
    rebuilt, same, of = tree["rebuilt"], tree["same_partner"], tree["of_decoder_partner"]
    of_null = f"; by chance {decimal(rebuilt['null'], 2)}" if rebuilt["null"] is not None else ""
    paired = ""
    if null:
        over_pairs = percent_interval(null["same_partner_range"])
        paired = f"; by chance {percent(null['same_partner']['decoder'])} {over_pairs}".rstrip()
    words = Text(
        "\nRebuilt: the share of its decoder direction that at most four latents there explain, "
        f"{decimal(rebuilt['mean'], 2)} on average{of_null}.\nPaired by firing together instead (Jaccard), "
        f"{percent(same['decoder'])} of the latents have the partner that the decoders gave them: "
        f"{percent(same['shared'])} of the shared, {percent(same['unshared'])} of the others{paired}.\n"
    )
    heads = ("Jaccard", "right"), ("P(there | here)", "right")
    together = grid("firing together", *heads)
    for name in ("shared", "unshared"):
        together.add_row(f"with the decoder's partner, {name}", *_frequencies(of[name]))
    if null:
        for name in ("shared", "unshared"):
            moved = (Text(cell, QUIET) for cell in _frequencies(null["of_decoder_partner"][name]))
            together.add_row(Text(f"by chance, {name}", QUIET), *moved)
    for key, name in (("jaccard", "with the partner by firing"), ("max_jaccard", "with the nearest by firing")):
        together.add_row(name, decimal(tree[key], 2))
        if null:
            words_of_null = f"by chance {interval(null[f'{key}_range'], 2)}".rstrip()
            together.add_row(Text(words_of_null, QUIET), Text(decimal(null[key], 2), QUIET))
    return section(page, title, says, table, words, together, Text(_how_compared(tree), QUIET))


def _frequencies(of: Mapping[str, float | None]) -> list[str]:
    # Every pair is seen from both sides, so the mean of p_here is that of p_there.
    return [decimal(of[key], 2) for key in ("jaccard", "p_there")]


def _how_compared(tree: Mapping[str, Any]) -> str:
    """Over how many tokens, how exactly, and what chance means here: under the table."""
    words = ""
    if tree["n_tokens"] is not None:
        gap = tree["jaccard_gap_per_latent"]
        short = f"below {decimal(0.0001, 4)}" if gap < 0.0001 else f"at most {decimal(gap, 4)}"
        words = (
            f"Compared over {human(tree['n_tokens'])} tokens. The best pairing by firing of all could have a mean "
            f"Jaccard greater by {short}. "
        )
    if tree["null"]:
        words += "By chance: with the other SAE's firings moved far along the tokens."
    return words


_RELATION_WORDS = {
    "same": "fires where one does",
    "split": "is split into narrower ones",
    "absorbed": "is absorbed by a wider one",
    "broader": "is part of a wider one",
    "new": "has no counterpart",
    "rare": "fires too rarely to tell",
}
