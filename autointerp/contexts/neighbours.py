"""Find a latent's nearest neighbours, whose firing makes the hardest negatives.

A neighbour's decoder points in a similar direction, or it fires in the same windows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sae.firings.store import FiringStore, Ints, mix_bits

NEAREST = 10
"""Neighbours of each of the two kinds."""
_WINDOWS = 128  # of the latent, searched for other latents
_LEAST = 2  # windows in which both fire: one may be chance


class Neighbours:
    """The neighbours of any latent of one SAE.

    ``decoder`` reads the decoder [M, D] of the store's SAE; called once, when first needed.
    """

    def __init__(self, store: FiringStore, decoder: Callable[[], npt.NDArray[np.floating]]) -> None:
        self._store, self._read_decoder = store, decoder

    def __call__(self, latent: int) -> Ints:
        """Return up to 20 live latents: the nearest by decoder cosine, then others that fire together."""
        both = np.concatenate([self.find_by_direction(latent), self.find_by_firing(latent)])
        _, first = np.unique(both, return_index=True)
        return both[np.sort(first)]

    def find_by_direction(self, latent: int) -> Ints:
        """Return the latents with the largest decoder cosine, in descending order."""
        cosine = self._unit @ self._unit[latent]
        cosine[latent] = -np.inf
        cosine[self._firings == 0] = -np.inf
        nearest = np.argsort(-cosine, kind="stable")[:NEAREST]
        return nearest[np.isfinite(cosine[nearest])]

    def find_by_firing(self, latent: int) -> Ints:
        """Return the latents that fire most in the windows of this one, in descending order.

        By the cosine of firing in a window, over up to 128 windows of the latent (chosen by hash).
        """
        windows = self._store.windows(latent)[0]
        chosen = windows[np.argsort(mix_bits(windows.astype(np.uint64)))[:_WINDOWS]]
        if not len(chosen):
            return np.empty(0, np.int64)
        window, fired = self._store.firing_in(chosen)
        once = np.unique(window * self._store.num_latents + fired) % self._store.num_latents
        latents, together = np.unique(once, return_counts=True)
        kept = (latents != latent) & (together >= _LEAST)
        latents, together = latents[kept], together[kept]
        cosine = together / np.sqrt(self._firings[latents])
        return latents[np.argsort(-cosine, kind="stable")[:NEAREST]]

    @functools.cached_property
    def _firings(self) -> Ints:
        return np.diff(self._store.latent_offsets).astype(np.int64)

    @functools.cached_property
    def _unit(self) -> npt.NDArray[np.float32]:
        rows = np.asarray(self._read_decoder(), dtype=np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
