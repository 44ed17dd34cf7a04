"""The paper's findings about explanations: how well latents can be explained, and how that relates to their return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autointerp.findings.pairs import agreement
from autointerp.findings.paper.finding import (
    AGREES,
    DISAGREES,
    SIGNED,
    UNDECIDED,
    About,
    Finding,
    against,
)
from autointerp.findings.shape import Relation, Scores
from autointerp.findings.statistics.correlation import quantiles
from autointerp.findings.statistics.resampling import Resamples, interval_of
from autointerp.journal.method import CHANCE
from sae.common.amounts import decimal, estimate
from sae.common.estimate import Estimate

FEWEST = 20
"""The least number of aligned pairs, or of latents in a tenth, that a finding needs."""

INTERP = About(
    "interp",
    "latents can be explained: the mean detection score",
    "mean .72; quartiles .615 / .710 / .798",
    "mean detection score (balanced accuracy)",
)
RELATION = About(
    "relation",
    "low scores go with low cross-seed similarity",
    "“strongly correlated”, no coefficient",
    "Spearman of score and similarity",
    SIGNED,
)
FREQUENT_LOW = About(
    "frequent-low",
    "low scores go with the most frequent latents",
    "a figure, no number",
    "mean score of the tenth that fires most, less that of the others",
    SIGNED,
)
BOTH_SCORED = About(
    "both-scored",
    "a latent and its partner in the other SAE score alike when aligned",
    "a scatter of 1.3k pairs, no coefficient",
    "Spearman of the scores of aligned latents and their partners",
    SIGNED,
)


@dataclass(frozen=True)
class ScoreEvidence:
    """The scores of a study.

    Args:
        scores, relation: the report's findings of these names (``None``: not made yet).
        table: the focus run's scored latents (:meth:`autointerp.findings.relation.Part.joined`).
        pairs: :func:`autointerp.findings.pairs.scored_pairs`.
        n_aligned: the focus run's latents with an aligned partner (``None``: no run is aligned with it).
        most_latents: the number of latents that can be scored.
        more: the commands that provide missing data, for ``score``, ``pair`` and ``partners``.
        explain_more: the command that explains N latents, or first scores the existing explanations.
    """

    scores: Scores | None
    relation: Relation | None
    table: pd.DataFrame | None
    pairs: pd.DataFrame | None
    judge: str
    n_aligned: int | None
    most_latents: int
    more: Mapping[str, str]
    explain_more: Callable[[int], str]


def interp_finding(of: ScoreEvidence) -> Finding:
    """Agrees if the interval of the mean score is above chance, and that of own less swapped explanations above 0.

    Disagrees if either is wholly below. Cannot tell without a swapped control: the score may be above chance whatever
    the explanation says.
    """
    if of.scores is None or not of.scores.n_scored:
        return INTERP.missing("nothing is scored yet", of.more["score"])
    mean, control = of.scores.mean, of.scores.control
    if control is None:
        return INTERP.row(mean, UNDECIDED, f"there is no swapped control; judge: {of.judge}")
    above = control.above_control.mean
    verdicts = against(mean, CHANCE), against(above)
    verdict = DISAGREES if DISAGREES in verdicts else AGREES if set(verdicts) == {AGREES} else UNDECIDED
    quartiles = " / ".join(decimal(q.value) for q in of.scores.quartiles)
    why = f"tested: above .5, and above the swapped control: {_text(above)}; quartiles {quartiles}; judge: {of.judge}"
    return INTERP.row(mean, verdict, why)


def relation_finding(of: ScoreEvidence) -> Finding:
    """Agrees if the correlation of score and similarity is wholly above 0, disagrees if wholly below.

    Over all scored runs together if there are several. ``why`` adds the same at equal firing frequency, and the
    fraction of unshared latents that score above the median of all.
    """
    if of.relation is None:
        missing = "score" if of.scores is None or not of.scores.n_scored else "pair"
        return RELATION.missing("it takes scores and aligned seeds", of.more[missing])
    tree = of.relation.pooled or of.relation
    found, held = tree.spearman, tree.partial
    why = f"tested: above 0; at equal firing frequency {_text(held)}; {_unshared_high(of.table)}over {tree.n} latents"
    return RELATION.row(found, against(found), why)


def _unshared_high(table: pd.DataFrame | None) -> str:
    if table is None or not table["unshared"].any():
        return ""
    weight = pd.Series(_weights(table), table.index)
    median = float(quantiles(table["score"], [0.5], weight)[0])
    unshared = table[table["unshared"]]
    high = float(np.average(unshared["score"] > median, weights=weight[unshared.index]))
    return f"{decimal(high)} of the unshared latents score above the median; "


def frequent_low_finding(of: ScoreEvidence) -> Finding:
    """Agrees if the tenth of latents that fires most has a lower mean score than the others.

    The interval of the difference must be wholly below 0; disagrees if it is wholly above. With a sample, the tenth and
    the means are weighted to be those of all latents that can be scored.
    """
    if of.table is None or of.table.empty:
        return FREQUENT_LOW.missing("it takes scores and aligned seeds", of.more["score"])
    frequent = _most_frequent_tenth(of.table)
    if (n := int(frequent.sum())) < FEWEST:
        why = f"of {len(of.table)} scored latents {n} are of the tenth that fires most, it takes {FEWEST}"
        latents = min(50 * math.ceil(1.2 * len(of.table) * FEWEST / max(n, 1) / 50), of.most_latents)
        if latents <= len(of.table):
            return FREQUENT_LOW.missing(f"{why}; no more latents have contexts enough", None)
        return FREQUENT_LOW.missing(why, of.explain_more(latents))
    draw, score = _resamples(of.table), of.table["score"].to_numpy()
    found = interval_of(draw.means(score, frequent) - draw.means(score, ~frequent), min(n, draw.n_free))
    over_all = "" if of.relation is None else f"Spearman with frequency {_text(of.relation.frequency)}; "
    return FREQUENT_LOW.row(found, against(found, 0, -1), f"tested: below 0; {over_all}{n} of {len(of.table)} latents")


def _most_frequent_tenth(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Mark the latents [N] of the most frequent tenth of all latents that the table represents."""
    order = np.argsort(-table["frequency"].to_numpy(), kind="stable")
    weight = _weights(table)[order]
    found = np.zeros(len(table), bool)
    found[order[np.cumsum(weight) <= 0.1 * weight.sum() * (1 + 1e-9)]] = True
    return found


def _weights(table: pd.DataFrame) -> NDArray[np.float64]:
    """[N] the number of latents that each represents."""
    return table["weight"].to_numpy(float) if "weight" in table else np.ones(len(table))


def _resamples(table: pd.DataFrame) -> Resamples:
    if "weight" not in table:
        return Resamples(np.arange(len(table)))
    return Resamples(np.arange(len(table)), weights=table["weight"], strata=table["stratum"], known=table["known"])


def both_scored_finding(of: ScoreEvidence) -> Finding:
    """Agrees if the correlation of the scores of aligned latents and their partners is wholly above 0.

    Disagrees if it is wholly below. Aligned: both matched cosines above .7.
    """
    if of.pairs is None or int(of.pairs["aligned"].sum()) < FEWEST:
        n = 0 if of.pairs is None else int(of.pairs["aligned"].sum())
        if of.n_aligned is not None and of.n_aligned < FEWEST:
            return BOTH_SCORED.missing(f"only {of.n_aligned} latents have an aligned partner, it takes {FEWEST}", None)
        return BOTH_SCORED.missing(f"{n} aligned pairs have both scores, it takes {FEWEST}", of.more["partners"])
    aligned = of.pairs["aligned"].to_numpy(bool)
    here, elsewhere = agreement(of.pairs, aligned), agreement(of.pairs, ~aligned)
    apart = f", {decimal(elsewhere.gap.value)} elsewhere ({elsewhere.n} pairs)" if elsewhere.n else ""
    why = f"tested: above 0; mean difference {decimal(here.gap.value)} where aligned ({here.n} pairs){apart}"
    return BOTH_SCORED.row(here.spearman, against(here.spearman), why)


def findings_of_scores(of: ScoreEvidence) -> list[Finding]:
    """Return the four findings about scores, in the paper's order."""
    return [make(of) for make in (interp_finding, relation_finding, frequent_low_finding, both_scored_finding)]


def _text(e: Estimate) -> str:
    return "not known" if math.isnan(e.value) else estimate(e.value, (e.low, e.high), sign=True)
