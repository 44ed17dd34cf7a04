"""Texts around a circle: what is drawn from often, arranged once so that each draw costs as much as it draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sae.firings.store import Ints, mix_bits

Hashes = npt.NDArray[np.uint64]


class Ring(NamedTuple):
    """Groups of texts around a circle, at the places that their hashes give them; of each its first window.

    Drawing for a latent starts at the latent's own place and goes round: a uniform sample of the groups
    that costs as much as what is drawn, however large the harvest, and that newcomers disturb only where
    they come to stand.
    """

    places: Hashes  # ascending
    windows: Ints
    group: Hashes

    @classmethod
    def of(cls, windows: Ints, groups: Hashes, seed: np.uint64) -> Ring:
        """``windows`` [n] (ascending) and the group of every window [W] as a ring; the seed turns the places."""
        distinct, first = np.unique(groups[windows], return_index=True)
        places = mix_bits(distinct ^ seed)
        order = np.argsort(places)
        return cls(places[order], windows[first][order], distinct[order])

    def after(self, key: np.uint64, n: int, *excluded: Hashes) -> tuple[Ints, Hashes]:
        """The first ``n`` groups from ``key`` on that are in none of ``excluded`` (each sorted), or all there are."""
        size = len(self.places)
        begin = int(np.searchsorted(self.places, key))
        looked = min(2 * n, size)
        while True:
            around = (begin + np.arange(looked)) % max(size, 1)
            for hashes in excluded:
                around = around[~among(self.group[around], hashes)]
            found = around[:n]
            if len(found) == n or looked == size:
                return self.windows[found], self.group[found]
            looked = min(4 * looked, size)

    def walk(self, key: np.uint64, block: int, most: int) -> Iterator[tuple[Ints, Hashes]]:
        """Windows and groups from ``key`` on, ``block`` at a time, each once and ``most`` at most."""
        size = len(self.places)
        begin = int(np.searchsorted(self.places, key))
        for start in range(0, min(size, most), block):
            around = (begin + np.arange(start, min(start + block, size, most))) % size
            yield self.windows[around], self.group[around]


def among(values: Hashes, in_sorted: Hashes) -> npt.NDArray[np.bool_]:
    """[n] whether each of ``values`` is in ``in_sorted``."""
    if len(in_sorted) == 0:
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(in_sorted, values), len(in_sorted) - 1)
    return in_sorted[at] == values
