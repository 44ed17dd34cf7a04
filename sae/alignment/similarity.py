"""How alike the paired latents of two dictionaries are: the shape of their cosines, and whether it has two modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.alignment.bootstrap import Bools, Floats, Tables
from sae.alignment.dip import Dip, dip_test, kept_dip_test

EDGES = np.round(np.linspace(-1, 1, 41), 2)


def similarity(table: pd.DataFrame) -> Floats:
    """The mean of matched encoder and decoder cosine of each latent [M], NaN without partner."""
    return (table["encoder_cosine"].to_numpy(float) + table["decoder_cosine"].to_numpy(float)) / 2


def histogram(runs: Sequence[str], alignments: Tables, alive: Mapping[str, Bools]) -> dict[str, Any]:
    """Counts of alive anchors by matched cosine, over all ordered pairs: see ``StudyOverlap.as_dict``."""
    tables = [alignments[a, b][alive[a]] for a in runs for b in runs if a != b]
    table = pd.concat(tables, ignore_index=True)
    table = table[(table["encoder_partner"] >= 0) & (table["decoder_partner"] >= 0)]
    agree = (table["encoder_partner"] == table["decoder_partner"]).to_numpy()
    alike = similarity(table)

    def counts(values: Floats) -> list[int]:
        return np.histogram(np.clip(values, -1, 1), EDGES)[0].tolist()

    def mean(values: Floats) -> float | None:
        return float(values.mean()) if len(values) else None

    return {
        "edges": EDGES.tolist(),
        "encoder": counts(table["encoder_cosine"].to_numpy(float)),
        "decoder": counts(table["decoder_cosine"].to_numpy(float)),
        "agree": counts(alike[agree]),
        "differ": counts(alike[~agree]),
        "mean_agree": mean(alike[agree]),
        "mean_differ": mean(alike[~agree]),
    }


def bimodality(
    runs: Sequence[str],
    alignments: Tables,
    alive: Mapping[str, Bools],
    unit: Mapping[str, NDArray[Any]],
    draw: bool,
    kept: Path | None = None,
) -> Dip:
    """The dip test of the mean matched cosines of each ordered pair's alive anchors.

    ``unit`` gives each latent of each run the number of its unit (:class:`sae.alignment.bootstrap.LatentBootstrap`):
    the same feature in several runs is one observation. ``draw``: also the interval, which takes most of the time.
    ``kept``: the file that keeps what was worked out before.
    """
    samples, units = [], []
    for a, b in ((a, b) for a in runs for b in runs if a != b):
        alike = similarity(alignments[a, b])
        known = alive[a] & ~np.isnan(alike)
        samples.append(alike[known])
        units.append(np.asarray(unit[a])[known])
    return dip_test(samples, units, draw=draw) if kept is None else kept_dip_test(kept, samples, units, draw)


def by_pair(
    runs: Sequence[str], alignments: Tables, alive: Mapping[str, Bools], values: Callable[[pd.DataFrame], Floats]
) -> dict[str, float]:
    """Pair, as "a--b" → the mean of both directions of the mean of ``values`` [M] over alive anchors that have one.

    Those that are NaN have none; pairs of which a run has no anchor left are left out.
    """
    found = {}
    for a, b in combinations(runs, 2):
        both = [values(alignments[x, y])[alive[x]] for x, y in ((a, b), (b, a))]
        known = [of[~np.isnan(of)] for of in both]
        if all(map(len, known)):
            found[f"{a}--{b}"] = float(np.mean([of.mean() for of in known]))
    return found


def spread(of: Mapping[str, float]) -> float:
    """The standard deviation over pairs; NaN for fewer than two."""
    return float(np.std(list(of.values()), ddof=1)) if len(of) > 1 else nan


def range_of(of: Mapping[Any, float | None]) -> list[float] | None:
    """The least and the largest over pairs; ``None`` for fewer than two.

    Under a null this is its spread: every pair of runs has a draw of its own (:mod:`sae.alignment.nulls`), so that
    figures of pairs differ by chance and by what the siblings are like.
    """
    known = [value for value in of.values() if value is not None and not isnan(value)]
    return [min(known), max(known)] if len(known) > 1 else None
