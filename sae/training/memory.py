"""How much memory a training takes, so that one that cannot fit is told before it begins, and in numbers.

For S dictionaries of M latents on width D, in steps of B tokens, with K slots per token (the most that fire):

- **states**: 4 bytes x 3 x (2 M D + M + D) each, for the weights and Adam's two moments, for all S;
- **gradient**: 4 bytes x (2 M D + M + D), for one dictionary at a time on a CPU, for all S on a GPU; as much again for
  architectures that add it up group by group (all but TopK), and 2 bytes x M D for a rounded encoder (half of it where
  that is done in 8 bits);
- **step**: 4 bytes x 6 B D for each hookpoint's activations as they are read, centred and compared, and
  32 bytes x B (K + k_aux) for the slots, their products and their sorting, S times on a GPU (BatchTopK: of at most 8 k
  slots for each token; architectures with a penalty, which may fire for M / 2 latents: none);
- **pieces**: pre-activations that exist at once, three pieces of 32 MiB or one for each thread (one of 512 MiB on a
  GPU), and for
  architectures with a penalty the slots held at once, 2 Mi x 40 bytes in each of two classes of tokens; never more than
  B x M of them;
- **fixed**: a block's forward pass through the subject model and, for each hookpoint, the blocks held where there is no
  cache on disk; where most latents are dead, AuxK's copies of their weights and gradients, twice the gradient.

An architecture says for itself whether it has a penalty, how many gradients and slots
(:class:`sae.dictionaries.sae.Sae`).

Nothing grows with B x M. ``tests/sae/training/test_step_memory.py`` compares gradient, step and pieces with the peak
measured in a step of every architecture on the CPU; what is fixed is an allowance.
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
_SURE = 0.8  # the sums may be too high by this much
_SMALLEST_STEP = 512  # below this, smaller steps are no help any more


@dataclass(frozen=True)
class Need:
    """What a training takes, in bytes; see the module's docstring for the parts."""

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
    """Some dictionaries under one setting: ``seeds`` of them on activations of width ``d_in``."""

    settings: TrainingSettings
    seeds: int
    d_in: int
    hookpoint: str


def dictionary_bytes(num_latents: int, d_in: int) -> int:
    """The weights of one dictionary and Adam's two moments, in float32."""
    return 4 * 3 * (2 * num_latents * d_in + num_latents + d_in)


def training_need(parts: Sequence[Part], device: str | torch.device = "cpu") -> Need:
    """What it takes to train all ``parts`` side by side."""
    kind = "cuda" if torch.device(device).type == "cuda" else "cpu"
    each = [dictionary_bytes(p.settings.num_latents, p.d_in) for p in parts]
    widths = {p.hookpoint: p.d_in for p in parts}
    batch = max(p.settings.batch_tokens for p in parts)
    together = [p.seeds if kind == "cuda" and can_be_stacked(_kind(p)) else 1 for p in parts]
    dense = batch * max(p.settings.num_latents for p in parts)
    pieces = _CUDA_PIECES if kind == "cuda" else max(3, torch.get_num_threads()) * TILE_BYTES
    held = _HELD_SLOTS if any(_kind(p).penalised for p in parts) else 0
    return Need(
        states=sum(size * p.seeds for size, p in zip(each, parts, strict=True)),
        gradient=max(_gradient_bytes(p) * n for p, n in zip(parts, together, strict=True)),
        step=4 * 6 * batch * sum(widths.values())
        + 32 * batch * max(_slots(p) * n for p, n in zip(parts, together, strict=True)),
        pieces=min(pieces + held, 3 * 4 * dense + 40 * dense * bool(held)),
        fixed=4 * BLOCK_TOKENS * (_BLOCK_WIDTHS * max(widths.values()) + MIXED_BLOCKS * sum(widths.values())),
    )


def _kind(part: Part) -> type[Sae]:
    return ARCHITECTURES[part.settings.architecture]


def _gradient_bytes(part: Part) -> int:
    """Of one dictionary's gradient as it is made, without what AuxK may add."""
    plain = dictionary_bytes(part.settings.num_latents, part.d_in) // 3
    rounded = 0 if _kind(part).penalised else 2 * part.settings.num_latents * part.d_in
    return plain * _kind(part).gradients_at_once + rounded


def _slots(part: Part) -> int:
    """Slots of a token in a step that are made for the whole batch."""
    settings, kind = part.settings, _kind(part)
    auxiliary = 0 if kind.penalised else (settings.k_aux or part.d_in // 2) * (settings.auxk > 0)
    return settings.k * kind.slots_per_k + auxiliary


def free_bytes(device: str | torch.device) -> int | None:
    """What is free on ``device`` for this process, swap included; ``None`` where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    return free_host_bytes()


def check_fits(parts: Sequence[Part], device: str | torch.device) -> None:
    """Raise UserError, before anything is begun, where a training plainly cannot fit in what is free."""
    free, need = free_bytes(device), training_need(parts, device)
    if free is not None and _SURE * (need.total - need.fixed - need.pieces) > free:
        raise UserError(too_much(parts, free, device))


@contextmanager
def out_of_memory_is_told(parts: Sequence[Part], device: str | torch.device) -> Iterator[None]:
    """Make one line that says what to lower, and by how much, of an allocation that fails in the block."""
    free = free_bytes(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {device}: {too_much(parts, free, device, failed=True)}") from None


def too_much(parts: Sequence[Part], free: int | None, device: str | torch.device = "cpu", failed: bool = False) -> str:
    """What a training needs beside what is ``free``, and what to lower: words for an error message.

    ``failed``: an allocation has failed, so less has to be asked for even where the sums say that it fits.
    """
    need = training_need(parts, device)
    batch = max(part.settings.batch_tokens for part in parts)
    n = sum(part.seeds for part in parts)
    room = need.total // 2 if free is None else free * 9 // 10  # what fits to the last byte does not fit
    if failed:
        room = min(room, need.total * 9 // 10)
    words = (
        f"training {n} SAE{'s' * (n > 1)} with training.batch_tokens {batch} needs about {_gib(need.total)} "
        f"({_gib(need.states + need.gradient)} for weights and moments, {_gib(need.step)} for a step)"
    )
    words += "" if free is None else f" and {_gib(free)} are free"
    return f"{words}: {_advice(parts, need, batch, n, room)}"


def _advice(parts: Sequence[Part], need: Need, batch: int, n: int, room: int) -> str:
    rest = need.total - need.step
    smaller = batch
    while smaller > _SMALLEST_STEP and rest + need.step * smaller // batch > room:
        smaller //= 2
    if smaller < batch and rest + need.step * smaller // batch <= room:
        return f"lower training.batch_tokens to {smaller}"
    # Smaller steps alone are not enough.
    small = need.fixed + need.pieces + need.gradient + need.step * smaller // batch
    lower = f"lower training.batch_tokens to {smaller} and " if smaller < batch else ""
    fitting = max(0, room - small) * n // max(1, need.states)
    if 1 <= fitting < n:
        return f"{lower}train {fitting} at a time (more --seeds can be added later)"
    widest = max(parts, key=lambda part: dictionary_bytes(part.settings.num_latents, part.d_in))
    others = need.fixed + need.pieces + need.step * smaller // batch
    per_latent = dictionary_bytes(widest.settings.num_latents, widest.d_in) * 4 / 3 / widest.settings.num_latents
    latents = int(max(0, room - others) / per_latent) // 64 * 64
    if 64 <= latents < widest.settings.num_latents:
        return f"{lower}lower training.num_latents from {widest.settings.num_latents} to {latents}, one seed at a time"
    half = f"lower training.batch_tokens to {batch // 2}, or " if batch > 1 else ""
    return f"{half}free some memory, or use a machine with more"


def _gib(n: float) -> str:
    return f"{n / 2**30:.3g} GiB" if n >= 2**29 else f"{n / 2**20:.3g} MiB"
