"""Measure how much of a dictionary comes back when it is trained again, over any number of runs.

Definitions of a *shared* latent (:data:`DEFINITIONS`; Paulo & Belrose, arXiv 2501.16615) differ by tens of points, so
all in use are computed. They use the partners of the two one-to-one matchings, by encoder and by decoder.

An *anchor* is a latent that is searched for in the other runs; its partner may be dead. Fractions are of alive anchors,
and of all, averaged over the anchors of a run, then over runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations
from math import comb, isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from sae.alignment.bootstrap import Bools, Floats, LatentBootstrap, Tables, estimate, mean_over
from sae.alignment.dip import Dip, read_dip_test, run_dip_test
from sae.alignment.nulls import ROTATED, read_null, read_nulls
from sae.common.commands import shell_command
from sae.common.errors import BadInput, NotFound
from sae.common.estimate import UNKNOWN, Estimate

DIPS = "dips.json"  # The name of the file that keeps dip tests, among a root's alignments.

DEFINITIONS: dict[str, str] = {  # strict is the paper's formal rule
    "strict": "encoder and decoder matchings pick the same partner, and both cosines exceed the threshold",
    "both": "matched encoder cosine and matched decoder cosine exceed the threshold, each under its own matching",
    "decoder": "matched decoder cosine exceeds the threshold",
    "lenient": "encoder and decoder matchings pick the same partner, whatever the cosine",
}
EDGES = np.round(np.linspace(-1, 1, 41), 2)
_MEANS = {
    **{f"mean_{space}": f"{space}_cosine" for space in ("encoder", "decoder")},
    **{f"mean_max_{space}": f"max_{space}_cosine" for space in ("encoder", "decoder")},
}  # figure → column of an alignment's table
_ALIGNED = (
    *("encoder_partner", "encoder_cosine", "decoder_partner", "decoder_cosine"),
    *("max_encoder_neighbor", "max_encoder_cosine", "max_decoder_neighbor", "max_decoder_cosine"),
)

CLASSES = ("one", "some", "all")  # the SAEs of a study that have a latent: its own alone, also some others, or all
_DIGITS = 12  # to which fractions are rounded, so that a whole is 1 and not the float below it


class Region(NamedTuple):
    """The anchors of a run that exactly these other runs share."""

    shared_with: tuple[str, ...]
    fraction: float


@dataclass(frozen=True)
class Overlap:
    """One definition over one population (alive anchors, or all). Lists over n hold n = 1 … S."""

    value: Estimate  # fraction of latents shared by two runs, the mean over ordered pairs
    pairs: dict[str, Estimate]  # of each pair, as "a--b": the mean of the two directions
    only_one: list[Estimate]  # over all sets of n runs, the fraction of anchors shared with none of the other n - 1
    all_of_n: list[Estimate]  # over all sets of n runs, the fraction of anchors shared with each of the other n - 1
    exactly_n: list[Estimate]  # the fraction of anchors found in exactly n of the S runs, their own included
    retained: Estimate  # of latents shared with one run, the fraction shared with a further run; NaN for two runs
    regions: dict[str, list[Region]]  # run → its anchors by the set of other runs that share them, the largest first


@dataclass(frozen=True)
class StudyOverlap:
    """The overlap of the runs of a study by every definition, and the similarity of partners."""

    runs: list[str]
    threshold: float
    n_latents: dict[str, int]
    n_alive: dict[str, int]
    alive: dict[str, Overlap]
    all: dict[str, Overlap]
    mean_encoder: Estimate  # mean matched cosine
    mean_decoder: Estimate  # the same of decoders: PW-MCC (arXiv 2505.20254)
    mean_max_encoder: Estimate  # mean cosine with the nearest, matched or not
    mean_max_decoder: Estimate
    pw_mcc_sd: float  # the standard deviation of PW-MCC over pairs of runs; NaN for one pair
    max_cosine: Estimate  # fraction of alive anchors whose nearest rows both exceed the threshold
    by_pair: dict[str, dict[str, float]]  # figure → "a--b" → the mean of the two directions
    histogram: dict[str, Any]  # 40 bins, -1 to 1: ``encoder``, ``decoder``; their mean where they ``agree``, ``differ``
    bimodality: Dip  # the dip test of each pair's mean matched cosines
    sweep: pd.DataFrame = field(compare=False)  # see :func:`sweep_thresholds`
    nulls: dict[str, StudyOverlap]  # with rotated siblings, without intervals, if all pairs have them

    @property
    def same_partner(self) -> Estimate:
        return self.alive["lenient"].value


def compute_similarity(table: pd.DataFrame) -> Floats:
    """Return the mean of matched encoder and decoder cosine of each latent [M], NaN without partner."""
    return (table["encoder_cosine"].to_numpy(float) + table["decoder_cosine"].to_numpy(float)) / 2


def find_shared(table: pd.DataFrame, definition: str, threshold: float = 0.7) -> Bools:
    """Return which latents [M] of one run are shared with another: cosines must exceed the threshold, not equal it."""
    return compute_reach(table, definition) > threshold


def compute_reach(table: pd.DataFrame, definition: str) -> Floats:
    """Return the threshold [M] below which a latent is shared: -inf for none, inf for any, NaN without partner."""
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


def measure_overlap(
    runs: Sequence[str],
    alignments: Tables,
    alive: Mapping[str, Bools],
    threshold: float = 0.7,
    resamples: int = 1000,
    seed: int = 0,
    kept: Path | None = None,
) -> StudyOverlap:
    """Compute every figure of how far the S dictionaries of a study overlap.

    Args:
        alignments: (x, y) → the table of x in terms of y, for every ordered pair (``alignment.read_both_ways``).
        alive: run → [M] whether the latent ever fired.
        threshold: that cosines must exceed.
        resamples, seed: of the bootstrap.
        kept: the file that caches dip tests, half of the time (:func:`sae.alignment.dip.read_dip_test`).
    """
    alive = {run: np.asarray(alive[run], dtype=bool) for run in runs}
    check_aligned(runs, alignments, alive)

    def measure(tables: Tables, resamples: int) -> StudyOverlap:
        draw = LatentBootstrap(runs, tables, resamples, seed)
        return _measure(_Aligned(list(runs), tables, alive, threshold, draw), kept)

    nulls = {null: measure(tables, 0) for null, tables in read_nulls(runs, alignments).items()}
    return replace(measure(alignments, resamples), nulls=nulls)


class _Aligned(NamedTuple):
    """The aligned runs of a study."""

    runs: list[str]
    tables: Tables
    alive: dict[str, Bools]
    threshold: float
    draw: LatentBootstrap


def _measure(study: _Aligned, kept: Path | None) -> StudyOverlap:
    runs, alive = study.runs, study.alive
    populations = {"alive": alive, "all": {run: np.ones(len(of), bool) for run, of in alive.items()}}
    pairs = _estimate_pairs(study, populations)
    shares = {name: _find_sharing(runs, study.tables, name, study.threshold) for name in DEFINITIONS}
    found: dict[str, dict[str, Overlap]] = {
        population: {
            name: _overlap(study, shares[name], members, {pair: of[population, name] for pair, of in pairs.items()})
            for name in DEFINITIONS
        }
        for population, members in populations.items()
    }
    values = {pair: _figures(study.tables[pair], study.threshold) for pair in permutations(runs, 2)}
    figures = {name: {pair: of[name] for pair, of in values.items()} for name in (*_MEANS, "max_cosine")}
    by_pair = {name: _average_pairs(study, of) for name, of in figures.items()}
    pw_mcc = list(by_pair["mean_decoder"].values())
    return StudyOverlap(
        runs=runs,
        threshold=study.threshold,
        n_latents={run: len(alive[run]) for run in runs},
        n_alive={run: int(alive[run].sum()) for run in runs},
        alive=found["alive"],
        all=found["all"],
        **{name: _average_anchors(study, of, is_fraction=name == "max_cosine") for name, of in figures.items()},
        pw_mcc_sd=float(np.std(pw_mcc, ddof=1)) if len(pw_mcc) > 1 else nan,
        by_pair=by_pair,
        histogram=_histogram(study),
        bimodality=_test_bimodality(study, kept),
        sweep=sweep_thresholds(runs, study.tables, alive),
        nulls={},
    )


def _figures(table: pd.DataFrame, threshold: float) -> dict[str, Floats]:
    """Return the values of each latent [M] whose means are reported; NaN without partner."""
    found = {name: table[column].to_numpy(float) for name, column in _MEANS.items()}
    nearest = np.minimum(found["mean_max_encoder"], found["mean_max_decoder"])
    return {**found, "max_cosine": (nearest > threshold).astype(float)}


def sweep_thresholds(runs: Sequence[str], alignments: Tables, alive: Mapping[str, Bools]) -> pd.DataFrame:
    """Return the overlap of alive anchors at each threshold (0, 0.02, … 1), a column per definition."""
    at = np.round(np.linspace(0, 1, 51), 2)
    columns: dict[str, Any] = {"threshold": at}
    for definition in DEFINITIONS:
        of_run = [
            np.mean(
                [_share_above(compute_reach(alignments[a, b], definition)[alive[a]], at) for b in runs if b != a],
                axis=0,
            )
            for a in runs
            if np.any(alive[a])
        ]
        columns[definition] = np.mean(of_run, axis=0) if of_run else np.full(len(at), nan)
    return pd.DataFrame(columns)


def _share_above(values: Floats, at: Floats) -> Floats:
    """Return the share of ``values`` [n] that exceeds each of ``at``; NaN exceeds nothing."""
    known = np.sort(values[~np.isnan(values)])
    return 1 - (np.searchsorted(known, at, side="right") + len(values) - len(known)) / len(values)


def check_aligned(runs: Sequence[str], alignments: Tables, alive: Mapping[str, Bools]) -> None:
    """Raise unless there are two runs, all pairs are aligned, and widths match."""
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


def _find_sharing(runs: Sequence[str], alignments: Tables, definition: str, threshold: float) -> dict[str, Bools]:
    """Return run → [M, S - 1] whether each other run, in order, shares the latent."""
    return {
        run: np.stack(
            [find_shared(alignments[run, other], definition, threshold) for other in runs if other != run], axis=1
        )
        for run in runs
    }


def _estimate_pairs(
    study: _Aligned, populations: Mapping[str, Mapping[str, Bools]]
) -> dict[str, dict[tuple[str, str], Estimate]]:
    """Return ``a--b`` → (population, definition) → the fraction that the two share, the mean of both directions.

    Each pair is resampled by its own partners: the study's units would make its interval too narrow.
    """
    found: dict[str, dict[tuple[str, str], Estimate]] = {}
    for a, b in combinations(study.runs, 2):
        own = LatentBootstrap([a, b], study.tables, len(study.draw.weights), study.draw.seed)
        of_pair = found[f"{a}--{b}"] = {}
        for definition in DEFINITIONS:
            shares = _find_sharing([a, b], study.tables, definition, study.threshold)
            for population, members in populations.items():
                fraction = mean_over(own.fractions(shares, members)[:, :, 0], axis=1)
                of_pair[population, definition] = estimate(np.round(fraction, _DIGITS), own.count(members))
    return found


def _overlap(
    study: _Aligned, shares: Mapping[str, Bools], members: Mapping[str, Bools], pairs: dict[str, Estimate]
) -> Overlap:
    """Compute every figure of one definition from which runs share which anchors.

    Everything follows from s, the number of the S - 1 siblings that share an anchor: of the C(S - 1, n - 1) sets of n
    runs with the anchor's own, C(S - 1 - s, n - 1) hold no other run that shares it, and C(s, n - 1) only such runs. So
    the figures are weighted sums of the distribution of s.
    """
    runs, draw, n_others = study.runs, study.draw, len(study.runs) - 1
    counts = np.arange(n_others + 1)
    indicators = {run: shares[run].sum(axis=1)[:, None] == counts for run in runs}
    spread = mean_over(draw.fractions(indicators, members), axis=1)  # [resamples + 1, S]; the first row is the sample
    units = draw.count(members)

    def weighted(weights: ArrayLike) -> Estimate:
        of = np.asarray(weights, dtype=float)
        return estimate(np.round(spread @ of, _DIGITS), units if np.ptp(of) else None)  # equal weights: 1 for certain

    def share_of_sets(kind: Callable[[int, int], int], n: int) -> Estimate:
        return weighted([kind(int(s), n - 1) / comb(n_others, n - 1) for s in counts])

    sets = range(1, n_others + 2)
    with np.errstate(invalid="ignore"):
        retained = (spread @ (counts * (counts - 1.0))) / ((n_others - 1) * (spread @ counts)) if n_others > 1 else None
    held = {run: members[run] & shares[run].any(axis=1) for run in runs}
    return Overlap(
        value=weighted(counts / n_others),
        pairs=pairs,
        only_one=[share_of_sets(lambda s, others: comb(n_others - s, others), n) for n in sets],
        all_of_n=[share_of_sets(comb, n) for n in sets],
        exactly_n=[weighted(counts == n - 1) for n in sets],
        retained=UNKNOWN if retained is None else estimate(np.round(retained, _DIGITS), draw.count(held)),
        regions={run: _regions([x for x in runs if x != run], shares[run][members[run]]) for run in runs},
    )


def _regions(others: Sequence[str], shares: Bools) -> list[Region]:
    if not len(shares):
        return []
    patterns, counts = np.unique(shares, axis=0, return_counts=True)
    split = [
        Region(tuple(other for other, held in zip(others, pattern, strict=True) if held), float(count / len(shares)))
        for pattern, count in zip(patterns, counts, strict=True)
    ]
    return sorted(split, key=lambda part: (-part.fraction, part.shared_with))


def _average_anchors(study: _Aligned, values: Mapping[tuple[str, str], Floats], is_fraction: bool) -> Estimate:
    """Return the mean over ordered pairs of the mean over the alive anchors that have a value (NaN: no partner)."""
    of_run, runs = [], study.runs
    for k in range(len(runs) - 1):
        of = {run: values[run, [x for x in runs if x != run][k]] for run in runs}
        known = {run: study.alive[run] & ~np.isnan(of[run]) for run in runs}
        columns = {run: np.nan_to_num(of[run])[:, None] for run in runs}
        of_run.append(study.draw.fractions(columns, known)[:, :, 0])
    units = study.draw.count(study.alive) if is_fraction else None
    return estimate(mean_over(np.concatenate(of_run, axis=1), axis=1), units)


def _histogram(study: _Aligned) -> dict[str, Any]:
    anchors = [study.tables[a, b][study.alive[a]] for a, b in permutations(study.runs, 2)]
    table = pd.concat(anchors, ignore_index=True)
    table = table[(table["encoder_partner"] >= 0) & (table["decoder_partner"] >= 0)]
    agree = (table["encoder_partner"] == table["decoder_partner"]).to_numpy()
    alike = compute_similarity(table)
    values = {
        "encoder": table["encoder_cosine"].to_numpy(float),
        "decoder": table["decoder_cosine"].to_numpy(float),
        "agree": alike[agree],
        "differ": alike[~agree],
    }
    return {
        "edges": EDGES.tolist(),
        **{name: np.histogram(np.clip(of, -1, 1), EDGES)[0].tolist() for name, of in values.items()},
        **{f"mean_{name}": float(of.mean()) if len(of) else None for name, of in list(values.items())[2:]},
    }


def _test_bimodality(study: _Aligned, kept: Path | None) -> Dip:
    """Return the dip test of the similarities of each ordered pair's alive anchors; ``kept`` caches results."""
    samples, units, draw = [], [], len(study.draw.weights) > 0
    for a, b in permutations(study.runs, 2):
        alike = compute_similarity(study.tables[a, b])
        known = study.alive[a] & ~np.isnan(alike)
        samples.append(alike[known])
        units.append(study.draw.unit[a][known])
    return run_dip_test(samples, units, draw=draw) if kept is None else read_dip_test(kept, samples, units, draw)


def _average_pairs(study: _Aligned, values: Mapping[tuple[str, str], Floats]) -> dict[str, float]:
    """Return "a--b" → the mean of both directions of the mean of ``values`` [M] over alive anchors, if any."""
    found = {}
    for a, b in combinations(study.runs, 2):
        both = [values[pair][study.alive[pair[0]]] for pair in ((a, b), (b, a))]
        known = [of[~np.isnan(of)] for of in both]
        if all(map(len, known)):
            found[f"{a}--{b}"] = float(np.mean([of.mean() for of in known]))
    return found


def find_range(of: Mapping[Any, float | None]) -> list[float] | None:
    """Return the least and the largest over pairs; ``None`` for fewer than two."""
    known = [value for value in of.values() if value is not None and not isnan(value)]
    return [min(known), max(known)] if len(known) > 1 else None


def classify_sharing(n_shared: ArrayLike, n_others: int) -> NDArray[np.str_]:
    """Return the class (:data:`CLASSES`) of latents that ``n_shared`` of ``n_others`` other runs share."""
    n = np.asarray(n_shared)
    return np.select([n == 0, n == n_others], [CLASSES[0], CLASSES[2]], default=CLASSES[1])


def build_latent_table(
    run: str,
    runs: Sequence[str],
    alignments: Tables,
    alive: Bools,
    threshold: float = 0.7,
    behaviour: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Return one row per latent of ``run``.

    The columns, with X for every other run, are ``latent``; the alignment's, such as ``encoder_partner__X``; those of
    :class:`sae.alignment.behaviour.Behaviour` for the runs in ``behaviour``, such as ``jaccard__X``;
    ``shared_<definition>__X``;

    - ``n_shared_<definition>``, the number of other runs that share it, and ``stability_<definition>``, their share;
    - ``similarity``, the mean of (encoder cosine + decoder cosine) / 2 with its partners in the other runs;
    - the last three with rotated siblings, as ``n_shared_strict__rotated``, if all were aligned with those;
    - ``unshared``: alive and strict-shared with none; ``shared_class`` under strict: ``all``, ``some`` or ``one`` (its
      own alone), missing for a dead latent.
    """
    others = [other for other in runs if other != run]
    alive = np.asarray(alive, dtype=bool)
    check_aligned([run, *others], alignments, {run: alive})
    columns: dict[str, Any] = {"latent": np.arange(len(alive))}
    for other in others:
        table = alignments[run, other]
        columns |= {f"{name}__{other}": table[name].to_numpy() for name in _ALIGNED if name in table}
        for definition in DEFINITIONS:
            columns[f"shared_{definition}__{other}"] = find_shared(table, definition, threshold)
        done = (behaviour or {}).get(other)
        if done is not None:
            columns |= {
                f"{name}__{other}": done[name].to_numpy() for name in done if name not in ("latent", "n_firings")
            }
    columns |= _over_runs([alignments[run, other] for other in others], threshold)
    of_null = [null for other in others if (null := read_null(alignments[run, other])) is not None]
    if len(of_null) == len(others):
        columns |= {f"{name}__{ROTATED}": values for name, values in _over_runs(of_null, threshold).items()}
    n = columns["n_shared_strict"]
    columns["unshared"] = alive & (n == 0)
    columns["shared_class"] = classify_sharing(n, len(others)).astype(object)
    columns["shared_class"][~alive] = None
    return pd.DataFrame(columns)


def _over_runs(tables: Sequence[pd.DataFrame], threshold: float) -> dict[str, NDArray[Any]]:
    """Return the columns [M] of how many other runs share each latent, and how similar its partners are."""
    columns: dict[str, NDArray[Any]] = {}
    for definition in DEFINITIONS:
        per_run = [find_shared(table, definition, threshold) for table in tables]
        columns[f"n_shared_{definition}"] = np.sum(per_run, axis=0).astype(np.int32)
        columns[f"stability_{definition}"] = np.asarray(np.mean(per_run, axis=0), dtype=np.float32)
    alike = np.stack([compute_similarity(table) for table in tables])
    partnered = ~np.isnan(alike)
    with np.errstate(invalid="ignore"):
        mean = np.where(partnered, alike, 0).sum(axis=0) / partnered.sum(axis=0)
    columns["similarity"] = np.asarray(mean, dtype=np.float32)
    return columns
