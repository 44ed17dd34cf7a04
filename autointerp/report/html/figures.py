"""The figures of a page: how to read each, and its content in words.

``figures.js`` draws them from the findings and the columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from autointerp.findings.shape import StudyFindings
from autointerp.report.numbers import class_label, estimate_of, listed, percent, plural
from sae.common.amounts import decimal, is_known

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """``id`` names its drawing in the scripts, ``part`` its section of the report; ``paper`` a figure of the paper."""

    id: str
    part: str
    title: str
    says: str
    alt: str
    choices: tuple[str, ...] = ()
    """Sibling runs (or sweeps) to choose from, where it shows one at a time."""
    choose: str = "against"
    paper: str = ""
    of_latents: bool = False
    """Whether each point is a latent."""


def figures_of(found: StudyFindings, columns: Tree) -> list[Figure]:
    """Return the figures for which there are data, in the order of the page."""
    builders = (_overlap, _similarity, _latents, _scores, _relation)
    return list(chain.from_iterable(build(found, columns) for build in builders))


def _overlap(found: StudyFindings, columns: Tree) -> Iterator[Figure]:
    tree = found.overlap
    if tree is not None:
        names = ("strict", "both", "decoder", "lenient")
        shares = listed([f"{name} {percent(tree.by(name).value.value)}" for name in names])
        says = (
            "Share of alive latents that two SAEs share, by the cosine threshold. Lenient has no threshold. Dashed: "
            "chance level of the decoder definition, which bounds the others."
        )
        alt = f"At {decimal(tree.threshold, 2)}: {shares}."
        yield Figure("sweep", "overlap", "What is shared at other thresholds", says, alt)
    if tree is not None and len(tree.only_one) > 2:
        one, every = tree.only_one, tree.all_of_n
        says = (
            "Of the alive latents, the share found in one SAE alone and in every one, as more SAEs are compared "
            f"({tree.definition}, mean over all sets of that many, bars: 95 %). Dashed: by chance."
        )
        alt = (
            f"From 2 SAEs to {len(one)}, the share in one alone goes from {percent(one[1])} to {percent(one[-1])}, the "
            f"share in every one from {percent(every[1])} to {percent(every[-1])}."
        )
        yield Figure("growth", "overlap", "What more SAEs change", says, alt)
    if tree is not None and len(tree.strict.pairs) > 1:
        values = [of.value for of in tree.by(tree.definition).pairs.values() if is_known(of.value)]
        says = f"Share of alive latents ({tree.definition}), mean of both directions. An outlier is a bad training."
        alt = f"{len(values)} pairs, from {percent(min(values))} to {percent(max(values))}."
        yield Figure("pairs", "overlap", "What each two share", says, alt)
    if sweeps := columns["sweeps"]:
        points = [
            f"{sweep['name']}, {of['at']}: {percent(of['both']['value'])} and {percent(of['lenient']['value'])}"
            for sweep in sweeps
            for of in sweep["points"]
        ]
        says = (
            "Share of alive latents that two seeds share, by the swept setting: both cosines above the threshold, and "
            "the same partner at any cosine. Bars: 95 %, over latents. Dashed: by chance."
        )
        alt, names = f"Both and same partner: {'; '.join(points)}.", tuple(sweep["name"] for sweep in sweeps)
        part, title = "training" if tree is None else "overlap", "Overlap over a swept setting"
        yield Figure("width", part, title, says, alt, choices=names, choose="sweep", paper="figure 4")


def _similarity(found: StudyFindings, columns: Tree) -> Iterator[Figure]:
    tree, siblings = found.similarity, tuple(against["run"] for against in columns["against"])
    if tree is not None and siblings:
        says = (
            "Lines: the threshold. Blue: both matchings pick the same partner; orange: they pick different ones. At "
            "the edges: counts."
        )
        alt = (
            f"Where the partner is the same, the mean cosine is {decimal(tree.mean_same_partner)}; where it is not, "
            f"{decimal(tree.mean_different_partner)}."
        )
        title = "Encoder and decoder cosine of each latent and its partner"
        yield Figure("cosines", "similarity", title, says, alt, choices=siblings, paper="figure 1", of_latents=True)
    if tree is not None:
        says = (
            "Alive latents of all pairs by the mean of encoder and decoder cosine with their partner. Two humps mean "
            "that latents either return or do not. Line: by chance, cut where it leaves the frame."
        )
        encoders, decoders = decimal(tree.mean_encoder.value), decimal(tree.mean_decoder.value)
        alt = f"Mean matched cosine: encoders {encoders}, decoders {decoders}."
        yield Figure("similarity", "similarity", "How alike partners are", says, alt)
    if tree is not None and siblings:
        says = (
            "Mean cosine with the matched partner, and with the nearest latents, matched or not. On the diagonal the "
            "matched latent is the nearest; far under it, a match was forced."
        )
        matched, nearest = decimal(tree.mean_decoder.value), decimal(tree.mean_max_decoder.value)
        alt = f"Mean decoder cosine: matched {matched}, nearest {nearest}."
        yield Figure("nearest", "similarity", "Matched against nearest", says, alt, choices=siblings, of_latents=True)


def _latents(found: StudyFindings, columns: Tree) -> Iterator[Figure]:
    if (tree := found.membership) is not None and tree.parts:
        says = f"The {tree.n_alive:,} alive latents, by which other SAEs share them ({tree.definition})."
        alt = "; ".join(f"{part.label} {percent(part.fraction)}" for part in tree.parts) + "."
        yield Figure("membership", "membership", "Where the latents are found", says, alt, paper="figure 2")
    classes, scores = found.frequency_by_class, found.scores
    if classes is not None and columns["against"]:
        says = (
            "Similarity is the mean over the other SAEs; firings are counted over the harvest, on a logarithmic scale. "
            "At the edges: counts by class."
        )
        medians = "; ".join(f"{class_label(name, 3)} {1000 * row.median:.3g}" for name, row in classes.items())
        alt, title = f"Median firings per thousand tokens: {medians}.", "Similarity and how often a latent fires"
        yield Figure("frequency", "frequency", title, says, alt, paper="figure 3", of_latents=True)
        if scores is not None and scores.n_scored > 3:
            says = "The scored latents alone, in quarters of their score; the palest is the lowest."
            alt = f"Quartiles of the score: {' / '.join(decimal(q.value) for q in scores.quartiles)}."
            yield Figure("quartiles", "frequency", "The same, by score", says, alt, paper="figure 5", of_latents=True)
    if found.training and found.training.curves:
        fvu = [f"{name} {decimal(value)}" for name, value in found.training.fvu.items() if is_known(value)]
        says = "Fraction of variance unexplained by tokens seen, one line per SAE. The lines should lie on each other."
        yield Figure("training", "training", "How training went", says, f"At the end: {'; '.join(fvu)}.")


def _scores(found: StudyFindings, columns: Tree) -> Iterator[Figure]:
    tree = found.scores
    if tree is None or not tree.n_scored:
        return
    swapped = f"; swapped control {estimate_of(tree.control)}" if tree.control else ""
    says = (
        "Latents by balanced accuracy of a judge who reads their own explanation (blue, upwards); each control's hang "
        "below, as a share of its own latents. .5 is guessing."
    )
    alt = f"Own explanation {estimate_of(tree)}, {plural(tree.n_scored, 'latent')}{swapped}."
    yield Figure("scores", "scores", "Scores and their controls", says, alt)
    if columns["against"]:
        rows = (tree.by_class or {}).items()
        means = [f"{class_label(name, 3)} {estimate_of(row)}" for name, row in rows]
        says = (
            "Each box holds the middle half of the scores, its line the median; a point is a latent outside the "
            "whiskers. The dashed line is guessing."
        )
        title = "Scores by the number of SAEs that share the latent"
        yield Figure("by_number", "counted", title, says, f"Mean score: {'; '.join(means)}.")


def _relation(found: StudyFindings, columns: Tree) -> Iterator[Figure]:
    if (tree := found.relation) is not None:
        rows = (tree.spearman, tree.partial, tree.frequency)
        whole, held, frequency = (estimate_of(row, 2, sign=True) for row in rows)
        says = (
            "Diamonds: mean score of each quarter of the latents by similarity, with 95 % intervals. The dashed line "
            "is guessing."
        )
        alt = f"Spearman {whole}, at equal firing frequency {held}, {plural(tree.n, 'latent')}."
        yield Figure("relation", "relation", "Score and similarity", says, alt, of_latents=True)
        says = "Whether the most frequent latents are the ones that cannot be explained."
        title = "Score and how often a latent fires"
        yield Figure("score_frequency", "relation", title, says, f"Spearman {frequency}.", of_latents=True)
    if partners := columns["partners"]:
        n, names = sum(len(pairs["latent"]) for pairs in partners), tuple(pairs["run"] for pairs in partners)
        says = "On the diagonal both can be explained equally well. Darker: more similar."
        alt, title = f"{plural(n, 'pair')} of latents that are both scored.", "Score of a latent and of its partner"
        yield Figure("partners", "relation", title, says, alt, choices=names, paper="figure 6", of_latents=True)
