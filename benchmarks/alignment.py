"""Time the best one-to-one matching of two dictionaries, compared with SciPy's dense solver.

    python benchmarks/alignment.py [--sizes 8192 16384 32768] [--bundled | --runs run_a run_b] [--out x.json]

Half of the latents of the synthetic pair are shared: a row of the second dictionary is a row of the first plus half as
much noise (cosine about 0.9). The rest is random, D is 768, and the second is shuffled. ``--bundled`` takes two seeds
of the bundled study instead, trained here at each size (minutes; kept under ``build/alignment``), and ``--runs`` two
runs under ``--root``; both are matched by decoder, or by ``--space``.

Every side runs alone in its own process, which compiles its loops on a small pair first and then reports the time of
one matching and its peak memory:

- *ours*: ``find_best_matching`` from float32 weights, with its certificate; with the machine's fastest products
  (bfloat16 where it has instructions for them), and with float32 products only;
- *scipy*: ``linear_sum_assignment`` on the dense float64 matrix, the solver's time alone (that of the matrix is given
  separately); only up to ``--dense``, since its memory grows with the square;
- *product*: one pass over all products in blocks, by the faster of PyTorch and NumPy, neither searched nor kept: a
  lower limit for every method that visits all pairs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from outcome import about, leave, parser_of
from rich.console import Console
from rich.table import Table
from side import now

from sae.common.precision import resolve_float
from sae.dictionaries.kernels import cpu

ROOT = Path(__file__).parent.parent
TARGETS = {8192: 3.0, 16384: 6.0, 32768: 8.0}
"""the speed to reach, as a multiple of SciPy's"""
D_IN = 768
TILE = (1024, 4096)
BUNDLED = ROOT / "build" / "alignment"
BUNDLED_TOKENS = 1_000_000


def draw_pair(m: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw the synthetic pair, [M, D] each."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((m, D_IN), dtype=np.float32) for _ in range(2))
    b[: m // 2] *= 0.5
    b[: m // 2] += a[: m // 2]
    return a, b[rng.permutation(m)]


def load_weights(asked: argparse.Namespace) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if not asked.runs:
        return draw_pair(asked.size)
    from sae.study.run import Run

    saes = [Run.open(name, asked.root).sae() for name in asked.runs]
    a, b = (np.ascontiguousarray((sae.W_enc if asked.space == "encoder" else sae.W_dec).numpy()) for sae in saes)
    return (a, b) if len(a) <= len(b) else (b, a)


def train_bundled_runs(size: int, threads: int) -> list[str]:
    """Train two seeds of the bundled study at width ``size`` under ``BUNDLED``; return their names."""
    from sae.study.recipes import settings_from
    from sae.study.run import Study
    from sae.study.stage import Compute
    from sae.study.train import train_studies

    training = {"num_latents": size, "tokens": BUNDLED_TOKENS}
    settings = settings_from(ROOT / "eval_runs" / "recipes" / "demo.toml", training=training)
    (runs,) = train_studies([Study(f"m{size}", settings, (0, 1))], BUNDLED, Compute("cpu", threads))
    return [run.name for run in runs]


def measure_side(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure one side, in its own process."""
    torch.set_num_threads(asked.threads)
    if asked.side == "scipy":
        return _scipy(asked)
    if asked.side == "product":
        return _product(asked)
    from sae.alignment.matching.best import find_best_matching

    options = {"precision": asked.precision, "device": asked.device}
    rng = np.random.default_rng(1)
    find_best_matching(*rng.standard_normal((2, 3000, 16), dtype=np.float32), **options)  # compiles
    a, b = load_weights(asked)
    begun = time.perf_counter()
    found = find_best_matching(a, b, **options)
    return {
        "seconds": time.perf_counter() - begun,
        "sum": found.sum,
        "gap_per_latent": found.gap / len(a),
        "rounds": found.rounds,
        "products": round(found.share_of_pairs, 3),
        "candidates": found.candidates,
    }


def _scipy(asked: argparse.Namespace) -> dict[str, Any]:
    from scipy.optimize import linear_sum_assignment

    pair = load_weights(asked)
    begun = time.perf_counter()
    rows, columns = (w.astype(np.float64) for w in pair)
    for unit in (rows, columns):
        unit /= np.maximum(np.linalg.norm(unit, axis=1)[:, None], 1e-300)
    cosines = rows @ columns.T
    matrix = time.perf_counter() - begun
    np.negative(cosines, out=cosines)  # or SciPy would copy it
    begun = time.perf_counter()
    at = linear_sum_assignment(cosines)
    return {"seconds": time.perf_counter() - begun, "matrix_seconds": matrix, "sum": float(-cosines[at].sum())}


def _product(asked: argparse.Namespace) -> dict[str, Any]:
    kind = getattr(torch, resolve_float(asked.precision, asked.device))
    a, b = (torch.from_numpy(w).to(asked.device, kind) for w in load_weights(asked))
    out = torch.empty(TILE[0] * TILE[1], dtype=kind, device=asked.device)

    def run(rows: torch.Tensor, multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]) -> float:
        begun = now(asked.device)
        for x in rows.split(TILE[0]):
            for y in b.split(TILE[1]):
                multiply(x, y, out[: len(x) * len(y)].view(len(x), len(y)))
        return now(asked.device) - begun

    ways = [lambda x, y, out: torch.mm(x, y.T, out=out)]
    if kind == torch.float32:
        ways.append(cpu.products)
    for multiply in ways:
        run(a[: TILE[0]], multiply)
    return {"seconds": min(run(a, multiply) for multiply in ways)}


def run_side(asked: argparse.Namespace, name: str, size: int, precision: str) -> dict[str, Any]:
    """Run one side alone; return its figures with its peak memory in MiB."""
    command = [sys.executable, __file__, "--side", name, "--size", str(size), "--precision", precision]
    command += ["--threads", str(asked.threads), "--device", asked.device, "--root", str(asked.root)]
    command += ["--space", asked.space]
    command += ["--runs", *asked.runs] if asked.runs else []
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if answer.returncode:
        raise SystemExit(f"error: {name} ({precision}) at {size} failed; its output is above")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def compare(asked: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """Return the rows of one size; a ratio above 1 is in our favour."""
    peer = run_side(asked, "scipy", size, "float64") if size <= asked.dense else None
    rows = []
    best = resolve_float("auto", asked.device)
    for precision in ("auto", "float32") if best != "float32" else ("auto",):
        ours = run_side(asked, "ours", size, precision)
        floor = run_side(asked, "product", size, precision)
        rows.append(
            {
                "name": "matching" if precision == "auto" else "matching, float32 products only",
                "setting": _setting(asked, size),
                "ours": round(ours["seconds"], 2),
                "peer": peer and round(peer["seconds"], 2),
                "peer_name": peer and "scipy linear_sum_assignment",
                "unit": "s",
                "ratio": peer and round(peer["seconds"] / ours["seconds"], 2),
                "target": TARGETS.get(size),
                "peak_mib": ours["peak_mib"],
                "peer_peak_mib": peer and peer["peak_mib"],
                "peer_matrix_s": peer and round(peer["matrix_seconds"], 2),
                "product_s": round(floor["seconds"], 2),
                "gap_per_latent": ours["gap_per_latent"],
                "sum": ours["sum"],
                "sum_minus_peers": peer and ours["sum"] - peer["sum"],
                **{key: ours[key] for key in ("rounds", "products", "candidates")},
            }
        )
    return rows


def _setting(asked: argparse.Namespace, size: int) -> str:
    if asked.bundled:
        return f"M {size:,}, two seeds of the bundled study by {asked.space}"
    return f"{' × '.join(asked.runs)} by {asked.space}" if asked.runs else f"M {size:,}, D {D_IN}, half shared"


def show(rows: Sequence[dict[str, Any]], console: Console, title: str) -> None:
    table = Table(title=title, title_justify="left")
    heads = "ours s", "product s", "scipy s", "ratio", "target", "MiB", "scipy MiB", "gap / latent", "sum - scipy's"
    for name in ("", *heads):
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name))
    for row in rows:
        mode = "" if row["name"] == "matching" else " (float32)"
        peer = row["peer"] is not None
        table.add_row(
            row["setting"] + mode,
            f"{row['ours']:.2f}",
            f"{row['product_s']:.2f}",
            f"{row['peer']:.1f}" if peer else "",
            f"{row['ratio']:.1f} ×" if peer else "",
            f"{row['target']:.0f} ×" if row["target"] else "",
            f"{row['peak_mib']:,}",
            f"{row['peer_peak_mib']:,}" if peer else "",
            f"{row['gap_per_latent']:.1e}",
            f"{row['sum_minus_peers']:.0e}" if peer else "",
        )
    console.print(table)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[8192, 16384, 32768], metavar="M")
    parser.add_argument("--runs", nargs=2, metavar="RUN", help="two trained runs instead of synthetic pairs")
    parser.add_argument("--bundled", action="store_true", help="two seeds of the bundled study at each of the sizes")
    parser.add_argument("--space", choices=("decoder", "encoder"), default="decoder", help="of real runs")
    parser.add_argument("--root", type=Path, default=Path("eval_runs"), help="where the runs are")
    parser.add_argument("--dense", type=int, default=32768, help="the widest pair that SciPy is asked for")
    parser.add_argument("--device", default="cpu", help="where our products are formed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name in ("--side", "--size", "--precision"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        asked.size = int(asked.size)
        found = measure_side(asked)
        print(json.dumps({**found, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
        return
    begun, rows = time.time(), []
    if asked.runs:
        from sae.study.run import Run

        asked.root = asked.root.resolve()
        asked.sizes = [max(len(Run.open(name, asked.root).sae().W_dec) for name in asked.runs)]
    if asked.bundled:
        asked.root = BUNDLED
    for size in asked.sizes:
        asked.runs = train_bundled_runs(size, asked.threads) if asked.bundled else asked.runs
        rows += compare(asked, size)
    head = about(begun, asked.device, threads=asked.threads)
    leave(asked, rows, head, lambda: show(rows, Console(width=150), f"{head['processor']}, {asked.threads} threads"))


if __name__ == "__main__":
    main()
