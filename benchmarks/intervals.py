"""Measure how often the intervals of a latent's score hold the truth.

    python benchmarks/intervals.py [--trials 20000] [--out benchmarks/results/intervals.json] [--json]

A 95 % interval should hold the truth in 95 of 100 repetitions, at the sizes and rates that scores have: 50 contexts of
each kind, 20 of a harder kind, 5 of a stratum, and rates from guessing to near perfect. Rates (Wilson) are computed
exactly over all outcomes; balanced accuracy (MOVER) and AUROC (DeLong on the logit scale) are simulated, AUROC for
normal scores and for answers rounded to five levels, as a judge's probabilities are. Takes about two minutes at 20,000
trials. Exits with 1 if a coverage of 20 contexts or more lies outside 91 to 99.9 %.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from outcome import about, leave, parser_of
from rich.console import Console
from rich.table import Table
from scipy import stats

from autointerp.findings.statistics.correlation import METHODS
from autointerp.scoring.intervals import auroc, balanced_accuracy
from sae.common.estimate import Estimate, proportion

SIZES = (5, 20, 50, 100)
RATES = (0.5, 0.7, 0.9, 0.98)
SHIFTS = (0.0, 0.8, 2.0, 3.5)
BOUNDS = (0.91, 0.999)


def simulated(make: Callable[[np.random.Generator], Estimate], truth: float, trials: int) -> tuple[float, float]:
    """Coverage and mean width over ``trials`` repetitions."""
    rng = np.random.default_rng(0)
    found = [make(rng) for _ in range(trials)]
    held = float(np.mean([x.low <= truth <= x.high for x in found]))
    return held, float(np.mean([x.high - x.low for x in found]))


def of_rates() -> Iterator[dict[str, Any]]:
    for n in SIZES:
        every = [proportion(successes, n) for successes in range(n + 1)]
        for p in RATES:
            chance = stats.binom.pmf(np.arange(n + 1), n, p)
            held = sum(c for c, x in zip(chance, every, strict=True) if x.low <= p <= x.high)
            width = sum(c * (x.high - x.low) for c, x in zip(chance, every, strict=True))
            yield {"name": "rate", "setting": f"p {p}, {n} contexts", "n": n, "coverage": held, "width": width}


def of_balanced_accuracy(trials: int) -> Iterator[dict[str, Any]]:
    for n_active, n_inactive in ((20, 20), (50, 50), (50, 20), (100, 100)):
        truth = np.arange(n_active + n_inactive) < n_active
        for tpr, tnr in ((0.5, 0.5), (0.7, 0.74), (0.9, 0.6), (0.98, 0.98)):
            chance = np.where(truth, tpr, 1 - tnr)
            held, width = simulated(
                lambda rng, t=truth, c=chance: balanced_accuracy(t, rng.random(len(t)) < c),  # type: ignore[misc]
                (tpr + tnr) / 2,
                trials,
            )
            setting = f"TPR {tpr}, TNR {tnr}, {n_active} + {n_inactive} contexts"
            row = {"setting": setting, "n": min(n_active, n_inactive), "coverage": held, "width": width}
            yield {"name": "balanced accuracy", **row}


def of_auroc(trials: int) -> Iterator[dict[str, Any]]:
    cuts = np.array([-0.5, 0.5, 1.5, 2.5])
    for n in (20, 50):
        truth = np.arange(2 * n) < n
        for shift in SHIFTS:
            for levels in (None, cuts):
                held, width = simulated(
                    lambda rng, t=truth, s=shift, c=levels: auroc(t, _answers(rng, t, s, c)),  # type: ignore[misc]
                    _true_auroc(shift, levels),
                    trials,
                )
                kind = "normal" if levels is None else "five levels"
                row = {"setting": f"shift {shift}, {kind}, 2 × {n} contexts", "n": n}
                yield {"name": "AUROC", **row, "coverage": held, "width": width}


def _answers(rng: np.random.Generator, truth: np.ndarray, shift: float, cuts: np.ndarray | None) -> np.ndarray:
    scores = rng.normal(size=len(truth)) + shift * truth
    return scores if cuts is None else np.searchsorted(cuts, scores).astype(float)


def _true_auroc(shift: float, cuts: np.ndarray | None) -> float:
    if cuts is None:
        return float(stats.norm.cdf(shift / math.sqrt(2)))
    edges = np.concatenate([[-np.inf], cuts, [np.inf]])
    silent, active = (np.diff(stats.norm.cdf(edges - mean)) for mean in (0.0, shift))
    return float(sum(active[i] * (silent[:i].sum() + silent[i] / 2) for i in range(len(active))))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--trials", type=int, default=20_000)
    options = parser.parse_args()
    rows = [*of_rates(), *of_balanced_accuracy(options.trials), *of_auroc(options.trials)]
    for row in rows:
        row["as_asked"] = bool(row["n"] < 20 or BOUNDS[0] <= row["coverage"] <= BOUNDS[1])
    methods = {name: METHODS[name] for name in ("proportion", "balanced_accuracy", "auroc")}
    leave(options, rows, about(trials=options.trials, methods=methods), lambda: shown(rows))
    return 0 if all(row["as_asked"] for row in rows) else 1


def shown(rows: list[dict[str, Any]]) -> None:
    table = Table("what", "setting", "coverage", "mean width", "")
    for row in rows:
        figures = f"{row['coverage']:.3f}", f"{row['width']:.3f}"
        table.add_row(row["name"], row["setting"], *figures, "" if row["as_asked"] else "outside")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
