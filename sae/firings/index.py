"""From shards sorted by latent to one by-latent index: a counting sort that never holds the firings.

The first pass adds up how many firings each latent has in each source, which fixes where every latent
begins in the result. The second writes: for a block of latents at a time, each source's share of the
block is one contiguous slice, and goes behind what earlier sources left there. Sources are read once and
the result is written once, front to back, whatever the number of tokens; since sources come in the order
of their tokens, positions end up ascending within every latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap

from sae.common.progress import track
from sae.firings.store import Array, Ints, hash_windows, map_array, split_latents

if TYPE_CHECKING:
    from sae.text.corpus import Corpus

SORTED_FILES = ("sorted_offsets", "sorted_positions", "sorted_activations")
_BLOCK_FIRINGS = 1 << 22
_SEQUENCES_AT_ONCE_TOKENS = 1 << 18


class Piece(NamedTuple):
    """A shard's place: the ranks ``start`` to ``stop`` of the corpus order."""

    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.start:08d}-{self.stop:08d}"


class Source(NamedTuple):
    """Firings sorted by latent: token positions count from ``base``; those from ``limit`` on do not count."""

    offsets: Array
    positions: Array
    activations: Array
    base: int
    limit: int | None = None

    def slices(self, first: int, last: int) -> Iterator[tuple[Ints, Array, Array]]:
        """Firings of latents ``first`` to ``last``: how many of each latent, positions, activations.

        In pieces of bounded size, one after another: a latent may be cut between two of them.
        """
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
        """How many firings each latent has here: int64 [M]."""
        if self.limit is None:
            return np.diff(self.offsets)
        total = np.zeros(len(self.offsets) - 1, np.int64)
        for first, last in split_latents(self.offsets, _BLOCK_FIRINGS):
            for counts, _, _ in self.slices(first, last):
                total[first:last] += counts
        return total


def build_index(
    folder: Path,
    store: Path,
    provenance: dict[str, Any],
    kept: dict[str, Any] | None,
    pieces: list[Piece],
    corpus: Corpus,
    order: Ints,
    label: str,
) -> dict[str, int]:
    """Write the index files into ``folder``; returns the store's totals.

    Args:
        folder: where the six arrays go (see :mod:`sae.firings.store`).
        store: the firing store that holds the shards.
        provenance: the harvest's.
        kept: the record of a smaller, finished store whose index stands for the shards that it names.
        pieces: the shards, in the order of their tokens.
        corpus: where the tokens are.
        order: corpus rows of the harvested sequences.
        label: what the progress bar is called.
    """
    window = provenance["window"]
    per_sequence = provenance["context"] // window * window
    sources = _sources(store, kept, pieces, per_sequence)
    n_firings = merge(folder, sources, provenance["num_latents"], label)
    n_special = _describe_windows(folder, corpus, order, window)
    n_tokens = len(order) * per_sequence
    return {
        "n_windows": n_tokens // window,
        "n_tokens": n_tokens,
        "n_special_tokens": n_special,
        "n_firings": n_firings,
    }


def merge(folder: Path, sources: list[Source], num_latents: int, label: str) -> int:
    """Write offsets, positions and activations of all ``sources`` into ``folder``; returns the firings."""
    counts = np.zeros(num_latents, np.int64)
    for source in sources:
        counts += source.counts()
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    n_firings = int(offsets[-1])
    np.save(folder / "offsets.npy", offsets)
    positions = open_memmap(folder / "positions.npy", mode="w+", dtype=np.uint32, shape=(n_firings,))
    activations = open_memmap(folder / "activations.npy", mode="w+", dtype=np.float16, shape=(n_firings,))
    free = offsets[:-1].copy()  # where each latent's next firing goes
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


def _sources(store: Path, kept: dict[str, Any] | None, pieces: list[Piece], per_sequence: int) -> list[Source]:
    sources = []
    named = {shard["name"] for shard in kept["shards"]} if kept else set()
    inherited = [piece for piece in pieces if piece.name in named]
    if kept and inherited:
        offsets, positions, activations = (
            map_array(store / kept["index"] / f"{name}.npy") for name in ("offsets", "positions", "activations")
        )
        sources.append(Source(offsets, positions, activations, base=0, limit=inherited[-1].stop * per_sequence))
    for piece in pieces:
        if piece.name not in named:
            offsets, positions, activations = (
                map_array(store / "shards" / piece.name / f"{name}.npy") for name in SORTED_FILES
            )
            sources.append(Source(offsets, positions, activations, base=piece.start * per_sequence))
    return sources


def _describe_windows(folder: Path, corpus: Corpus, order: Ints, window: int) -> int:
    """Write what is known of each window beside its firings; returns how many tokens are special."""
    slots = corpus.context // window
    n_windows = len(order) * slots
    np.save(folder / "sequences.npy", np.asarray(order, dtype=np.int64))
    content = open_memmap(folder / "content.npy", mode="w+", dtype=np.uint64, shape=(n_windows,))
    special = open_memmap(folder / "special.npy", mode="w+", dtype=np.bool_, shape=(n_windows,))
    n_special = 0
    step = max(1, _SEQUENCES_AT_ONCE_TOKENS // corpus.context)
    for start in range(0, len(order), step):
        tokens = corpus.rows(order[start : start + step])[:, : slots * window].reshape(-1, window)
        marked = corpus.is_special(tokens)
        n_special += int(marked.sum())
        content[start * slots : start * slots + len(tokens)] = hash_windows(tokens)
        special[start * slots : start * slots + len(tokens)] = marked.any(1)
    content.flush()
    special.flush()
    return n_special
