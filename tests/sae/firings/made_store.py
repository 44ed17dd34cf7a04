"""A firing store in memory, from a table of which latent fires at which token: what look-ups need, and no more."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from sae.firings.store import FiringStore


class MadeStore:
    """``fires`` [T, M], T a multiple of the window; three windows make a shard."""

    n_skipped_tokens = 0

    def __init__(self, fires: np.ndarray, window: int = 4) -> None:
        self.fires, self.window = fires, window
        self.n_tokens, self.num_latents = fires.shape
        self._positions = [np.flatnonzero(column).astype(np.uint32) for column in fires.T]
        self.latent_offsets = np.concatenate([[0], np.cumsum([len(p) for p in self._positions])])
        self.tokens_per_shard = 3 * window
        self.n_shards = -(-self.n_tokens // self.tokens_per_shard)

    def firings(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        position = self._positions[latent]
        return position, np.ones(len(position), np.float16)

    def shard(self, number: int) -> tuple[np.ndarray, ...]:
        here = self.fires[number * self.tokens_per_shard : (number + 1) * self.tokens_per_shard]
        counts = here.sum(axis=1)
        ends = np.concatenate([[0], np.cumsum(counts)])
        return np.nonzero(here)[1].astype(np.uint16), counts.astype(np.uint16), ends[:: self.window].astype(np.uint32)


def store_of(fires: np.ndarray, **options: Any) -> FiringStore:
    return cast(FiringStore, MadeStore(np.asarray(fires, dtype=bool), **options))
