"""Sort and write the shards of a harvest in a thread, during the next shard's forward pass."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae.common.files import write_json
from sae.firings.store import Array, Ints


class Coded(NamedTuple):
    """Firings of consecutive tokens: F latents and activations in token order, and B counts."""

    latents: Array
    activations: Array
    counts: Array
    n_clipped: int
    n_raised: int


class Shard(NamedTuple):
    """The content of one shard of one run, and its folder."""

    folder: Path
    coded: list[Coded]
    num_latents: int


class ShardWriter:
    """Writes one shard at a time in a thread, so memory holds at most two.

    Raises a shard's error when the next shard is handed over, or at the end.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._last: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None and self._last is not None:
            self._last.result()

    def hand_over(self, shards: list[Shard]) -> None:
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._write, shards)

    def _write(self, shards: list[Shard]) -> None:
        for shard in shards:
            with atomic_folder(shard.folder) as temporary:
                _write(temporary, shard, self.window)


def _write(folder: Path, shard: Shard, window: int) -> None:
    """Write a shard's arrays: by token, which stay, and by latent, until the index is merged."""
    latents, activations, counts = (np.concatenate([part[i] for part in shard.coded]) for i in range(3))
    window_counts = counts.reshape(-1, window).sum(1, dtype=np.int64)
    token = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    by_latent = np.argsort(latents, kind="stable")  # stable: tokens stay ascending within a latent
    arrays = {
        "latents": latents,
        "counts": counts,
        "window_offsets": _offsets(window_counts).astype(np.uint32),
        "sorted_offsets": _offsets(np.bincount(latents, minlength=shard.num_latents)),
        "sorted_positions": token[by_latent],
        "sorted_activations": activations[by_latent],
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    facts = {
        "n_firings": len(latents),
        "n_clipped": sum(part.n_clipped for part in shard.coded),
        "n_raised": sum(part.n_raised for part in shard.coded),
    }
    write_json(folder / "facts.json", facts)


def _offsets(counts: Array) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; sync its files and rename it to ``path`` if the block ends without an error."""
    temporary = path.with_name(f".tmp-{path.name}")
    for leftover in (temporary, path):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
