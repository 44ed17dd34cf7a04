"""What the paper found of the dictionaries themselves: how much returns, how alike, and which.

"Shared" is here always the paper's own: both matched cosines above .7 (``both``), whatever a report is looked at with,
since the reference values are of that. Fractions are of alive latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, isnan

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autointerp.findings.paper.finding import (
    AGREES,
    DISAGREES,
    NUMBER,
    SIGNED,
    UNDECIDED,
    About,
    Finding,
    against,
    every,
)
from autointerp.findings.paper.intervals import Measured, over_seeds
from sae.alignment.bootstrap import Bools, Floats, LatentBootstrap, Tables, mean_over
from sae.alignment.dip import Dip
from sae.alignment.nulls import read_nulls
from sae.alignment.overlap import shared, similarity
from sae.common.amounts import decimal

THRESHOLD = 0.7
NEARLY_ALL = 0.9
"""A fraction that returns from which on one would no longer speak of different features."""
NO_SECOND_MODE = 0.01
"""A dip below which a second mode, however far off, would hold less than a fiftieth of the latents."""


@dataclass(frozen=True)
class Dictionaries:
    """The aligned runs of a study.

    ``alive`` and ``frequency`` are run → [M]; ``frequency`` is empty where nothing was harvested. ``more`` has the
    command that provides what is missing, for each of ``pair``, ``seed`` and ``harvest``.
    """

    runs: Sequence[str]
    tables: Tables
    alive: Mapping[str, Bools]
    frequency: Mapping[str, Floats]
    bimodality: Dip | None
    more: Mapping[str, str]

    @functools.cached_property
    def nulls(self) -> Mapping[str, Tables]:
        """The tables as they are by chance, made once for all figures."""
        return read_nulls(self.runs, self.tables)


# --- figures -------------------------------------------------------------------------------------------------------


def _pairwise(
    draw: LatentBootstrap, tables: Tables, members: Mapping[str, Bools], columns: Callable[[pd.DataFrame], Floats]
) -> Floats:
    """[R + 1, S, S - 1, C]: the mean over each run's members of ``columns`` [M, C] of its table with each other run."""
    values = {
        run: np.concatenate([columns(tables[run, other]) for other in draw.runs if other != run], axis=1)
        for run in draw.runs
    }
    found = draw.fractions(values, {run: members[run] for run in draw.runs})
    return found.reshape(*found.shape[:2], len(draw.runs) - 1, -1)


def fraction(of: Dictionaries, definition: str, members: Mapping[str, Bools] | None = None) -> Measured:
    """The fraction of ``members`` (the alive latents) that two runs share."""

    counted = of.alive if members is None else members

    def figure(draw: LatentBootstrap, tables: Tables) -> Floats:
        def is_shared(table: pd.DataFrame) -> Floats:
            return shared(table, definition, THRESHOLD)[:, None].astype(float)

        found = _pairwise(draw, tables, counted, is_shared)
        return mean_over(found.reshape(len(found), -1), axis=1)

    return over_seeds(figure, of.runs, of.tables, of.nulls, members=counted)


def _gap(draw: LatentBootstrap, tables: Tables, alive: Mapping[str, Bools]) -> Floats:
    """The mean matched cosine where the matchings agree, less that where they differ."""

    def columns(table: pd.DataFrame) -> Floats:
        alike = similarity(table)
        known = ~np.isnan(alike)
        agree = known & (table["encoder_partner"].to_numpy() == table["decoder_partner"].to_numpy())
        differ = known & ~agree
        cosine = np.nan_to_num(alike)
        return np.stack([cosine * agree, agree, cosine * differ, differ], axis=1)

    sums = mean_over(_pairwise(draw, tables, alive, columns).reshape(len(draw.weights) + 1, -1, 4), axis=1)
    with np.errstate(invalid="ignore"):
        return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]


def _n_shared(tables: Tables, runs: Sequence[str], run: str) -> NDArray[np.int_]:
    """[M] how many of the other runs share each latent of ``run``."""
    return np.sum([shared(tables[run, other], "both", THRESHOLD) for other in runs if other != run], axis=0)


def _spread(draw: LatentBootstrap, tables: Tables, alive: Mapping[str, Bools]) -> Floats:
    """[R + 1, S]: the distribution of how many of the S - 1 other runs share a latent, the mean over runs."""
    counts, indicators = np.arange(len(draw.runs)), {}
    for run in draw.runs:
        indicators[run] = (_n_shared(tables, draw.runs, run)[:, None] == counts).astype(float)
    return mean_over(draw.fractions(indicators, {run: alive[run] for run in draw.runs}), axis=1)


def _drop(draw: LatentBootstrap, tables: Tables, alive: Mapping[str, Bools]) -> Floats:
    """By how much the fraction found in no other SAE falls from sets of two SAEs to sets of three."""
    others = len(draw.runs) - 1
    alone = [[comb(others - s, n - 1) / comb(others, n - 1) for s in range(others + 1)] for n in (2, 3)]
    return _spread(draw, tables, alive) @ (np.asarray(alone[0]) - np.asarray(alone[1]))


def _retained(draw: LatentBootstrap, tables: Tables, alive: Mapping[str, Bools]) -> Floats:
    """Of the latents that two SAEs share, the fraction that a third shares too."""
    spread, others = _spread(draw, tables, alive), len(draw.runs) - 1
    counts = np.arange(others + 1.0)
    with np.errstate(invalid="ignore"):
        return (spread @ (counts * (counts - 1))) / ((others - 1) * (spread @ counts))


# --- findings ------------------------------------------------------------------------------------------------------


def shared_finding(of: Dictionaries) -> Finding:
    """Agrees where the interval of the fraction shared lies wholly above chance and wholly below :data:`NEARLY_ALL`.

    Disagrees where it lies wholly at or below chance (nothing returns), or wholly above :data:`NEARLY_ALL` (all does).
    """
    about = _ABOUT["shared"]
    if len(of.runs) < 2:
        return about.missing("it takes two aligned seeds", of.more["pair"])
    found = fraction(of, "both")
    decoder = fraction(of, "decoder").estimate.value
    chance = 0.0 if isnan(found.null) else found.null
    above, below = against(found.estimate, chance), against(found.estimate, NEARLY_ALL, -1)
    verdict = DISAGREES if DISAGREES in (above, below) else every([above, below])
    tested = f"above chance ({decimal(chance)}), below {decimal(NEARLY_ALL, 1)}"
    why = f"tested: {tested}; by decoder alone {decimal(decoder)}; {found.method}"
    return about.row(found.estimate, verdict, why)


def bimodal_finding(of: Dictionaries) -> Finding:
    """Agrees where Hartigan's dip test excludes a single mode (p < .05) and the dip's interval lies above 0.

    Disagrees where it does not and the dip's interval lies wholly below :data:`NO_SECOND_MODE`: two modes far apart, of
    which the smaller holds the share w, have a dip of w / 2.
    """
    about = _ABOUT["bimodal"]
    if of.bimodality is None:
        return about.missing("it takes two aligned seeds", of.more["pair"])
    found, p = of.bimodality.value, of.bimodality.p_value
    verdict = UNDECIDED
    if p < 0.05 and found.low > 0:
        verdict = AGREES
    elif p >= 0.05 and found.high < NO_SECOND_MODE:
        verdict = DISAGREES
    told = "too few latents to test" if isnan(p) else "p < .001" if p < 0.001 else f"p = {decimal(p)}"
    return about.row(found, verdict, f"tested against a single mode: {told}; bootstrap over latents")


def disagree_finding(of: Dictionaries) -> Finding:
    """Agrees where the mean cosine of agreeing matchings exceeds that of differing ones by more than it does by chance.

    That is, where the interval of the difference lies wholly above it (0 where no null was made); disagrees where it
    lies wholly below.
    """
    about = _ABOUT["disagree"]
    if len(of.runs) < 2:
        return about.missing("it takes two aligned seeds", of.more["pair"])
    found = over_seeds(lambda draw, tables: _gap(draw, tables, of.alive), of.runs, of.tables, of.nulls, within=(-2, 2))
    chance = 0.0 if isnan(found.null) else found.null
    agree = fraction(of, "lenient").estimate.value
    if isnan(found.estimate.value):
        return about.row(found.estimate, UNDECIDED, "the matchings agree for all latents, or for none")
    tested = f"above chance ({decimal(chance, sign=True)})"
    why = f"tested: {tested}; the matchings agree for {decimal(agree)} of the latents; {found.method}"
    return about.row(found.estimate, against(found.estimate, chance), why)


def third_seed_finding(of: Dictionaries) -> Finding:
    """Agrees where a third SAE lowers the fraction found in no other by more than it would by chance.

    The fraction cannot rise, so 0 would be no test: the interval of the fall must lie wholly above the fall by chance;
    disagrees where it lies wholly below.
    """
    about = _ABOUT["third-seed"]
    if len(of.runs) < 3:
        return about.missing("it takes three aligned seeds", of.more["seed"])
    found = over_seeds(
        lambda draw, tables: _drop(draw, tables, of.alive), of.runs, of.tables, of.nulls, least=3, members=of.alive
    )
    chance = 0.0 if isnan(found.null) else found.null
    alone = 1 - fraction(of, "both").estimate.value
    left = f"{decimal(alone)} of two SAEs, {decimal(alone - found.estimate.value)} of three"
    why = f"tested: more than by chance ({decimal(chance)}); in one alone {left}; {found.method}"
    return about.row(found.estimate, against(found.estimate, chance), why)


def retained_finding(of: Dictionaries) -> Finding:
    """Agrees where the interval of the fraction retained lies wholly above one half, disagrees where wholly below."""
    about = _ABOUT["retained"]
    if len(of.runs) < 3:
        return about.missing("it takes three aligned seeds", of.more["seed"])
    held = {run: of.alive[run] & (_n_shared(of.tables, of.runs, run) > 0) for run in of.runs}
    found = over_seeds(
        lambda draw, tables: _retained(draw, tables, of.alive), of.runs, of.tables, of.nulls, least=3, members=held
    )
    return about.row(found.estimate, against(found.estimate, 0.5), f"tested: above one half; {found.method}")


def frequency_finding(of: Dictionaries) -> Finding:
    """Agrees where more of the most frequent tenth of each SAE's alive latents is shared than of its rarest tenth.

    That is, where the interval of the difference lies wholly above 0; disagrees where it lies wholly below.
    """
    about = _ABOUT["frequency"]
    if len(of.runs) < 2:
        return about.missing("it takes two aligned seeds", of.more["pair"])
    if not set(of.runs) <= set(of.frequency):
        return about.missing("firings have not been counted", of.more["harvest"])
    tenths = {run: _tenths(of.frequency[run], of.alive[run]) for run in of.runs}

    def figure(draw: LatentBootstrap, tables: Tables) -> Floats:
        def is_shared(table: pd.DataFrame) -> Floats:
            return shared(table, "both", THRESHOLD)[:, None].astype(float)

        most, least = (
            mean_over(
                _pairwise(draw, tables, {run: of_run[i] for run, of_run in tenths.items()}, is_shared).reshape(
                    len(draw.weights) + 1, -1
                ),
                axis=1,
            )
            for i in (0, 1)
        )
        return most - least

    found = over_seeds(figure, of.runs, of.tables, of.nulls, within=(-1, 1))
    most, rarest = (
        fraction(of, "both", {run: of_run[i] for run, of_run in tenths.items()}).estimate.value for i in (0, 1)
    )
    cluster = _frequent_though_unshared(of)
    why = (
        f"tested: above 0; {decimal(most)} and {decimal(rarest)} shared; of the unshared {decimal(cluster)} fire more "
        f"than the median shared latent; {found.method}"
    )
    return about.row(found.estimate, against(found.estimate), why)


def _tenths(frequency: Floats, alive: Bools) -> tuple[Bools, Bools]:
    """Which alive latents [M] are the tenth that fires most, and the tenth that fires least."""
    order = np.flatnonzero(alive)[np.argsort(frequency[alive], kind="stable")]
    n = max(1, len(order) // 10)
    most, least = np.zeros(len(alive), bool), np.zeros(len(alive), bool)
    most[order[len(order) - n :]], least[order[:n]] = True, True
    return most, least


def _frequent_though_unshared(of: Dictionaries) -> float:
    """Of the alive latents that no other run shares, the fraction that fires more than the median latent of those that
    every one shares; the mean over runs, NaN where there are none."""
    found = []
    for run in of.runs:
        by = np.stack([shared(of.tables[run, other], "both", THRESHOLD) for other in of.runs if other != run])
        every_one, none = of.alive[run] & by.all(axis=0), of.alive[run] & ~by.any(axis=0)
        if every_one.any() and none.any():
            found.append(float((of.frequency[run][none] > np.median(of.frequency[run][every_one])).mean()))
    return float(np.mean(found)) if found else float("nan")


# --- rows ----------------------------------------------------------------------------------------------------------

_ABOUT = {
    about.id: about
    for about in (
        About(
            "shared",
            "two seeds share a part of their latents, not all",
            "32k latents: .416 both (.53 as told in the blog, by decoder alone)",
            "fraction shared by two seeds (both)",
            NUMBER,
        ),
        About(
            "bimodal",
            "matched cosines have two modes, high and low",
            "mean alignment .72 where the matchings agree, .33 where not",
            "Hartigan's dip of the matched cosines, mean over pairs",
        ),
        About(
            "disagree",
            "where encoder and decoder matchings disagree, the cosine is low",
            "+.39 (.72 less .33); the matchings agree for .793 of the latents",
            "mean cosine where the matchings agree, less that where they differ",
            SIGNED,
        ),
        About(
            "third-seed",
            "a third seed lowers the fraction found in no other SAE",
            ".099 (.583 of two, .484 of three); as told in the blog .12",
            "fall of the fraction found in one SAE alone, from two SAEs to three",
            NUMBER,
        ),
        About(
            "retained",
            "most latents that SAEs 1 and 2 share are in SAE 3 too",
            ".786 (.327 in all three, .089 in 1 and 2 alone)",
            "of the latents that two SAEs share, those in a third",
            NUMBER,
        ),
        About(
            "frequency",
            "the most frequent latents are shared, the rarest are not",
            "a figure over 10M tokens, no number",
            "fraction shared of the most frequent tenth, less that of the rarest",
            SIGNED,
        ),
    )
}


def findings_of_dictionaries(of: Dictionaries) -> list[Finding]:
    """The six findings about how much of a dictionary returns, in the paper's order."""
    return [
        make(of)
        for make in (
            shared_finding,
            bimodal_finding,
            disagree_finding,
            third_seed_finding,
            retained_finding,
            frequency_finding,
        )
    ]
