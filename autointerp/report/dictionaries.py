"""The half of the report that needs no language model: what the trained dictionaries are, and what comes back.

Each function turns one part of the findings into something rich can print, or says which command would make
that part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from autointerp.journal.method import ENOUGH_TO_CALL_DEAD
from autointerp.report import blocks
from autointerp.report.curves import training_curves
from autointerp.report.layout import (
    QUIET,
    STYLE_OF_CLASS,
    Page,
    absent,
    count,
    get,
    grid,
    human,
    indented,
    listed,
    origin,
    percent,
    section,
)
from autointerp.report.visible import visible
from sae.common.amounts import decimal

Findings = Mapping[str, Any]


def membership(found: Findings, page: Page) -> RenderableType:
    focus = visible(found["focus"])
    title = f"Where the latents of {focus} are found"
    tree = found["membership"]
    if tree is None:
        return section(page, title, "Which other seeds have each latent.", missing(found, "overlap"))
    says = f"Each alive latent of {focus} is in one part, by the SAEs that share it ({tree['definition']})."
    styles, parts = _part_styles(tree["parts"]), tree["parts"]
    pieces = [blocks.Part(part["n"], styles[i], page.fill(i)) for i, part in enumerate(parts)]
    nulls = list(parts[0]["null"]) if parts else []
    by_chance = [(f"by chance, {null}" if i == 0 else null, "right") for i, null in enumerate(nulls)]
    table = grid("", "", ("latents", "right"), ("of alive", "right"), *by_chance, head=True)
    for part, piece in zip(parts, pieces, strict=True):
        table.add_row(
            blocks.Drawn(piece.fill * 2, piece.style),
            Text(visible(part["label"])),
            count(part["n"]),
            percent(part["fraction"]),
            *(Text(percent(part["null"][null]), QUIET) for null in nulls),
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
    word = "dead" if tokens is None or tokens >= ENOUGH_TO_CALL_DEAD else "silent"
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
    if quality := get(tree, "quality"):
        shown = listed(
            [
                f"{visible(name)} {decimal(of['fvu_without'])} (L0 {of['l0_without']:.1f})"
                for name, of in quality.items()
            ]
        )
        notes.append(
            "A few outlier tokens (over 10 times the median norm) hold most of the variance, so FVU is about them. "
            f"Without them, on the first batch: {shown}."
        )
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
    return "from one SAE to another" if _imported(found) or found.get("apart") else "when only the seed changes"


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
