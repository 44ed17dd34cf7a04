"""Time the training of S seeds, whole optimiser steps in token·seeds per second, compared with the peers.

    python benchmarks/training.py [--shapes 256x4096x32x4096 …] [--threads 2] [--rounds 5] [--json] [--out x.json]

Every side is a process of its own that waits until it is asked: in each round each side trains a few steps of all S
seeds, one side after the other, so that what else the machine does falls on all of them alike. A side's figure is
the median of its rounds, the first of which (compilation, growing heaps) does not count. Each side runs in float32
and with bfloat16 products, ours on a CPU in int8 too; compared are float32 with float32, and the fastest mode of ours
with the faster mode of the peer's. Modes that the machine can only emulate are skipped. The peers live in
``.venv-peers`` (see the Makefile) or, where that is not, in ``.venv-bench``, which has only what their trainers need
and is made here; or name a Python that has them with ``--peers-python``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from outcome import about, leave, parser_of
from rich.console import Console
from rich.table import Table
from side import Task, now

from sae.common.precision import is_emulated
from sae.dictionaries.kernels import cpu

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".venv-peers", HERE.parent / ".venv-bench"
SHAPES = {"cpu": ["256x4096x32x4096", "768x8192x32x2048"], "cuda": ["768x32768x32x8192"]}
PEERS = ("sparsify", "dictionary_learning")
MODES = {"ours": ("float32", "bfloat16", "int8"), **dict.fromkeys(PEERS, ("float32", "bfloat16"))}


@dataclass
class Side:
    """One side in one mode, and what it has shown so far."""

    task: Task
    process: subprocess.Popen[str]
    about: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """of a step of all seeds, round by round"""
    peak: int = 0
    """bytes: the process's resident memory, or what it held on the GPU"""

    @classmethod
    def start(cls, task: Task, python: str) -> Side:
        script = HERE / ("side_ours.py" if task.side == "ours" else "side_peers.py")
        process = subprocess.Popen([python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        side = cls(task, process)
        side._tell(task.line())
        side.about = side._hear()["about"]
        return side

    def round(self, steps: int) -> float:
        """Train ``steps`` steps; return the seconds they took."""
        self._tell(json.dumps({"steps": steps}))
        heard = self._hear()
        self.peak = heard["peak"]
        return float(heard["seconds"])

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    @property
    def rate(self) -> float:
        """Token·seeds per second."""
        return self.task.tokens * self.task.seeds / statistics.median(self.seconds)

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._ended()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._ended()
        return dict(json.loads(line))

    def _ended(self) -> NoReturn:
        raise SystemExit(f"error: {self.task.side} ({self.task.mode}) ended; what it said is above")


def compare(tasks: Sequence[Task], peers_python: str, rounds: int, seconds: float) -> list[Side]:
    """Let all sides train in turn, each for about ``seconds`` a round."""
    sides: list[Side] = []
    try:
        for task in tasks:
            sides.append(Side.start(task, sys.executable if task.side == "ours" else peers_python))
        steps = []
        for side in sides:
            side.round(1)
            steps.append(max(1, round(seconds / side.round(1))))
        for _ in range(rounds):
            for side, n in zip(sides, steps, strict=True):
                side.seconds.append(side.round(n) / n)
    finally:
        for side in sides:
            side.close()
    return sides


def product_rate(task: Task) -> float:
    """Token·seeds per second of the dense encoder product alone: what no trainer that needs it can exceed.

    The fastest of PyTorch's product, in two sizes of pieces, and of the one that training uses on this machine.
    """
    kind = getattr(torch, task.mode)
    multiply, result = (torch._int_mm, torch.int32) if kind == torch.int8 else (torch.mm, kind)
    torch.set_num_threads(task.threads)
    x = torch.randn(task.tokens, task.d_in, device=task.device).to(kind)
    weight = torch.randn(task.num_latents, task.d_in, device=task.device).to(kind)
    best = float("inf")
    for mebibytes in (8, 32) if task.device == "cpu" else (1024,):
        rows = max(1, mebibytes * 2**20 // (result.itemsize * task.num_latents))
        out = torch.empty(min(rows, task.tokens), task.num_latents, dtype=result, device=task.device)
        for _ in range(8):
            begun = now(task.device)
            for part in x.split(rows):
                multiply(part, weight.T, out=out[: len(part)])
            best = min(best, now(task.device) - begun)
            if kind == torch.float32:
                begun = now(task.device)
                for part in x.split(rows):
                    cpu.products(part, weight, out[: len(part)])
                best = min(best, now(task.device) - begun)
    return task.tokens / best


def rows_of(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """The comparisons, one row each; a ratio above 1 is in our favour."""
    ours = {side.task.mode: side for side in sides if side.task.side == "ours"}
    best = max(ours.values(), key=lambda side: side.rate)
    rows = []
    for peer in PEERS:
        theirs = {side.task.mode: side for side in sides if side.task.side == peer}
        if not theirs:
            continue
        their_best = max(theirs.values(), key=lambda side: side.rate)
        pairs = [("training, best against best", best, their_best)]
        if "float32" in theirs and "float32" in ours:
            pairs.append(("training, float32 against float32", ours["float32"], theirs["float32"]))
        rows += [_row(name, a, b) for name, a, b in pairs]
    if not rows:
        rows = [_row("training", side, None) for side in ours.values()]
    return rows


def _row(name: str, ours: Side, peer: Side | None) -> dict[str, Any]:
    task = ours.task
    ceiling = product_rate(task)
    return {
        "name": name,
        "setting": f"D {task.d_in}, M {task.num_latents}, k {task.k}, batch {task.tokens}, {task.seeds} seeds",
        "ours": round(ours.rate),
        "peer": None if peer is None else round(peer.rate),
        "peer_name": None if peer is None else peer.task.side,
        "unit": "token·seeds/s",
        "ratio": None if peer is None else round(ours.rate / peer.rate, 2),
        "peak_mib": round(ours.peak / 2**20),
        "peer_peak_mib": None if peer is None else round(peer.peak / 2**20),
        "mode": task.mode,
        "peer_mode": None if peer is None else peer.task.mode,
        "share_of_product": round(ours.rate / ceiling, 3),
        "about": ours.about,
        "peer_about": None if peer is None else peer.about,
    }


def peers_python(given: str | None) -> str:
    """A Python that has the peers; makes the environment if there is none."""
    if given is not None:
        return given
    ready = [folder for folder in ENVIRONMENTS if (folder / ".ready").exists()]
    folder = (ready or ENVIRONMENTS[-1:])[0]
    python = folder / "bin" / "python"
    if not ready:
        print(f"installing the peers into {folder} …", file=sys.stderr)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pinned = [word for name in ("", "-peers") for word in ("-c", str(HERE.parent / f"constraints{name}.txt"))]
        subprocess.run(
            [*pip, *pinned, f"torch=={torch.__version__.split('+')[0]}", "eai-sparsify", "einops"], check=True
        )
        # Its trainers need einops and PyTorch; what the rest of the package wants would be another gigabyte.
        subprocess.run([*pip, *pinned, "--no-deps", "dictionary-learning"], check=True)
        (folder / ".ready").touch()
    return str(python)


def shown(rows: Sequence[dict[str, Any]], console: Console, title: str) -> None:
    console.print(title)
    for setting in dict.fromkeys(row["setting"] for row in rows):
        table = Table(title=setting, title_justify="left")
        for name in ("", "ours", "peer", "ratio", "MiB", "of product"):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for row in rows:
            if row["setting"] != setting:
                continue
            peer = row["peer"] is not None
            table.add_row(
                f"{row['peer_name']}: {row['name'].removeprefix('training, ')}" if peer else "no peer",
                f"{row['ours']:,} {row['mode']}",
                f"{row['peer']:,} {row['peer_mode']}" if peer else "",
                f"{row['ratio']:.2f} ×" if peer else "",
                f"{row['peak_mib']:,}" + (f", {row['peer_peak_mib']:,}" if peer else ""),
                f"{row['share_of_product']:.0%}",
            )
        console.print(table)
    sides = [("ours", row["about"]) for row in rows] + [(row["peer_name"], row["peer_about"]) for row in rows]
    for line in dict.fromkeys(f"{name}: {', '.join(f'{k} {v}' for k, v in of.items())}" for name, of in sides if of):
        console.print(f"  {line}", style="dim")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", metavar="DxMxKxB", help="default: the two of the README; one on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long a side trains in a round")
    parser.add_argument("--sides", nargs="+", choices=("ours", *PEERS), default=["ours", *PEERS])
    parser.add_argument(
        "--modes", nargs="+", choices=MODES["ours"], help="default: those that the machine has instructions for"
    )
    parser.add_argument("--peers-python", help="a Python that has eai-sparsify and dictionary-learning")
    asked = parser.parse_args()
    kind = torch.device(asked.device).type
    python = peers_python(asked.peers_python) if set(asked.sides) - {"ours"} else ""
    modes = asked.modes or [mode for mode in MODES["ours"] if not is_emulated(mode, asked.device)]
    begun, rows = time.time(), []
    for shape in asked.shapes or SHAPES[kind]:
        sizes = dict(zip(("d_in", "num_latents", "k", "tokens"), map(int, shape.split("x")), strict=True))
        tasks = [
            Task(side, mode, **sizes, seeds=asked.seeds, threads=asked.threads, device=asked.device)
            for side in asked.sides
            for mode in modes
            if mode in MODES[side]
            and not (side == "sparsify" and mode == "float32" and kind == "cuda")  # there it always takes bfloat16
            and not (mode == "int8" and kind == "cuda")
        ]
        rows += rows_of(compare(tasks, python, asked.rounds, asked.seconds))
    head = about(begun, asked.device, threads=asked.threads)
    title = f"{head['processor']}, {asked.threads} threads, token·seeds per second"
    leave(asked, rows, head, lambda: shown(rows, Console(width=132), title))


if __name__ == "__main__":
    main()
