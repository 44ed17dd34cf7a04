"""Draw stratified samples of latents that grow without redrawing, and store them in ``latents.sample.parquet``.

Most latents fire seldom, so a plain sample would hold hardly any that are, say, rare and shared. So the population (the
eligible latents that pass the filters) is cut into *strata*, cells of similarity × log firing frequency between the
population's quartiles (of frequency alone without an alignment), and small cells are sampled at a higher rate. Weights
correct for that: each drawn latent represents 1 / (its inclusion probability) latents (Horvitz and Thompson 1952).

*Permanent random numbers* (Ohlsson 1995): every latent has a fixed number, a hash of the draw's seed and its index, and
the smallest of each stratum are drawn. The number drawn of each stratum depends only on the population and the sample
size, and never falls as the sample grows. So a sample of 200 holds the sample of 100.

A sample with fewer than two latents per stratum is drawn from the whole population; as it grows, the smallest strata
are filled first. Given the counts by stratum, all choices are equally probable, hence the probability n / N.

A sample is stored before its first latent is explained, because weighting scores needs it. A *draw* belongs to a
population (eligible latents, filtered or not) and an explainer: a larger one replaces the smaller one that it holds;
others are kept alongside. Latents named by the user are in none.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from sae.common.files import digest, read_table, table_metadata, write_table
from sae.study.run import Run

METHOD = "stratified by quartiles of similarity and of log firing frequency, n ~ sqrt(N), permanent random numbers"
POWER = 0.5
"""Exponent of a stratum's size in its number drawn: 1 would be in proportion, 0 equal numbers."""
_SIDE = 4  # quantiles of each variable, as in the report
_IN_CELL = 4  # mean number of latents in a cell, below which cells are merged


@dataclass(frozen=True)
class Strata:
    """The cell of each latent of a population. N latents."""

    similarity: NDArray[np.intp]
    """[N] the quantile of similarity, from 0; -1 where it is unknown."""
    frequency: NDArray[np.intp]
    """[N] the quantile of the firing frequency, from 0."""
    by: str
    """The variables, in words."""

    @property
    def label(self) -> NDArray[np.intp]:
        """[N] one number for each cell that has a member, from 0."""
        return np.unique(np.stack([self.similarity, self.frequency]), axis=1, return_inverse=True)[1].reshape(-1)


def make_strata(frequency: ArrayLike, similarity: ArrayLike | None = None) -> Strata:
    """Return the cells of a population, by quartiles; by halves, or one cell, if it is small.

    Args:
        frequency: [N] firings per token (only the order matters).
        similarity: [N] to the partners in the other runs, NaN if unknown; ``None`` without an alignment.
    """
    f = np.asarray(frequency, dtype=np.float64)
    s = np.full(len(f), np.nan) if similarity is None else np.asarray(similarity, dtype=np.float64)
    known = not np.isnan(s).all()
    sides = (side for side in (_SIDE, 2, 1) if len(f) >= _IN_CELL * (side * side if known else side))
    side = next(sides, 1)
    by = "similarity × log firing frequency" if known else "log firing frequency"
    return Strata(_find_quantile(s, side), _find_quantile(np.nan_to_num(f), side), by)


def _find_quantile(values: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    known = ~np.isnan(values)
    found = np.full(len(values), -1, dtype=np.intp)
    if known.any():
        edges = np.unique(np.quantile(values[known], np.linspace(0, 1, n + 1)[1:-1]))
        found[known] = np.searchsorted(edges, values[known], side="left")
    return found


def draw_sample(latents: Sequence[int], strata: Strata, n: int | None, seed: int = 0) -> pd.DataFrame:
    """Draw ``n`` latents of the population; all for ``None`` or if there are fewer.

    Returns:
        One row for every latent of the population, ascending: ``latent``, ``similarity_cell``, ``frequency_cell``,
        ``stratum``, ``drawn``, ``probability`` (of being drawn, given the number drawn of its stratum; 0 if none is)
        and ``weight`` (its inverse for those drawn, 0 for the others).
    """
    size, label = len(latents), strata.label
    number = np.array([permanent_number(seed, latent) for latent in latents], dtype=np.uint64)
    order = np.argsort(number, kind="stable")
    n = size if n is None else min(n, size)
    held = np.bincount(label, minlength=1)
    is_plain = n < 2 * len(held)
    if is_plain:
        label, held = np.zeros(size, np.intp), np.array([size])
    first = label[order[: min(n, 2 * len(held) - 1)]]
    taken = allocate(held, n, np.bincount(first, minlength=len(held)))
    place = np.empty(size, np.intp)
    for stratum in range(len(held)):
        inside = order[label[order] == stratum]
        place[inside] = np.arange(len(inside))
    chosen = place < taken[label]
    probability = (taken / np.maximum(held, 1))[label]
    table = pd.DataFrame(
        {
            "latent": np.asarray(latents, dtype=np.int64),
            "similarity_cell": np.zeros(size, np.int64) if is_plain else strata.similarity.astype(np.int64),
            "frequency_cell": np.zeros(size, np.int64) if is_plain else strata.frequency.astype(np.int64),
            "stratum": label.astype(np.int64),
            "drawn": chosen,
            "probability": probability,
            "weight": np.divide(1.0, probability, out=np.zeros(size), where=chosen),
        }
    )
    return table.sort_values("latent", ignore_index=True)


def allocate(held: NDArray[np.intp], n: int, start: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the number drawn of each stratum when ``n`` are drawn in all; none falls when ``n`` grows.

    Starting from ``start``, strata get up to two latents each; then each next latent is of the stratum with the largest
    ``held ** POWER`` over its number drawn (Webster's divisors), until a stratum is used up.
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
    """Return the number by which the latents of a stratum are ordered in every draw of this seed: 64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{latent}".encode(), digest_size=8).digest(), "big")


def compute_weights(table: pd.DataFrame, done: set[int]) -> pd.DataFrame:
    """Return the number of latents of the population that each finished latent of the sample stands for.

    An unfinished sample counts as a smaller one: n of a stratum is its number in ``done``. A stratum without any is
    merged with the nearest one that has some, so that the weights sum to the size of the population.

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
    merged = table["stratum"].map(joins)
    held, n = held.groupby(joins).sum(), n.groupby(joins).sum()
    of = merged[inside]
    fraction = (n / held).reindex(of).to_numpy(float)
    return pd.DataFrame(
        {"weight": 1 / fraction, "stratum": of.to_numpy(np.int64), "fraction": fraction},
        index=pd.Index(table["latent"][inside], name="latent"),
    )


# --- stored draws ---------------------------------------------------------------------------------------------

EXPLAINED_BY = {
    "explainer": "explainer",
    "model": "explainer_model",
    "settings_hash": "explain_settings_hash",
    "prompt_hash": "explain_prompt_hash",
}
"""The columns that identify an explainer in the journal, and their names in a score table."""
_OF_RECORD = ("draw", "inputs", "latents", "n", "population")


@dataclass(frozen=True)
class Draw:
    """A sample of a population of one run's latents."""

    table: pd.DataFrame
    """One row for each latent of the population: :func:`draw_sample`."""
    about: dict[str, Any]
    """``sharing`` and the other filters, ``strata`` (their variables), ``seed``; ``partners_of`` for the partners of
    another run's sample."""

    @property
    def latents(self) -> list[int]:
        return [int(latent) for latent in self.table["latent"][self.table["drawn"]]]

    def describe(self) -> dict[str, Any]:
        """Return the facts for the file's footer."""
        return {**self.about, "n": int(self.table["drawn"].sum()), "population": len(self.table)}


def store_draw(run: Run, draw: Draw, explained_by: Mapping[str, Any]) -> None:
    """Store ``draw`` for the explainer (``explainer``, ``model``, ``settings_hash``, ``prompt_hash``).

    Replaces the draw of the same filter, unless that is a larger sample of the same population. The caller has claimed
    the run's journal.
    """
    explainer = {name: explained_by[name] for name in EXPLAINED_BY}
    about = {name: value for name, value in draw.about.items() if name != "strata"}
    of = digest({"about": about, "explainer": explainer, "method": METHOD})
    old, kept = _read_draws(run)
    before: dict[str, Any] = next((entry for entry in kept if entry["draw"] == of), {})
    latents, inputs_of_draw = digest(draw.table["latent"].tolist()), _inputs(draw)
    words = {"draw": of, **explainer, **draw.describe(), "latents": latents, "inputs": inputs_of_draw}
    same = before.get("latents") == latents
    if same and (before["n"] > words["n"] or before["inputs"] == inputs_of_draw):
        return
    others = None if old is None else old[old["draw"] != of]
    table = draw.table.assign(draw=of)
    table = table if others is None or others.empty else pd.concat([others, table], ignore_index=True)
    draws = [*(entry for entry in kept if entry["draw"] != of), words]
    inputs = digest([entry["inputs"] for entry in draws])
    write_table(run.stage_path("sample"), table, inputs=inputs, draws=draws, method=METHOD)


def _inputs(draw: Draw) -> str:
    columns = ["latent", "stratum", "drawn"]
    return digest({"about": draw.about, "rows": [draw.table[name].tolist() for name in columns]})


def _read_draws(run: Run) -> tuple[pd.DataFrame | None, list[dict[str, Any]]]:
    """Return the file's table, ``None`` if there is none, and the facts about each draw."""
    path = run.stage_path("sample")
    return (read_table(path), table_metadata(path).get("draws", [])) if path.exists() else (None, [])


@dataclass(frozen=True)
class Sample:
    """The latents drawn for one explainer: draws of populations that have no latent in common."""

    draws: tuple[Draw, ...]

    @property
    def population(self) -> int:
        return sum(len(draw.table) for draw in self.draws)

    @property
    def drawn(self) -> set[int]:
        return {latent for draw in self.draws for latent in draw.latents}

    def weights(self, done: set[int]) -> pd.DataFrame:
        """Return :func:`compute_weights` of all draws, with strata numbered apart."""
        if (key := frozenset(done)) not in self._weights:
            self._weights[key] = self._compute_weights(done)
        return self._weights[key]

    @functools.cached_property
    def _weights(self) -> dict[frozenset[int], pd.DataFrame]:
        return {}

    def _compute_weights(self, done: set[int]) -> pd.DataFrame:
        tables: list[pd.DataFrame] = []
        for draw in self.draws:
            start = 1 + max((int(table["stratum"].max()) for table in tables if len(table)), default=-1)
            found = compute_weights(draw.table, done)
            tables.append(found.assign(stratum=found["stratum"] + start))
        return pd.concat(tables)

    def as_dict(self) -> dict[str, Any]:
        """Return each draw's population, size and strata, for JSON."""
        return {
            "population": self.population,
            "n_drawn": len(self.drawn),
            "draws": [_describe_strata(draw) for draw in self.draws],
        }


def _describe_strata(draw: Draw) -> dict[str, Any]:
    strata = draw.table.groupby("stratum").agg(
        similarity_cell=("similarity_cell", "first"),
        frequency_cell=("frequency_cell", "first"),
        n_latents=("latent", "size"),
        n_drawn=("drawn", "sum"),
    )
    return {**draw.describe(), "cells": [{str(k): int(v) for k, v in row.items()} for row in strata.to_dict("records")]}


def load_sample(run: Run, setup: Mapping[str, Any]) -> Sample | None:
    """Return the sample behind the explanations of a score set-up; ``None`` if none was stored.

    Of draws whose populations overlap, the one of the largest population counts, then the largest, then the newest.
    Disjoint ones (the shared and the unshared) count together.
    """
    table, draws = _read_draws(run)
    if table is None:
        return None
    wanted = {mine: setup.get(theirs) or "" for mine, theirs in EXPLAINED_BY.items()}
    ours = [entry for entry in draws if all((entry[name] or "") == value for name, value in wanted.items())]
    ranked = sorted(enumerate(ours), key=lambda item: (item[1]["population"], item[1]["n"], item[0]), reverse=True)
    taken: list[Draw] = []
    held: set[int] = set()
    for _, entry in ranked:
        rows = table[table["draw"] == entry["draw"]].drop(columns="draw").reset_index(drop=True)
        latents = set(rows["latent"].tolist())
        if not latents & held:
            held |= latents
            about = {k: v for k, v in entry.items() if k not in (*_OF_RECORD, *EXPLAINED_BY)}
            taken.append(Draw(rows, about))
    return Sample(tuple(taken)) if taken else None


def map_to_partners(draw: Draw, name: str, partner: np.ndarray, eligible: set[int]) -> Draw:
    """Return the draw of the sample's partners in a sibling run: each is drawn if its latent is.

    Args:
        name: the run of ``draw``.
        partner: [M] the partner of each of that run's latents; below 0 for none.
        eligible: the sibling's eligible latents; others are not in the population.
    """
    table = draw.table.assign(latent=np.asarray(partner)[draw.table["latent"]])
    table = table[(table["latent"] >= 0) & table["latent"].isin(eligible)]
    table = table.astype({"latent": np.int64}).sort_values("latent", ignore_index=True)
    return Draw(table, {**draw.about, "partners_of": name})
