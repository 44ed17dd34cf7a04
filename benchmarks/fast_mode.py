"""Compare training by rounded products with training in float32, on the bundled study.

    python benchmarks/fast_mode.py [--modes int8 bfloat16] [--triples 3] [--root build/fast-mode] [--out x.json]

Trains the study of ``make demo`` in float32 for several triples of seeds and in each rounded mode for the first triple,
harvests and aligns. Compares the FVU at the end of training, and the fraction of alive latents that two seeds share:
the mean of a mode's three pairs against the mean of all of float32's, by these pairs' spread. It also counts how often
two precisions choose different latents for the same token with the trained weights. Takes minutes for each triple; the
same command resumes it. Exits with 1 if a mode falls outside.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from outcome import about, keep, parser_of
from rich.console import Console
from rich.table import Table

from autointerp.findings import evidence
from sae.activations.stream import TrainingBatches
from sae.alignment.overlap import Overlap
from sae.common.files import read_table
from sae.common.precision import Precision
from sae.dictionaries.encoding import topk_firings
from sae.settings import Settings
from sae.study.align import align_runs
from sae.study.recipes import settings_from
from sae.study.run import Run, Study
from sae.study.stage import Compute, open_source
from sae.study.train import train_studies

ROOT = Path(__file__).parents[1]
DEFINITIONS = ("strict", "lenient")
WITHIN = 0.01  # of float32's FVU
Z = 2.0  # standard errors by which the mean overlap of three pairs may differ from that of float32's pairs


def fvu(run: Run) -> float:
    """Fraction of variance unexplained over the last twentieth of the training, weighted alike."""
    rows = read_table(run.training_log_path)
    return float(rows["fvu"].tail(max(1, len(rows) // 20)).mean())


def shared_by(runs: Sequence[Run]) -> dict[str, Overlap]:
    study = evidence.Study.open(runs[0].root, [run.name for run in runs], evidence.View())
    assert study.shared is not None
    return study.shared.alive


def overlaps(runs: Sequence[Run]) -> dict[str, float]:
    """What fraction of alive latents each pair shares, "definition a--b", and their mean over the pairs."""
    found: dict[str, float] = {}
    for name in DEFINITIONS:
        pairs = {f"{a.name}--{b.name}": shared_by([a, b])[name].value.value for a, b in combinations(runs, 2)}
        found |= {f"{name} {pair}": value for pair, value in pairs.items()}
        found[name] = statistics.mean(pairs.values())
    return found


def chosen_differently(run: Run, mode: Precision, compute: Compute, root: Path) -> dict[str, float]:
    """For real activations and the run's weights: of tokens and of slots, the fraction in which ``mode`` differs."""
    source = open_source([run.settings], root, compute, cache="none")
    training = run.settings.training
    stream = source.stream(run.settings.subject.hookpoint)
    batches = TrainingBatches(stream, training.tokens, training.batch_tokens, run.settings.corpus.order_seed)
    sae = run.sae().to(stream.device)
    tokens = differing = slots = swapped = 0
    for step in range(0, len(batches), max(1, len(batches) // 8)):
        centred = sae.centred(batches[step])
        fires = []
        exactly: Precision = "float32"
        for precision in (exactly, mode):
            firings = topk_firings(centred, sae.W_enc, sae.b_enc, training.k, precision)
            dense = torch.zeros(len(centred), sae.num_latents, device=centred.device)
            fires.append(dense.scatter_add_(1, firings.indices, firings.activations) > 0)
        lost = (fires[0] & ~fires[1]).sum(1)
        tokens, differing = tokens + len(lost), differing + int((lost > 0).sum())
        slots, swapped = slots + int(fires[0].sum()), swapped + int(lost.sum())
    return {"tokens": tokens, "of_tokens": differing / tokens, "of_slots": swapped / slots}


def compare(
    settings: Settings, modes: Sequence[Precision], triples: int, root: Path, compute: Compute
) -> dict[str, Any]:
    """Train what is missing, and compare each mode with float32."""
    exact = [_study(settings, "float32", i, root, compute)[1] for i in range(triples)]
    found = {}
    for mode in modes:
        runs, rounded = _study(settings, mode, 0, root, compute)
        found[mode] = _beside(rounded, exact)
        found[mode]["chosen_differently"] = chosen_differently(runs[0], mode, compute, root)
    return {"float32": exact, "modes": found}


def _study(
    settings: Settings, precision: Precision, number: int, root: Path, compute: Compute
) -> tuple[list[Run], dict[str, Any]]:
    """Three seeds, trained where they are not yet, and what is compared of them."""
    asked, seeds = settings.with_values(training={"precision": precision}), list(range(3 * number, 3 * number + 3))
    (runs,) = train_studies([Study(f"{precision}-{number}", asked, tuple(seeds))], root, compute)
    align_runs(runs, compute, nulls=False)
    return runs, {"seeds": seeds, "fvu": [fvu(run) for run in runs], **overlaps(runs)}


def _beside(rounded: dict[str, Any], exact: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare one mode's triple with all of float32's."""
    ratio = statistics.mean(rounded["fvu"]) / statistics.mean(exact[0]["fvu"])
    spread = {}
    for name in DEFINITIONS:
        pairs = [value for triple in exact for key, value in triple.items() if key.startswith(f"{name} ")]
        mean, sd = statistics.mean(pairs), statistics.stdev(pairs)
        # The pairs of a triple are taken for independent, which makes the margin narrower than it would be.
        z = (rounded[name] - mean) / (sd * (1 / 3 + 1 / len(pairs)) ** 0.5)
        spread[name] = {"float32": mean, "sd_of_pairs": sd, "rounded": rounded[name], "z": z}
    return {
        "fvu_ratio": ratio,
        "fvu_within": abs(ratio - 1) <= WITHIN,
        "overlap": spread,
        "overlap_within": all(abs(s["z"]) <= Z for s in spread.values()),
        "study": rounded,
    }


def shown(result: dict[str, Any], console: Console) -> None:
    table = Table(title="The bundled study in float32 and with rounded products", title_justify="left")
    for name in ("precision", "seeds", "FVU", *DEFINITIONS):
        table.add_column(name)
    studies = [("float32", study) for study in result["float32"]]
    for precision, study in studies + [(mode, found["study"]) for mode, found in result["modes"].items()]:
        pairs = [[v for key, v in study.items() if key.startswith(f"{name} ")] for name in DEFINITIONS]
        table.add_row(
            precision,
            " ".join(map(str, study["seeds"])),
            " ".join(f"{value:.4f}" for value in study["fvu"]),
            *(" ".join(f"{value:.3f}" for value in values) for values in pairs),
        )
    console.print(table)
    for mode, found in result["modes"].items():
        console.print(
            f"{mode}: FVU {found['fvu_ratio']:.4f} times that of the same seeds in float32 ({WITHIN:.0%} asked)"
        )
        for name, s in found["overlap"].items():
            console.print(
                f"  {name} overlap: {s['rounded']:.4f}, {s['float32']:.4f} in float32 "
                f"(standard deviation of pairs {s['sd_of_pairs']:.4f}): z = {s['z']:+.2f}"
            )
        differing = found["chosen_differently"]
        console.print(
            f"  other latents chosen: for {differing['of_tokens']:.3%} of {differing['tokens']:,} tokens, "
            f"in {differing['of_slots']:.4%} of slots"
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "eval_runs" / "recipes" / "demo.toml")
    parser.add_argument("--modes", nargs="+", choices=("int8", "bfloat16"), default=["int8", "bfloat16"])
    parser.add_argument("--triples", type=int, default=3, help="of seeds, in float32")
    parser.add_argument("--tokens", type=int, help="train on fewer than the recipe says")
    parser.add_argument("--root", type=Path, default=ROOT / "build" / "fast-mode", help="where the runs are kept")
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    settings = settings_from(asked.recipe, training={"tokens": asked.tokens})
    result = compare(settings, asked.modes, asked.triples, asked.root, Compute("cpu", asked.threads))
    if asked.out is not None:
        keep(asked.out, {**about(), **result})
    if asked.json:
        print(json.dumps(result, indent=1))
    else:
        shown(result, Console())
    sys.exit(not all(of["fvu_within"] and of["overlap_within"] for of in result["modes"].values()))


if __name__ == "__main__":
    main()
