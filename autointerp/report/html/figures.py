"""Which figures a page has, and what is said of each: how to read it, and what it shows to who cannot see it.

The drawing is the page's own (``figures.js``); the numbers are those of the findings and of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autointerp.report.numbers import get, listed, percent, plural
from sae.common.amounts import decimal, estimate

Findings = Mapping[str, Any]
Columns = Mapping[str, Any]
_SHOWS_LATENTS = " Each point is a latent: point at it to see what it is, click to open it."


@dataclass(frozen=True)
class Figure:
    """``id`` names its drawing in ``figures.js``; ``part`` the part of the report that it stands in."""

    id: str
    part: str
    title: str
    says: str
    alt: str
    choices: tuple[str, ...] = ()
    """Sibling runs (or sweeps) to choose from, where it shows one at a time."""
    choose: str = "against"
    paper: str = ""
    """Which figure of the paper it is."""
    tall: bool = False


Build = Callable[[Findings, Columns], Figure | None]


def figures_of(found: Findings, columns: Columns) -> list[Figure]:
    """The figures for which there are data, in the order of the page."""
    return [figure for build in _BUILDERS if (figure := build(found, columns)) is not None]


def _siblings(columns: Columns) -> tuple[str, ...]:
    return tuple(against["run"] for against in columns["against"])


def _growth(found: Findings, _: Columns) -> Figure | None:
    tree = found["overlap"]
    if tree is None or len(tree["only_one"]) < 3:
        return None
    n = len(tree["only_one"])
    return Figure(
        "growth",
        "overlap",
        "What more SAEs change",
        f"Of the alive latents, the share found in one SAE alone and in every one, as more SAEs are compared "
        f"({tree['definition']}, mean over all sets of that many, bars: 95 %). Dashed: by chance.",
        f"From 2 SAEs to {n}, the share in one alone goes from {percent(tree['only_one'][1])} to "
        f"{percent(tree['only_one'][-1])}, the share in every one from {percent(tree['all_of_n'][1])} to "
        f"{percent(tree['all_of_n'][-1])}.",
    )


def _sweep(found: Findings, _: Columns) -> Figure | None:
    tree = found["overlap"]
    if tree is None:
        return None
    told = listed([f"{name} {percent(tree[name]['value'])}" for name in ("strict", "both", "decoder", "lenient")])
    return Figure(
        "sweep",
        "overlap",
        "What is shared at other thresholds",
        "Share of alive latents that two SAEs share, by the cosine that is asked for. Lenient asks for none. "
        "Dashed: the decoder definition by chance, which bounds the others.",
        f"At {decimal(tree['threshold'], 2)}: {told}.",
    )


def _pairs(found: Findings, _: Columns) -> Figure | None:
    tree = found["overlap"]
    if tree is None or len(tree["strict"]["pairs"]) < 2:
        return None
    pairs = {k: v for k, v in tree[tree["definition"]]["pairs"].items() if v is not None}
    return Figure(
        "pairs",
        "overlap",
        "What each two share",
        f"Share of alive latents ({tree['definition']}), mean of both directions. Off the scale by much would be a "
        "seed that went another way.",
        f"{len(pairs)} pairs, from {percent(min(pairs.values()))} to {percent(max(pairs.values()))}.",
    )


def _cosines(found: Findings, columns: Columns) -> Figure | None:
    if not columns["against"]:
        return None
    tree = found["similarity"]
    return Figure(
        "cosines",
        "similarity",
        "Encoder and decoder cosine of each latent and its partner",
        f"Right and up is alike; the lines are the threshold. Blue: both matchings pick the same partner; orange: they "
        f"pick different ones. At the edges: how many there are.{_SHOWS_LATENTS}",
        f"Where the partner is the same, the mean cosine is {decimal(tree['mean_same_partner'])}; where it is not, "
        f"{decimal(tree['mean_different_partner'])}.",
        choices=_siblings(columns),
        paper="figure 1",
        tall=True,
    )


def _similarity(found: Findings, _: Columns) -> Figure | None:
    tree = found["similarity"]
    if tree is None:
        return None
    return Figure(
        "similarity",
        "similarity",
        "How alike partners are",
        "Alive latents of all pairs by the mean of encoder and decoder cosine with their partner. Two humps mean that "
        "latents either return or do not. Lines: the same by chance, cut where they leave the frame.",
        f"Mean matched cosine: encoders {decimal(tree['mean_encoder'])}, decoders {decimal(tree['mean_decoder'])}.",
    )


def _nearest(found: Findings, columns: Columns) -> Figure | None:
    if not columns["against"]:
        return None
    tree = found["similarity"]
    return Figure(
        "nearest",
        "similarity",
        "Matched against nearest",
        "Mean cosine with the matched partner, and with the nearest latent of each kind, taken or not. On the diagonal "
        f"the matched one is the nearest; far under it, a match was forced.{_SHOWS_LATENTS}",
        f"Mean decoder cosine: matched {decimal(tree['mean_decoder'])}, nearest {decimal(tree['mean_max_decoder'])}.",
        choices=_siblings(columns),
        tall=True,
    )


def _membership(found: Findings, _: Columns) -> Figure | None:
    tree = found["membership"]
    if tree is None or not tree["parts"]:
        return None
    return Figure(
        "membership",
        "membership",
        "Where the latents are found",
        f"The {tree['n_alive']:,} alive latents of the run, by which other SAEs share them ({tree['definition']}).",
        "; ".join(f"{part['label']} {percent(part['fraction'])}" for part in tree["parts"]) + ".",
        paper="figure 2",
    )


def _frequency(found: Findings, columns: Columns) -> Figure | None:
    tree = found["frequency_by_class"]
    if tree is None or not columns["against"]:
        return None
    return Figure(
        "frequency",
        "frequency",
        "Similarity and how often a latent fires",
        "Similarity is the mean over the other SAEs; firings are counted over the harvest, on a logarithmic scale. "
        f"At the edges: how many there are, by class.{_SHOWS_LATENTS}",
        "Median firings per thousand tokens: "
        + "; ".join(f"{_class(name)} {1000 * row['median']:.3g}" for name, row in tree.items())
        + ".",
        paper="figure 3",
        tall=True,
    )


def _quartiles(found: Findings, columns: Columns) -> Figure | None:
    tree = found["scores"]
    if found["frequency_by_class"] is None or not columns["against"] or tree is None or tree["n_scored"] < 4:
        return None
    return Figure(
        "quartiles",
        "frequency",
        "The same, by score",
        "The scored latents alone, in quarters of their score, from the quarter hardest to explain (palest) to the "
        f"easiest (darkest).{_SHOWS_LATENTS}",
        f"Quartiles of the score: {' / '.join(decimal(q) for q in tree['quartiles'])}.",
        paper="figure 5",
        tall=True,
    )


def _training(found: Findings, _: Columns) -> Figure | None:
    if not get(found, "training", "curves"):
        return None
    fvu = {name: value for name, value in found["training"]["fvu"].items() if value is not None}
    return Figure(
        "training",
        "training",
        "How training went",
        "Fraction of variance unexplained by tokens seen, one line per SAE. Lines that lie on each other are as it "
        "should be: only the seed differs.",
        "At the end: " + "; ".join(f"{name} {decimal(value)}" for name, value in fvu.items()) + ".",
    )


def _scores(found: Findings, _: Columns) -> Figure | None:
    tree = found["scores"]
    if tree is None or not tree["n_scored"]:
        return None
    control = tree["control"]
    beside = f"; swapped control {estimate(control['mean'], control['interval'])}" if control else ""
    return Figure(
        "scores",
        "scores",
        "Scores beside their controls",
        "Latents by balanced accuracy of a judge who reads their own explanation (blue, upwards); what each control "
        "scores hangs below, as a share of its own latents. .5 is guessing.",
        f"Own explanation {estimate(tree['mean'], tree['interval'])}, {plural(tree['n_scored'], 'latent')}{beside}.",
    )


def _by_number(found: Findings, columns: Columns) -> Figure | None:
    tree = found["scores"]
    if tree is None or not tree["n_scored"] or not columns["against"]:
        return None
    classes = tree["by_class"] or {}
    told = [f"{_class(name)} {estimate(row['mean'], row['interval'])}" for name, row in classes.items()]
    return Figure(
        "by_number",
        "counted",
        "Scores by the number of SAEs that share the latent",
        "Each box holds the middle half of the scores, its line the median; a point is a latent outside the whiskers. "
        "The dashed line is guessing.",
        "Mean score: " + "; ".join(told) + ".",
    )


def _relation(found: Findings, _: Columns) -> Figure | None:
    tree = found["relation"]
    if tree is None:
        return None
    held = tree["partial"]
    return Figure(
        "relation",
        "relation",
        "Score and similarity",
        "Diamonds: mean score of each quarter of the latents by similarity, with 95 % intervals. The dashed line is "
        f"guessing.{_SHOWS_LATENTS}",
        f"Spearman {estimate(tree['spearman'], tree['interval'], 2, sign=True)}, with the firing frequency held fixed "
        f"{estimate(held['value'], held['interval'], 2, sign=True)}, {plural(tree['n'], 'latent')}.",
        tall=True,
    )


def _score_frequency(found: Findings, _: Columns) -> Figure | None:
    tree = found["relation"]
    if tree is None:
        return None
    return Figure(
        "score_frequency",
        "relation",
        "Score and how often a latent fires",
        f"Whether the most frequent latents are the ones that cannot be explained.{_SHOWS_LATENTS}",
        f"Spearman {estimate(tree['frequency']['value'], tree['frequency']['interval'], 2, sign=True)}.",
        tall=True,
    )


def _partners(_: Findings, columns: Columns) -> Figure | None:
    if not columns["partners"]:
        return None
    n = sum(len(pairs["latent"]) for pairs in columns["partners"])
    return Figure(
        "partners",
        "relation",
        "Score of a latent and of its partner",
        f"On the diagonal both can be explained equally well. The darker, the more alike the two are.{_SHOWS_LATENTS}",
        f"{plural(n, 'pair')} of latents that are both scored.",
        choices=tuple(pairs["run"] for pairs in columns["partners"]),
        paper="figure 6",
        tall=True,
    )


def _width(found: Findings, columns: Columns) -> Figure | None:
    sweeps = columns["sweeps"]
    if not sweeps:
        return None
    told = [
        f"{sweep['name']}, {point['at']}: {percent(point['both']['value'])} and {percent(point['lenient']['value'])}"
        for sweep in sweeps
        for point in sweep["points"]
    ]
    return Figure(
        "width",
        "overlap" if found["overlap"] is not None else "training",
        "Overlap over a swept setting",
        "Share of alive latents that two seeds share, by what was swept: both cosines above the threshold, and the "
        "same partner at any cosine. Bars: 95 %, over latents. Dashed: by chance.",
        "Both and same partner: " + "; ".join(told) + ".",
        choices=tuple(sweep["name"] for sweep in sweeps),
        choose="sweep",
        paper="figure 4",
    )


def _class(name: str) -> str:
    return {"one": "in no other seed", "some": "in some seeds", "all": "in every seed"}[name]


_BUILDERS: tuple[Build, ...] = (
    *(_sweep, _growth, _pairs, _width),
    *(_cosines, _similarity, _nearest),
    *(_membership, _frequency, _quartiles, _training),
    *(_scores, _by_number, _relation, _score_frequency, _partners),
)
