"""Stratified samples of latents: who is drawn, with what probability, and how a larger sample extends a smaller one.

Score and similarity both go with how often a latent fires, and most latents fire seldom: of a plain sample hardly any
would be, say, rare and shared. So the population (the eligible latents that pass the filters) is cut into *strata*,
cells of similarity × log firing frequency between the population's quartiles (of frequency alone where nothing is
aligned), and small cells are drawn from at a higher rate than large ones. What that distorts, weights set right: each
drawn latent stands for 1 / (its inclusion probability) latents of the population (Horvitz and Thompson 1952).

*Permanent random numbers* (Ohlsson 1995): every latent has a fixed number, a hash of the draw's seed and of its own,
and of a stratum those with the smallest are drawn. How many of each stratum follows from the population and the size of
the sample alone, one latent after another, and never falls as the sample grows. So a sample of 200 holds the sample of
100, and nothing that was paid for is asked again.

A sample with fewer than two latents for each stratum is drawn from the whole population alike; as it grows, the strata
that have fewest are filled up first. Given the counts by stratum, every choice of so many of its members is equally
probable (the counts depend on which numbers a stratum has, not on which member has which), hence the probability n / N.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

METHOD = "stratified by quartiles of similarity and of log firing frequency, n ~ sqrt(N), permanent random numbers"
POWER = 0.5
"""Of a stratum's size, in how many of it are drawn: 1 would be in proportion, 0 the same number of each."""
_SIDE = 4  # quantiles of each variable: those that the report shows scores by
_IN_CELL = 4  # latents in a cell on average below which there are fewer cells


@dataclass(frozen=True)
class Strata:
    """Which cell each latent of a population is in, and what the cells are made of. N latents."""

    similarity: NDArray[np.intp]
    """[N] the quantile of similarity, from 0; -1 where it is not known."""
    frequency: NDArray[np.intp]
    """[N] the quantile of the firing frequency, from 0."""
    by: str

    @property
    def label(self) -> NDArray[np.intp]:
        """[N] one number for each cell that has a member, from 0."""
        return np.unique(np.stack([self.similarity, self.frequency]), axis=1, return_inverse=True)[1].reshape(-1)


def strata(frequency: ArrayLike, similarity: ArrayLike | None = None) -> Strata:
    """The cells of a population, by quartiles; by halves, or one cell, where it is small.

    Args:
        frequency: [N] firings per token; only its order matters, so that its logarithm need not be taken.
        similarity: [N] to the partners in the other runs, NaN where unknown; ``None`` where nothing is aligned.
    """
    f = np.asarray(frequency, dtype=np.float64)
    s = np.full(len(f), np.nan) if similarity is None else np.asarray(similarity, dtype=np.float64)
    known = not np.isnan(s).all()
    sides = (side for side in (_SIDE, 2, 1) if len(f) >= _IN_CELL * (side * side if known else side))
    side = next(sides, 1)
    by = "similarity × log firing frequency" if known else "log firing frequency"
    return Strata(_quantile(s, side), _quantile(np.nan_to_num(f), side), by)


def _quantile(values: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    known = ~np.isnan(values)
    found = np.full(len(values), -1, dtype=np.intp)
    if known.any():
        edges = np.unique(np.quantile(values[known], np.linspace(0, 1, n + 1)[1:-1]))
        found[known] = np.searchsorted(edges, values[known], side="left")
    return found


def drawn(latents: Sequence[int], of: Strata, n: int | None, seed: int = 0) -> pd.DataFrame:
    """A sample of ``n`` of the population (of all where ``None``, or where there are not so many).

    Returns:
        One row for every latent of the population, ascending: ``latent``, ``similarity_cell``, ``frequency_cell``,
        ``stratum``, ``drawn``, ``probability`` (of being drawn, given how many are drawn of its stratum) and
        ``weight`` (its inverse for those drawn, 0 for the others). A stratum of which none is drawn has probability 0:
        samples hardly larger than there are strata have such.
    """
    size, label = len(latents), of.label
    number = np.array([permanent_number(seed, latent) for latent in latents], dtype=np.uint64)
    order = np.argsort(number, kind="stable")
    n = size if n is None else min(n, size)
    held = np.bincount(label, minlength=1)
    alike = n < 2 * len(held)
    if alike:
        label, held = np.zeros(size, np.intp), np.array([size])
    first = label[order[: min(n, 2 * len(held) - 1)]]
    taken = allocation(held, n, np.bincount(first, minlength=len(held)))
    place = np.empty(size, np.intp)
    for stratum in range(len(held)):
        inside = order[label[order] == stratum]
        place[inside] = np.arange(len(inside))
    chosen = place < taken[label]
    probability = (taken / np.maximum(held, 1))[label]
    table = pd.DataFrame(
        {
            "latent": np.asarray(latents, dtype=np.int64),
            "similarity_cell": np.zeros(size, np.int64) if alike else of.similarity.astype(np.int64),
            "frequency_cell": np.zeros(size, np.int64) if alike else of.frequency.astype(np.int64),
            "stratum": label.astype(np.int64),
            "drawn": chosen,
            "probability": probability,
            "weight": np.divide(1.0, probability, out=np.zeros(size), where=chosen),
        }
    )
    return table.sort_values("latent", ignore_index=True)


def allocation(held: NDArray[np.intp], n: int, start: NDArray[np.intp]) -> NDArray[np.intp]:
    """How many of each stratum are drawn when ``n`` are in all; never fewer of any when ``n`` grows.

    Beginning with ``start``, the strata that have fewer than two are filled up; then each next latent is of the stratum
    whose ``held ** POWER`` is largest against what it has (Webster's divisors), until a stratum is used up.
    """
    taken = np.minimum(start, held)

    def urgency(stratum: int) -> tuple[float, float, int]:
        few = -np.inf if taken[stratum] < 2 else -(held[stratum] ** POWER) / (taken[stratum] + 0.5)
        return (few + 0.0, float(taken[stratum]), stratum)

    waiting = [urgency(stratum) for stratum in range(len(held)) if taken[stratum] < held[stratum]]
    heapq.heapify(waiting)
    for _ in range(n - int(taken.sum())):
        stratum = heapq.heappop(waiting)[2]
        taken[stratum] += 1
        if taken[stratum] < held[stratum]:
            heapq.heappush(waiting, urgency(stratum))
    return taken


def permanent_number(seed: int, latent: int) -> int:
    """What orders the latents of a stratum in every draw of this seed: 64 random-looking bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{latent}".encode(), digest_size=8).digest(), "big")


def weights_of(table: pd.DataFrame, done: set[int]) -> pd.DataFrame:
    """The drawn latents that came to an end, each with the number of latents of the population that it stands for.

    Of a sample that is not wholly done, what is done counts as a smaller sample: n of a stratum is those of it in
    ``done``. A stratum without any is taken together with the nearest one that has some, so that the weights sum to
    the size of the population.

    Returns:
        By ``latent``: ``weight``, ``stratum`` and ``fraction``, the share of the stratum that is in the sample.
    """
    inside = table["drawn"].to_numpy(bool) & table["latent"].isin(done).to_numpy()
    cells = table.groupby("stratum")[["similarity_cell", "frequency_cell"]].first()
    held = table.groupby("stratum").size()
    n = table["stratum"][inside].value_counts().reindex(cells.index, fill_value=0)
    full, empty = cells[n > 0], cells[n == 0]
    joins = {stratum: stratum for stratum in full.index}
    if len(full):
        for stratum, cell in empty.iterrows():
            joins[stratum] = (full - cell).abs().sum(axis=1).idxmin()
    stands_with = table["stratum"].map(joins)
    held, n = held.groupby(joins).sum(), n.groupby(joins).sum()
    of = stands_with[inside]
    fraction = (n / held).reindex(of).to_numpy(float)
    return pd.DataFrame(
        {"weight": 1 / fraction, "stratum": of.to_numpy(np.int64), "fraction": fraction},
        index=pd.Index(table["latent"][inside], name="latent"),
    )
