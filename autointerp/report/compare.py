"""Two runs in the terminal: how far they agree, and pairs of their latents with both explanations side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autointerp.explaining.patterns import shorten
from autointerp.report import blocks, dictionaries, sharing
from autointerp.report.layout import (
    ACCENT,
    QUIET,
    STYLE_OF_CLASS,
    Page,
    bullets,
    command_line,
    count,
    grid,
    listed,
    percent,
    percent_interval,
    plural,
    section,
)
from autointerp.report.terminal import emit
from autointerp.report.visible import shown, visible
from sae.common.amounts import decimal, estimate, is_known

Found = Mapping[str, Any]
_SIDE_BY_SIDE = 80
_NAMED = 12
_CLASSES = {"shared": "shared", "unshared": "not shared", "together": "together"}


def show_comparison(found: Found, shown_pairs: Found, console: Console) -> None:
    """Print a comparison.

    Args:
        found: the object of :func:`autointerp.findings.pair.compare_runs`.
        shown_pairs: which of its pairs: the object of :func:`autointerp.findings.pair.chosen`.
    """
    page = Page.of(console)
    parts = [
        _head(found, page),
        sharing.overlap(found, page),
        sharing.similarity(found, page),
        _scores(found, page),
        _pairs(found, shown_pairs, page),
        _lacking(found, page),
    ]
    emit(Group(*(part for part in parts if part is not None), Text()), console, page.width)


# --- head and scores ----------------------------------------------------------------------------------------


def _head(found: Found, page: Page) -> RenderableType:
    names = [visible(run["name"]) for run in found["runs"]]
    title = Text.assemble((listed(names), f"bold {ACCENT}"), (f"   {dictionaries.runs_in_words(found)}", "bold"))
    table = grid(("", "fold"), ("", "fold"), head=False)
    for run, name in zip(found["runs"], names, strict=True):
        words = (
            f"{dictionaries.seed_in_words(run)}; of {plural(run['num_latents'], 'latent')} {run['n_alive']:,} alive, "
            f"{run['n_explained']:,} explained, {run['n_scored']:,} scored"
        )
        table.add_row(Text(name, QUIET), words)
    if found["scored_by"]:
        table.add_row(Text("scored by", QUIET), shown(_who(found["scored_by"])))
    warnings: list[RenderableType] = []
    if found["apart"]:
        words = f"Aligned by --force: {found['apart']}. What differs between them is not the seed alone."
        warnings += [Text(), Text.assemble(("! ", "bold red"), shown(words))]
    for entry in found["stale"]:
        warnings += [Text(), Text(f"Out of date: {visible(entry['says'])}", "bold"), command_line(entry["command"])]
    return Group(title, Text("━" * page.width, ACCENT, no_wrap=True), table, *warnings, Text(), bullets(_short(found)))


def _who(told: Mapping[str, Any]) -> str:
    def agent(name: str, model: str | None) -> str:
        return f"{name} ({model})" if model else name

    explained = agent(told["explainer"] or "?", told["explainer_model"])
    return f"{told['scorer']}: {agent(told['judge'], told['model'])}, of explanations by {explained}"


def _short(found: Found) -> list[str]:
    """The answers in plain sentences."""
    tree, alike = found["overlap"], found["similarity"]
    row = tree[tree["definition"]]
    told = [
        f"{percent(row['value'])} of the alive latents are shared ({tree['definition']}), 95 % "
        f"{percent_interval(row['interval'])}{_chance(percent, row['null'])}."
    ]
    cosines = []
    for space in ("encoder", "decoder"):
        name = f"mean_{space}"
        value = estimate(alike[name], alike[f"{name}_interval"])
        nulls = {null: of[name] for null, of in alike["null"].items()}
        cosines.append(f"{space} {value}{_chance(decimal, nulls)}")
    told.append(f"Mean cosine of partners: {', '.join(cosines)}.")
    if found["agreement"] is not None:
        tree = found["agreement"]["together"]
        told.append(
            f"{plural(tree['n'], 'pair')} scored on both sides: the scores correlate by "
            f"{_estimate(tree['spearman'], 2, sign=True)} (Spearman)."
        )
    return told


def _chance(write: Any, nulls: Mapping[str, float | None]) -> str:
    """The figure with rotated siblings; nothing where there is none."""
    value = nulls.get("rotated")
    return "" if value is None else f" (by chance {write(value)})"


def _estimate(tree: Mapping[str, Any], digits: int = 3, *, sign: bool = False) -> str:
    return estimate(tree["value"], tree["interval"], digits, sign=sign)


def _scores(found: Found, page: Page) -> RenderableType:
    a, b = (visible(run["name"]) for run in found["runs"])
    title = "Do partners score alike?"
    says = (
        f"Pairs whose two explanations were scored in the same way. Difference: the score in {a} less that in {b}; "
        "gap: its size; with 95 % intervals over pairs, which are no sample of all pairs."
    )
    tree = found["agreement"]
    if tree is None:
        none = [Text("No pair is scored on both sides."), *_otherwise(found)]
        return section(page, title, says, *none)
    rows = [(label, tree[name]) for name, label in _CLASSES.items() if tree[name]["n"]]
    means = [f"{label} {decimal(row['mean'])} in {a} and {decimal(row['mean_there'])} in {b}" for label, row in rows]
    below = [Text(f"Mean scores: {'; '.join(means)}.", QUIET), *_otherwise(found)]
    if page.width < _SIDE_BY_SIDE:
        return section(page, title, says, *_scores_in_lines(rows), *below)
    table = grid("", ("pairs", "right"), "difference", "gap", "Spearman", *([""] if page.wide else []))
    for label, row in rows:
        cells: list[RenderableType] = [Text(label), count(row["n"]), *_figures(row)]
        if page.wide:
            low, high = row["spearman"]["interval"] or (None, None)
            value, low, high = (math.nan if x is None else x for x in (row["spearman"]["value"], low, high))
            cells.append(blocks.whisker(value, low, high, -1, 1, 16, ACCENT, mark=0))
        table.add_row(*cells)
    return section(page, title, says, table, *below)


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        _estimate(row["difference"], sign=True),
        _estimate(row["gap"]),
        _estimate(row["spearman"], 2, sign=True),
    )


def _scores_in_lines(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[RenderableType]:
    for label, row in rows:
        table = grid("", ("", "fold"), head=False)
        for name, said in zip(("difference", "gap", "Spearman"), _figures(row), strict=True):
            table.add_row(Text(name, QUIET), said)
        yield Text(f"{label}, {plural(row['n'], 'pair')}", "bold")
        yield Padding(table, (0, 0, 0, 2))


def _otherwise(found: Found) -> Iterator[RenderableType]:
    if found["scored_by"] and found["scored_by"]["other_made_otherwise"]:
        other = visible(found["runs"][1]["name"])
        yield Text(f"{other} has scores, but made in another way (judge, explainer or contexts): they are left out.")


# --- the pairs ----------------------------------------------------------------------------------------------


def _pairs(found: Found, chosen: Found, page: Page) -> RenderableType:
    a, b = (visible(run["name"]) for run in found["runs"])
    says = (
        f"A latent of {a} and its partner in {b} by decoder direction; whether the encoders pick the same one, and "
        f"whether that counts as shared ({found['definition']} at {decimal(found['threshold'], 2)}). "
        "“Fire together”: the Jaccard index of the tokens at which they fire."
    )
    body: list[RenderableType] = [Text(chosen["says"])]
    for pair in chosen["pairs"]:
        body += [Text(), *_pair(pair, (a, b), page)]
    if found["n_without_partner"]:
        words = f"{plural(found['n_without_partner'], 'latent')} of {a} have no partner: {b} has fewer latents."
        body += [Text(), Text(words, QUIET)]
    if chosen["n_of"] > len(chosen["pairs"]):
        body += [Text(), Text("--latents shows more, --json has all pairs.", QUIET)]
    return section(page, "Pairs", says, *body)


def _pair(pair: Found, names: tuple[str, str], page: Page) -> Iterator[RenderableType]:
    style = STYLE_OF_CLASS["all" if pair["is_shared"] else "one"]
    same = "same partner by both" if pair["same_partner"] else _other_partner(pair)
    facts = [
        f"encoder {decimal(pair['encoder_cosine'], 2)}",
        f"decoder {decimal(pair['decoder_cosine'], 2)}",
        same,
        *([f"fire together {decimal(pair['jaccard'], 2)}"] if is_known(pair["jaccard"]) else []),
    ]
    yield Text.assemble(
        (f"{pair['latent']} ↔ {pair['partner']}", "bold"),
        ("   shared" if pair["is_shared"] else "   not shared", style),
        (f"   similarity {decimal(pair['similarity'], 2)}", ""),
    )
    yield Padding(Text(" · ".join(facts), QUIET), (0, 0, 0, 2))
    columns = [_side(side, name) for side, name in zip(pair["sides"], names, strict=True)]
    if page.width < _SIDE_BY_SIDE:
        for lines in columns:
            yield Padding(Group(*lines), (0, 0, 0, 2))
        return
    each = (page.width - 2 - 3) // 2
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    for _ in columns:
        table.add_column(width=each, overflow="fold")
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    yield Padding(table, (0, 0, 0, 2))


def _other_partner(pair: Found) -> str:
    partner = pair["encoder_partner"]
    return "no partner by encoder" if partner is None else f"encoder's partner is {partner}"


def _side(side: Found, name: str) -> list[Text]:
    """One latent in lines: which, how often it fires, its score, what it was said to be."""
    if side["n_firings"] is None:
        fires = "not harvested"
    else:
        often = f"fires {count(side['n_firings'])} times, {dictionaries.rate(side['firing_frequency'])}"
        fires = often if side["alive"] else "never fires"
    score = side["score"]
    told = "not scored" if score is None else f"score {_estimate(score, 2)}"
    text = side["explanation"]
    words = shown(shorten(text)) if text is not None else shown(f"({side['without_explanation']})", QUIET)
    return [Text(f"{name} {side['latent']}", "bold"), Text(fires, QUIET), Text(told, QUIET), words]


# --- what is missing ----------------------------------------------------------------------------------------


def _lacking(found: Found, page: Page) -> RenderableType | None:
    """Pairs of which one side has no explanation, or either no score: how many, which, and what makes them."""
    tree = found["lacking"]
    entries = tree["without_explanation"]
    body: list[RenderableType] = []
    if not tree["n_explained_both"] and not entries:
        body.append(Text("Nothing is explained in either run yet."))
    for run in found["runs"]:
        able = [e for e in entries if e["run"] == run["name"] and e["can_be_explained"]]
        unable = [e for e in entries if e["run"] == run["name"] and not e["can_be_explained"]]
        name = visible(run["name"])
        if able:
            body.append(Text(f"{name}: {plural(len(able), 'latent')} with an explained partner: {_numbers(able)}."))
        if unable:
            words = f"{name}: {len(unable):,} more that cannot be explained (too few contexts): {_numbers(unable)}."
            body.append(Text(words, QUIET))
    how = ", with the same --llm-url or --vllm as before" if tree["by_language_model"] else ""
    if tree["explain"]:
        body += [Text(f"This explains partners{how}:"), *map(command_line, tree["explain"])]
    if tree["not_scored"]:
        words = f"{plural(len(tree['not_scored']), 'pair')} explained on both sides without a score on either or both"
        body.append(Text(f"{words}: {_first(tree['not_scored'])}."))
    if tree["score"]:
        body += [Text(f"This scores what is explained{how}:"), command_line(tree["score"])]
    if not body:
        return None
    says = "Explanations and scores that a pair has on one side alone cannot be compared."
    return section(page, "Not on both sides", says, *body)


def _numbers(entries: Sequence[Mapping[str, Any]]) -> str:
    return _first([entry["latent"] for entry in entries])


def _first(latents: Sequence[int]) -> str:
    """The first few numbers, and how many follow."""
    rest = len(latents) - _NAMED
    words = ", ".join(map(str, latents[:_NAMED]))
    return f"{words} and {rest:,} more (--json has all)" if rest > 0 else words
