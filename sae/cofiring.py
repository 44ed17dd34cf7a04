"""Where the latents of two dictionaries fire together: counts over the harvested tokens, without an M × M table.

For one latent at a time, the tokens at which it fires are looked up in its own store, and what fires there in the
other's: as many look-ups as it has firings. Of the M counts that result, what is asked for is kept, and the next latent
overwrites them. So memory is a few arrays of length M and one piece of firings, whatever the number of tokens; time is
(firings of one) × (latents per token of the other), and no two tokens are ever compared.

Legend: M_a, M_b latents of the two; N nearest that are kept; T tokens that both stores hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from sae import relation
from sae.directions import in_parallel, threads
from sae.firings import FiringStore

NEAREST = 24  # latents of the other dictionary that are kept for each, the nearest by Jaccard
_TELL = 256  # latents between two reports of progress
_PIECE = 1 << 17  # firings of one latent looked up at once

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True)
class Cofirings:
    """What one dictionary's latents have to do with the other's."""

    n_tokens: int
    """T"""
    firings: Ints
    """[M_a] of each latent, over these tokens"""
    firings_there: Ints
    """[M_b] of each latent of the other"""
    near: npt.NDArray[np.int32]
    """[M_a, N] the latents there with the largest Jaccard, falling (ties: the lower number); -1 where fewer co-fire"""
    near_together: Ints
    """[M_a, N] on how many tokens it fires with each"""
    asked_together: Ints
    """[M_a, Q] and with each that was asked after"""
    relation: npt.NDArray[np.int8]
    """[M_a] the number of the relation in ``relation.NAMES``; -1 where it was not asked"""
    members: npt.NDArray[np.int32]
    """[M_a, 4] the latents there that it rests on, -1 where fewer"""
    covered: npt.NDArray[np.float32]
    """[M_a] the share of its firings that they cover"""


def jaccard(together: npt.ArrayLike, one: npt.ArrayLike, other: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The share of the tokens at which either fires, at which both do; 0 where neither ever fires."""
    together, one, other = (np.asarray(x, dtype=np.float64) for x in (together, one, other))
    either = one + other - together
    return np.divide(together, either, out=np.zeros_like(either), where=either > 0)


def cofirings(
    store: FiringStore,
    other: FiringStore,
    asked: npt.NDArray[np.int32],
    relate: npt.NDArray[np.bool_],
    advance: Callable[[int], None] | None = None,
) -> Cofirings:
    """Count together-firings of every latent of ``store`` with those of ``other``, over the tokens that both hold.

    Args:
        store, other: harvests of the same tokens in the same order (one may hold more); M_a and M_b latents.
        asked: [M_a, Q] latents of the other whose count is wanted in any case; -1 for none.
        relate: [M_a] the latents whose relation (:mod:`sae.relation`) is wanted.
        advance: told how many latents are done since it was last told.
    """
    n_tokens = min(store.n_tokens, other.n_tokens)
    here, there = (_firings(s, n_tokens) for s in (store, other))
    m = store.num_latents
    found = Cofirings(
        n_tokens=n_tokens,
        firings=here,
        firings_there=there,
        near=np.full((m, NEAREST), -1, np.int32),
        near_together=np.zeros((m, NEAREST), np.int64),
        asked_together=np.zeros(asked.shape, np.int64),
        relation=np.full(m, -1, np.int8),
        members=np.full((m, relation.MEMBERS), -1, np.int32),
        covered=np.zeros(m, np.float32),
    )

    telling = Lock()

    def count(low: int, high: int) -> None:
        worker = _Worker(other, found)
        for latent in range(low, high):
            worker.count(latent, store.firings(latent)[0][: here[latent]], asked[latent], bool(relate[latent]))
            done = latent - low + 1
            if advance is not None and (done % _TELL == 0 or latent == high - 1):
                with telling:
                    advance((done - 1) % _TELL + 1)

    # Each thread the same number of firings, not of latents: these differ a hundredfold.
    share = np.searchsorted(np.cumsum(here), np.linspace(0, here.sum(), threads() + 1)[1:-1]) + 1
    cuts = np.unique(np.concatenate([[0], np.minimum(share, m), [m]])).tolist()
    in_parallel(count, list(pairwise(cuts)))
    return found


class _Worker:
    """Counts one latent after another into the rows of ``found``, in arrays of its own that are used again."""

    def __init__(self, other: FiringStore, found: Cofirings) -> None:
        m = other.num_latents
        self._found, self._lookup = found, _ByToken(other)
        self._counts, self._touched = np.zeros(m, np.int64), np.empty(m, np.int32)
        self._place, self._chosen = np.full(m, -1, np.int8), np.empty(relation.CANDIDATES, np.int32)
        self._patterns = np.empty(1 << relation.CANDIDATES, np.int64)

    def count(self, latent: int, position: Array, asked: Array, relate: bool) -> None:
        """Everything about one latent, which fires at the tokens ``position``."""
        found, counts = self._found, self._counts
        pieces = [position[i : i + _PIECE] for i in range(0, len(position), _PIECE)]
        last, size = None, 0
        for piece in pieces:
            last = self._lookup.latents(piece)
            size = _tally(last[0], counts, self._touched, size)
        touched = self._touched[:size]
        near, together = found.near[latent], found.near_together[latent]
        _nearest(touched, counts, len(position), found.firings_there, near, together)
        found.asked_together[latent] = np.where(asked >= 0, counts[asked], 0)
        if relate:
            known = pieces if len(pieces) != 1 or last is None else [last]
            found.relation[latent], found.covered[latent] = self._relation(latent, len(position), touched, known)
        counts[touched] = 0

    def _relation(
        self, latent: int, n: int, touched: Array, pieces: Sequence[Array | tuple[Array, Array]]
    ) -> tuple[int, float]:
        """Which relation it is, and the share of its firings covered; a piece may have been looked up already."""
        found, nearest = self._found, self._found.near[latent, 0]
        if n < relation.FEWEST:
            return relation.NAMES.index("rare"), 0.0
        together = int(found.near_together[latent, 0])
        if nearest >= 0 and together >= relation.SAME * (n + found.firings_there[nearest] - together):
            found.members[latent, 0] = nearest
            return relation.NAMES.index("same"), together / n
        size = relation.candidates(touched, self._counts, n, found.firings_there, found.n_tokens, self._chosen)
        chosen, patterns = self._chosen[:size], self._patterns
        patterns[: 1 << size] = 0
        for piece in pieces:
            ids, ends = piece if isinstance(piece, tuple) else self._lookup.latents(piece)
            _patterns(ids, ends, chosen, self._place, patterns)
        told, covered = relation.judge(patterns, chosen, n, found.firings_there, found.members[latent])
        return int(told), float(covered)


def _firings(store: FiringStore, n_tokens: int) -> Ints:
    """How often each latent fires at the first ``n_tokens`` tokens: [M]."""
    if n_tokens == store.n_tokens:
        return np.diff(store.latent_offsets).astype(np.int64)
    counts = (np.searchsorted(store.firings(m)[0], np.uint32(n_tokens)) for m in range(store.num_latents))
    return np.fromiter(counts, np.int64, store.num_latents)


class _ByToken:
    """The latents that fire at given tokens of a store."""

    def __init__(self, store: FiringStore) -> None:
        self._store = store
        self._shards = [tuple(map(np.asarray, store.shard(i))) for i in range(store.n_shards)]
        self._per_shard = store.tokens_per_shard

    def latents(self, position: Array) -> tuple[npt.NDArray[np.int32], Ints]:
        """Those at tokens ``position`` (ascending): one after another, and where each token's end."""
        cuts = np.searchsorted(position, np.arange(len(self._shards) + 1) * self._per_shard)
        ids, ends, done = [], [], 0
        for i in np.flatnonzero(np.diff(cuts)):
            latents, counts, window_offsets = self._shards[i]
            local = np.asarray(position[cuts[i] : cuts[i + 1]], dtype=np.int64) - i * self._per_shard
            sizes = counts[local].astype(np.int64)
            end = np.cumsum(sizes)
            out = np.empty(int(end[-1]), np.int32)
            _gather(local, latents, counts, window_offsets, self._store.window, out)
            ids.append(out)
            ends.append(end + done)
            done += len(out)
        if not ids:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        return (ids[0], ends[0]) if len(ids) == 1 else (np.concatenate(ids), np.concatenate(ends))


@_compiled
def _gather(
    local: np.ndarray,
    latents: np.ndarray,
    counts: np.ndarray,
    window_offsets: np.ndarray,
    window: int,
    out: np.ndarray,
) -> None:
    at, current, token, start = 0, np.int64(-1), np.int64(0), np.int64(0)
    for p in local:
        w = p // window
        if w != current:
            current, token, start = w, w * window, np.int64(window_offsets[w])
        while token < p:
            start += np.int64(counts[token])
            token += 1
        for i in range(start, start + np.int64(counts[p])):
            out[at] = latents[i]
            at += 1


@_compiled
def _tally(ids: np.ndarray, counts: np.ndarray, touched: np.ndarray, size: int) -> int:
    for b in ids:
        if counts[b] == 0:
            touched[size] = b
            size += 1
        counts[b] += 1
    return size


@_compiled
def _nearest(
    touched: np.ndarray, counts: np.ndarray, n: int, firings: np.ndarray, near: np.ndarray, together: np.ndarray
) -> None:
    """The largest Jaccards, by insertion; compared as fractions, so that equals are equals."""
    size, most = 0, len(near)
    for b in touched:
        c, either = counts[b], n + firings[b] - counts[b]
        at = size
        if size == most:
            if not _before(
                c, either, b, together[most - 1], n + firings[near[most - 1]] - together[most - 1], near[-1]
            ):
                continue
            at = most - 1
        else:
            size += 1
        while at > 0 and _before(
            c, either, b, together[at - 1], n + firings[near[at - 1]] - together[at - 1], near[at - 1]
        ):
            near[at], together[at] = near[at - 1], together[at - 1]
            at -= 1
        near[at], together[at] = b, c


@_compiled
def _before(c: int, either: int, b: int, other_c: int, other_either: int, other: int) -> bool:
    left, right = c * other_either, other_c * either
    return left > right or (left == right and b < other)


@_compiled
def _patterns(ids: np.ndarray, ends: np.ndarray, chosen: np.ndarray, place: np.ndarray, patterns: np.ndarray) -> None:
    """Add up which of the chosen fire at each token. ``place`` [M_b] is -1 throughout, before and after."""
    for i in range(len(chosen)):
        place[chosen[i]] = i
    start = 0
    for end in ends:
        pattern = 0
        for i in range(start, end):
            if place[ids[i]] >= 0:
                pattern |= 1 << place[ids[i]]
        patterns[pattern] += 1
        start = end
    for i in range(len(chosen)):
        place[chosen[i]] = -1
