"""Compare the scores with the swapped control, the control SAEs and the n-gram baseline.

Dictionaries that learnt nothing score high too, so the table has each control's score by the same protocol, and the
difference with its interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autointerp.report import blocks as doc
from autointerp.report.numbers import count, estimate_of, plural
from sae.common.amounts import decimal, interval, is_known

Tree = Mapping[str, Any]
_NAMES = {"frozen": "frozen decoder", "untrained": "untrained SAE"}
_WHAT = {
    "frozen": ("an SAE whose random decoder was never trained", "training the decoder"),
    "untrained": ("an SAE that was not trained at all", "training"),
}
NEGATIVES = {"hard": "a neighbour fires", "same_token": "same token"}


def score_table(tree: Tree) -> doc.Table:
    """Show the mean under the own explanations, each control's mean, and the differences."""
    rows: doc.Rows = [[doc.Span("own explanation", "accent"), *_figures(tree), ""]]
    for name, row, above in rows_of(tree):
        rows.append([name, *_figures(row), estimate_of(above, sign=True)])
    quartiles = doc.Column("quartiles", is_extra=True)
    return doc.Table(["", ">latents", ">mean", "95 % interval", quartiles, ">AUROC", "own minus this"], rows)


def _figures(row: Tree) -> list[str]:
    quartiles = " / ".join(decimal(q, 2) for q in row["quartiles"])
    figures = [count(row["n_scored"]), decimal(row["mean"]), interval(row["interval"]), quartiles]
    return [*figures, decimal(row["auroc_mean"])]


def other_scorers(tree: Tree) -> Iterator[doc.Block]:
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


def describe_controls(tree: Tree) -> Iterator[doc.Block]:
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


def by_negatives(tree: Tree) -> Iterator[doc.Block]:
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
    controls = list(rows_of(tree))
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


def rows_of(tree: Tree) -> Iterator[tuple[str, Tree, Tree]]:
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
