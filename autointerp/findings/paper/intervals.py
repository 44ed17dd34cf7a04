"""Intervals of figures over several seeds.

The pairs of S seeds are not independent: a seed is in S - 1 of them. So with more seeds than a figure needs, its
interval is a jackknife over seeds (Student's t with S - 1 degrees of freedom), widened to the bootstrap over latents
(:mod:`sae.alignment.bootstrap`) if that is wider. With fewer seeds it is the bootstrap alone, which does not cover
other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from sae.alignment.bootstrap import Bools, Floats, LatentBootstrap, Tables, estimate
from sae.common.estimate import Estimate

RESAMPLES = 1000
SEEDS = "jackknife over seeds, no narrower than the bootstrap over latents"
LATENTS = "bootstrap over latents; it says nothing of other seeds"

#: A figure of the runs that a bootstrap is over: [R + 1], the sample's own value first.
Figure = Callable[[LatentBootstrap, Tables], Floats]


class Measured(NamedTuple):
    estimate: Estimate
    method: str
    chance: float
    """the figure with rotated siblings; 0 if the runs were aligned without"""


def over_seeds(
    figure: Figure,
    runs: Sequence[str],
    tables: Tables,
    nulls: Mapping[str, Tables],
    least: int = 2,
    within: tuple[float, float] = (0.0, 1.0),
    members: Mapping[str, Bools] | None = None,
) -> Measured:
    """Return the figure of ``runs`` with its interval, and by chance.

    Args:
        nulls: :func:`sae.alignment.nulls.read_nulls`.
        least: the number of runs that the figure needs.
        within: the figure's range, at which intervals are cut.
        members: for a fraction, the latents that it is of (run → [M]).
    """
    draw = LatentBootstrap(runs, tables, RESAMPLES, 0)
    of_latents = estimate(figure(draw, tables), None if members is None else draw.count(members))
    (value, low, high), method = of_latents, LATENTS
    if len(runs) > least:
        left_out = [value_of(figure, [run for run in runs if run != left], tables) for left in runs]
        (value, low, high), method = wider(jackknife(of_latents.value, left_out), of_latents), SEEDS
    low, high = low if math.isnan(low) else max(within[0], low), high if math.isnan(high) else min(within[1], high)
    by_chance = [value_of(figure, runs, of_null) for of_null in nulls.values()]
    chance = max((x for x in by_chance if not math.isnan(x)), default=0.0)
    return Measured(Estimate(value, low, high), method, chance)


def value_of(figure: Figure, runs: Sequence[str], tables: Tables) -> float:
    """Return the figure without an interval."""
    return float(figure(LatentBootstrap(runs, tables, 0, 0), tables)[0])


def jackknife(value: float, left_out: Sequence[float]) -> Estimate:
    """Return ``value`` with its delete-one jackknife interval; ``left_out`` has the figure without each seed."""
    n = len(left_out)
    if n < 2 or any(math.isnan(x) for x in (value, *left_out)):
        return Estimate(value, math.nan, math.nan)
    spread = math.sqrt((n - 1) / n * float(np.sum((np.asarray(left_out) - np.mean(left_out)) ** 2)))
    half = float(special.stdtrit(n - 1, 0.975)) * spread
    return Estimate(value, value - half, value + half)


def without_each(pairs: Mapping[str, float | None]) -> dict[str, float]:
    """Map each run to the mean over the pairs ("a--b" → value) without it; empty for fewer than three runs."""
    runs = list(dict.fromkeys(run for pair in pairs for run in pair.split("--")))
    found = {}
    for left in runs if len(runs) > 2 else []:
        rest = [v for pair, v in pairs.items() if left not in pair.split("--") and v is not None]
        found[left] = float(np.mean(rest)) if rest else math.nan
    return found


def wider(one: Estimate, other: Estimate) -> Estimate:
    """Return the value of ``one`` with the outer bounds of both, ignoring NaN."""
    lows = [e.low for e in (one, other) if not math.isnan(e.low)]
    highs = [e.high for e in (one, other) if not math.isnan(e.high)]
    return Estimate(one.value, min(lows, default=math.nan), max(highs, default=math.nan))


def standard_error(found: Estimate) -> float:
    """Return the standard error of a normal 95 % interval."""
    return (found.high - found.low) / (2 * float(special.ndtri(0.975)))


def normal(value: float, error: float) -> Estimate:
    """Return ``value`` with the 95 % interval of its standard error."""
    half = float(special.ndtri(0.975)) * error
    return Estimate(value, value - half, value + half)
