"""Store the samples that were drawn of a run's latents, in ``latents.sample.parquet``.

Stored before the first latent is explained, because weighting scores needs the sampling. A *draw* belongs to a
population (eligible latents, filtered or not) and an explainer: a larger one replaces the smaller one that it holds;
others are kept alongside. Latents named by the user are in none.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from autointerp.contexts.sampling import METHOD, compute_weights
from sae.common.files import digest, read_table, table_metadata, write_table
from sae.study.run import Run

STAGE = "sample"
_EXPLAINED_BY = {
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
    """One row for each latent of the population: :func:`autointerp.contexts.sampling.draw_sample`."""
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
    explainer = {name: explained_by[name] for name in _EXPLAINED_BY}
    about = {name: value for name, value in draw.about.items() if name != "strata"}
    of = digest({"about": about, "explainer": explainer, "method": METHOD})
    kept = {entry["draw"]: entry for entry in _read_draws(run)}
    before = kept.get(of, {})
    latents, inputs_of_draw = digest(draw.table["latent"].tolist()), _inputs(draw)
    words = {"draw": of, **explainer, **draw.describe(), "latents": latents, "inputs": inputs_of_draw}
    same = before.get("latents") == latents
    if same and (before["n"] > words["n"] or before["inputs"] == inputs_of_draw):
        return
    old = _read_sample_table(run)
    others = old[old["draw"] != of] if old is not None else None
    table = draw.table.assign(draw=of)
    table = table if others is None or others.empty else pd.concat([others, table], ignore_index=True)
    draws = [entry for entry in kept.values() if entry["draw"] != of] + [words]
    inputs = digest([entry["inputs"] for entry in draws])
    write_table(run.stage_path(STAGE), table, inputs=inputs, draws=draws, method=METHOD)


def _inputs(draw: Draw) -> str:
    columns = ["latent", "stratum", "drawn"]
    return digest({"about": draw.about, "rows": [draw.table[name].tolist() for name in columns]})


def _read_draws(run: Run) -> list[dict[str, Any]]:
    return list(table_metadata(run.stage_path(STAGE)).get("draws", []))


def _read_sample_table(run: Run) -> pd.DataFrame | None:
    path = run.stage_path(STAGE)
    return read_table(path) if path.exists() else None


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
        """Return :func:`autointerp.contexts.sampling.compute_weights` of all draws, with strata numbered apart."""
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
    table = _read_sample_table(run)
    if table is None:
        return None
    wanted = {mine: setup.get(theirs) or "" for mine, theirs in _EXPLAINED_BY.items()}
    ours = [entry for entry in _read_draws(run) if all((entry[name] or "") == value for name, value in wanted.items())]
    ranked = sorted(enumerate(ours), key=lambda item: (item[1]["population"], item[1]["n"], item[0]), reverse=True)
    taken: list[Draw] = []
    held: set[int] = set()
    for _, entry in ranked:
        rows = table[table["draw"] == entry["draw"]].drop(columns="draw").reset_index(drop=True)
        latents = set(rows["latent"].tolist())
        if not latents & held:
            held |= latents
            about = {k: v for k, v in entry.items() if k not in (*_OF_RECORD, *_EXPLAINED_BY)}
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
