"""How sure one may be of a figure over several seeds.

The pairs of S seeds are no independent observations: a seed is in S - 1 of them. So where a figure can do without one
seed, its interval is a jackknife over seeds (each left out in turn; Student's t with S - 1 degrees of freedom, since
there are few), widened to the bootstrap over latents (:mod:`sae.alignment.bootstrap`) where that reaches further: with
three seeds a jackknife may come out narrow by luck. With fewer, it is the bootstrap over latents alone, which says
nothing of other seeds.
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
    null: float
    """the figure with rotated siblings; NaN where the runs were aligned without"""


def over_seeds(
    figure: Figure,
    runs: Sequence[str],
    tables: Tables,
    nulls: Mapping[str, Tables],
    least: int = 2,
    within: tuple[float, float] = (0.0, 1.0),
    members: Mapping[str, Bools] | None = None,
) -> Measured:
    """The figure of ``runs`` with its interval (this module's head) and by chance.

    ``nulls`` are the tables of :func:`sae.alignment.nulls.read_nulls`. ``least`` is the number of runs that the figure
    takes; ``within`` its range, at which intervals are cut.
    For a fraction, ``members`` are the latents that it is of (run → [M]).
    """
    draw = LatentBootstrap(runs, tables, RESAMPLES, 0)
    of_latents = estimate(figure(draw, tables), None if members is None else draw.count(members))
    found, method = of_latents, LATENTS
    if len(runs) > least:
        parts = [[run for run in runs if run != left] for left in runs]
        left_out = [float(figure(LatentBootstrap(part, tables, 0, 0), tables)[0]) for part in parts]
        found, method = wider(jackknife(of_latents.value, left_out), of_latents), SEEDS
    return Measured(cut(found, *within), method, by_chance(figure, runs, nulls))


def by_chance(figure: Figure, runs: Sequence[str], nulls: Mapping[str, Tables]) -> float:
    """The figure of ``runs`` aligned with what shares nothing with them."""
    values = [float(figure(LatentBootstrap(runs, tables, 0, 0), tables)[0]) for tables in nulls.values()]
    return max((v for v in values if not math.isnan(v)), default=math.nan)


def jackknife(value: float, left_out: Sequence[float]) -> Estimate:
    """``value`` with the interval of the delete-one jackknife: ``left_out`` has the figure without each seed."""
    n = len(left_out)
    if n < 2 or any(math.isnan(x) for x in (value, *left_out)):
        return Estimate(value, math.nan, math.nan)
    spread = math.sqrt((n - 1) / n * float(np.sum((np.asarray(left_out) - np.mean(left_out)) ** 2)))
    half = float(special.stdtrit(n - 1, 0.975)) * spread
    return Estimate(value, value - half, value + half)


def without_each(pairs: Mapping[str, float | None]) -> dict[str, float]:
    """Run → the mean over the pairs ("a--b" → value) that it is not in; empty for fewer than three runs."""
    runs = list(dict.fromkeys(run for pair in pairs for run in pair.split("--")))
    found = {}
    for left in runs if len(runs) > 2 else []:
        rest = [v for pair, v in pairs.items() if left not in pair.split("--") and v is not None]
        found[left] = float(np.mean(rest)) if rest else math.nan
    return found


def wider(one: Estimate, other: Estimate) -> Estimate:
    """The value of ``one`` with the outer bounds of both; of either alone where the other has none."""
    lows = [e.low for e in (one, other) if not math.isnan(e.low)]
    highs = [e.high for e in (one, other) if not math.isnan(e.high)]
    return Estimate(one.value, min(lows, default=math.nan), max(highs, default=math.nan))


def cut(found: Estimate, least: float, most: float) -> Estimate:
    """The interval cut at the ends of the figure's range."""
    value, low, high = found
    return Estimate(value, low if math.isnan(low) else max(least, low), high if math.isnan(high) else min(most, high))


def standard_error(found: Estimate) -> float:
    """Of a 95 % interval, as of a normal one."""
    return (found.high - found.low) / (2 * float(special.ndtri(0.975)))


def normal(value: float, error: float) -> Estimate:
    """``value`` with the 95 % interval of its standard error."""
    half = float(special.ndtri(0.975)) * error
    return Estimate(value, value - half, value + half)
