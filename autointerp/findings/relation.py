"""How the scores go with the latents' return: do those that come back explain better?

Every figure is made so that it can be held against another: the correlation as it is, and without the scores' noise;
both with the firing frequency held fixed, since frequent latents may return and be explained for that alone; shared
against unshared latents that fire equally often; and the mean score by quarters of similarity, as the paper shows it.

The latents of one run are taken to be independent of each other. Those of several runs are not: a latent and its
partners in the other seeds are one observation, and are resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from autointerp.contexts.sample_record import Sample
from autointerp.findings.json_values import mean_of, number
from autointerp.findings.reliability import Corrected, Halves, corrected_spearman, splits_of
from autointerp.findings.scores import Swapped
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
from autointerp.scoring.setups import status_kind
from sae.common.estimate import UNKNOWN, Estimate

METHODS = {
    "matched": "shared - unshared within tenths of the firing frequency, weighted by n_shared n_unshared / n; "
    "expanded percentile bootstrap, 1000 resamples, seeded",
    "pooled": "expanded percentile bootstrap, 1000 resamples, seeded, of latents with their decoder-matched partners",
}
_FREQUENCY_STRATA = 10  # of the matched comparison; fewer where there are fewer than _IN_STRATUM latents in each
_IN_STRATUM = 8


@dataclass(frozen=True)
class Part:
    """One run's scores.

    ``rows`` are one set-up's; ``latents`` is the run's table by latent number (``similarity``, ``firing_frequency``,
    ``unshared``); ``verdicts`` those behind the scores (:func:`autointerp.findings.reliability.verdicts_of`); ``unit``
    [M] has one number for a latent and its partners in the other runs.
    """

    run: str
    rows: pd.DataFrame
    latents: pd.DataFrame
    verdicts: pd.DataFrame
    unit: np.ndarray | None = None
    sample: Sample | None = None
    """What the scored latents are a sample of; ``None``: of nothing on record."""

    def joined(self) -> pd.DataFrame:
        """The scored latents that fire: ``score``, ``similarity``, ``frequency`` (log 10), ``unshared``, ``unit``.

        With a sample those that are in it, with ``weight``, ``stratum`` and ``known`` (see ``Resamples``).
        """
        own = self.rows[self.rows["control"] == "none"].set_index("latent")
        weights = None if self.sample is None else self.sample.weights(set(own.index))
        own = own[own["status"].map(status_kind) == "ok"]
        columns = ["similarity", "firing_frequency"]
        table = own[["balanced_accuracy"]].join(self.latents[columns], how="inner").dropna().astype(float)
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
        error = error_of(own.loc[joined.index])
        rho = 0.0
        if error is not None:
            kept = np.ones(len(joined), dtype=bool)
            rho = real_share(joined["score"].to_numpy(), kept, error.to_numpy(), joined)
        return joined.assign(known=rho * joined["fraction"])


def relation_findings(part: Part, *, n_bins: int = 4) -> dict[str, Any] | None:
    """One run's scores against cross-seed similarity; ``None`` where fewer than three latents have both.

    Of a sample, all of it is weighted and by resampling within strata: see
    :mod:`autointerp.findings.statistics.estimation`.
    """
    table = part.joined()
    if len(table) < 3:
        return None
    if part.sample is not None:
        of = Resamples(table["unit"], weights=table["weight"], strata=table["stratum"], known=table["known"])
        return _all_by_resampling([part], [table], of, n_bins)
    score, similarity, frequency = table["score"], table["similarity"], table["frequency"]
    within = stratified_spearman(similarity, score, frequency, n_strata=n_bins)
    place = _quarter(similarity, n_bins)
    strata = strata_of(frequency, n_bins)
    return {
        **_tree(
            table,
            whole=spearman(similarity, score),
            held=partial_spearman(similarity, score, frequency),
            with_frequency=spearman(frequency, score),
            similar_and_frequent=spearman(similarity, frequency),
            within=within.pooled,
            strata={int(i): s.correlation for i, s in zip(np.unique(strata), within.strata, strict=True)},
            means={int(i): bootstrap_mean(score[place == i]) for i in np.unique(place)},
            above=_above_control(part, table, place),
            n_bins=n_bins,
        ),
        **_by_resampling([part], [table], Resamples(table["unit"])),
    }


def pooled_findings(parts: Sequence[Part], *, n_bins: int = 4) -> dict[str, Any] | None:
    """The same over several runs' scores together; all intervals by resampling latents with their partners.

    Of samples, each run counts for as many latents as its weighted sample is worth, (sum w)^2 / sum w^2: did it count
    for all its eligible latents, a few scored partners would speak as loudly as another run's hundreds.

    ``None`` where fewer than two runs have scores, or fewer than three latents.
    """
    tables = [part.joined() for part in parts]
    parts = [part for part, table in zip(parts, tables, strict=True) if len(table)]
    tables = [table for table in tables if len(table)]
    if len(parts) < 2 or sum(map(len, tables)) < 3:
        return None
    weighted = all(part.sample is not None for part in parts)
    if weighted:
        tables = [table.assign(weight=table["weight"] * _worth(table["weight"])) for table in tables]
    whole = pd.concat(tables, ignore_index=True)
    resamples = Resamples(whole["unit"])
    if weighted:
        # A unit is in the stratum that it has in the first run that holds it. Without correction for how much of the
        # population is known: what units of several runs are drawn from is larger than what either was.
        run = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        strata = run * (int(whole["stratum"].max()) + 1) + whole["stratum"].to_numpy()
        resamples = Resamples(whole["unit"], weights=whole["weight"], strata=strata)
    return {
        "runs": [part.run for part in parts],
        "n_units": resamples.n_units,
        "weighted": weighted,
        **_all_by_resampling(parts, tables, resamples, n_bins),
    }


def _worth(weight: pd.Series) -> float:
    """By what to multiply weights, so that they sum to the number of equal ones that would be worth as much."""
    return float(weight.sum() / (weight**2).sum())


def _all_by_resampling(
    parts: Sequence[Part], tables: Sequence[pd.DataFrame], resamples: Resamples, n_bins: int
) -> dict[str, Any]:
    table = pd.concat(tables, ignore_index=True)
    score, similarity, frequency = table["score"], table["similarity"], table["frequency"]
    n, r = resamples.n_free, resamples.correlations([similarity, score, frequency])
    strata, place = strata_of(frequency, n_bins, resamples.own), _quarter(similarity, n_bins, resamples.own)
    inside = {int(i): _within(resamples, similarity, score, strata == i) for i in np.unique(strata)}
    return {
        **_tree(
            table,
            whole=interval_of(r[:, 0, 1], n),
            held=interval_of(partial(r[:, 0, 1], r[:, 0, 2], r[:, 1, 2]), n),
            with_frequency=interval_of(r[:, 1, 2], n),
            similar_and_frequent=interval_of(r[:, 0, 2], n),
            within=interval_of(_mean_of_strata(inside, {i: int((strata == i).sum()) for i in inside}), n),
            strata={i: interval_of(draws, resamples.count(strata == i)) for i, draws in inside.items()},
            means={int(i): _mean(resamples, score, place == i) for i in np.unique(place)},
            above=_above_control(parts[0], tables[0], place) if len(parts) == 1 else {},
            n_bins=n_bins,
            weights=resamples.own,
        ),
        **_by_resampling(parts, tables, resamples),
    }


def _tree(
    table: pd.DataFrame,
    *,
    whole: Estimate,
    held: Estimate,
    with_frequency: Estimate,
    similar_and_frequent: Estimate,
    within: Estimate,
    strata: Mapping[int, Estimate],
    means: Mapping[int, Estimate],
    above: Mapping[int, dict[str, Any] | None],
    n_bins: int,
    weights: Floats | None = None,
) -> dict[str, Any]:
    frequency = strata_of(table["frequency"], n_bins, weights)
    place = _quarter(table["similarity"], n_bins, weights)
    told = whole.as_dict()
    return {
        "spearman": told["value"],
        "interval": told["interval"],
        "n": len(table),
        "partial": held.as_dict(),
        "within_strata": within.as_dict(),
        "strata": [
            {
                "low": number(10 ** table["frequency"][frequency == i].min()),
                "high": number(10 ** table["frequency"][frequency == i].max()),
                "n": int((frequency == i).sum()),
                **correlation.as_dict(),
            }
            for i, correlation in strata.items()
        ],
        "frequency": with_frequency.as_dict(),
        "similarity_and_frequency": similar_and_frequent.as_dict(),
        "bins": [
            {
                "low": number(table["similarity"][place == i].min()),
                "high": number(table["similarity"][place == i].max()),
                "n": int((place == i).sum()),
                **mean_of(mean),
                "above_control": above.get(i),
            }
            for i, mean in means.items()
        ],
    }


def _quarter(x: pd.Series, n: int, weights: Floats | None = None) -> np.ndarray:
    """Which quantile of x each value is in, from 0; of the population, where values have weights."""
    edges = np.unique(quantiles(x, np.linspace(0, 1, n + 1)[1:-1], weights))
    return np.searchsorted(edges, x, side="right")


def _above_control(part: Part, table: pd.DataFrame, place: np.ndarray) -> dict[int, dict[str, Any] | None]:
    """Return by quarter how far the mean score is above the swapped control (:meth:`.scores.Swapped.below`).

    ``table`` is the part's joined one, ``place`` [n] the quarter of each of its rows.
    """
    swapped = Swapped.among(part.rows, part.sample)
    own = part.rows[part.rows["control"] == "none"].set_index("latent").loc[table.index]
    return {int(i): swapped.below(own[place == i]) for i in np.unique(place)}


def _mean(resamples: Resamples, values: pd.Series, inside: Bools) -> Estimate:
    return interval_of(resamples.means(values, inside), resamples.count(inside))


def _within(resamples: Resamples, x: pd.Series, y: pd.Series, inside: Bools) -> Floats:
    if inside.sum() < 5:
        return np.full(len(resamples), np.nan)
    return resamples.correlations([x, y], inside)[:, 0, 1]


def _mean_of_strata(strata: Mapping[int, Floats], sizes: Mapping[int, int]) -> Floats:
    """Fisher's z of the strata, weighted by n - 3, where it is defined; see ``stratified_spearman``."""
    total, weight = np.zeros(len(next(iter(strata.values())))), 0.0
    for i, draws in strata.items():
        if not np.isnan(draws[0]):
            share = sizes[i] - 3
            total += share * np.arctanh(short_of_one(draws, sizes[i]))
            weight += share
    return np.tanh(total / weight) if weight else np.full(len(total), np.nan)


# --- by resampling, of one run or of several ------------------------------------------------------------------------


def _by_resampling(parts: Sequence[Part], tables: Sequence[pd.DataFrame], resamples: Resamples) -> dict[str, Any]:
    table = pd.concat(tables, ignore_index=True)
    corrected = _corrected(parts, tables, table, resamples)
    return {
        "reliability": corrected.reliability.as_dict(),
        "corrected": corrected.spearman.as_dict(),
        "partial_corrected": corrected.partial.as_dict(),
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
    if any(one.n == 0 for one in halves):  # the verdicts are not at hand
        return Corrected(UNKNOWN, UNKNOWN, UNKNOWN)
    whole = Halves(np.concatenate([one.scores for one in halves], axis=2))
    score, similarity, frequency = (table[c].to_numpy(float) for c in ("score", "similarity", "frequency"))
    return corrected_spearman(score, similarity, frequency, whole, resamples)


def matched_difference(score: Floats, shared: Bools, frequency: Floats, resamples: Resamples) -> dict[str, Any]:
    """The mean score of shared latents less that of unshared ones; plainly, and among those that fire equally often.

    For the latter, the difference is taken within quantiles of the frequency. One in which all latents are shared, or
    none is, has nothing to compare and takes no part; the weights are those of the least variance.

    Args:
        score: [N]
        shared: [N] whether each latent is shared with any other run.
        frequency: [N] what is to be equal, such as the log of the firing frequency.
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
    return {
        "plain": plain.as_dict(),
        "matched": matched.as_dict(),
        "n_shared": int(shared.sum()),
        "n_unshared": int((~shared).sum()),
        "n_matched": int(np.isin(strata, usable).sum()),
    }
