"""The overlap stage's table: one run's latents, one row each, with their partners in every other run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from sae.alignment.bootstrap import Bools, Tables
from sae.alignment.nulls import ROTATED, read_null
from sae.alignment.overlap import DEFINITIONS, check, shared, similarity

_ALIGNED = (
    *("encoder_partner", "encoder_cosine", "decoder_partner", "decoder_cosine"),
    *("max_encoder_neighbor", "max_encoder_cosine", "max_decoder_neighbor", "max_decoder_cosine"),
)

CLASSES = ("one", "some", "all")  # the SAEs of a study that have a latent: its own alone, also some others, or all


def shared_class(n_shared: ArrayLike, n_others: int) -> NDArray[np.str_]:
    """Return the class (:data:`CLASSES`) of latents that ``n_shared`` of ``n_others`` other runs share."""
    n = np.asarray(n_shared)
    return np.select([n == 0, n == n_others], [CLASSES[0], CLASSES[2]], default=CLASSES[1])


def latent_table(
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
    check([run, *others], alignments, {run: alive})
    columns: dict[str, Any] = {"latent": np.arange(len(alive))}
    for other in others:
        table = alignments[run, other]
        columns |= {f"{name}__{other}": table[name].to_numpy() for name in _ALIGNED if name in table}
        for definition in DEFINITIONS:
            columns[f"shared_{definition}__{other}"] = shared(table, definition, threshold)
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
    columns["shared_class"] = shared_class(n, len(others)).astype(object)
    columns["shared_class"][~alive] = None
    return pd.DataFrame(columns)


def _over_runs(tables: Sequence[pd.DataFrame], threshold: float) -> dict[str, NDArray[Any]]:
    """Return the columns [M] of how many other runs share each latent, and how similar its partners are."""
    columns: dict[str, NDArray[Any]] = {}
    for definition in DEFINITIONS:
        per_run = [shared(table, definition, threshold) for table in tables]
        columns[f"n_shared_{definition}"] = np.sum(per_run, axis=0).astype(np.int32)
        columns[f"stability_{definition}"] = np.asarray(np.mean(per_run, axis=0), dtype=np.float32)
    alike = np.stack([similarity(table) for table in tables])
    partnered = ~np.isnan(alike)
    with np.errstate(invalid="ignore"):
        mean = np.where(partnered, alike, 0).sum(axis=0) / partnered.sum(axis=0)
    columns["similarity"] = np.asarray(mean, dtype=np.float32)
    return columns
