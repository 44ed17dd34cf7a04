"""The peers' sides: their own classes, in an environment of their own, one seed after the other.

sparsify: its ``SparseCoder``, called in the order in which its ``Trainer`` calls it (normalise the decoder's rows,
forward, note what fired, backward, remove the gradient along the rows, Adam, its schedule), without the trainer's
forward pass through a language model, its copies of the activations and its communication between processes.
dictionary_learning: ``TopKTrainer.update``, whole. Both with Adam and otherwise their defaults.

Under "bfloat16" the same code runs under PyTorch's autocast, which is what sparsify does by itself on a GPU (there it
has no other mode, and is not asked for one). On a CPU neither does so by itself: the mode is given to them because it
is faster on some.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from activations import batches
from side import Asked, Task, now
from torch import Tensor

_STEPS = 1_000_000  # of their schedules; the first thousand, the warm-up, is not timed differently
Step = Callable[[int, Tensor], Any]


def sparsify_step(task: Task, pool: list[Tensor]) -> Step:
    if task.device == "cpu":  # where Triton is installed, sparsify takes it for granted that there is a GPU too
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    torch.set_float32_matmul_precision("high")  # as its Trainer.fit does
    coder = SparseCoder(
        task.d_in, SparseCoderConfig(num_latents=task.num_latents, k=task.k), task.device, torch.float32
    )
    coder.b_dec.data = pool[0].mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=2e-4 / (task.num_latents / 2**14) ** 0.5)
    schedule = get_linear_schedule_with_warmup(adam, 1000, _STEPS)
    fired = torch.zeros(task.num_latents, dtype=torch.bool, device=task.device)
    silent = torch.zeros(task.num_latents, dtype=torch.long, device=task.device)

    def step(_: int, x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with _autocast(task):  # around the forward pass alone, as it does on a GPU
            out = coder(x)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        schedule.step()
        silent.add_(len(x))
        silent[fired] = 0
        fired.zero_()

    return step


def dictionary_learning_step(task: Task, pool: list[Tensor]) -> Step:
    del pool
    trainer = _dictionary_learning("trainers.top_k").TopKTrainer(
        steps=_STEPS,
        activation_dim=task.d_in,
        dict_size=task.num_latents,
        k=task.k,
        layer=0,
        lm_name="none",
        device=task.device,
    )

    def step(number: int, x: Tensor) -> None:
        with _autocast(task):  # around the whole update, as its training loop does on a GPU
            trainer.update(number, x)

    return step


def _autocast(task: Task) -> torch.autocast:
    return torch.autocast(torch.device(task.device).type, torch.bfloat16, enabled=task.mode == "bfloat16")


def _dictionary_learning(module: str) -> Any:
    """A module of the package without the package's own ``__init__``, which wants libraries that no trainer needs."""
    if "dictionary_learning" not in sys.modules:
        spec = importlib.util.find_spec("dictionary_learning")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("dictionary_learning is not installed here")
        package = types.ModuleType("dictionary_learning")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["dictionary_learning"] = package
    return importlib.import_module(f"dictionary_learning.{module}")


_SIDES = {
    "sparsify": ("eai-sparsify", sparsify_step),
    "dictionary_learning": ("dictionary-learning", dictionary_learning_step),
}


def main() -> None:
    asked = Asked()
    task = asked.task
    pool = batches(task.d_in, task.tokens, task.device)
    package, make = _SIDES[task.side]
    torch.manual_seed(0)
    # S seeds in turn take as long as S times as many steps of one, and hold one at a time.
    step = make(task, pool)
    asked.ready({"version": importlib.metadata.version(package), "optimiser": "torch.optim.Adam"})
    done = 0
    for steps in asked.rounds():
        begun = now(task.device)
        for i in range(done, done + steps * task.seeds):
            step(i, pool[i % len(pool)])
        asked.answer(now(task.device) - begun)
        done += steps * task.seeds


main()
