"""How far a latent's score is the latent's, and how far the luck of the contexts that it was tested on.

A score is a mean of yes and no over some fifty contexts of each kind; another draw of contexts would give another
score. Its *reliability* is the rank correlation, over latents, of two such independent scores. It is found without
asking anything anew: the verdicts of each latent are split at random into two halves, both are scored, and their
correlation r is stepped up to the full length by Spearman and Brown's formula, 2 r / (1 + r); the mean over many splits
is taken. A second draw of contexts would measure the same at twice the cost: a judge at temperature 0 answers the same
question alike, so what differs between draws is which contexts they hold, and halves differ in just that. What a
language model is shown in one request is answered together and may err together, so its halves are made of whole
requests: else what is common to a request would count as agreement.

It does not say what another *explanation* of the same latents would have scored. The reliability is that of scores of
these very explanations, and it is relative: among latents that differ little, the same verdicts tell less.

Noise in the scores weakens every correlation with them. Spearman's correlation of score and similarity is corrected
for that (*disattenuated*, Spearman 1904) by

    corrected = raw / sqrt(reliability)

The similarity is computed from the weights and has no such noise: its reliability is 1. The limits of the correction:

* It is derived for normal scores with equal noise. For ranks of balanced accuracies it is right within .02, as
  simulated (``benchmarks/correlation.py``). Where many latents have *exactly* the same true score, the reliability
  comes out too large by about .02 and sure of itself, and the correlation is corrected too little, by up to .04.
* It takes noise away and nothing else. Where latents failed because they were hard, or only some range of scores or
  similarities was looked at, both figures are of the latents that are left, and nearer to 0.
* Below a reliability of :data:`LEAST` the scores hardly tell latents apart, and nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autointerp.contexts.sample_record import Sample
from autointerp.findings.statistics.resampling import Bools, Floats, Resamples, interval_of, partial
from autointerp.journal.journal import Journal
from autointerp.scoring.scorers.base import HARDER
from autointerp.scoring.setups import verdict_filters
from sae.common.estimate import UNKNOWN, Estimate
from sae.study.run import Run

METHODS = {
    "reliability": "mean rank correlation of random halves of each latent's verdicts, stepped up by Spearman and "
    "Brown's formula; expanded percentile bootstrap over latents, 1000 resamples, seeded",
    "corrected": "Spearman / sqrt(reliability of the score); both are made anew in each of 1000 bootstrap resamples",
}
LEAST = 0.25
"""Reliability below which no correlation is corrected: it would be more than doubled, its noise with it."""
_TOGETHER = 5  # verdicts in a request of a language model, where the journal is too old to say
_FEWEST = 10  # latents with two halves below which nothing is said
_WORK = 20_000  # latents × splits


@dataclass(frozen=True)
class Halves:
    """Scores of random halves of each latent's verdicts. N latents, P splits."""

    scores: Floats
    """[P, 2, N] balanced accuracy; NaN for a half that lacks activating or silent contexts."""

    @property
    def n(self) -> int:
        """Latents that have both halves in some split."""
        return int((~np.isnan(self.scores)).all(1).any(0).sum())

    @classmethod
    def of(cls, verdicts: pd.DataFrame, latents: Sequence[Any], seed: int = 0, splits: int | None = None) -> Halves:
        """Split the ``verdicts`` on ``latents`` (their order is that of the result).

        Args:
            verdicts: ``latent``, ``truth`` and ``label``; none that failed. With ``request``, those of a latent that
                have the same one always go to the same half. Where none have, each half has the same number of
                activating contexts and of silent ones, give or take one.
        """
        kept = verdicts[verdicts["latent"].isin(latents)]
        latent = pd.Index(latents).get_indexer(kept["latent"])
        truth, label = kept["truth"].to_numpy(bool), kept["label"].to_numpy(bool)
        alone = "request" not in kept or not kept.duplicated(["latent", "request"]).any()
        # What goes to a half as one, and within what the ones are dealt out in turn.
        deck = latent * 2 + truth if alone else latent
        turn = np.arange(len(kept)) if alone else pd.factorize(kept["request"])[0]
        _, first, card = np.unique(deck * (turn.max(initial=0) + 1) + turn, return_index=True, return_inverse=True)
        decks = deck[first]  # ascending
        rng = np.random.default_rng(seed)
        splits = splits or splits_of(len(latents))
        right = truth == label
        found = np.empty((splits, 2, len(latents)))
        for split in range(splits):
            side = _dealt(decks, rng)[card]
            cell = (latent * 2 + side) * 2 + truth
            n = np.bincount(cell, minlength=4 * len(latents)).reshape(-1, 2, 2)
            hits = np.bincount(cell, weights=right, minlength=4 * len(latents)).reshape(-1, 2, 2)
            with np.errstate(invalid="ignore"):
                found[split] = (hits / n).mean(2).T
        return cls(found)

    def draws(self, resamples: Resamples) -> Floats:
        """[R + 1] the reliability of the whole scores in each resample; NaN where it is not to be had."""
        total = np.zeros(len(resamples))
        n = np.zeros(len(resamples))
        for first, second in self.scores:
            kept: Bools = ~(np.isnan(first) | np.isnan(second))
            if kept.sum() < _FEWEST:
                continue
            r = resamples.correlations([first, second], kept)[:, 0, 1]
            total += np.where(np.isnan(r), 0, r)
            n += ~np.isnan(r)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = total / n
            return 2 * r / (1 + r)


def splits_of(n: int) -> int:
    """Into halves, of n latents: many of few, few of many, whose mean is sure sooner."""
    return int(np.clip(_WORK // max(1, n), 4, 30))


def _dealt(decks: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """0 or 1 for each card, half of each deck either; of an odd deck the greater half is either by chance."""
    order = np.argsort(decks + rng.random(len(decks)))
    start = np.searchsorted(decks[order], decks[order])
    odd = rng.integers(2, size=int(decks.max(initial=0)) + 1)
    side = np.empty(len(decks), np.int64)
    side[order] = (np.arange(len(decks)) - start + odd[decks[order]]) % 2
    return side


@dataclass(frozen=True)
class Corrected:
    """A correlation of score and similarity without the scores' noise, and what it rests on."""

    reliability: Estimate
    spearman: Estimate
    """Not a number, like :attr:`partial`, where the reliability is below :data:`LEAST` or unknown."""
    partial: Estimate
    """The same with a covariate held fixed, such as the firing frequency."""


def corrected_spearman(
    score: Floats, similarity: Floats, covariate: Floats, halves: Halves, resamples: Resamples
) -> Corrected:
    """Spearman's correlation of score [N] and similarity [N], corrected for the scores' reliability.

    In the partial one both correlations with the score are corrected before the covariate [N] is held fixed.
    """
    reliability, n = halves.draws(resamples), resamples.n_free
    told = interval_of(reliability, n)
    if not told.value >= LEAST:
        return Corrected(told, UNKNOWN, UNKNOWN)
    r = resamples.correlations([score, similarity, covariate])
    # A resample whose scores happen to tell nothing apart would divide by nearly nothing.
    root = np.sqrt(np.maximum(reliability, LEAST / 4))
    with_similarity, with_covariate = (np.clip(r[:, 0, i] / root, -1, 1) for i in (1, 2))
    held = partial(with_similarity, with_covariate, r[:, 1, 2])
    return Corrected(told, interval_of(with_similarity, n), interval_of(held, n))


def reliability_findings(rows: pd.DataFrame, verdicts: pd.DataFrame, sample: Sample | None) -> dict[str, Any] | None:
    """The reliability of one set-up's scores as JSON values; ``None`` where there are no verdicts.

    Where the explained latents are a sample on record, that of the scores of all eligible latents (without finite
    population correction: the halves' own noise is most of what is uncertain about it).

    Args:
        rows: the set-up's rows of the run's score table.
        verdicts: those behind the rows (:func:`verdicts_of`).
        sample: what the explained latents are a sample of, if that is on record.
    """
    own = rows[rows["control"] == "none"].set_index("latent")
    weights = None if sample is None else sample.weights(set(own.index))
    own = own[own["status"] == "ok"]
    own = own if weights is None else own[own.index.isin(weights.index)]
    halves = Halves.of(verdicts, own.index.tolist())
    if not halves.n:
        return None
    resamples = Resamples(np.arange(len(own)))
    if weights is not None:
        of = weights.loc[own.index]
        resamples = Resamples(np.arange(len(own)), weights=of["weight"], strata=of["stratum"])
    told = interval_of(halves.draws(resamples), max(2, resamples.n_free))
    return {**told.as_dict(), "n": halves.n}


def verdicts_of(run: Run, rows: pd.DataFrame, setup: Mapping[str, Any]) -> pd.DataFrame:
    """The verdicts behind the scores in ``rows`` (one set-up's).

    ``latent``, ``truth`` and ``label``, and where a model was asked ``request``, a number for those that it gave
    together; what failed is left out. Empty where the run has no journal.
    """
    own = rows[(rows["control"] == "none") & (rows["status"] == "ok")]
    if not run.journal_path.exists() or own.empty:
        return pd.DataFrame(columns=["latent", "truth", "label"]).astype({"latent": int, "truth": bool, "label": float})
    with Journal(run.journal_path) as journal:
        ids = [int(i) for i in own["explanation_id"]]
        read = ["latent", "truth", "label", "failure", "negative_kind", "request"]
        table = journal.verdicts(read, explanation_id=ids, **verdict_filters(setup))
    # The score is the one over random negatives; harder ones, which the requests held too, have figures of their own.
    counted = table["failure"].isna() & ~table["negative_kind"].isin(HARDER)
    columns = ["latent", "truth", "label"]
    if setup["model"]:
        older = -1 - table.groupby("latent").cumcount() // _TOGETHER
        table["request"] = table["request"].fillna(older)
        columns.append("request")
    return table.loc[counted, columns]
