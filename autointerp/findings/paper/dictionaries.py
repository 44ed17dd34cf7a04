"""The paper's findings about the dictionaries: how much returns, how alike, and which latents.

"Shared" is always the paper's definition, both matched cosines above .7 (``both``). Fractions are of alive latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, isnan

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autointerp.findings.paper.finding import AGREES, DISAGREES, SIGNED, UNDECIDED, About, Finding, against, every
from autointerp.findings.paper.intervals import Figure, Measured, over_seeds, value_of
from sae.alignment.bootstrap import Bools, Floats, LatentBootstrap, Tables, mean_over
from sae.alignment.dip import Dip
from sae.alignment.nulls import read_nulls
from sae.alignment.overlap import compute_similarity, find_shared
from sae.common.amounts import decimal

THRESHOLD = 0.7
NEARLY_ALL = 0.9
"""A fraction shared above which the seeds would have the same features."""
NO_SECOND_MODE = 0.01
"""A dip below which a second mode would hold less than a fiftieth of the latents."""


@dataclass(frozen=True)
class Dictionaries:
    """The aligned runs of a study.

    ``alive`` and ``frequency`` are run → [M]; ``frequency`` is empty if nothing was harvested. ``more`` has the
    command that provides missing data, for each of ``pair``, ``seed`` and ``harvest``.
    """

    runs: Sequence[str]
    tables: Tables
    alive: Mapping[str, Bools]
    frequency: Mapping[str, Floats]
    bimodality: Dip | None
    more: Mapping[str, str]

    @functools.cached_property
    def nulls(self) -> Mapping[str, Tables]:
        return read_nulls(self.runs, self.tables)

    def measure(
        self,
        figure: Figure,
        least: int = 2,
        within: tuple[float, float] = (0.0, 1.0),
        members: Mapping[str, Bools] | None = None,
    ) -> Measured:
        return over_seeds(figure, self.runs, self.tables, self.nulls, least, within, members)


# --- figures -------------------------------------------------------------------------------------------------------


def _pairwise(
    draw: LatentBootstrap, tables: Tables, members: Mapping[str, Bools], columns: Callable[[pd.DataFrame], Floats]
) -> Floats:
    """Average ``columns`` [M, C] over each run's members, for each other run: [R + 1, S (S - 1), C]."""
    values = {
        run: np.concatenate([columns(tables[run, other]) for other in draw.runs if other != run], axis=1)
        for run in draw.runs
    }
    found = draw.fractions(values, {run: members[run] for run in draw.runs})
    return found.reshape(len(found), len(draw.runs) * (len(draw.runs) - 1), -1)


def _fraction(definition: str, members: Mapping[str, Bools]) -> Figure:
    """The fraction of ``members`` that two runs share."""

    def is_shared(table: pd.DataFrame) -> Floats:
        return find_shared(table, definition, THRESHOLD)[:, None].astype(float)

    return lambda draw, tables: mean_over(_pairwise(draw, tables, members, is_shared)[:, :, 0], axis=1)


def _value(of: Dictionaries, definition: str, members: Mapping[str, Bools] | None = None) -> float:
    return value_of(_fraction(definition, members or of.alive), of.runs, of.tables)


def _gap(draw: LatentBootstrap, tables: Tables, alive: Mapping[str, Bools]) -> Floats:
    """The mean matched cosine of latents whose matchings agree, less that of latents whose matchings differ."""

    def columns(table: pd.DataFrame) -> Floats:
        alike = compute_similarity(table)
        known = ~np.isnan(alike)
        agree = known & (table["encoder_partner"].to_numpy() == table["decoder_partner"].to_numpy())
        differ = known & ~agree
        cosine = np.nan_to_num(alike)
        return np.stack([cosine * agree, agree, cosine * differ, differ], axis=1)

    sums = mean_over(_pairwise(draw, tables, alive, columns), axis=1)
    with np.errstate(invalid="ignore"):
        return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]


def _n_shared(tables: Tables, runs: Sequence[str], run: str) -> NDArray[np.int_]:
    """[M] the number of other runs that share each latent of ``run``."""
    return np.sum([find_shared(tables[run, other], "both", THRESHOLD) for other in runs if other != run], axis=0)


def _spread(draw: LatentBootstrap, tables: Tables, alive: Mapping[str, Bools]) -> Floats:
    """[R + 1, S] the distribution of the number of other runs that share a latent, averaged over runs."""
    counts = np.arange(len(draw.runs))
    indicators = {run: (_n_shared(tables, draw.runs, run)[:, None] == counts).astype(float) for run in draw.runs}
    return mean_over(draw.fractions(indicators, {run: alive[run] for run in draw.runs}), axis=1)


def _drop(draw: LatentBootstrap, tables: Tables, alive: Mapping[str, Bools]) -> Floats:
    """The fall of the fraction found in no other SAE from sets of two SAEs to sets of three."""
    others = len(draw.runs) - 1
    alone = [[comb(others - s, n - 1) / comb(others, n - 1) for s in range(others + 1)] for n in (2, 3)]
    return _spread(draw, tables, alive) @ (np.asarray(alone[0]) - np.asarray(alone[1]))


def _retained(draw: LatentBootstrap, tables: Tables, alive: Mapping[str, Bools]) -> Floats:
    """The fraction of the latents that two SAEs share which a third shares too."""
    spread, others = _spread(draw, tables, alive), len(draw.runs) - 1
    counts = np.arange(others + 1.0)
    with np.errstate(invalid="ignore"):
        return (spread @ (counts * (counts - 1))) / ((others - 1) * (spread @ counts))


# --- findings ------------------------------------------------------------------------------------------------------


def shared_finding(of: Dictionaries, about: About) -> Finding:
    """Agrees if the interval of the fraction shared is wholly above chance and below :data:`NEARLY_ALL`.

    Disagrees if it is wholly at or below chance (nothing returns), or wholly above :data:`NEARLY_ALL` (all does).
    """
    found = of.measure(_fraction("both", of.alive), members=of.alive)
    verdicts = against(found.estimate, found.chance), against(found.estimate, NEARLY_ALL, -1)
    tested = f"above chance ({decimal(found.chance)}), below {decimal(NEARLY_ALL, 1)}"
    why = f"tested: {tested}; by decoder alone {decimal(_value(of, 'decoder'))}; {found.method}"
    return about.row(found.estimate, DISAGREES if DISAGREES in verdicts else every(verdicts), why)


def bimodal_finding(of: Dictionaries, about: About) -> Finding:
    """Agrees if Hartigan's dip test excludes a single mode (p < .05) and the dip's interval is above 0.

    Disagrees if it does not and the dip's interval is wholly below :data:`NO_SECOND_MODE`: two modes far apart, of
    which the smaller holds the share w, have a dip of w / 2.
    """
    if of.bimodality is None:
        return about.missing("it takes two aligned seeds", of.more["pair"])
    found, p = of.bimodality.value, of.bimodality.p_value
    verdict = UNDECIDED
    if p < 0.05 and found.low > 0:
        verdict = AGREES
    elif p >= 0.05 and found.high < NO_SECOND_MODE:
        verdict = DISAGREES
    tested = "too few latents to test" if isnan(p) else "p < .001" if p < 0.001 else f"p = {decimal(p)}"
    return about.row(found, verdict, f"tested against a single mode: {tested}; bootstrap over latents")


def disagree_finding(of: Dictionaries, about: About) -> Finding:
    """Agrees if agreeing matchings have a higher mean cosine than differing ones, by more than by chance.

    The interval of the difference must be wholly above chance; disagrees if it is wholly below.
    """
    found = of.measure(lambda draw, tables: _gap(draw, tables, of.alive), within=(-2, 2))
    if isnan(found.estimate.value):
        return about.row(found.estimate, UNDECIDED, "the matchings agree for all latents, or for none")
    tested = f"above chance ({decimal(found.chance, sign=True)})"
    agree = f"the matchings agree for {decimal(_value(of, 'lenient'))} of the latents"
    return about.row(
        found.estimate, against(found.estimate, found.chance), f"tested: {tested}; {agree}; {found.method}"
    )


def third_seed_finding(of: Dictionaries, about: About) -> Finding:
    """Agrees if a third SAE lowers the fraction found in no other by more than by chance.

    The fraction cannot rise, so 0 would be no test: the interval of the fall must be wholly above the fall by chance;
    disagrees if it is wholly below.
    """
    found = of.measure(lambda draw, tables: _drop(draw, tables, of.alive), least=3, members=of.alive)
    alone = 1 - _value(of, "both")
    left = f"{decimal(alone)} of two SAEs, {decimal(alone - found.estimate.value)} of three"
    why = f"tested: more than by chance ({decimal(found.chance)}); in one alone {left}; {found.method}"
    return about.row(found.estimate, against(found.estimate, found.chance), why)


def retained_finding(of: Dictionaries, about: About) -> Finding:
    """Agrees if the interval of the fraction retained is wholly above one half, disagrees if wholly below."""
    held = {run: of.alive[run] & (_n_shared(of.tables, of.runs, run) > 0) for run in of.runs}
    found = of.measure(lambda draw, tables: _retained(draw, tables, of.alive), least=3, members=held)
    return about.row(found.estimate, against(found.estimate, 0.5), f"tested: above one half; {found.method}")


def frequency_finding(of: Dictionaries, about: About) -> Finding:
    """Agrees if more of the most frequent tenth of each SAE's alive latents is shared than of its rarest tenth.

    The interval of the difference must be wholly above 0; disagrees if it is wholly below.
    """
    if not set(of.runs) <= set(of.frequency):
        return about.missing("firings have not been counted", of.more["harvest"])
    tenths = {run: _tenths(of.frequency[run], of.alive[run]) for run in of.runs}
    most, rarest = ({run: both[i] for run, both in tenths.items()} for i in (0, 1))
    of_most, of_rarest = _fraction("both", most), _fraction("both", rarest)
    found = of.measure(lambda draw, tables: of_most(draw, tables) - of_rarest(draw, tables), within=(-1, 1))
    why = (
        f"tested: above 0; {decimal(_value(of, 'both', most))} and {decimal(_value(of, 'both', rarest))} shared; of "
        f"the unshared {decimal(_frequent_though_unshared(of))} fire more than the median shared latent; {found.method}"
    )
    return about.row(found.estimate, against(found.estimate), why)


def _tenths(frequency: Floats, alive: Bools) -> tuple[Bools, Bools]:
    """Mark the alive latents [M] of the tenth that fires most, and of the tenth that fires least."""
    order = np.flatnonzero(alive)[np.argsort(frequency[alive], kind="stable")]
    n = max(1, len(order) // 10)
    most, least = np.zeros(len(alive), bool), np.zeros(len(alive), bool)
    most[order[len(order) - n :]], least[order[:n]] = True, True
    return most, least


def _frequent_though_unshared(of: Dictionaries) -> float:
    """Return the fraction of unshared alive latents that fire more than the median latent shared with every run.

    The mean over runs, NaN if there are none.
    """
    found = []
    for run in of.runs:
        n = _n_shared(of.tables, of.runs, run)
        by_all, by_none = of.alive[run] & (n == len(of.runs) - 1), of.alive[run] & (n == 0)
        if by_all.any() and by_none.any():
            found.append(float((of.frequency[run][by_none] > np.median(of.frequency[run][by_all])).mean()))
    return float(np.mean(found)) if found else float("nan")


# --- rows ----------------------------------------------------------------------------------------------------------

SHARED = About(
    "shared",
    "two seeds share a part of their latents, not all",
    "32k latents: .416 both (.53 according to the blog, by decoder alone)",
    "fraction shared by two seeds (both)",
)
BIMODAL = About(
    "bimodal",
    "matched cosines have two modes, high and low",
    "mean alignment .72 where the matchings agree, .33 where not",
    "Hartigan's dip of the matched cosines, mean over pairs",
)
DISAGREE = About(
    "disagree",
    "where encoder and decoder matchings disagree, the cosine is low",
    "+.39 (.72 less .33); the matchings agree for .793 of the latents",
    "mean cosine where the matchings agree, less that where they differ",
    SIGNED,
)
THIRD_SEED = About(
    "third-seed",
    "a third seed lowers the fraction found in no other SAE",
    ".099 (.583 of two, .484 of three); according to the blog .12",
    "fall of the fraction found in one SAE alone, from two SAEs to three",
)
RETAINED = About(
    "retained",
    "most latents that SAEs 1 and 2 share are in SAE 3 too",
    ".786 (.327 in all three, .089 in 1 and 2 alone)",
    "of the latents that two SAEs share, those in a third",
)
FREQUENCY = About(
    "frequency",
    "the most frequent latents are shared, the rarest are not",
    "a figure over 10M tokens, no number",
    "fraction shared of the most frequent tenth, less that of the rarest",
    SIGNED,
)
_FINDINGS = [
    (shared_finding, 2, SHARED),
    (bimodal_finding, 1, BIMODAL),
    (disagree_finding, 2, DISAGREE),
    (third_seed_finding, 3, THIRD_SEED),
    (retained_finding, 3, RETAINED),
    (frequency_finding, 2, FREQUENCY),
]


def findings_of_dictionaries(of: Dictionaries) -> list[Finding]:
    """Return the six findings about how much of a dictionary returns, in the paper's order."""
    lacking = {2: ("it takes two aligned seeds", of.more["pair"]), 3: ("it takes three aligned seeds", of.more["seed"])}
    return [
        about.missing(*lacking[least]) if len(of.runs) < least else make(of, about) for make, least, about in _FINDINGS
    ]
