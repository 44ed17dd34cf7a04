"""What the scores stand above: the swapped control, the control SAEs and the n-gram baseline, row by row.

A mean score alone says little, for dictionaries that learnt nothing score high too. So beside every mean stands what a
control scores by the same protocol, and the difference with its interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from autointerp.report.layout import ACCENT, QUIET, Page, command_line, count, grid, plural
from autointerp.report.visible import visible
from sae.common.amounts import decimal, estimate, interval, is_known

Tree = Mapping[str, Any]
NAMES = {"frozen": "frozen decoder", "untrained": "untrained SAE"}
_WHAT = {
    "frozen": "an SAE whose random decoder was never trained",
    "untrained": "an SAE that was not trained at all",
}
_OWED = {"frozen": "training the decoder", "untrained": "training"}
NEGATIVES = {"hard": "a neighbour fires", "same_token": "same token"}


def score_table(tree: Tree, page: Page) -> RenderableType:
    """The mean under the latents' own explanations, then each control's and how far the own mean is above it."""
    heads = [("latents", "right"), ("mean", "right"), ("95 % interval", "left")]
    heads += [("quartiles", "left")] if page.wide else []
    table = grid("", *heads, ("AUROC", "right"), "own − this", gap=2 if page.wide else 1)
    table.add_row(Text("own explanation", ACCENT), *_figures(tree, page), "")
    for name, row, above in _rows(tree):
        table.add_row(name, *_figures(row, page), estimate(above["mean"], above["interval"], sign=True))
    return table


def other_scorers(tree: Tree, page: Page) -> Iterator[RenderableType]:
    """What other scorers make of the latents, each beside its own swapped control; nothing where there is none."""
    if not tree["other_scorers"]:
        return
    digits = 3 if page.wide else 2
    heads = [("latents", "right"), ("own explanation", "left"), ("swapped control", "left"), ("own − swapped", "left")]
    heads += [("AUROC", "right")] if page.wide else []
    table = grid("also scored by", *heads, gap=2 if page.wide else 1)
    for row in tree["other_scorers"]:
        control = row["control"]
        cells = [estimate(row["mean"], row["interval"], digits)]
        cells += [estimate(control["mean"], control["interval"], digits)] if control else ["–"]
        above = control["above_control"] if control else None
        cells += [estimate(above["mean"], above["interval"], digits, sign=True)] if above else ["–"]
        cells += [decimal(row["auroc_mean"])] if page.wide else []
        table.add_row(visible(row["scorer"]), count(row["n_scored"]), *cells)
    who = {(str(row["explainer"]), str(row["judge"])) for row in tree["other_scorers"]}
    by = "; ".join(f"{visible(explainer)}, judged by {visible(judge)}" for explainer, judge in sorted(who))
    yield Text()
    yield table
    yield Text(f"Explained by {by}. A score means what its scorer tests, and only that.", QUIET)


def in_words(tree: Tree) -> Iterator[RenderableType]:
    """The same as sentences, a warning where the swapped control is not at one half, and how to get what lacks."""
    control = tree["control"]
    if control is None:
        yield Text("\nNo swapped control was scored: a score alone says little, random dictionaries score high too.")
    elif control["leaks"]:
        words = (
            f"the swapped control scores {estimate(control['mean'], control['interval'])} and not .5: the judge or the "
            "sampling leaks, so that latents score without their explanation. What is above the control still counts; "
            "by chance alone this is said of one study in twenty."
        )
        yield Text.assemble(("\n! ", "bold red"), words)
    if control is not None and is_known(control["above_control"]["fraction"]):
        share = f"{100 * control['above_control']['fraction']:.0f} %"
        yield Text(f"\n{share} of the latents score higher with their own explanation than with the swapped one.")
    for row in tree["control_saes"]:
        yield Text(_than_control_sae(row))
        if row["n_failed"] or row["n_ineligible"]:
            lost = f"{row['n_failed']} failed, {row['n_ineligible']} with too few contexts"
            yield Text(f"  (of {visible(row['run'])}: {lost})", QUIET)
    if (baseline := tree["baseline"]) is not None:
        yield Text(_than_baseline(baseline))
    if (lacking := tree["lacking_controls"]) is not None:
        yield Text(f"\n{visible(lacking['says'])}", QUIET)
        if lacking["command"]:
            yield command_line(lacking["command"])


def by_negatives(tree: Tree, page: Page) -> Iterator[RenderableType]:
    """The harder negatives, each beside the random ones of the same latents; nothing where there are none."""
    if not tree["negatives"]:
        return
    names = "latents", "mean", "95 % interval", "TNR", "AUROC", "random", "lacking"
    table = grid("negatives", *((name, "right") for name in names))
    for kind, row in tree["negatives"].items():
        figures = count(row["n_scored"]), decimal(row["mean"]), interval(row["interval"]), decimal(row["tnr"]["value"])
        random = decimal(row["random_mean"])
        table.add_row(NEGATIVES[kind], *figures, decimal(row["auroc_mean"]), random, count(row["n_missing"]))
    yield Text()
    yield table
    yield Text("random: the same latents' score over random negatives; lacking: latents without enough of the kind.")
    yield from _above_by_negatives(tree, page)


def _above_by_negatives(tree: Tree, page: Page) -> Iterator[RenderableType]:
    """How far the own mean is above each control, kind by kind of negative."""
    rows = list(_rows(tree))
    if not rows:
        return
    digits = 2 if len(rows) > 2 or not page.wide else 3
    table = grid("own − …", *(name for name, _, _ in rows), gap=2 if page.wide else 1)
    own = tree["negatives"]
    for kind, name in {"random": "random", **NEGATIVES}.items():
        if kind != "random" and kind not in own:
            continue
        cells = []
        for which, row, above in rows:
            told = above if kind == "random" else _of_kind(own, row, which, kind)
            cells.append("–" if told is None else estimate(told["mean"], told["interval"], digits, sign=True))
        table.add_row(name, *cells)
    yield Text()
    yield table


def _of_kind(own: Tree, row: Tree, name: str, kind: str) -> Tree | None:
    if name == "swapped control":
        told: Tree | None = own[kind]["above_control"]
        return told
    harder = row["negatives"].get(kind)
    return None if harder is None else harder["above"]


def _rows(tree: Tree) -> Iterator[tuple[str, Tree, Tree]]:
    """Name, figures, and how far the own mean is above them."""
    if (control := tree["control"]) is not None:
        yield "swapped control", control, control["above_control"]
    for row in tree["control_saes"]:
        yield NAMES[row["kind"]], row, row["above"]
    if (baseline := tree["baseline"]) is not None:
        yield "n-gram baseline", baseline, baseline["above"]


def above(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """How far the own mean is above each control: its name, and the difference with its interval."""
    yield from ((name, told) for name, _, told in _rows(tree) if is_known(told["mean"]))


def _figures(row: Tree, page: Page) -> list[str]:
    figures = [count(row["n_scored"]), decimal(row["mean"]), interval(row["interval"])]
    figures += [" / ".join(decimal(q, 2) for q in row["quartiles"])] if page.wide else []
    return [*figures, decimal(row["auroc_mean"])]


def _than_control_sae(row: Tree) -> str:
    above, what = row["above"], _WHAT[row["kind"]]
    told = f"({estimate(above['mean'], above['interval'], sign=True)})"
    if not above["interval"]:
        return f"{plural(row['n_scored'], 'latent')} of {what} scored: too few to compare with."
    low, high = above["interval"]
    if low > 0:
        owed = _OWED[row["kind"]]
        return f"On the whole they score higher than the latents of {what} {told}: so much is owed to {owed}."
    if high < 0:
        return f"On the whole they score lower than the latents of {what} {told}: training did not make them clearer."
    return f"On the whole they score no higher than the latents of {what} {told}: such scores do not show training."


def _than_baseline(row: Tree) -> str:
    above = row["above"]
    told = f"({estimate(above['mean'], above['interval'], sign=True)}, {plural(row['n_scored'], 'latent')})"
    if not above["interval"] or above["interval"][0] <= 0 <= above["interval"][1]:
        return f"On the same contexts n-grams alone, which cost nothing, score as well {told}."
    side = "lower" if above["interval"][0] > 0 else "higher"
    return f"On the same contexts n-grams alone, which cost nothing, score {side} {told}."
