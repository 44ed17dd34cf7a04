"""Summarise the scores of one run and one set-up: how well its latents can be explained.

Alongside the mean: how many latents could not be scored and why, and the swapped control.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from autointerp.contexts.sampling import Sample, load_sample
from autointerp.findings import shape
from autointerp.findings.evidence import JournalFacts, Study
from autointerp.findings.json_values import number
from autointerp.findings.statistics.estimation import AS_THEY_ARE, Estimator, error_of
from autointerp.journal.method import CHANCE
from autointerp.scoring.scorers.base import HARDER, STOPS
from autointerp.scoring.setups import precision_of, rows_of, rows_over, setups_of, status_kind
from sae.alignment.overlap import CLASSES
from sae.common.estimate import UNKNOWN, Estimate, proportion

SCORE_EDGES = np.linspace(0, 1, 51)


def score_findings(
    rows: pd.DataFrame,
    latents: pd.DataFrame,
    explained: set[int],
    too_few: Set[int] = frozenset(),
    sample: Sample | None = None,
    rounds: Mapping[str, Any] | None = None,
) -> shape.SetupScores:
    """Return the distribution of the scores, the control, and counts by shared class.

    Args:
        rows: one set-up's.
        latents: the run's table by latent number: ``alive``, ``shared_class`` if there are siblings, ``eligible`` if
            contexts were counted.
        explained: latents with an explanation in the journal.
        too_few: latents that were asked for and had too few contexts.
        sample: the figures use only its latents, weighted (:mod:`autointerp.findings.statistics.estimation`); counts
            are always of latents.
        rounds: of adaptive judging.
    """
    own = rows[rows["control"] == "none"].set_index("latent")
    kinds = own["status"].map(status_kind)
    of = estimator_of(rows, too_few, sample)
    scored = own[kinds == "ok"]
    good, swapped = Scored(of.of(scored), of), swapped_scores(rows, sample)
    auroc = good.mean("auroc")
    ineligible = set(own.index[kinds == "ineligible"]) | too_few
    asked = set(own.index) | explained | ineligible
    eligible = latents.get("eligible")
    return shape.SetupScores(
        **(good.figures() | {"auroc_mean": auroc.value}),
        auroc_interval=auroc.interval,
        precision=_describe_precision(good.rows, rounds),
        sample=None if sample is None else _describe_sample(sample, of.sample, good.rows, scored),
        n_failed=int((kinds == "failed").sum()),
        n_ineligible=len(ineligible),
        n_asked=len(asked),
        n_explained=len(explained),
        n_eligible=int(eligible.sum()) if eligible is not None else len(asked - ineligible),
        eligible_of="all latents" if eligible is not None else "the latents asked for",
        n_alive=int(latents["alive"].sum()),
        n_latents=len(latents),
        n_failed_answers=failed_answers(own),
        histogram=good.histogram(),
        control=_control(rows, swapped, good),
        negatives=_negatives(good, swapped),
        too_few=too_few_findings(latents),
        by_class=_by_class(latents, own, kinds, explained, of, swapped) if "shared_class" in latents else None,
    )


def _describe_precision(good: pd.DataFrame, rounds: Mapping[str, Any] | None) -> shape.Adaptive | None:
    """Describe adaptive judging: half-width, reasons for stopping, mean number of contexts. ``None`` if not used."""
    half_width = precision_of(good)
    if half_width is None:
        return None
    counts = good["stopped"].value_counts()
    n_contexts = good["n_active"].astype(float) + good["n_inactive"].astype(float)
    return shape.Adaptive(half_width, {why: int(counts.get(why, 0)) for why in STOPS}, n_contexts.mean(), rounds)


def _describe_sample(
    sample: Sample, weights: pd.DataFrame | None, good: pd.DataFrame, scored: pd.DataFrame
) -> shape.SampleOfLatents:
    assert weights is not None
    return shape.SampleOfLatents(
        **sample.as_dict(),
        n_done=len(weights),
        n_scored=len(good),
        n_waiting=len(sample.drawn - set(weights.index)),
        n_failed=len(weights) - len(good),
        n_outside=len(scored) - len(good),
        effective_n=weights["weight"].sum() ** 2 / (weights["weight"] ** 2).sum() if len(weights) else None,
    )


def estimator_of(rows: pd.DataFrame, too_few: Set[int], sample: Sample | None) -> Estimator:
    """Return the estimator of figures over the own scores; failed latents and ``too_few`` keep their weights."""
    if sample is None:
        return Estimator()
    return Estimator(sample.weights(set(rows["latent"][rows["control"] == "none"]) | too_few))


@dataclass(frozen=True)
class Scored:
    """Scores of one set-up that did not fail, by latent, and the estimator of figures over them."""

    rows: pd.DataFrame
    of: Estimator = AS_THEY_ARE

    def over(self, kind: str) -> Scored:
        """Return the scores over a harder kind of negatives."""
        return Scored(rows_over(self.rows, kind), self.of)

    def values(self, column: str = "balanced_accuracy") -> pd.Series:
        """Return the known values of a column, by latent."""
        return self.rows.get(column, pd.Series(dtype=float)).astype(float).dropna()

    def mean(self, column: str = "balanced_accuracy") -> Estimate:
        values = self.values(column)
        return self.of.mean(values, error_of(self.rows, column))

    def plain_mean(self, column: str = "balanced_accuracy") -> float:
        """Return the mean of a column, without an interval."""
        return self.of.plain_mean(self.values(column))

    def distribution(self) -> shape.Distribution:
        return shape.Distribution(self.mean(), self.of.quartiles(self.values(), error_of(self.rows)))

    def figures(self) -> dict[str, Any]:
        """Return the fields of :class:`ScoreFigures`."""
        return {**vars(self.distribution()), "auroc_mean": self.plain_mean("auroc"), "n_scored": len(self.rows)}

    def histogram(self) -> shape.Histogram:
        """Count the scores between :data:`SCORE_EDGES`."""
        values, edges = self.values(), SCORE_EDGES
        counts, estimated = (np.histogram(values, edges, weights=of)[0] for of in (None, self.of.weights(values)))
        is_sample = self.of.sample is not None
        return shape.Histogram(
            [round(float(e), 6) for e in edges],
            counts.tolist(),
            [round(float(n), 3) for n in estimated] if is_sample else None,
        )

    def difference(self, own: Scored) -> Estimate:
        """Return the mean of own less these scores over the latents that have both."""
        ours, theirs = error_of(own.rows), error_of(self.rows)
        return self.of.mean(
            (own.values() - self.values()).dropna(), None if ours is None or theirs is None else ours + theirs
        )

    def below(self, own: Scored) -> shape.Difference | None:
        """Return how far own is above these scores; ``None`` if no latent has both."""
        paired = (own.values() - self.values()).dropna()
        if paired.empty:
            return None
        return shape.Difference(self.difference(own), len(paired), self.of.share(paired > 0))


def swapped_scores(rows: pd.DataFrame, sample: Sample | None) -> Scored:
    """Return the swapped controls; with a sample, their latents are a smaller one, chosen by their numbers alone."""
    asked = rows[rows["control"] == "swap"].set_index("latent")
    of = Estimator(None if sample is None else sample.weights(set(asked.index)))
    return Scored(of.of(asked[asked["status"] == "ok"]), of)


def _control(rows: pd.DataFrame, swapped: Scored, own: Scored) -> shape.SwappedControl | None:
    if swapped.rows.empty:
        return None
    # Partners are drawn at random, so scoring all latents does not make the mean certain: no correction for that.
    figures = swapped.figures() | {"mean": swapped.of.mean(swapped.values())}
    low, high = figures["mean"].interval or (CHANCE, CHANCE)
    return shape.SwappedControl(
        **figures,
        kind="swap",
        leaks=bool(low > CHANCE or high < CHANCE),
        n_failed=int(((rows["control"] == "swap") & (rows["status"] != "ok")).sum()),
        histogram=swapped.histogram(),
        above_control=swapped.below(own) or shape.Difference(UNKNOWN, 0, math.nan),
    )


def failed_answers(rows: pd.DataFrame) -> int:
    """Count the contexts of any kind without a verdict."""
    columns = [c for c in ("n_failed", *(f"n_failed_{kind}" for kind in HARDER)) if c in rows]
    return int(sum(rows[c].fillna(0).sum() for c in columns))


def _negatives(good: Scored, swapped: Scored) -> dict[str, shape.HarderScores]:
    """Return the scores over each harder kind of negatives that some latent has."""
    found = {}
    for kind in HARDER:
        some, others = good.over(kind), swapped.over(kind)
        if some.rows.empty:
            continue
        found[kind] = shape.HarderScores(
            **some.figures(),
            tnr=some.mean("tnr"),
            random_mean=good.of.plain_mean(good.values()[some.rows.index]),
            swapped_mean=others.plain_mean(),
            above_control=others.below(some),
            n_missing=len(good.rows) - len(some.rows),
            n_failed_answers=int(good.rows[f"n_failed_{kind}"].fillna(0).sum()),
        )
    return found


def _by_class(
    latents: pd.DataFrame, own: pd.DataFrame, kinds: pd.Series, explained: set[int], of: Estimator, swapped: Scored
) -> dict[str, shape.ScoresOfClass]:
    found = {}
    for name, members in _classes(latents).items():
        inside = own.index.isin(members.index)
        good = Scored(of.of(own[inside & (kinds == "ok").to_numpy()]), of)
        counted = members.get("eligible")
        found[name] = shape.ScoresOfClass(
            **vars(good.distribution()),
            n_latents=len(members),
            n_alive=int(members["alive"].sum()),
            n_eligible=int(counted.sum()) if counted is not None else int((kinds[inside] != "ineligible").sum()),
            n_explained=len(explained & set(members.index)),
            n_scored=len(good.rows),
            n_failed=int((kinds[inside] == "failed").sum()),
            above_control=swapped.below(good),
        )
    return found


def _classes(latents: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split latents by shared class, without the empty classes."""
    found = {name: latents[latents["shared_class"] == name] for name in CLASSES}
    return {name: members for name, members in found.items() if len(members)}


# --- latents with too few contexts ------------------------------------------------------------------------


def too_few_findings(latents: pd.DataFrame) -> dict[str, shape.TooFew] | None:
    """Describe the alive latents with too few contexts to be explained and tested: how many, which, and why.

    Over all classes ``together`` and, if there are siblings, for each shared class. ``None`` if contexts were not
    counted.
    """
    if "eligible" not in latents:
        return None
    alive = latents[latents["alive"].astype(bool)]
    classes = _classes(alive) if "shared_class" in alive else {}
    return {name: _too_few(members) for name, members in {"together": alive, **classes}.items()}


def _too_few(members: pd.DataFrame) -> shape.TooFew:
    enough = members["eligible"].astype("boolean").fillna(False).astype(bool)
    lacking = members[~enough]
    reasons = lacking.get("ineligible_reason", pd.Series("", index=lacking.index)).map(_without_numbers)
    frequency = members.get("firing_frequency", pd.Series(np.nan, index=members.index))
    return shape.TooFew(
        n_alive=len(members),
        n=len(lacking),
        fraction=proportion(len(lacking), len(members)),
        latents=lacking.index.tolist(),
        reasons=dict(Counter(reasons).most_common()),
        median_frequency=number(frequency[~enough].median()) if len(lacking) else None,
        median_frequency_of_eligible=number(frequency[enough].median()) if enough.any() else None,
    )


def _without_numbers(reason: object) -> str:
    """Return the reason without its numbers, which differ between latents."""
    words = str(reason or "not said")
    for kind in ("fires nearly everywhere", "activating contexts to explain from", "activating contexts to test on"):
        if kind in words:
            return kind if kind.startswith("fires") else f"too few {kind}"
    return words


# --- other scorers ----------------------------------------------------------------------------------------


def other_scorer_findings(study: Study, latents: pd.DataFrame, facts: JournalFacts) -> list[shape.OtherScorer]:
    """Return a row for each other scorer of the same explainer and judge; scorers are never averaged together."""
    if study.scores is None or "scorer" not in study.scores:
        return []
    view, setup = study.view, study.setup or {}
    wanted: dict[str, Any] = {"explainer": view.explainer, "judge": view.judge}
    if setup:
        wanted = {key: setup.get(key) for key in ("explainer", "explainer_model", "judge", "model")}
    wanted |= {"draw": view.draw, "replicate": view.replicate}
    found = []
    for scorer in sorted(set(study.scores["scorer"].dropna()) - {view.scorer, setup.get("scorer")}):
        for other in setups_of(study.scores, scorer=scorer, **wanted)[:1]:
            rows, sample = rows_of(study.scores, other), load_sample(study.focus, other)
            of = score_findings(rows, latents, facts.explained, facts.too_few, sample)
            who = scorer, other.get("explainer"), other.get("judge")
            counts = of.n_scored, of.n_failed, of.n_ineligible
            found.append(shape.OtherScorer(of.mean, *who, of.auroc_mean, of.auroc_interval, *counts, of.control))
    return found
