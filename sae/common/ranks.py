"""Several processes at one training or harvest: what each of them does, and which one writes.

``torchrun … cli.py train`` starts the same command several times over; each process is a *rank*. A harvest is split by
pieces of the text, and its files are those of one process. A training can be split in two ways:

- ``seeds``: every rank trains some of the seeds, on the same batches as all others. Seeds share nothing but the
  batches, so on CPUs with the same number of threads a rank the weights are bit for bit those of one process.
- ``data``: every rank works on some rows of every batch, for all seeds; losses, gradients and firings are added up
  over the ranks before the step. They are the same sums in another order, so a training agrees with that of one
  process to rounding: in float64, to 1e-6 over 50 steps. In float32 it begins so and then parts ways, as two
  machines would: which latents are among the k largest changes abruptly, and the smallest difference grows from there.

Either way the subject model's forward pass, the dear part, is done once. Rank 0 alone plans, writes records and says
anything; weights and states are written by the rank that trains the seed, or by rank 0 where all do. This module
knows one process alone; :mod:`sae.common.torchrun` has the rest, and with it torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sae.common import launch
from sae.common.commands import as_started
from sae.common.errors import BadInput
from sae.common.progress import say

if TYPE_CHECKING:
    from torch import Tensor

    from sae.activations.stream import TrainingBatches
    from sae.dictionaries.objective import Loss

Mode = Literal["seeds", "data"]
T = TypeVar("T")


class Job:
    """The processes that train together; this class is the plain case of one process alone."""

    rank = 0
    size = 1
    mode: Mode = "seeds"

    @property
    def writes(self) -> bool:
        """Whether this rank writes the states and weights of the seeds that it trains."""
        return True

    def share(self, seeds: Sequence[T]) -> list[T]:
        """Those of ``seeds`` that this rank trains."""
        return list(seeds)

    def rows(self, x: Tensor) -> Tensor:
        """Those rows of a batch [B, D] that this rank works on."""
        return x

    def read(self, batches: Sequence[TrainingBatches], step: int) -> list[Tensor]:
        """The step's batch of each, as :func:`sae.activations.stream.read_together` gives it, on every rank.

        All ranks must ask for the same batches of the same steps in the same order.
        """
        from sae.activations.stream import read_together

        return read_together(batches, step)

    def total(self, loss: Loss, gradient: dict[str, Tensor]) -> tuple[Loss, dict[str, Tensor]]:
        """Loss and gradient of the whole batch from those of this rank's rows."""
        return loss, gradient

    def alike(self, tensors: Sequence[Tensor], record: T) -> T:  # noqa: ARG002
        """Where all ranks train the same seed, give all of them rank 0's ``tensors`` (in place) and JSON ``record``."""
        return record

    def check_alike(self, tensors: Sequence[Tensor]) -> None:
        """Stop where ranks that train the same seed no longer hold the same bits."""

    def gather(self, values: Tensor) -> list[Tensor]:
        """``values`` [n] of all ranks that work on the batch, n being each one's own, in the order of the ranks."""
        return [values]

    @property
    def place(self) -> int:
        """This rank's place in what :meth:`gather` gives."""
        return 0

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number

    record: dict[str, Any] = {}  # noqa: RUF012
    """what ``run.json`` says of the job, where the weights' last bits depend on it"""

    @contextmanager
    def first_then_others(self, name: str) -> Iterator[None]:  # noqa: ARG002
        """The block on rank 0, and then, when it is done, on the others."""
        yield

    def first(self, name: str, work: Callable[[], T]) -> T:  # noqa: ARG002
        """What ``work`` gives on rank 0 (a JSON value), on every rank; the others wait as long as it takes."""
        return work()

    def barrier(self) -> None:
        """Go on when all ranks have come this far."""


ALONE = Job()


@contextmanager
def together(parallel: str | None, seeds: int, device: str) -> Iterator[tuple[Job, str]]:
    """Meet the other ranks, if there are any, for as long as the block lasts; the job, and this rank's device.

    ``parallel`` is "seeds", "data", or None where the user leaves the choice to us; ``device`` what the user said.
    """
    if parallel is not None and not launch.launched():
        raise BadInput(
            f"--parallel {parallel} is for several processes; start them with "
            f"`{as_started('torchrun --standalone --nproc-per-node 2 cli.py train')} …`"
        )
    mode, line = choose_mode(parallel, seeds, launch.size())
    with _met(mode, line, device) as met:
        yield met


@contextmanager
def together_at_text(device: str) -> Iterator[tuple[Job, str]]:
    """:func:`together` for work that is split by pieces of the text."""
    line = f"{launch.size()} ranks: the text is split over them, the same files as from one process"
    with _met("seeds", line, device) as met:
        yield met


@contextmanager
def _met(mode: Mode, line: str, device: str) -> Iterator[tuple[Job, str]]:
    """Meet the other ranks, if there are any, and say ``line``."""
    if not launch.launched():
        yield ALONE, device
        return
    from sae.common.torchrun import joined, rank_device

    say(line)
    device = rank_device(device)
    with joined(mode, device) as job:
        yield job, device


def choose_mode(asked: str | None, seeds: int, ranks: int) -> tuple[Mode, str]:
    """How to split a training of so many seeds, and a line that says so. ``asked`` is None where nobody did."""
    if asked not in (None, "seeds", "data"):
        raise BadInput(f"--parallel {asked!r}: give seeds or data")
    mode: Mode = "data" if asked == "data" or (asked is None and seeds < ranks) else "seeds"
    if mode == "data":
        what = "each step's tokens are split over the ranks, equal to one process up to rounding"
    elif seeds < ranks:
        what = f"{seeds} of {ranks} ranks train a seed, the others only help with the subject model"
    else:
        what = "the seeds are split over the ranks, the same weights as one process"
    return mode, f"{ranks} ranks, --parallel {mode}: {what}"
