"""Split one training or harvest over several processes (ranks), and choose the one that writes.

``torchrun … cli.py train`` starts the same command in several *ranks*. A harvest is split by pieces of the text and
gives the files of one process. A training is split in one of two ways:

- ``seeds``: each rank trains some of the seeds on all batches. On CPUs with the same number of threads per rank, the
  weights are bit for bit those of one process.
- ``data``: each rank takes some rows of each batch, for all seeds; losses, gradients and firings are summed over ranks.
  The sums differ from one process's by rounding only (in float64, weights agree to 1e-6 after 50 steps); in float32
  runs diverge later, because the choice of the k largest is abrupt.

The subject model's forward pass is done once. Only rank 0 plans, writes records and prints; weights and states are
written by the rank that trains the seed, or by rank 0. :class:`Job` is one process alone; :mod:`sae.common.torchrun`
has several, and imports torch.
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
    """The ranks that work together; this class is one process alone."""

    rank = 0
    size = 1
    mode: Mode = "seeds"

    @property
    def writes(self) -> bool:
        """Return whether this rank writes the states and weights of the seeds that it trains."""
        return True

    def share(self, seeds: Sequence[T]) -> list[T]:
        """Return the seeds that this rank trains."""
        return list(seeds)

    def rows(self, x: Tensor) -> Tensor:
        """Return this rank's rows of a batch [B, D]."""
        return x

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks that share the batch."""

    def least_of(self, tensor: Tensor) -> None:
        """Replace a tensor by its elementwise minimum over the ranks that share the batch."""

    def numbers(self, values: Sequence[int] | None) -> list[int]:
        """Return rank 0's whole numbers on every rank; the others give None."""
        return list(values or ())

    def broadcast(self, x: Tensor | None) -> Tensor:
        """Return rank 0's tensor on every rank; the others may give None."""
        assert x is not None
        return x

    def give(self, x: Tensor) -> None:  # noqa: ARG002
        """Send a tensor to rank 0, which must ``take`` it."""
        raise RuntimeError("one process alone has no other rank to give to")

    def take(self, owner: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """On rank 0: return the tensor of this shape that ``owner`` gives."""
        raise RuntimeError("one process alone has no other rank to take from")

    def alike(self, tensors: Sequence[Tensor], record: T) -> T:  # noqa: ARG002
        """Copy rank 0's ``tensors`` (in place) and JSON ``record`` to the ranks that train the same seed."""
        return record

    def check_alike(self, tensors: Sequence[Tensor]) -> None:
        """Raise UserError if tensors differ between ranks that train the same seed."""

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return ``values`` [n] of each rank that shares the batch; n may differ."""
        return [values]

    @property
    def place(self) -> int:
        """Return this rank's index in the result of :meth:`gather`."""
        return 0

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        return number

    record: dict[str, Any] = {}  # noqa: RUF012  # for ``run.json``, if the weights' last bits depend on the ranks

    @contextmanager
    def first_then_others(self, name: str) -> Iterator[None]:  # noqa: ARG002
        """Run the block on rank 0, then on the others."""
        yield

    def first(self, name: str, work: Callable[[], T]) -> T:  # noqa: ARG002
        """Run ``work`` on rank 0 and return its result (a JSON value) on every rank."""
        return work()

    def barrier(self) -> None:
        """Wait until all ranks have reached this line."""


ALONE = Job()
