"""Relate the scores to the latents' return: do latents that come back explain better?

The correlation is given raw and without the scores' noise, both also with the firing frequency held fixed; then shared
against unshared latents of equal frequency, and the mean score by quarters of similarity.

The latents of one run count as independent. A latent and its partners in other seeds are resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from autointerp.contexts.sampling import Sample
from autointerp.findings.reliability import Corrected, Halves, corrected_spearman, splits_of
from autointerp.findings.scores import Scored, swapped_scores
from autointerp.findings.shape import Correlations, PooledRelation, Quarter, SharedAndUnshared, Stratum
from autointerp.findings.statistics.correlation import (
    bootstrap_mean,
    partial_spearman,
    quantiles,
    short_of_one,
    spearman,
    strata_of,
    stratified_spearman,
)
from autointerp.findings.statistics.estimation import error_of, real_share
from autointerp.findings.statistics.resampling import Bools, Floats, Resamples, interval_of, partial
from autointerp.scoring.setups import own_scores
from sae.common.estimate import UNKNOWN, Estimate

METHODS = {
    "matched": "shared - unshared within tenths of the firing frequency, weighted by n_shared n_unshared / n; "
    "expanded percentile bootstrap, 1000 resamples, seeded",
    "pooled": "expanded percentile bootstrap, 1000 resamples, seeded, of latents with their decoder-matched partners",
}
_FREQUENCY_STRATA = 10  # of the matched comparison; fewer if there would be fewer than _IN_STRATUM latents in each
_IN_STRATUM = 8


@dataclass(frozen=True)
class Part:
    """One run's scores.

    ``rows`` are one set-up's; ``latents`` is the run's table by latent number (``similarity``, ``firing_frequency``,
    ``unshared``); ``verdicts`` come from :func:`autointerp.findings.reliability.verdicts_of`; ``unit`` [M] has one
    number for a latent and its partners in the other runs; ``sample`` is the recorded sample of the scored latents.
    """

    run: str
    rows: pd.DataFrame
    latents: pd.DataFrame
    verdicts: pd.DataFrame
    unit: np.ndarray | None = None
    sample: Sample | None = None

    def joined(self) -> pd.DataFrame:
        """Return the scored latents that fire, with ``frequency`` as log 10.

        With a sample, only its latents, with ``weight``, ``stratum`` and ``known`` (see ``Resamples``).
        """
        own = self.rows[self.rows["control"] == "none"].set_index("latent")
        weights = None if self.sample is None else self.sample.weights(set(own.index))
        own = own[own["status"] == "ok"]
        columns = ["similarity", "firing_frequency"]
        table = (
            own[["balanced_accuracy"]].join(self.latents.reindex(columns=columns), how="inner").dropna().astype(float)
        )
        table = table[table["firing_frequency"] > 0]
        joined = pd.DataFrame(
            {
                "score": table["balanced_accuracy"],
                "similarity": table["similarity"],
                "frequency": np.log10(table["firing_frequency"]),
                "unshared": self.latents.loc[table.index, "unshared"].astype(bool),
                "unit": table.index if self.unit is None else np.asarray(self.unit)[table.index],
            }
        )
        if weights is None:
            return joined
        joined = joined.join(weights, how="inner")
        error, rho = error_of(own.loc[joined.index]), 0.0
        if error is not None:
            rho = real_share(joined["score"].to_numpy(), np.ones(len(joined), bool), error.to_numpy(), joined)
        return joined.assign(known=rho * joined["fraction"])


def relation_findings(part: Part, *, n_bins: int = 4) -> Correlations | None:
    """Relate one run's scores to cross-seed similarity; ``None`` if fewer than three latents have both.

    With a sample, weighted and resampled within strata (:mod:`autointerp.findings.statistics.estimation`).
    """
    table = part.joined()
    if len(table) < 3:
        return None
    if part.sample is not None:
        of = Resamples(table["unit"], weights=table["weight"], strata=table["stratum"], known=table["known"])
        return _all_by_resampling([part], [table], of, n_bins)
    score, similarity, frequency = table["score"], table["similarity"], table["frequency"]
    strata, place = strata_of(frequency, n_bins), _quarter(similarity, n_bins)
    within = stratified_spearman(similarity, score, frequency, n_strata=n_bins)
    return Correlations(
        spearman=spearman(similarity, score),
        partial=partial_spearman(similarity, score, frequency),
        within_strata=within.pooled,
        frequency=spearman(frequency, score),
        similarity_and_frequency=spearman(similarity, frequency),
        n=len(table),
        strata=_by_stratum(table, strata, [s.correlation for s in within.strata]),
        bins=_by_quarter(table, place, [bootstrap_mean(score[place == i]) for i in np.unique(place)], part),
        **_by_resampling([part], [table], Resamples(table["unit"])),
    )


def pooled_findings(parts: Sequence[Part], *, n_bins: int = 4) -> PooledRelation | None:
    """Return the same over several runs together; all intervals resample latents with their partners.

    With samples, each run counts for the effective size of its weighted sample, (sum w)^2 / sum w^2. ``None`` if fewer
    than two runs have scores, or fewer than three latents.
    """
    tables = [part.joined() for part in parts]
    parts = [part for part, table in zip(parts, tables, strict=True) if len(table)]
    tables = [table for table in tables if len(table)]
    if len(parts) < 2 or sum(map(len, tables)) < 3:
        return None
    weighted = all(part.sample is not None for part in parts)
    if weighted:
        worth = [float(table["weight"].sum() / (table["weight"] ** 2).sum()) for table in tables]
        tables = [table.assign(weight=table["weight"] * w) for table, w in zip(tables, worth, strict=True)]
    whole = pd.concat(tables, ignore_index=True)
    resamples = Resamples(whole["unit"])
    if weighted:
        # A unit is in the stratum that it has in the first run that holds it. No finite population correction: units
        # of several runs are drawn from a larger population than either run's.
        run = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        strata = run * (int(whole["stratum"].max()) + 1) + whole["stratum"].to_numpy()
        resamples = Resamples(whole["unit"], weights=whole["weight"], strata=strata)
    found = _all_by_resampling(parts, tables, resamples, n_bins)
    return PooledRelation(
        **vars(found), runs=[part.run for part in parts], n_units=resamples.n_units, weighted=weighted
    )


def _all_by_resampling(
    parts: Sequence[Part], tables: Sequence[pd.DataFrame], resamples: Resamples, n_bins: int
) -> Correlations:
    table = pd.concat(tables) if len(tables) == 1 else pd.concat(tables, ignore_index=True)
    score, similarity, frequency = table["score"], table["similarity"], table["frequency"]
    n, r = resamples.n_free, resamples.correlations([similarity, score, frequency])
    strata, place = strata_of(frequency, n_bins, resamples.own), _quarter(similarity, n_bins, resamples.own)
    inside = {int(i): _within(resamples, similarity, score, strata == i) for i in np.unique(strata)}
    means = [interval_of(resamples.means(score, place == i), resamples.count(place == i)) for i in np.unique(place)]
    correlations = [interval_of(draws, resamples.count(strata == i)) for i, draws in inside.items()]
    return Correlations(
        spearman=interval_of(r[:, 0, 1], n),
        partial=interval_of(partial(r[:, 0, 1], r[:, 0, 2], r[:, 1, 2]), n),
        within_strata=interval_of(_mean_of_strata(inside, {i: int((strata == i).sum()) for i in inside}), n),
        frequency=interval_of(r[:, 1, 2], n),
        similarity_and_frequency=interval_of(r[:, 0, 2], n),
        n=len(table),
        strata=_by_stratum(table, strata, correlations),
        bins=_by_quarter(table, place, means, parts[0] if len(parts) == 1 else None),
        **_by_resampling(parts, tables, resamples),
    )


def _by_stratum(table: pd.DataFrame, strata: np.ndarray, correlations: Sequence[Estimate]) -> list[Stratum]:
    found = []
    for i, correlation in zip(np.unique(strata), correlations, strict=True):
        inside = table["frequency"][strata == i]
        found.append(Stratum(10 ** inside.min(), 10 ** inside.max(), len(inside), correlation))
    return found


def _by_quarter(table: pd.DataFrame, place: np.ndarray, means: Sequence[Estimate], part: Part | None) -> list[Quarter]:
    """Describe the quarters of similarity; for one run, also how far each is above the swapped control."""
    found = []
    swapped = None if part is None else swapped_scores(part.rows, part.sample)
    own = None if part is None else own_scores(part.rows).loc[table.index]
    for i, mean in zip(np.unique(place), means, strict=True):
        inside = table["similarity"][place == i]
        above = None if swapped is None or own is None else swapped.below(Scored(own[place == i]))
        found.append(Quarter(mean, inside.min(), inside.max(), len(inside), above))
    return found


def _quarter(x: pd.Series, n: int, weights: Floats | None = None) -> np.ndarray:
    """Return the quantile, from 0, that each value of x is in; with weights, quantiles of the population."""
    edges = np.unique(quantiles(x, np.linspace(0, 1, n + 1)[1:-1], weights))
    return np.searchsorted(edges, x, side="right")


def _within(resamples: Resamples, x: pd.Series, y: pd.Series, inside: Bools) -> Floats:
    if inside.sum() < 5:
        return np.full(len(resamples), np.nan)
    return resamples.correlations([x, y], inside)[:, 0, 1]


def _mean_of_strata(strata: Mapping[int, Floats], sizes: Mapping[int, int]) -> Floats:
    """Average Fisher's z of the strata in which it is defined, weighted by n - 3; see ``stratified_spearman``."""
    total, weight = np.zeros(len(next(iter(strata.values())))), 0.0
    for i, draws in strata.items():
        if not np.isnan(draws[0]):
            total += (sizes[i] - 3) * np.arctanh(short_of_one(draws, sizes[i]))
            weight += sizes[i] - 3
    return np.tanh(total / weight) if weight else np.full(len(total), np.nan)


def _by_resampling(parts: Sequence[Part], tables: Sequence[pd.DataFrame], resamples: Resamples) -> dict[str, Any]:
    table = pd.concat(tables, ignore_index=True)
    corrected = _corrected(parts, tables, table, resamples)
    return {
        "reliability": corrected.reliability,
        "corrected": corrected.spearman,
        "partial_corrected": corrected.partial,
        "shared_and_unshared": matched_difference(
            table["score"].to_numpy(), ~table["unshared"].to_numpy(bool), table["frequency"].to_numpy(), resamples
        ),
    }


def _corrected(
    parts: Sequence[Part], tables: Sequence[pd.DataFrame], table: pd.DataFrame, resamples: Resamples
) -> Corrected:
    halves = [
        Halves.of(part.verdicts, of.index.tolist(), splits=splits_of(len(table)))
        for part, of in zip(parts, tables, strict=True)
    ]
    if any(one.n == 0 for one in halves):  # no verdicts are available
        return Corrected(UNKNOWN, UNKNOWN, UNKNOWN)
    whole = Halves(np.concatenate([one.scores for one in halves], axis=2))
    score, similarity, frequency = (table[c].to_numpy(float) for c in ("score", "similarity", "frequency"))
    return corrected_spearman(score, similarity, frequency, whole, resamples)


def matched_difference(score: Floats, shared: Bools, frequency: Floats, resamples: Resamples) -> SharedAndUnshared:
    """Return the mean score of shared latents less that of unshared ones: plain, and at equal firing frequency.

    Matched within quantiles of the frequency that hold both kinds, with the weights of least variance.

    Args:
        score: [N]
        shared: [N] whether each latent is shared with any other run.
        frequency: [N] the covariate to match on, such as the log of the firing frequency.
    """
    strata = strata_of(frequency, int(np.clip(len(score) // _IN_STRATUM, 1, _FREQUENCY_STRATA)), resamples.own)
    usable = [i for i in np.unique(strata) if 0 < shared[strata == i].sum() < (strata == i).sum()]
    sums, weight = np.zeros(len(resamples)), np.zeros(len(resamples))
    for i in usable:
        both = [strata == i, (strata == i) & shared, (strata == i) & ~shared]
        _, with_shared, without = (resamples.means(score, kept) for kept in both)
        share = resamples.means(shared.astype(float), both[0])
        held = resamples.means((strata == i).astype(float))
        difference = np.nan_to_num(with_shared - without)
        precision = held * np.nan_to_num(share * (1 - share))
        sums += precision * difference
        weight += precision
    with np.errstate(invalid="ignore"):
        matched = interval_of(sums / weight, resamples.n_free) if usable else UNKNOWN
    plain = interval_of(resamples.means(score, shared) - resamples.means(score, ~shared), resamples.n_free)
    return SharedAndUnshared(
        plain=plain,
        matched=matched,
        n_shared=int(shared.sum()),
        n_unshared=int((~shared).sum()),
        n_matched=int(np.isin(strata, usable).sum()),
    )
