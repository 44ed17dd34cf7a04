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

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks that work on the batch."""

    def least_of(self, tensor: Tensor) -> None:
        """Replace a tensor by its elementwise minimum over the ranks that work on the batch."""

    def numbers(self, values: Sequence[int] | None) -> list[int]:
        """Return rank 0's whole numbers on every rank; the others give None."""
        return list(values or ())

    def broadcast(self, x: Tensor | None) -> Tensor:
        """Return rank 0's tensor on every rank; the others may give None."""
        assert x is not None
        return x

    def give(self, x: Tensor) -> None:  # noqa: ARG002
        """Send a tensor to rank 0, which has to ``take`` it."""
        raise RuntimeError("one process alone has no other rank to give to")

    def take(self, owner: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """On rank 0: return the tensor of this shape that ``owner`` gives."""
        raise RuntimeError("one process alone has no other rank to take from")

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
