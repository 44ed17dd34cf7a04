"""The half of the report that needs no language model: what the trained dictionaries are, and what comes back.

Each function turns one part of the findings into something rich can print, or says which command would make
that part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from autointerp.report import blocks
from autointerp.report.curves import training_curves
from autointerp.report.layout import (
    ACCENT,
    QUIET,
    STYLE_OF_CLASS,
    Page,
    absent,
    count,
    decimal,
    get,
    grid,
    human,
    indented,
    legend,
    listed,
    origin,
    percent,
    percent_interval,
    section,
)
from autointerp.report.visible import visible

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
    left_out = [Text(), missing(found, "overlap")] if len(found["compared"]) < len(found["runs"]) else []
    return section(page, title, says, *overlap_table(tree, page), *left_out)


def overlap_table(tree: Mapping[str, Any], page: Page) -> Iterator[RenderableType]:
    """Every definition with its interval, then the pairs, then what more SAEs change."""
    threshold = decimal(tree["threshold"], 2).rstrip("0")
    heads: list[str | tuple[str, str]] = ["", ("of alive", "right"), "95 % interval", ("of all", "right")]
    table = grid(*heads, *([""] if page.wide else []), ("shared when", "fold"))
    for name, rule in RULES.items():
        row = tree[name]
        leading = name == tree["definition"]
        cells: list[RenderableType] = [
            Text(name, "bold" if leading else ""),
            Text(percent(row["value"]), "bold" if leading else ""),
            Text(percent_interval(row["interval"])),
            Text(percent(row["over_all_latents"]), QUIET),
            Text(rule.format(t=threshold), QUIET),
        ]
        if page.wide:
            cells.insert(4, blocks.bar(row["value"] or 0.0, 16, ACCENT if leading else ""))
        table.add_row(*cells)
    yield table
    yield from _pairs(tree, page)
    yield from _growth(tree)


def _pairs(tree: Mapping[str, Any], page: Page) -> Iterator[RenderableType]:
    definition = tree["definition"]
    pairs: Mapping[str, float | None] = tree[definition]["pairs"]
    values = [v for v in pairs.values() if v is not None]
    if len(pairs) < 2 or not values:
        return
    names = [visible(pair.replace("--", " & ")) for pair in pairs]
    yield Text()
    if sum(len(name) + 2 for name in names) + len(definition) <= page.width:
        table = grid("by pair", *((name, "right") for name in names))
        table.add_row(definition, *(percent(value) for value in pairs.values()))
        yield table
    else:
        yield Text(f"{definition}: {len(pairs)} pairs, from {percent(min(values))} to {percent(max(values))}")


def _growth(tree: Mapping[str, Any]) -> Iterator[RenderableType]:
    only, every = tree["only_one"], tree["all_of_n"]
    if len(only) < 3:
        return
    table = grid("", *((str(n), "right") for n in range(2, len(only) + 1)))
    table.columns[0].header = "SAEs compared"
    table.add_row("found in one alone", *(Text(percent(v), STYLE_OF_CLASS["one"]) for v in only[1:]))
    table.add_row("found in every one", *(Text(percent(v), STYLE_OF_CLASS["all"]) for v in every[1:]))
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
    same = tree["mean_same_partner"], tree["mean_different_partner"]
    agree = found["overlap"]["same_partner"]
    words = Text(
        f"\nEncoder and decoder pick the same partner for {percent(agree)} of the latents: mean cosine there "
        f"{decimal(same[0])}, elsewhere {decimal(same[1])}. Mean matched cosine of the encoders "
        f"{decimal(tree['mean_encoder'])}, of the decoders {decimal(tree['mean_decoder'])}."
    )
    return section(page, title, says, *(indented(line) for line in lines), words)


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


def membership(found: Findings, page: Page) -> RenderableType:
    focus = visible(found["focus"])
    title = f"Where the latents of {focus} are found"
    tree = found["membership"]
    if tree is None:
        return section(page, title, "Which other seeds have each latent.", missing(found, "overlap"))
    says = f"Each alive latent of {focus} is in one part, by the SAEs that share it ({tree['definition']})."
    styles, parts = _part_styles(tree["parts"]), tree["parts"]
    pieces = [blocks.Part(part["n"], styles[i], page.fill(i)) for i, part in enumerate(parts)]
    table = grid("", "", ("latents", "right"), ("of alive", "right"), head=True)
    for part, piece in zip(parts, pieces, strict=True):
        table.add_row(
            Text(piece.fill * 2, piece.style), Text(visible(part["label"])), count(part["n"]), percent(part["fraction"])
        )
    return section(page, title, says, indented(blocks.stacked_bar(pieces, page.width - 4)), Text(), indented(table))


def _part_styles(parts: list[Mapping[str, Any]]) -> list[str]:
    """Orange for one SAE alone, strong blue for every one, and paler blues between."""
    between = ["#9fd3f2", "#56b4e9", "#7cc4ee", "#b7def5"]
    return [
        STYLE_OF_CLASS[part["shared_class"]] if part["shared_class"] in ("one", "all") else between[i % len(between)]
        for i, part in enumerate(parts)
    ]


def class_label(name: str, n_runs: int) -> str:
    if name == "one":
        return "in no other seed"
    return "in the other seed" if n_runs == 2 else "in every seed" if name == "all" else "in some seeds"


def frequency(found: Findings, page: Page) -> RenderableType:
    title = "Do the frequent ones come back?"
    says = (
        "How often latents fire (‰: firings per thousand tokens), by whether other seeds have them. Each row is a "
        "histogram on a logarithmic scale, its height relative to its own row."
    )
    tree = found["frequency_by_class"]
    if tree is None:
        return section(page, title, says, missing(found, "overlap" if found["firing"] else "harvest"))
    edges = next(iter(tree.values()))["histogram"]["edges"]
    bins = len(edges) - 1
    with_quartiles = page.width >= 58 + bins  # what the other columns take
    cell = max(1, min(2, (page.width - (58 if with_quartiles else 40)) // bins))
    heads: list[str | tuple[str, str]] = ["", ("latents", "right"), ("median", "right")]
    table = grid(*heads, *(["quartiles"] if with_quartiles else []), "firings per token")
    for name, row in tree.items():
        quartiles = f"{rate(row['quartiles'][0])} – {rate(row['quartiles'][2])}"
        table.add_row(
            Text(class_label(name, len(found["compared"])), STYLE_OF_CLASS[name]),
            count(row["n"]),
            rate(row["median"]),
            *([Text(quartiles, QUIET)] if with_quartiles else []),
            blocks.strip(row["histogram"]["counts"], STYLE_OF_CLASS[name], cell=cell),
        )
    decades = [e for e in edges if math.isclose(math.log10(e), round(math.log10(e)), abs_tol=1e-6)]
    decades = decades if cell > 1 else decades[::2]  # a label and a gap need six cells
    width = cell * bins
    span = math.log(edges[-1] / edges[0])
    ticks = [blocks.Tick(math.log(d / edges[0]) / span * width, _power(d)) for d in decades]
    for line in blocks.axis(width, ticks):
        table.add_row("", "", "", *([""] if with_quartiles else []), line)
    return section(page, title, says, table)


def rate(value: float | None) -> str:
    """A firing frequency as firings per thousand tokens: ``7.8‰``, ``.12‰``."""
    if value is None or not math.isfinite(value):
        return "–"
    per_thousand = 1000 * value
    if per_thousand >= 1:
        return f"{per_thousand:.3g} ‰"
    return f"{per_thousand:.2g} ‰"


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    return "10" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(c)] if c != "-" else "⁻" for c in str(exponent)) if exponent else "1"


def training(found: Findings, page: Page) -> RenderableType:
    title = "How well the SAEs are trained"
    says = (
        "FVU is the share of the activations' variance that the SAE fails to reproduce (0 is perfect); L0 the latents "
        "active per token; dead latents never fire."
    )
    tree, firing = found["training"], found["firing"]
    if tree is None and not (_imported(found) and firing):
        begun = any(entry["stage"] == "train" for entry in found["missing"])
        return section(page, title, says, missing(found, "train" if begun or not _imported(found) else "harvest"))
    tokens = get(firing, "tokens")
    word = "dead" if tokens is None or tokens >= 1_000_000 else "silent"
    table = grid("", ("seed", "right"), ("tokens", "right"), ("FVU", "right"), ("L0", "right"), (word, "right"))
    for run in found["runs"]:
        name = run["name"]
        silent = get(firing, "dead_fraction", name)
        table.add_row(
            Text(visible(name), "bold" if name == found["focus"] else ""),
            origin(run["seed"]),
            human(get(tree, "tokens", name)),
            decimal(get(tree, "fvu", name)),
            decimal(_l0(found, name), 1),
            percent(silent if silent is not None else get(tree, "dead_fraction", name)),
        )
    notes = []
    if tokens is not None:
        notes.append(f"Firings were counted over {human(tokens)} tokens.")
    if word == "silent":
        notes.append("That is under 1M, too few to call a latent without a firing dead.")
    unfinished = [visible(run["name"]) for run in found["runs"] if "trained" not in run["stages"]]
    if unfinished:
        notes.append(f"Not finished: {listed(unfinished)}.")
    curves = training_curves(get(tree, "curves") or {}, page)
    return section(page, title, says, table, *curves, *([Text("\n" + " ".join(notes))] if notes else []))


#: Which missing stages explain that a part is empty, the first that applies. Commands run what they need by themselves.
_BECAUSE = {
    "train": ("train",),
    "harvest": ("harvest", "train"),
    "overlap": ("overlap", "train"),
    "explain": ("explain",),
    "score": ("explain", "score"),
}


def missing(found: Findings, stage: str) -> RenderableType:
    """Why a part is empty, and the command that fills it."""
    waiting = {entry["stage"]: entry for entry in found["missing"]}
    for name in _BECAUSE[stage]:
        if name in waiting:
            return absent(waiting[name]["says"], waiting[name]["command"])
    return Text("There is no record of it.", QUIET)


def _l0(found: Findings, name: str) -> float | None:
    """Latents per token at the end of training; for a run without a log, over the harvested tokens."""
    logged = get(found["training"], "l0", name)
    return get(found["firing"], "mean_l0", name) if logged is None else logged


def _imported(found: Findings) -> list[str]:
    return [run["name"] for run in found["runs"] if run.get("seed", 0) is None]


def what_changes(found: Findings) -> str:
    """What the SAEs of a study differ in, as the end of a sentence about what comes back."""
    return "from one SAE to another" if _imported(found) else "when only the seed changes"


def seed_in_words(run: Mapping[str, Any]) -> str:
    return "imported" if run["seed"] is None else f"seed {run['seed']}"


def size_in_words(run: Mapping[str, Any]) -> str:
    """``1,024 latents, k 8``, with the architecture where it is not TopK."""
    kind = "" if run.get("architecture", "topk") == "topk" else f"{run['architecture']}, "
    k = "" if run["k"] is None else f", k {run['k']}"
    return f"{kind}{run['num_latents']:,} latents{k}"


def runs_in_words(found: Findings) -> str:
    """``3 SAEs on the same data, seeds 0 1 2 · 1,024 latents, k 8``."""
    runs, n_imported = found["runs"], len(_imported(found))
    seeds = " ".join(str(run["seed"]) for run in runs if run["seed"] is not None)
    each = listed(sorted({size_in_words(run) for run in runs}))
    if len(runs) == 1:
        return f"1 SAE, {seed_in_words(runs[0])} · {each}"
    if n_imported:
        trained = f", seeds {seeds} trained here" if seeds else ""
        return f"{len(runs)} SAEs, {n_imported} imported{trained} · {each}"
    return f"{len(runs)} SAEs on the same data, seeds {seeds} · {each}"
