"""Merge shards that are sorted by latent into one by-latent index, with a counting sort in bounded memory.

The first pass counts each latent's firings, which gives its place in the result. The second appends each source's slice
of a block of latents at a time. Sources come in the order of their tokens, so positions ascend within a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sae.common.progress import track
from sae.firings.store import Array, Ints, create_array, hash_windows, split_latents

if TYPE_CHECKING:
    from sae.text.corpus import Corpus

_BLOCK_FIRINGS = 1 << 22
_SEQUENCES_AT_ONCE_TOKENS = 1 << 18


class Source(NamedTuple):
    """Firings sorted by latent. Positions count from ``base``; those from ``limit`` on are ignored."""

    offsets: Array
    positions: Array
    activations: Array
    base: int
    limit: int | None = None

    def slices(self, first: int, last: int) -> Iterator[tuple[Ints, Array, Array]]:
        """Yield the firings of latents ``first`` to ``last`` in pieces: counts per latent, positions, activations."""
        bounds = np.asarray(self.offsets[first : last + 1], dtype=np.int64)
        for start in range(int(bounds[0]), int(bounds[-1]), _BLOCK_FIRINGS):
            stop = min(start + _BLOCK_FIRINGS, int(bounds[-1]))
            edges = np.clip(bounds, start, stop) - start
            positions, activations = self.positions[start:stop], self.activations[start:stop]
            if self.limit is not None:
                kept = positions < self.limit
                edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept, dtype=np.int64)])[edges]
                positions, activations = positions[kept], activations[kept]
            yield np.diff(edges), positions + np.uint32(self.base), activations

    def counts(self) -> Ints:
        """Return the number of firings of each latent, int64 [M]."""
        if self.limit is None:
            return np.diff(self.offsets)
        total = np.zeros(len(self.offsets) - 1, np.int64)
        for first, last in split_latents(self.offsets, _BLOCK_FIRINGS):
            for counts, _, _ in self.slices(first, last):
                total[first:last] += counts
        return total


def merge(folder: Path, sources: list[Source], num_latents: int, label: str) -> int:
    """Write offsets, positions and activations of all ``sources`` into ``folder``; return the number of firings.

    ``label`` is that of the progress bar; the files are described in :mod:`sae.firings.store`.
    """
    counts = np.zeros(num_latents, np.int64)
    for source in sources:
        counts += source.counts()
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    n_firings = int(offsets[-1])
    create_array(folder / "offsets.npy", np.int64, offsets.shape)[:] = offsets
    positions = create_array(folder / "positions.npy", np.uint32, (n_firings,))
    activations = create_array(folder / "activations.npy", np.float16, (n_firings,))
    free = offsets[:-1].copy()  # the place of each latent's next firing
    with track(label, n_firings, "firings") as bar:
        for first, last in split_latents(offsets, _BLOCK_FIRINGS):
            for source in sources:
                for many, found, values in source.slices(first, last):
                    there = np.repeat(free[first:last] - (np.cumsum(many) - many), many) + np.arange(len(found))
                    positions[there] = found
                    activations[there] = values
                    free[first:last] += many
            bar.advance(int(offsets[last] - offsets[first]))
    positions.flush()
    activations.flush()
    return n_firings


def describe_windows(
    folder: Path, corpus: Corpus, order: Ints, window: int, skipped: Callable[[Ints], npt.NDArray[np.bool_]]
) -> int:
    """Write each window's sequence, content hash and special flag; return the number of special tokens.

    ``skipped`` tells which tokens of sequences [n, T] their position or id excludes. A window of such tokens alone gets
    the flag too: no latent can fire in it, so it shows nothing.
    """
    slots = corpus.context // window
    n_windows = len(order) * slots
    create_array(folder / "sequences.npy", np.int64, order.shape)[:] = order
    content = create_array(folder / "content.npy", np.uint64, (n_windows,))
    special = create_array(folder / "special.npy", np.bool_, (n_windows,))
    n_special = 0
    step = max(1, _SEQUENCES_AT_ONCE_TOKENS // corpus.context)
    for start in range(0, len(order), step):
        sequences = corpus.rows(order[start : start + step])
        tokens = sequences[:, : slots * window].reshape(-1, window)
        unseen = skipped(sequences)[:, : slots * window].reshape(-1, window)
        marked = corpus.is_special(tokens)
        n_special += int(marked.sum())
        content[start * slots : start * slots + len(tokens)] = hash_windows(tokens)
        special[start * slots : start * slots + len(tokens)] = marked.any(1) | unseen.all(1)
    content.flush()
    special.flush()
    return n_special
