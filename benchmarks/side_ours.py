"""Our side: :func:`sae.training.trainer.train_groups`, S seeds side by side on each batch, as ``cli.py train`` runs it.

The trainer asks for each step's activations; that is where this side takes the time, and waits between rounds.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project is not installed
importlib.import_module("sae")  # before PyTorch, as cli.py does: it says how OpenMP's threads wait

from activations import batches
from side import Asked, now
from torch import Tensor

from sae.common import progress
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.kernels.steps import triton_kernels
from sae.settings import TrainingSettings
from sae.training.trainer import Group, train_groups

_ENDLESS = 10**9


class _Endless(Sequence[Any]):
    """As many steps as one likes, over the same few batches."""

    def __init__(self, pool: list[Tensor]) -> None:
        self._pool = pool

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: Any) -> Any:
        return self._pool[step % len(self._pool)]


def main() -> None:
    asked = Asked()
    task = asked.task
    pool = batches(task.d_in, task.tokens, task.device)
    settings = TrainingSettings.model_validate(
        {
            "num_latents": task.num_latents,
            "k": task.k,
            "tokens": task.tokens * _ENDLESS,
            "batch_tokens": task.tokens,
            "precision": task.mode,
            "checkpoint_steps": _ENDLESS,
        }
    )
    saes = [
        TopKSae.init(task.d_in, task.num_latents, task.k, seed, pool[0]).to(task.device) for seed in range(task.seeds)
    ]
    kernels = "compiled loops" if task.device == "cpu" else "Triton" if triton_kernels() else "PyTorch operations"
    asked.ready({"optimiser": "Adam, fused", "sparse steps": kernels})
    remaining: Iterator[int] = asked.rounds()
    progress.console.quiet = True  # there is no end that it could count down to
    left, begun = 0, 0.0

    def read(of_groups: Sequence[Any], step: int) -> Sequence[Tensor]:
        nonlocal left, begun
        if left == 0:
            if step:
                asked.answer(now(task.device) - begun)
            left = next(remaining, 0)
            if left == 0:
                raise SystemExit
            begun = now(task.device)
        left -= 1
        return [group[step] for group in of_groups]

    with tempfile.TemporaryDirectory() as folder:
        states = [Path(folder) / f"seed{seed}" / "training-state" for seed in range(task.seeds)]
        train_groups([Group(_Endless(pool), saes, settings, states)], read=read)


main()
