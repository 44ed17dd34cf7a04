"""Compare adaptive scoring with fixed sizes and with naive stopping: coverage, bias, and number of contexts.

    python benchmarks/adaptive_scoring.py [--json]

Exact, not simulated: sums the probability of every sequence of verdicts, for true rates from .5 to .98. Three ways:

* ``adaptive``: looks, rule, estimate and interval of ``autointerp.scoring.adaptive``;
* ``naive``: the same looks, but stopping as soon as the usual interval (MOVER of Wilson's) is narrow enough, and
  reporting that interval and the raw rates;
* ``fixed``: the whole test set, with the usual interval.

Prints the worst coverage over the grid, the largest bias, and the mean number of contexts judged if both rates are .6,
.75, .85, .9, .95 and .98.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from outcome import about, leave, parser_of
from scipy import stats

from autointerp.scoring.adaptive import Look, _paths, interval, schedule, stops
from sae.common.estimate import proportion

RATES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98)
SHOWN = (0.6, 0.75, 0.85, 0.9, 0.95, 0.98)
HALF_WIDTHS = (0.05, 0.065, 0.08, 0.1, 0.127, 0.15)
SIZES = (30, 50, 95, 150)

Array = NDArray[np.float64]
Way = Callable[[list[Look], int, float], tuple[NDArray[np.bool_], Array, Array, Array]]
"""Looks, the number of one, half-width → for all counts there: whether it stops, the score, and its interval's ends."""


def adaptive(looks: list[Look], number: int, half_width: float) -> tuple[NDArray[np.bool_], Array, Array, Array]:
    look = looks[number]
    paths = _paths(tuple(looks[: number + 1]), half_width)
    with np.errstate(invalid="ignore"):  # 0 / 0 where no course leads
        value = np.nan_to_num((paths[1] + paths[2]) / paths[0] / 2)
    right = np.arange(look.n_active + 1.0)[:, None], np.arange(look.n_inactive + 1.0)[None]
    low, high = interval(right[0], look.n_active, right[1], look.n_inactive)
    return stops(look, half_width), value, np.minimum(low, value), np.maximum(high, value)


def naive(looks: list[Look], number: int, half_width: float) -> tuple[NDArray[np.bool_], Array, Array, Array]:
    rates = [np.array([proportion(x, n) for x in range(n + 1)]) for n in looks[number]]
    (tpr, low_1, high_1), (tnr, low_2, high_2) = rates[0].T[:, :, None], rates[1].T[:, None, :]
    value = (tpr + tnr) / 2
    low = value - np.hypot(tpr - low_1, tnr - low_2) / 2
    high = value + np.hypot(high_1 - tpr, high_2 - tnr) / 2
    return (high - low) / 2 <= half_width, value, np.maximum(low, 0), np.minimum(high, 1)


def operation(way: Way, looks: list[Look], half_width: float) -> dict[tuple[float, float], tuple[float, ...]]:
    """(TPR, TNR) → coverage, bias, contexts judged on average, standard error of the score. Exact."""
    parts = [way(looks, number, half_width) for number in range(len(looks))]
    found: dict[tuple[float, float], tuple[float, ...]] = {}
    for tpr, tnr in itertools.combinations_with_replacement(RATES, 2):
        truth, before = (tpr + tnr) / 2, Look(0, 0)
        chance, total = np.ones((1, 1)), np.zeros(4)
        for number, (look, (stop, value, low, high)) in enumerate(zip(looks, parts, strict=True)):
            chance = _moved(before.n_active, look.n_active, tpr) @ chance
            chance = chance @ _moved(before.n_inactive, look.n_inactive, tnr).T
            here = chance if number == len(looks) - 1 else np.where(stop, chance, 0)
            covered = (low <= truth + 1e-12) & (truth <= high + 1e-12)
            off = value - truth
            total += [(here * part).sum() for part in (covered, off, sum(look), off**2)]
            chance, before = chance - here, look
        found[tpr, tnr] = (total[0], total[1], total[2], float(np.sqrt(total[3] - total[1] ** 2)))
    return found


def _moved(before: int, now: int, rate: float) -> Array:
    more = np.arange(now + 1)[:, None] - np.arange(before + 1)[None]
    return np.asarray(stats.binom.pmf(more, now - before, rate))


def row(name: str, n: int, half_width: float | None) -> dict[str, object]:
    looks = [Look(n, n)] if name == "fixed" else schedule(n, n)
    found = operation(adaptive if name == "adaptive" else naive, looks, half_width or 0.0)
    worst = min(found, key=lambda rates: found[rates][0])
    return {
        "name": name,
        "at_most": 2 * n,
        "half_width": half_width,
        "least_coverage": round(float(found[worst][0]), 4),
        "least_at": worst,
        "below_94_percent": int(sum(cell[0] < 0.94 for cell in found.values())),
        "cells": len(found),
        "largest_bias": round(float(max((cell[1] for cell in found.values()), key=abs)), 5),
        "contexts": {rate: round(float(found[rate, rate][2]), 1) for rate in SHOWN},
        "standard_error": {rate: round(found[rate, rate][3], 4) for rate in SHOWN},
    }


def main() -> None:
    parser = parser_of(__doc__)
    given = parser.parse_args()
    rows = []
    for n in SIZES:
        rows.append(row("fixed", n, None))
        for half_width in HALF_WIDTHS:
            rows += [row(name, n, half_width) for name in ("adaptive", "naive")]
            if not given.json:
                for made in rows[-3:] if half_width == HALF_WIDTHS[0] else rows[-2:]:
                    _show(made)
    leave(given, rows, about(), lambda: None)


def _show(made: dict[str, object]) -> None:
    width = "" if made["half_width"] is None else f" ± {made['half_width']}"
    print(
        f"{made['name']:8} ≤ {made['at_most']}{width}: coverage at least {made['least_coverage']:.4f} at "
        f"{made['least_at']}, below .94 in {made['below_94_percent']} of {made['cells']}; bias at most "
        f"{made['largest_bias']:+.5f}; contexts {made['contexts']}; standard error {made['standard_error']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
