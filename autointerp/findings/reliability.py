"""Estimate how reliable the scores are: how well they would agree with those of another draw of contexts.

The *reliability* is the rank correlation, over latents, of two independent scores. To estimate it from one draw, the
verdicts of each latent are split at random into two halves; the correlation r of their scores is stepped up to the full
length by Spearman and Brown's formula, 2 r / (1 + r), and averaged over many splits. A language model may err on the
contexts of one request together, so its halves are made of whole requests. The reliability does not cover another
*explanation* of the same latents.

Noise in the scores weakens every correlation with them. Spearman's correlation of score and similarity is corrected for
that (*disattenuated*, Spearman 1904); the similarity, computed from the weights, has no such noise:

    corrected = raw / sqrt(reliability)

* The formula is derived for normal scores with equal noise. For ranks of balanced accuracies it is right within .02
  (simulated in ``benchmarks/correlation.py``). If many latents have *exactly* the same true score, the reliability is
  too large by about .02, and the correlation is corrected too little, by up to .04.
* It removes noise only, not bias from failed latents or a cut range of scores.
* Below a reliability of :data:`LEAST` nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from autointerp.contexts.sampling import Sample
from autointerp.findings.shape import Reliability
from autointerp.findings.statistics.resampling import Bools, Floats, Resamples, interval_of, partial
from autointerp.journal.journal import open_journal
from autointerp.scoring.scorers.base import HARDER
from autointerp.scoring.setups import verdict_filters
from sae.common.estimate import UNKNOWN, Estimate
from sae.study.run import Run

METHODS = {
    "reliability": "mean rank correlation of random halves of each latent's verdicts, stepped up by Spearman and "
    "Brown's formula; expanded percentile bootstrap over latents, 1000 resamples, seeded",
    "corrected": "Spearman / sqrt(reliability of the score); both recomputed in each of 1000 bootstrap resamples",
}
LEAST = 0.25
"""Least reliability at which correlations are corrected; below it they would more than double."""
_TOGETHER = 5  # verdicts in a request of a language model, if the journal is too old to record it
_FEWEST = 10  # latents with two halves that an estimate needs
_WORK = 20_000  # latents × splits


@dataclass(frozen=True)
class Halves:
    """Scores of random halves of each latent's verdicts. N latents, P splits."""

    scores: Floats
    """[P, 2, N] balanced accuracy; NaN for a half that lacks activating or silent contexts."""

    @property
    def n(self) -> int:
        """The number of latents that have both halves in some split."""
        return int((~np.isnan(self.scores)).all(1).any(0).sum())

    @classmethod
    def of(cls, verdicts: pd.DataFrame, latents: Sequence[Any], seed: int = 0, splits: int | None = None) -> Halves:
        """Split the ``verdicts`` on ``latents``, in their order.

        ``verdicts`` has ``latent``, ``truth`` and ``label``, none failed. Verdicts of a latent with the same
        ``request`` go to the same half. Without requests, halves have equal numbers of activating and of silent
        contexts, give or take one.
        """
        kept = verdicts[verdicts["latent"].isin(latents)]
        latent = pd.Index(latents).get_indexer(kept["latent"])
        truth, label = kept["truth"].to_numpy(bool), kept["label"].to_numpy(bool)
        alone = "request" not in kept or not kept.duplicated(["latent", "request"]).any()
        # A card goes to a half as a whole; the cards of a deck are dealt out in turn.
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
        """[R + 1] the reliability of the whole scores in each resample; NaN if undefined."""
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
    """Return the number of random splits for n latents: fewer for more latents."""
    return int(np.clip(_WORK // max(1, n), 4, 30))


def _dealt(decks: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Deal half of each deck to either side, 0 or 1; chance decides which gets the extra card of an odd deck."""
    order = np.argsort(decks + rng.random(len(decks)))
    start = np.searchsorted(decks[order], decks[order])
    odd = rng.integers(2, size=int(decks.max(initial=0)) + 1)
    side = np.empty(len(decks), np.int64)
    side[order] = (np.arange(len(decks)) - start + odd[decks[order]]) % 2
    return side


@dataclass(frozen=True)
class Corrected:
    """A correlation of score and similarity without the scores' noise, and the reliability used."""

    reliability: Estimate
    spearman: Estimate
    partial: Estimate
    """With a covariate held fixed. NaN, like :attr:`spearman`, if the reliability is below :data:`LEAST` or unknown."""


def corrected_spearman(
    score: Floats, similarity: Floats, covariate: Floats, halves: Halves, resamples: Resamples
) -> Corrected:
    """Correct Spearman's correlation of score [N] and similarity [N] for the scores' reliability.

    For the partial correlation, both correlations with the score are corrected before the covariate [N] is held fixed.
    """
    reliability, n = halves.draws(resamples), resamples.n_free
    found = interval_of(reliability, n)
    if not found.value >= LEAST:
        return Corrected(found, UNKNOWN, UNKNOWN)
    r = resamples.correlations([score, similarity, covariate])
    # Avoid division by almost zero in resamples with unreliable scores.
    root = np.sqrt(np.maximum(reliability, LEAST / 4))
    with_similarity, with_covariate = (np.clip(r[:, 0, i] / root, -1, 1) for i in (1, 2))
    held = partial(with_similarity, with_covariate, r[:, 1, 2])
    return Corrected(found, interval_of(with_similarity, n), interval_of(held, n))


def reliability_findings(rows: pd.DataFrame, verdicts: pd.DataFrame, sample: Sample | None) -> Reliability | None:
    """Return the reliability of one set-up's scores; ``None`` without verdicts.

    With a ``sample``, it is that of all eligible latents, without finite population correction. ``verdicts`` are those
    behind the ``rows`` (:func:`verdicts_of`).
    """
    latents, resamples = resample_latents(rows, sample)
    halves = Halves.of(verdicts, latents)
    if not halves.n:
        return None
    return Reliability(interval_of(halves.draws(resamples), max(2, resamples.n_free)), halves.n)


def resample_latents(
    rows: pd.DataFrame, sample: Sample | None, among: Set[int] | None = None
) -> tuple[list[int], Resamples]:
    """Return the latents scored in ``rows`` (of the ``sample`` and ``among`` these, if given), and their resamples."""
    own = rows[rows["control"] == "none"].set_index("latent")
    weights = None if sample is None else sample.weights(set(own.index))
    own = own[own["status"] == "ok"]
    for kept in (among, None if weights is None else weights.index):
        own = own if kept is None else own[own.index.isin(kept)]
    if weights is None:
        return own.index.tolist(), Resamples(np.arange(len(own)))
    of = weights.loc[own.index]
    return own.index.tolist(), Resamples(np.arange(len(own)), weights=of["weight"], strata=of["stratum"])


def verdicts_of(run: Run, rows: pd.DataFrame, setup: Mapping[str, Any]) -> pd.DataFrame:
    """Read the verdicts behind the scores in ``rows`` (one set-up's): ``latent``, ``context``, ``truth`` and ``label``.

    For a language model, ``request`` numbers those given together. Failed ones are skipped. Empty without a journal.
    """
    own = rows[(rows["control"] == "none") & (rows["status"] == "ok")]
    if not run.journal_path.exists() or own.empty:
        types = {"latent": int, "context": int, "truth": bool, "label": float}
        return pd.DataFrame(columns=list(types)).astype(types)
    with open_journal(run) as journal:
        ids = [int(i) for i in own["explanation_id"]]
        read = ["latent", "context", "truth", "label", "failure", "negative_kind", "request"]
        table = journal.verdicts(read, explanation_id=ids, **verdict_filters(setup))
    # The score is over random negatives; the requests also held harder ones.
    counted = table["failure"].isna() & ~table["negative_kind"].isin(HARDER)
    columns = ["latent", "context", "truth", "label"]
    if setup["model"]:
        older = -1 - table.groupby("latent").cumcount() // _TOGETHER
        table["request"] = table["request"].fillna(older)
        columns.append("request")
    return table.loc[counted, columns]
