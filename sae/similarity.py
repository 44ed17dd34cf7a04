"""How alike the paired latents of two dictionaries are: the shape of their cosines, and whether it has two modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.bootstrap import Bools, Floats, Tables
from sae.dip import Dip, dip_test

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
    runs: Sequence[str], alignments: Tables, alive: Mapping[str, Bools], unit: Mapping[str, NDArray[Any]]
) -> Dip:
    """The dip test of the mean matched cosines of each ordered pair's alive anchors.

    ``unit`` gives each latent of each run the number of its unit (:class:`sae.bootstrap.LatentBootstrap`): the same
    feature in several runs is one observation.
    """
    samples, units = [], []
    for a, b in ((a, b) for a in runs for b in runs if a != b):
        alike = similarity(alignments[a, b])
        known = alive[a] & ~np.isnan(alike)
        samples.append(alike[known])
        units.append(np.asarray(unit[a])[known])
    return dip_test(samples, units)


def spread_over_pairs(pairs: Sequence[tuple[str, str]], alignments: Tables, alive: Mapping[str, Bools]) -> float:
    """The standard deviation over pairs of the mean matched decoder cosine (the mean of both directions)."""
    if len(pairs) < 2:
        return nan
    means = [
        np.mean([np.nanmean(alignments[x, y]["decoder_cosine"].to_numpy(float)[alive[x]]) for x, y in ((a, b), (b, a))])
        for a, b in pairs
        if alive[a].any() and alive[b].any()
    ]
    return float(np.std(means, ddof=1)) if len(means) > 1 else nan
