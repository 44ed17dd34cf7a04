"""The swapped control: score a latent's contexts with another latent's explanation.

Contexts, judge, prompts, and the style and length of the explanations stay the same. So any score above one half (a
judge that leans to "yes" on rich contexts, latents that fire in most of the text) does not come from the explanation.
The other latent must be dissimilar: neither point the same way nor fire in the same windows. Its explanation must be
another text, or the control would be no control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching, min_weight_full_bipartite_matching

from autointerp.explaining.copies import normalise
from sae.firings.store import mix_bits

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CANDIDATES = 48
"""Latents tried as partners of each. Most pairs of latents are dissimilar, so the first few will do."""
_WINDOWS = 1 << 15  # windows in which co-firing is counted at most: phi is then known to about 0.006


class FiringWindows(Protocol):
    """The part of a firing store that is needed (:class:`sae.firings.store.FiringStore` has it)."""

    n_windows: int

    def windows(self, latent: int) -> tuple[Ints, NDArray[np.float32]]: ...


def swap_partners(
    latents: Sequence[int],
    W_dec: NDArray[np.floating],
    store: FiringWindows | None = None,
    *,
    texts: Mapping[int, str] | None = None,
    seed: int = 0,
    max_cosine: float = 0.2,
    max_cofiring: float = 0.1,
) -> dict[int, int]:
    """Return for each latent another of ``latents`` by whose explanation it is judged.

    Latents are placed on a ring by a hash of the seed and their number, and take one of the next ones: all different if
    possible, and near, so that adding latents changes few pairs. Latents without a candidate that is dissimilar and has
    another text are skipped.

    Args:
        latents: n latents, each with an explanation.
        W_dec: [M, D] the decoder; partners have a cosine below ``max_cosine`` in absolute value.
        store: the firings; partners have a correlation of firing in a window (phi) below ``max_cofiring`` in absolute
            value. Without it only the decoder is used.
        texts: the explanations; without them all count as different.
    Returns:
        Latent to partner, in the order of ``latents``.
    """
    ring = np.array(sorted(set(latents)), dtype=np.int64)
    ring = ring[np.argsort(mix_bits(ring.astype(np.uint64) ^ mix_bits(np.array([seed], np.uint64))), kind="stable")]
    n, tried = len(ring), min(CANDIDATES, len(ring) - 1)
    if n < 2:
        return {}
    text = np.arange(n)  # [n] equal numbers for equal texts
    if texts is not None:
        text = np.unique([normalise(texts[latent]) for latent in ring.tolist()], return_inverse=True)[1]
    following = _following(text, tried)
    allowed = _dissimilar_directions(np.asarray(W_dec[ring], dtype=np.float64), following, max_cosine)
    allowed &= text[following] != text[:, None]
    if store is not None:
        allowed &= _fire_apart(ring, store, following, max_cofiring)
    has_any = np.flatnonzero(allowed.any(1))
    partner = np.full(n, -1)
    partner[has_any] = _assign(allowed[has_any], following[has_any], n)
    found = {int(ring[i]): int(ring[partner[i]]) for i in has_any}
    return {latent: found[latent] for latent in latents if latent in found}


def _following(text: Ints, tried: int) -> Ints:
    """Return the next places on the ring that have another text, [n, tried]; a row that lacks some ends in its own."""
    n = len(text)
    following = (np.arange(n)[:, None] + np.arange(1, tried + 1)) % n
    for row in np.flatnonzero((text[following] == text[:, None]).any(1)).tolist():
        others = (row + 1 + np.flatnonzero(np.roll(text, -row - 1) != text[row])[:tried]) % n
        following[row] = row
        following[row, : len(others)] = others
    return following


def _dissimilar_directions(rows: NDArray[np.float64], following: Ints, most: float) -> Bools:
    """Return whether each candidate's decoder row has a small cosine with the latent's, [n, tried]; rows [n, D]."""
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosine = [np.einsum("nd,nd->n", rows, rows[column]) for column in following.T]
    return np.abs(np.stack(cosine, axis=1)) < most


def _fire_apart(ring: Ints, store: FiringWindows, following: Ints, most: float) -> Bools:
    """Return whether each candidate fires in the latent's windows as often as elsewhere, [n, tried].

    Windows are thinned evenly to a bounded number and held as bits.
    """
    step = -(-store.n_windows // _WINDOWS)
    n_windows = -(-store.n_windows // step)
    bits = np.zeros((len(ring), -(-n_windows // 8)), dtype=np.uint8)
    for row, latent in enumerate(ring.tolist()):
        windows, _ = store.windows(latent)
        fires = np.zeros(n_windows, dtype=bool)
        fires[windows[windows % step == 0] // step] = True
        bits[row] = np.packbits(fires, bitorder="little")
    share = np.bitwise_count(bits).sum(1, dtype=np.int64) / n_windows
    spread = np.sqrt(share * (1 - share))
    phi = np.zeros(following.shape)
    for j, column in enumerate(following.T):
        both = np.bitwise_count(bits & bits[column]).sum(1, dtype=np.int64) / n_windows
        covariance, scale = both - share * share[column], spread * spread[column]
        # A latent that fires nowhere, or everywhere, goes together with none.
        phi[:, j] = np.divide(covariance, scale, out=np.zeros(len(ring)), where=scale > 0)
    return np.abs(phi) < most


def _assign(allowed: Bools, following: Ints, n: int) -> Ints:
    """Choose one allowed candidate per row: all different if possible, near ones first."""
    row, rank = np.nonzero(allowed)
    graph = csr_matrix((rank + 1.0, (row, following[row, rank])), shape=(len(allowed), n))
    different = maximum_bipartite_matching(graph, perm_type="column")
    if (different >= 0).all():
        rows, columns = min_weight_full_bipartite_matching(graph)
        return columns[np.argsort(rows)].astype(np.int64)
    # Not all can differ: those left over share their nearest.
    nearest = following[np.arange(len(allowed)), allowed.argmax(1)]
    return np.where(different >= 0, different, nearest).astype(np.int64)
