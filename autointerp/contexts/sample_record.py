"""The samples that were drawn of a run's latents, kept beside its other tables: ``latents.sample.parquet``.

It is written before the first latent is asked about, because scores can be weighted only if it is known how their
latents were come by. A *draw* is a population (eligible latents, by a filter or not) with an explainer: the same one
made larger takes the place of the smaller, which it holds; others stand beside it. Latents that were named outright
have no probability of being drawn and are in none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from autointerp.contexts.sampling import METHOD, weights_of
from sae.common.files import digest, read_table, table_metadata, write_table
from sae.study.run import Run

STAGE = "sample"
_EXPLAINED_BY = {
    "explainer": "explainer",
    "model": "explainer_model",
    "settings_hash": "explain_settings_hash",
    "prompt_hash": "explain_prompt_hash",
}
"""What tells explainers apart in the journal, and the same in a score table."""
_OF_RECORD = ("draw", "inputs", "latents", "n", "population")


@dataclass(frozen=True)
class Draw:
    """A sample of a population of one run's latents."""

    table: pd.DataFrame
    """One row for each latent of the population: :func:`autointerp.contexts.sampling.drawn`."""
    about: dict[str, Any]
    """``sharing`` and what else filtered the population, ``strata`` (of what they are cells), ``seed``; for the
    partners of another run's sample, ``partners_of``."""

    @property
    def latents(self) -> list[int]:
        return [int(latent) for latent in self.table["latent"][self.table["drawn"]]]

    def words(self) -> dict[str, Any]:
        """What the file's footer says of it."""
        return {**self.about, "n": int(self.table["drawn"].sum()), "population": len(self.table)}


def record(run: Run, draw: Draw, explained_by: Mapping[str, Any]) -> None:
    """Keep ``draw`` for the explainer (``explainer``, ``model``, ``settings_hash``, ``prompt_hash``).

    It replaces what was kept for the same filter: a smaller sample of the population, one in other strata, one of a
    population that has changed since (another seed decides what is unshared). Where a larger one of this very
    population was drawn before, that stays. Whoever calls has claimed the run's journal.
    """
    explainer = {name: explained_by[name] for name in _EXPLAINED_BY}
    about = {name: value for name, value in draw.about.items() if name != "strata"}
    of = digest({"about": about, "explainer": explainer, "method": METHOD})
    kept = {entry["draw"]: entry for entry in _draws(run)}
    before = kept.get(of, {})
    latents, inputs_of_draw = digest(draw.table["latent"].tolist()), _inputs(draw)
    words = {"draw": of, **explainer, **draw.words(), "latents": latents, "inputs": inputs_of_draw}
    same = before.get("latents") == latents
    if same and (before["n"] > words["n"] or before["inputs"] == inputs_of_draw):
        return
    old = _table(run)
    others = old[old["draw"] != of] if old is not None else None
    table = draw.table.assign(draw=of)
    table = table if others is None or others.empty else pd.concat([others, table], ignore_index=True)
    draws = [entry for entry in kept.values() if entry["draw"] != of] + [words]
    inputs = digest([entry["inputs"] for entry in draws])
    write_table(run.stage_path(STAGE), table, inputs=inputs, draws=draws, method=METHOD)


def _inputs(draw: Draw) -> str:
    columns = ["latent", "stratum", "drawn"]
    return digest({"about": draw.about, "rows": [draw.table[name].tolist() for name in columns]})


def _draws(run: Run) -> list[dict[str, Any]]:
    return list(table_metadata(run.stage_path(STAGE)).get("draws", []))


def _table(run: Run) -> pd.DataFrame | None:
    path = run.stage_path(STAGE)
    return read_table(path) if path.exists() else None


@dataclass(frozen=True)
class Sample:
    """What was drawn for one explainer: draws of populations that have no latent in common."""

    draws: tuple[Draw, ...]

    @property
    def population(self) -> int:
        return sum(len(draw.table) for draw in self.draws)

    @property
    def drawn(self) -> set[int]:
        return {latent for draw in self.draws for latent in draw.latents}

    def weights(self, done: set[int]) -> pd.DataFrame:
        """:func:`autointerp.contexts.sampling.weights_of` those in ``done``; strata of different draws are different
        ones."""
        tables: list[pd.DataFrame] = []
        for draw in self.draws:
            start = 1 + max((int(table["stratum"].max()) for table in tables if len(table)), default=-1)
            found = weights_of(draw.table, done)
            tables.append(found.assign(stratum=found["stratum"] + start))
        return pd.concat(tables)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each draw's population, size and strata."""
        return {
            "population": self.population,
            "n_drawn": len(self.drawn),
            "draws": [_told(draw) for draw in self.draws],
        }


def _told(draw: Draw) -> dict[str, Any]:
    strata = draw.table.groupby("stratum").agg(
        similarity_cell=("similarity_cell", "first"),
        frequency_cell=("frequency_cell", "first"),
        n_latents=("latent", "size"),
        n_drawn=("drawn", "sum"),
    )
    return {**draw.words(), "cells": [{str(k): int(v) for k, v in row.items()} for row in strata.to_dict("records")]}


def sample_of(run: Run, setup: Mapping[str, Any]) -> Sample | None:
    """The sample that the explanations of a set-up of scores are of; ``None`` where none was recorded.

    Of draws whose populations overlap, the one of the widest population counts, then the largest, then the newest:
    figures are to be of as many latents as they can. Disjoint ones (the shared and the unshared) count together.
    """
    table = _table(run)
    if table is None:
        return None
    wanted = {mine: setup.get(theirs) or "" for mine, theirs in _EXPLAINED_BY.items()}
    ours = [entry for entry in _draws(run) if all((entry[name] or "") == value for name, value in wanted.items())]
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


def partners_of(draw: Draw, name: str, partner: np.ndarray, able: set[int]) -> Draw:
    """The draw that the sample's partners in a sibling run make: each is drawn where the latent is that it belongs to.

    Args:
        name: of the run that ``draw`` is of.
        partner: [M] of each of that run's latents, its partner's number; below 0 where it has none.
        able: the sibling's eligible latents; others are not in the population.
    """
    table = draw.table.assign(latent=np.asarray(partner)[draw.table["latent"]])
    table = table[(table["latent"] >= 0) & table["latent"].isin(able)]
    table = table.astype({"latent": np.int64}).sort_values("latent", ignore_index=True)
    return Draw(table, {**draw.about, "partners_of": name})
