"""Estimate the memory of a training, to refuse one that cannot fit before it begins, and say what to lower.

For S dictionaries of M latents on width D, in steps of B tokens with K slots each (the most that fire), in float32:

- **states**: weights and Adam's two moments, for all S;
- **gradient**: for one dictionary at a time on a CPU, for all S on a GPU; twice that unless TopK; and a rounded copy;
- **step**: 6 B D for each hookpoint's activations, and 32 bytes x B (K + k_aux) for the slots, their products and their
  sorting, S times on a GPU (BatchTopK: at most 8 k slots per token; with a penalty, which may fire for M / 2 latents:
  none);
- **pieces**: pre-activations that exist at once, and with a penalty the slots of two classes of tokens; at most B x M;
- **fixed**: a block's forward pass and, for each hookpoint, the blocks held without a cache on disk; where most latents
  are dead, AuxK's copies of their weights and gradients, twice the gradient.

``tests/sae/training/test_step_memory.py`` compares gradient, step and pieces with the measured peak of every
architecture on the CPU; the fixed part is an allowance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sae.common.errors import UserError
from sae.common.memory import free_host_bytes, is_out_of_memory
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.kernels.cpu import TILE_BYTES
from sae.dictionaries.sae import Sae
from sae.settings import TrainingSettings
from sae.text.corpus import BLOCK_TOKENS, MIXED_BLOCKS
from sae.training.stacked import can_be_stacked

_CUDA_PIECES = 512 << 20
_HELD_SLOTS = 2 * 40 * (2 << 20)
_BLOCK_WIDTHS = 24  # numbers of width D that a forward pass holds for each token of a block, about
_CERTAIN = 0.8  # the estimate may be too high by this factor
_SMALLEST_STEP = 512  # smaller steps save no more memory


@dataclass(frozen=True)
class Need:
    """The memory of a training in bytes; see the module's docstring for the parts."""

    states: int
    gradient: int
    step: int
    pieces: int
    fixed: int

    @property
    def total(self) -> int:
        return self.states + self.gradient + self.step + self.pieces + self.fixed


@dataclass(frozen=True)
class Part:
    """Dictionaries under one setting: ``seeds`` of them on activations of width ``d_in``."""

    settings: TrainingSettings
    seeds: int
    d_in: int
    hookpoint: str

    @property
    def kind(self) -> type[Sae]:
        return ARCHITECTURES[self.settings.architecture]

    @property
    def dictionary_bytes(self) -> int:
        """The weights of one dictionary and Adam's two moments, in float32."""
        m = self.settings.num_latents
        return 4 * 3 * (2 * m * self.d_in + m + self.d_in)

    @property
    def gradient_bytes(self) -> int:
        """One dictionary's gradient, without AuxK's share."""
        rounded = 0 if self.kind.penalised else 2 * self.settings.num_latents * self.d_in
        return self.dictionary_bytes // 3 * self.kind.gradients_at_once + rounded

    @property
    def slots(self) -> int:
        """Slots of a token in a step that exist for the whole batch."""
        auxiliary = (self.settings.k_aux or self.d_in // 2) * (self.settings.auxk > 0)
        return self.settings.k * self.kind.slots_per_k + (0 if self.kind.penalised else auxiliary)


def training_need(parts: Sequence[Part], device: str | torch.device = "cpu") -> Need:
    """Return the memory needed to train all ``parts`` side by side."""
    on_cuda = torch.device(device).type == "cuda"
    widths = {p.hookpoint: p.d_in for p in parts}
    batch = max(p.settings.batch_tokens for p in parts)
    together = [(p, p.seeds if on_cuda and can_be_stacked(p.kind) else 1) for p in parts]
    dense = batch * max(p.settings.num_latents for p in parts)
    pieces = _CUDA_PIECES if on_cuda else max(3, torch.get_num_threads()) * TILE_BYTES
    held = _HELD_SLOTS if any(p.kind.penalised for p in parts) else 0
    return Need(
        states=sum(p.dictionary_bytes * p.seeds for p in parts),
        gradient=max(p.gradient_bytes * n for p, n in together),
        step=4 * 6 * batch * sum(widths.values()) + 32 * batch * max(p.slots * n for p, n in together),
        pieces=min(pieces + held, 3 * 4 * dense + 40 * dense * bool(held)),
        fixed=4 * BLOCK_TOKENS * (_BLOCK_WIDTHS * max(widths.values()) + MIXED_BLOCKS * sum(widths.values())),
    )


def free_bytes(device: str | torch.device) -> int | None:
    """Return the free memory on ``device`` for this process, swap included; ``None`` if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free_host_bytes() if device.type == "cpu" else None


def check_fits(parts: Sequence[Part], device: str | torch.device) -> None:
    """Raise UserError if a training certainly cannot fit in the free memory."""
    free, need = free_bytes(device), training_need(parts, device)
    if free is not None and _CERTAIN * (need.total - need.fixed - need.pieces) > free:
        raise UserError(describe_shortage(parts, free, device))


@contextmanager
def report_out_of_memory(parts: Sequence[Part], device: str | torch.device) -> Iterator[None]:
    """Turn a failed allocation in the block into a UserError that says what to lower, and by how much."""
    free = free_bytes(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device}: {describe_shortage(parts, free, device, failed=True)}") from None


def describe_shortage(
    parts: Sequence[Part], free: int | None, device: str | torch.device = "cpu", failed: bool = False
) -> str:
    """Return the memory that a training needs and what to lower, for an error message.

    ``failed``: an allocation has failed, so the advice asks for less even if the estimate fits.
    """
    need = training_need(parts, device)
    batch = max(part.settings.batch_tokens for part in parts)
    n = sum(part.seeds for part in parts)
    available = need.total // 2 if free is None else free * 9 // 10  # a training never uses the last byte
    if failed:
        available = min(available, need.total * 9 // 10)
    message = (
        f"training {n} SAE{'s' * (n > 1)} with training.batch_tokens {batch} needs about {_gib(need.total)} "
        f"({_gib(need.states + need.gradient)} for weights and moments, {_gib(need.step)} for a step)"
    )
    message += "" if free is None else f" and {_gib(free)} are free"
    return f"{message}: {_advice(parts, need, batch, n, available)}"


def _advice(parts: Sequence[Part], need: Need, batch: int, n: int, available: int) -> str:
    rest = need.total - need.step
    smaller = batch
    while smaller > _SMALLEST_STEP and rest + need.step * smaller // batch > available:
        smaller //= 2
    step = need.step * smaller // batch
    if smaller < batch and rest + step <= available:
        return f"lower training.batch_tokens to {smaller}"
    # Smaller steps alone are not enough.
    lower = f"lower training.batch_tokens to {smaller} and " if smaller < batch else ""
    others = need.fixed + need.pieces + step
    fitting = max(0, available - others - need.gradient) * n // max(1, need.states)
    if 1 <= fitting < n:
        return f"{lower}train {fitting} at a time (more --seeds can be added later)"
    widest = max(parts, key=lambda part: part.dictionary_bytes)
    num_latents = widest.settings.num_latents
    latents = int(max(0, available - others) / (widest.dictionary_bytes * 4 / 3 / num_latents)) // 64 * 64
    if 64 <= latents < num_latents:
        return f"{lower}lower training.num_latents from {num_latents} to {latents}, one seed at a time"
    half = f"lower training.batch_tokens to {batch // 2}, or " if batch > 1 else ""
    return f"{half}free some memory, or use a machine with more"


def _gib(n: float) -> str:
    return f"{n / 2**30:.3g} GiB" if n >= 2**29 else f"{n / 2**20:.3g} MiB"
