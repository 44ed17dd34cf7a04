"""How much of a dictionary comes back when it is trained again, over any number of runs.

Several definitions of a *shared* latent circulate and differ by tens of points, so all are computed and every number
says which it uses. With partners from the two one-to-one matchings (encoder and decoder) and a threshold t = 0.7:

    strict    both matchings pick the same partner, and both cosines exceed t   (the paper's formal rule)
    both      the matched encoder cosine and the matched decoder cosine exceed t, each under its own matching
    decoder   the matched decoder cosine exceeds t
    lenient   both matchings pick the same partner, whatever the cosine

(Paulo & Belrose, arXiv 2501.16615.) A latent is an *anchor* when the question is asked of it: does it come back in the
other runs? Whether its partner there is alive is not asked, as in the definitions above; fractions are taken over alive
anchors, and over all. A fraction is averaged over the anchors of a run, then over runs: each run weighs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import comb, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from sae.alignment.bootstrap import INTERVALS, Bools, Floats, LatentBootstrap, Tables, estimate, mean_over
from sae.alignment.dip import Dip
from sae.alignment.nulls import read_nulls
from sae.alignment.similarity import bimodality, by_pair, histogram, spread
from sae.common.commands import shell_command
from sae.common.errors import BadInput, NotFound
from sae.common.estimate import UNKNOWN, Estimate

DIPS = "dips.json"
"""The name of the file that keeps dip tests, among a root's alignments."""

DEFINITIONS: dict[str, str] = {
    "strict": "encoder and decoder matchings pick the same partner, and both cosines exceed the threshold",
    "both": "matched encoder cosine and matched decoder cosine exceed the threshold, each under its own matching",
    "decoder": "matched decoder cosine exceeds the threshold",
    "lenient": "encoder and decoder matchings pick the same partner, whatever the cosine",
}


@dataclass(frozen=True)
class Overlap:
    """One definition over one population (alive anchors, or all). Lists over n hold n = 1 … S, S the number of runs.

    Attributes:
        value: fraction of latents shared by two runs, the mean over ordered pairs.
        pairs: "a--b" → the mean of the two directions.
        only_one: over all sets of n runs, the fraction of anchors shared with none of the other n - 1.
        all_of_n: over all sets of n runs, the fraction of anchors shared with every one of the other n - 1.
        exactly_n: the fraction of anchors found in exactly n of the S runs, their own included.
        retained: of latents shared with one run, the fraction shared with a further run (NaN for two runs).
        regions: run → the run's anchors split by the set of other runs that share them, as (others, fraction), the
            largest first: the segments of a donut or an upset plot.
    """

    value: Estimate
    pairs: dict[str, Estimate]
    only_one: list[Estimate]
    all_of_n: list[Estimate]
    exactly_n: list[Estimate]
    retained: Estimate
    regions: dict[str, list[tuple[tuple[str, ...], float]]]

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.value.as_dict(),
            "pairs": {pair: found.as_dict() for pair, found in self.pairs.items()},
            "only_one": [found.as_dict() for found in self.only_one],
            "all_of_n": [found.as_dict() for found in self.all_of_n],
            "exactly_n": [found.as_dict() for found in self.exactly_n],
            "retained": self.retained.as_dict(),
            "regions": {
                run: [{"shared_with": list(others), "fraction": fraction} for others, fraction in split]
                for run, split in self.regions.items()
            },
        }


@dataclass(frozen=True)
class StudyOverlap:
    """What the runs of a study share: every definition, over alive anchors and over all, and how alike partners are.

    ``mean_encoder`` and ``mean_decoder`` are means of matched cosines (the decoder's is PW-MCC, arXiv 2505.20254, of
    which ``pw_mcc_sd`` is the standard deviation over pairs of runs, NaN for one pair), ``max_cosine`` the fraction of
    alive anchors whose nearest encoder row and nearest decoder row, taken or not, are both above the threshold;
    ``mean_max_encoder`` and ``mean_max_decoder`` are means of the cosines with these. ``by_pair`` has the same figures
    of each pair of runs: figure → "a--b" → the mean of the two directions.
    ``histogram`` and ``bimodality``, the dip test of each pair's mean matched cosines, show whether these have two
    modes. ``nulls`` has all of it again, without intervals, for what shares nothing (:mod:`sae.alignment.nulls`), where
    the pairs were aligned with that: one draw for each pair of runs, so that the figures of the pairs show how a null
    spreads. ``sweep`` has what is shared at thresholds from 0 to 1: see :func:`threshold_sweep`.
    """

    runs: list[str]
    threshold: float
    n_latents: dict[str, int]
    n_alive: dict[str, int]
    alive: dict[str, Overlap]
    all: dict[str, Overlap]
    mean_encoder: Estimate
    mean_decoder: Estimate
    mean_max_encoder: Estimate
    mean_max_decoder: Estimate
    pw_mcc_sd: float
    max_cosine: Estimate
    by_pair: dict[str, dict[str, float]]
    histogram: dict[str, Any]
    bimodality: Dip
    sweep: pd.DataFrame = field(compare=False)
    nulls: dict[str, StudyOverlap]

    @property
    def same_partner(self) -> Estimate:
        """Fraction of alive anchors whose two matchings agree: another name for the lenient overlap."""
        return self.alive["lenient"].value

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values.

        ``histogram``: 40 bins of 0.05 from -1 to 1 with the counts of alive anchors by matched ``encoder`` cosine,
        ``decoder`` cosine, and the mean of the two where the matchings ``agree`` and where they ``differ``, with the
        means of these.
        """
        return {
            "runs": self.runs,
            "threshold": self.threshold,
            "definitions": DEFINITIONS,
            "intervals": INTERVALS,
            "n_latents": self.n_latents,
            "n_alive": self.n_alive,
            "alive": {name: found.as_dict() for name, found in self.alive.items()},
            "all": {name: found.as_dict() for name, found in self.all.items()},
            "same_partner": self.same_partner.as_dict(),
            "max_cosine": self.max_cosine.as_dict(),
            "mean_encoder": self.mean_encoder.as_dict(),
            "mean_decoder": self.mean_decoder.as_dict(),
            "mean_max_encoder": self.mean_max_encoder.as_dict(),
            "mean_max_decoder": self.mean_max_decoder.as_dict(),
            "by_pair": self.by_pair,
            "pw_mcc_sd": None if isnan(self.pw_mcc_sd) else self.pw_mcc_sd,
            "histogram": self.histogram,
            "bimodality": {
                "statistic": "Hartigan's dip of the mean of matched encoder and decoder cosine; mean over pairs",
                **self.bimodality.value.as_dict(),
                "of_sample": None if isnan(self.bimodality.of_sample) else self.bimodality.of_sample,
                "p_value": None if isnan(self.bimodality.p_value) else self.bimodality.p_value,
            },
            "sweep": {column: _or_none(values) for column, values in self.sweep.items()},
            "nulls": {name: found.as_dict() for name, found in self.nulls.items()},
        }


def shared(table: pd.DataFrame, definition: str, threshold: float = 0.7) -> Bools:
    """Which latents [M] of one run are shared with another, from their alignment as seen from the first.

    A latent without a partner is not shared; a cosine exactly at the threshold does not exceed it.
    """
    return reach(table, definition) > threshold


def reach(table: pd.DataFrame, definition: str) -> Floats:
    """The threshold [M] below which a latent is shared: -inf if at none, inf if at any, NaN if it has no partner."""
    encoder, decoder = (table[f"{space}_cosine"].to_numpy(float) for space in ("encoder", "decoder"))
    partner = table["encoder_partner"].to_numpy()
    same = (partner == table["decoder_partner"].to_numpy()) & (partner >= 0)
    if definition == "strict":
        return np.where(same, np.minimum(encoder, decoder), -np.inf)
    if definition == "both":
        return np.minimum(encoder, decoder)
    if definition == "decoder":
        return decoder
    if definition == "lenient":
        return np.where(same, np.inf, -np.inf)
    raise BadInput(f"no definition of shared is called {definition!r}; there are {', '.join(DEFINITIONS)}")


def overlap(
    runs: Sequence[str],
    alignments: Tables,
    alive: Mapping[str, Bools],
    threshold: float = 0.7,
    resamples: int = 1000,
    seed: int = 0,
    kept: Path | None = None,
) -> StudyOverlap:
    """Everything that a study says about how far its S dictionaries overlap.

    Args:
        runs: at least two names.
        alignments: (x, y) → the table of x in terms of y, for every ordered pair (``alignment.both_ways``).
        alive: run → [M] whether the latent ever fired.
        threshold: what both or either cosine must exceed.
        resamples, seed: of the bootstrap.
        kept: the file that keeps dip tests, which take as long as all the rest
            (:func:`sae.alignment.dip.kept_dip_test`).
    """
    alive = {run: np.asarray(alive[run], dtype=bool) for run in runs}
    check(runs, alignments, alive)
    nulls = {
        null: _overlap_of(runs, tables, alive, threshold, LatentBootstrap(runs, tables, 0, seed), True, kept)
        for null, tables in read_nulls(runs, alignments).items()
    }
    draw = LatentBootstrap(runs, alignments, resamples, seed)
    return replace(_overlap_of(runs, alignments, alive, threshold, draw, False, kept), nulls=nulls)


def _overlap_of(
    runs: Sequence[str],
    alignments: Tables,
    alive: Mapping[str, Bools],
    threshold: float,
    draw: LatentBootstrap,
    is_null: bool,
    kept: Path | None,
) -> StudyOverlap:
    populations = {"alive": alive, "all": {run: np.ones(len(alive[run]), bool) for run in runs}}
    pairs = _pairs(runs, alignments, populations, threshold, draw)
    found: dict[str, dict[str, Overlap]] = {
        population: {
            definition: _overlap(
                runs,
                _shared_with(runs, alignments, definition, threshold),
                members,
                draw,
                {pair: told[population, definition] for pair, told in pairs.items()},
            )
            for definition in DEFINITIONS
        }
        for population, members in populations.items()
    }

    def nearest_above(table: pd.DataFrame) -> Floats:
        cosines = table[["max_encoder_cosine", "max_decoder_cosine"]].to_numpy(float)
        return (cosines.min(axis=1) > threshold).astype(float)

    figures: dict[str, Callable[[pd.DataFrame], Floats]] = {
        "mean_encoder": lambda table: table["encoder_cosine"].to_numpy(float),
        "mean_decoder": lambda table: table["decoder_cosine"].to_numpy(float),
        "mean_max_encoder": lambda table: table["max_encoder_cosine"].to_numpy(float),
        "mean_max_decoder": lambda table: table["max_decoder_cosine"].to_numpy(float),
        "max_cosine": nearest_above,
    }
    means = {
        name: _pairwise_mean(runs, alignments, alive, draw, values, is_fraction=name == "max_cosine")
        for name, values in figures.items()
    }
    of_pairs = {name: by_pair(runs, alignments, alive, values) for name, values in figures.items()}
    return StudyOverlap(
        runs=list(runs),
        threshold=threshold,
        n_latents={run: len(alive[run]) for run in runs},
        n_alive={run: int(alive[run].sum()) for run in runs},
        alive=found["alive"],
        all=found["all"],
        **means,
        pw_mcc_sd=spread(of_pairs["mean_decoder"]),
        by_pair=of_pairs,
        histogram=histogram(runs, alignments, alive),
        bimodality=bimodality(runs, alignments, alive, draw.unit, draw=not is_null, kept=kept),
        sweep=threshold_sweep(runs, alignments, alive),
        nulls={},
    )


def threshold_sweep(
    runs: Sequence[str], alignments: Tables, alive: Mapping[str, Bools], thresholds: ArrayLike | None = None
) -> pd.DataFrame:
    """The overlap of alive anchors as the threshold moves: ``threshold`` and a column per definition (no intervals).

    The default thresholds are 0, 0.02, … 1. ``lenient`` does not depend on the threshold and is a flat line.
    """
    at = np.round(np.linspace(0, 1, 51), 2) if thresholds is None else np.asarray(thresholds, dtype=float)
    columns: dict[str, Any] = {"threshold": at}
    for definition in DEFINITIONS:
        of_run = [
            np.mean(
                [_share_above(reach(alignments[a, b], definition)[alive[a]], at) for b in runs if b != a],
                axis=0,
            )
            for a in runs
            if np.any(alive[a])
        ]
        columns[definition] = np.mean(of_run, axis=0) if of_run else np.full(len(at), nan)
    return pd.DataFrame(columns)


def _share_above(values: Floats, at: Floats) -> Floats:
    """What share of ``values`` [n] exceeds each of ``at``; NaN exceeds nothing."""
    known = np.sort(values[~np.isnan(values)])
    return 1 - (np.searchsorted(known, at, side="right") + len(values) - len(known)) / len(values)


def _or_none(values: pd.Series) -> list[float | None]:
    return [None if isnan(x) else float(x) for x in values]


def check(runs: Sequence[str], alignments: Tables, alive: Mapping[str, Bools]) -> None:
    """Raise in one line where there are not two runs, or no alignment of theirs, or one of other widths."""
    if len(set(runs)) < 2 or len(set(runs)) < len(runs):
        raise BadInput(f"overlap needs two or more different runs, not {', '.join(map(repr, runs)) or 'none'}")
    for run, members in alive.items():
        for other in (x for x in runs if x != run):
            if (run, other) not in alignments:
                raise NotFound(f"{run!r} and {other!r} are not aligned yet; run `{shell_command('align', run, other)}`")
            if len(alignments[run, other]) != len(members):
                raise BadInput(
                    f"{run!r} has {len(members)} latents, but {len(alignments[run, other])} in its alignment with "
                    f"{other!r}; run `{shell_command('align', run, other)}`"
                )


def _shared_with(runs: Sequence[str], alignments: Tables, definition: str, threshold: float) -> dict[str, Bools]:
    """run → [M, S - 1] whether each other run, in order, shares the latent."""
    return {
        run: np.stack([shared(alignments[run, other], definition, threshold) for other in runs if other != run], axis=1)
        for run in runs
    }


_DIGITS = 12
"""To which fractions are rounded, so that a whole is 1 and not the float below it."""


def _pairs(
    runs: Sequence[str],
    alignments: Tables,
    populations: Mapping[str, Mapping[str, Bools]],
    threshold: float,
    draw: LatentBootstrap,
) -> dict[str, dict[tuple[str, str], Estimate]]:
    """``a--b`` → (population, definition) → the fraction that the two share, the mean of both directions.

    Each pair is resampled by its own partners. In the units of the study a latent that two runs share and the widest
    does not would be two, and the interval too narrow.
    """
    found: dict[str, dict[tuple[str, str], Estimate]] = {}
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            own = LatentBootstrap([a, b], alignments, len(draw.weights), draw.seed)
            told: dict[tuple[str, str], Estimate] = {}
            for definition in DEFINITIONS:
                shares = _shared_with([a, b], alignments, definition, threshold)
                for population, members in populations.items():
                    fraction = mean_over(own.fractions(shares, members)[:, :, 0], axis=1)
                    told[population, definition] = estimate(np.round(fraction, _DIGITS), own.count(members))
            found[f"{a}--{b}"] = told
    return found


def _overlap(
    runs: Sequence[str],
    shares: Mapping[str, Bools],
    members: Mapping[str, Bools],
    draw: LatentBootstrap,
    pairs: Mapping[str, Estimate],
) -> Overlap:
    """Every figure of one definition from which runs share which anchors.

    How many of its S - 1 siblings share an anchor, s, decides its part in all the figures over n: of the sets of n runs
    that hold the anchor's own, C(S - 1 - s, n - 1) of C(S - 1, n - 1) hold no other that shares it, and C(s, n - 1)
    hold only others that do. So the figures are weighted sums of the distribution of s; nothing is enumerated.
    """
    n_others = len(runs) - 1
    counts = np.arange(n_others + 1)
    indicators = {run: shares[run].sum(axis=1)[:, None] == counts for run in runs}
    spread = mean_over(draw.fractions(indicators, members), axis=1)  # [resamples + 1, S]; the first row is the sample
    units = draw.count(members)

    def weighted(weights: ArrayLike) -> Estimate:
        # What is 1 whatever is shared, is so for certain.
        of = np.asarray(weights, dtype=float)
        return estimate(np.round(spread @ of, _DIGITS), units if np.ptp(of) else None)

    def share_of_sets(kind: Callable[[int, int], int], n: int) -> Estimate:
        return weighted([kind(int(s), n - 1) / comb(n_others, n - 1) for s in counts])

    sets = range(1, n_others + 2)
    with np.errstate(invalid="ignore"):
        retained = (spread @ (counts * (counts - 1.0))) / ((n_others - 1) * (spread @ counts)) if n_others > 1 else None
    held = {run: members[run] & shares[run].any(axis=1) for run in runs}
    return Overlap(
        value=weighted(counts / n_others),
        pairs=dict(pairs),
        only_one=[share_of_sets(lambda s, others: comb(n_others - s, others), n) for n in sets],
        all_of_n=[share_of_sets(comb, n) for n in sets],
        exactly_n=[weighted(counts == n - 1) for n in sets],
        retained=UNKNOWN if retained is None else estimate(np.round(retained, _DIGITS), draw.count(held)),
        regions={run: _regions(run, runs, shares[run][members[run]]) for run in runs},
    )


def _regions(run: str, runs: Sequence[str], shares: Bools) -> list[tuple[tuple[str, ...], float]]:
    if not len(shares):
        return []
    others = [other for other in runs if other != run]
    patterns, counts = np.unique(shares, axis=0, return_counts=True)
    split = [
        (tuple(other for other, held in zip(others, pattern, strict=True) if held), float(count / len(shares)))
        for pattern, count in zip(patterns, counts, strict=True)
    ]
    return sorted(split, key=lambda part: (-part[1], part[0]))


def _pairwise_mean(
    runs: Sequence[str],
    alignments: Tables,
    members: Mapping[str, Bools],
    draw: LatentBootstrap,
    values: Callable[[pd.DataFrame], Floats],
    is_fraction: bool,
) -> Estimate:
    """The mean over ordered pairs of the mean over the anchors that have a value (NaN: no partner)."""
    of_run = []
    for k in range(len(runs) - 1):
        table = {run: values(alignments[run, [x for x in runs if x != run][k]]) for run in runs}
        known = {run: members[run] & ~np.isnan(table[run]) for run in runs}
        of_run.append(draw.fractions({run: np.nan_to_num(table[run])[:, None] for run in runs}, known)[:, :, 0])
    units = draw.count(members) if is_fraction else None
    return estimate(mean_over(np.concatenate(of_run, axis=1), axis=1), units)
