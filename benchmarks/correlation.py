"""Test the corrected correlation of score and similarity by simulation.

    python benchmarks/correlation.py [--rounds 200] [--latents 200] [--json] [--out x.json]

Latents have a known true score and a known similarity. Each is scored by n verdicts on either kind of context, as in
the program. The program's own functions compute the raw correlation, the reliability and the corrected correlation,
with their intervals. Over many such studies, the means are compared with the truth, and the intervals that hold it are
counted. ``all`` latents are scored; or some fail, ``by chance`` or more likely if their true score is low (``hard
ones``); or only the upper half of the similarities is used (``half the range``). ``truth_of_these`` is the correlation
of the scored latents with endless verdicts. Takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from made_scores import SHAPES, Made, rank_correlation, score
from numpy.typing import NDArray
from outcome import about, leave, parser_of
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autointerp.findings.reliability import Halves, corrected_spearman
from autointerp.findings.statistics.resampling import Resamples, interval_of

Bools = NDArray[np.bool_]

LEFT: dict[str, Callable[[Made, np.random.Generator], Bools]] = {
    "all": lambda made, _: np.ones(len(made.true), bool),
    "by chance": lambda made, rng: rng.random(len(made.true)) < 0.6,
    "hard ones": lambda made, rng: rng.random(len(made.true)) < np.clip(3 * (made.true - 0.5), 0, 1),
    "half the range": lambda made, _: made.similarity > np.median(made.similarity),
}
"""Which latents are left to be scored."""


def cell(shape: str, correlation: float, n: int, left: str, latents: int, rounds: int) -> dict[str, Any]:
    """One setting: means over ``rounds`` studies of ``latents`` latents, and coverages."""
    rng = np.random.default_rng([int(correlation * 100), n, list(SHAPES).index(shape), list(LEFT).index(left)])
    large = Made.draw(100_000, correlation, shape, rng)
    kept = LEFT[left](large, rng)
    truth = rank_correlation(large.true, large.similarity)
    of_these = rank_correlation(large.true[kept], large.similarity[kept])
    part = large.only(np.flatnonzero(kept)[:10_000])
    retest = rank_correlation(score(part.verdicts(n, rng)), score(part.verdicts(n, rng)))
    found = []
    for _ in range(rounds):
        made = Made.draw(latents, correlation, shape, rng)
        made = made.only(np.flatnonzero(LEFT[left](made, rng)))
        size, verdicts = len(made.true), made.verdicts(n, rng)
        measured, resamples = score(verdicts), Resamples(np.arange(size), 300)
        halves = Halves.of(verdicts, range(size), splits=10)
        result = corrected_spearman(measured, made.similarity, made.frequency, halves, resamples)
        raw = interval_of(resamples.correlations([measured, made.similarity])[:, 0, 1])
        corrected = result.spearman
        found.append(
            [
                *(raw.value, corrected.value, result.reliability.value),
                *(e.low <= of_these <= e.high if np.isfinite(e.low) else np.nan for e in (raw, corrected)),
                result.reliability.low <= retest <= result.reliability.high,
            ]
        )
    means = np.nanmean(np.array(found, dtype=float), axis=0)
    names = ("raw", "corrected", "reliability", "raw_covers", "corrected_covers", "reliability_covers")
    return {
        "shape": shape,
        "correlation": correlation,
        "n": n,
        "left": left,
        "truth": truth,
        "truth_of_these": of_these,
        "retest": retest,
        **dict(zip(names, means.tolist(), strict=True)),
        "uncorrected_studies": int(np.isnan(np.array(found, dtype=float)[:, 1]).sum()),
    }


def shown(rows: list[dict[str, Any]], console: Console) -> None:
    columns = [name for name in rows[0] if name != "uncorrected_studies"]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console.print(table)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="studies in each setting")
    parser.add_argument("--latents", type=int, default=200, help="in a study")
    asked = parser.parse_args()
    settings: list[tuple[str, float, int, str]] = list(product(SHAPES, (0.0, 0.4, 0.8), (10, 50), ("all",)))
    settings += list(product(("even", "paper"), (0.6,), (25,), [left for left in LEFT if left != "all"]))
    console = Console(stderr=True)
    rows = [
        cell(*s, latents=asked.latents, rounds=asked.rounds) for s in track(settings, "simulating", console=console)
    ]
    leave(asked, rows, about(latents=asked.latents, rounds=asked.rounds), lambda: shown(rows, Console()))


if __name__ == "__main__":
    main()
