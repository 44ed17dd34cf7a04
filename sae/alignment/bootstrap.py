"""Intervals for figures about several runs: resample latents together with their partners.

The same feature found by several runs is one observation. Resampling each run by itself makes intervals too narrow.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import nan

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.common.estimate import FEW, Estimate, effective_number, proportion

INTERVALS = (
    "percentile bootstrap over latents, 1000 resamples, seeded; the unit is a latent of one run "
    f"with its decoder-matched partners in the other runs; Wilson score interval where a fraction has under {FEW} "
    f"cases, or all but under {FEW}"
)

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Tables = Mapping[tuple[str, str], pd.DataFrame]


def partner_units(runs: Sequence[str], alignments: Tables) -> dict[str, NDArray[np.integer]]:
    """Return run → [M] the unit of each latent: a latent of the widest run, with its decoder-matched partners."""
    sizes = {run: len(alignments[run, next(x for x in runs if x != run)]) for run in runs}
    widest = max(runs, key=lambda run: sizes[run])
    return {
        run: np.arange(sizes[run]) if run == widest else alignments[run, widest]["decoder_partner"].to_numpy()
        for run in runs
    }


class LatentBootstrap:
    """Resample the latents of all runs of a study at once, by their units (:func:`partner_units`)."""

    def __init__(self, runs: Sequence[str], alignments: Tables, resamples: int, seed: int) -> None:
        self.runs, self.seed = list(runs), seed
        self.unit = partner_units(runs, alignments)
        self.n_units = max(len(unit) for unit in self.unit.values())
        self.weights = _weights(self.n_units, resamples, seed)

    @functools.cached_property
    def _floats(self) -> Floats:
        """Return the weights as floats for BLAS; used only if they are few."""
        return self.weights.astype(np.float64)

    def count(self, members: Mapping[str, Bools]) -> int:
        """Return the number of units that hold a member of any run."""
        held = np.zeros(self.n_units, dtype=bool)
        for run in self.runs:
            held[self.unit[run][members[run]]] = True
        return int(held.sum())

    def fractions(self, values: Mapping[str, NDArray], members: Mapping[str, Bools]) -> Floats:
        """Return the mean of values [M, C] over each run's members or NaN: [resamples + 1, S, C], sample first."""
        n_columns = next(iter(values.values())).shape[1]
        sums = np.zeros((self.n_units, len(self.runs), n_columns + 1))
        for r, run in enumerate(self.runs):
            held = members[run]
            sums[self.unit[run][held], r, :n_columns] = values[run][held]
            sums[self.unit[run][held], r, n_columns] = 1
        flat = sums.reshape(self.n_units, -1)
        parts = [flat.sum(axis=0)[None]]
        chunk = max(1, 4_000_000 // self.n_units)
        for done in range(0, len(self.weights), chunk):
            whole = chunk >= len(self.weights)
            parts.append((self._floats if whole else self.weights[done : done + chunk].astype(np.float64)) @ flat)
        total = np.concatenate(parts).reshape(-1, len(self.runs), n_columns + 1)
        with np.errstate(invalid="ignore"):
            return total[:, :, :n_columns] / total[:, :, n_columns:]


@functools.lru_cache(maxsize=4)
def _weights(n_units: int, resamples: int, seed: int) -> NDArray[np.uint8]:
    """Draw how often each resample holds each unit: [resamples, n_units]; kept, since a report uses them many times."""
    rng = np.random.default_rng(seed)
    weights = np.empty((resamples, n_units), dtype=np.uint8)  # plenty for a Poisson count of mean 1
    for row in weights:
        row[:] = np.bincount(rng.integers(n_units, size=n_units), minlength=n_units)
    weights.setflags(write=False)
    return weights


def mean_over(values: Floats, axis: int) -> Floats:
    """Return the mean without NaN (a run without alive latents has no fraction); NaN where nothing is left."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=axis) / known.sum(axis=axis)


def estimate(draws: Floats, units: int | None = None) -> Estimate:
    """Return the sample's value (the first draw) with the 95 % percentile interval of the other draws.

    ``units`` is the number of units of a fraction. If under :data:`sae.common.estimate.FEW` units are cases (or are
    not), or all draws agree, the interval is Wilson's at the effective number of units
    (:func:`sae.common.estimate.fraction`).
    """
    value, resampled = float(draws[0]), draws[1:][~np.isnan(draws[1:])]
    if np.isnan(value) or not len(resampled):
        return Estimate(value, nan, nan)
    low, high = np.quantile(resampled, [0.025, 0.975])
    if units and 0 <= value <= 1:
        n = min(units, effective_number(value, float(resampled.var()), units))
        if low == high or min(value, 1 - value) * n < FEW:
            return proportion(value * n, n)
    return Estimate(value, min(float(low), value), max(float(high), value))
