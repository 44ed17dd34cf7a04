"""Compare the architectures on the bundled study: L0, dead latents, and stability across seeds.

    python benchmarks/architectures.py [--kinds topk relu …] [--seeds 0 1] [--tokens 9M] [--json] [--out x.json]

Trains the study of ``make demo`` under each architecture, all on one stream of activations, harvests 1M tokens that
training has seen too, aligns the seeds, and reports per architecture: firing latents per token in training's last
twentieth and over the harvest, and how far the latter is from k; dead latents over the harvest; FVU; and what fraction
of alive latents two seeds share (Paulo & Belrose, arXiv 2501.16615, report the decoder definition). The same command
resumes it. Exits with 1 if an L0 is more than 10 % from k, or 5 % or more of the latents are dead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from outcome import about, leave, parser_of
from rich.console import Console
from rich.table import Table

from autointerp.findings import evidence
from sae.common.amounts import parse_amount
from sae.common.files import read_table
from sae.dictionaries.architectures import ARCHITECTURES
from sae.settings import Settings
from sae.study.align import align_runs
from sae.study.harvest import harvest_runs
from sae.study.recipes import settings_from
from sae.study.run import Run, Study
from sae.study.stage import Compute
from sae.study.train import train_studies

ROOT = Path(__file__).parents[1]
HARVEST = 1_000_000  # tokens
L0_WITHIN, DEAD_BELOW = 0.1, 0.05
SHARED = ("decoder", "strict")


def row_of(kind: str, runs: Sequence[Run], k: int) -> dict[str, Any]:
    """What one architecture came to, as means over its seeds."""
    logs = [read_table(run.training_log_path) for run in runs]
    firing = [read_table(run.stage_path("firing")) for run in runs]
    l0 = mean(float(table["firing_frequency"].sum()) for table in firing)
    dead = mean(float(table["dead"].mean()) for table in firing)
    study = evidence.Study.open(runs[0].root, [run.name for run in runs], evidence.View())
    assert study.shared is not None
    shared = study.shared.alive
    return {
        "architecture": kind,
        "seeds": [run.seed for run in runs],
        "k": k,
        "l0": round(l0, 3),
        "l0_in_training": round(mean(float(log["l0"].tail(max(1, len(log) // 20)).mean()) for log in logs), 3),
        "dead": round(dead, 4),
        "fvu": round(mean(float(log["fvu"].tail(max(1, len(log) // 20)).mean()) for log in logs), 4),
        **{f"shared_{name}": round(shared[name].value.value, 4) for name in SHARED},
        "ok": abs(l0 / k - 1) <= L0_WITHIN and dead < DEAD_BELOW,
    }


def compare(settings: Settings, kinds: Sequence[str], seeds: Sequence[int], root: Path) -> list[dict[str, Any]]:
    """Train what is missing, all on one stream; a row per architecture."""
    compute = Compute("cpu", None)
    studies = [Study(kind, settings.with_values(training={"architecture": kind}), tuple(seeds)) for kind in kinds]
    trained = train_studies(studies, root, compute)
    harvest_runs([run for runs in trained for run in runs], compute, HARVEST)
    for runs in trained:
        align_runs(runs, compute)
    return [row_of(kind, runs, settings.training.k) for kind, runs in zip(kinds, trained, strict=True)]


def shown(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="The bundled study under each architecture", title_justify="left")
    for name in ("", "L0", "in training", "dead", "FVU", *(f"{name}-shared" for name in SHARED), ""):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        table.add_row(
            row["architecture"],
            f"{row['l0']:.2f} ({row['l0'] / row['k'] - 1:+.1%})",
            f"{row['l0_in_training']:.2f}",
            f"{row['dead']:.1%}",
            f"{row['fvu']:.4f}",
            *(f"{row[f'shared_{name}']:.3f}" for name in SHARED),
            "" if row["ok"] else "outside",
        )
    console.print(table)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "eval_runs" / "recipes" / "demo.toml")
    parser.add_argument("--kinds", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=parse_amount, help="train on fewer than the recipe says")
    parser.add_argument("--root", type=Path, default=ROOT / "build" / "architectures", help="where the runs are kept")
    asked = parser.parse_args()
    settings = settings_from(asked.recipe, training={"tokens": asked.tokens})
    rows = compare(settings, asked.kinds, asked.seeds, asked.root)
    leave(asked, rows, about(tokens=settings.training.tokens), lambda: shown(rows, Console()))
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
