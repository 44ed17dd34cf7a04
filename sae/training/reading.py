"""Read the batch of each training step, on one process or on several.

On several ranks, each computes some of the blocks that a step lacks; rank 0, which alone keeps the cache on disk, puts
them together and sends the batch to all. Every rank sees the bits that one process would compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sae.activations.stream import (
    ActivationStream,
    TrainingBatches,
    compute_block,
    find_missing_blocks,
    get_streams,
    read_batches,
)
from sae.common.ranks import Job


class Reader:
    """Reads batches for a job. All its ranks must read the same batches of the same steps in the same order."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._n_given_out = 0

    def __call__(self, batches: Sequence[TrainingBatches], step: int) -> list[Tensor]:
        """Return the step's batch of each, [B, D], as :func:`read_batches` does, on every rank."""
        job = self._job
        if job.size == 1:
            return read_batches(batches, step)
        streams = get_streams(batches)
        numbers = job.numbers(find_missing_blocks(streams, batches[0].sequences(step)) if job.rank == 0 else None)
        owners = {number: (self._n_given_out + i) % job.size for i, number in enumerate(numbers)}
        self._n_given_out += len(numbers)
        found: dict[str, Tensor | None] = dict.fromkeys(stream.hookpoint for stream in streams)
        if job.rank == 0:
            read = read_batches(batches, step, lambda wanted, number: self._block(streams, wanted, number, owners))
            if any(owners.values()):
                raise RuntimeError(f"step {step} did not take all of the blocks that the ranks computed for it")
            found |= {b.stream.hookpoint: x for b, x in zip(batches, read, strict=True)}
        else:
            for number in (n for n, owner in owners.items() if owner == job.rank):
                values = compute_block(streams, number)
                for stream in streams:
                    job.give(values[stream.hookpoint])
        sent = {hookpoint: job.broadcast(x) for hookpoint, x in found.items()}
        return [sent[b.stream.hookpoint] for b in batches]

    def _block(
        self,
        streams: Sequence[ActivationStream],
        wanted: Sequence[ActivationStream],
        number: int,
        owners: dict[int, int],
    ) -> Mapping[str, Tensor]:
        """Return a block on rank 0: its own work, or another rank's."""
        owner = owners.pop(number, 0)  # a block found damaged on disk only now has no other owner
        if owner == 0:
            return compute_block(wanted, number)
        rows = len(streams[0].corpus.block(number))
        return {s.hookpoint: self._job.take(owner, (rows, s.context, s.width), s.subject.dtype) for s in streams}
