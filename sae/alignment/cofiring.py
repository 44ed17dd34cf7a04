"""Count where the latents of two dictionaries fire together, without an M × M table.

For one latent at a time, its tokens are read from its own store, and the latents that fire there from the other's. Only
the wanted counts are kept. Memory: a few arrays of length M, a piece of firings, a byte per firing of one latent. Time:
(firings of one) × (latents per token of the other).

Legend: M_a, M_b latents of the two; N nearest that are kept; T tokens that both stores hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import Event, Lock
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from sae.alignment import relation
from sae.common.errors import BadInput
from sae.dictionaries.kernels.cpu import run_in_parallel, split_by_load
from sae.firings.store import FiringStore

NEAREST = 24  # latents of the other dictionary that are kept for each, by Jaccard
_TELL = 256  # latents between two reports of progress
_IN_MEMORY = 256 << 20  # bytes; the latents of a store up to this size are held as one array, which is faster
_MAPPED = 144  # shards of a store kept open: a file and, at 65,536 tokens a shard, 256 KiB each
_PIECE = 1 << 17  # firings of one latent read at once

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True)
class Cofirings:
    """Counts of one dictionary's latents with the other's."""

    n_tokens: int  # T
    firings: Ints  # [M_a] of each latent, over these tokens
    firings_there: Ints  # [M_b] of each latent of the other
    near: npt.NDArray[np.int32]  # [M_a, N] the other's latents by falling Jaccard (ties: lower number); -1: fewer
    near_together: Ints  # [M_a, N] the number of tokens at which both fire
    asked_together: Ints  # [M_a, Q] the same with each latent asked for
    relation: npt.NDArray[np.int8]  # [M_a] the number of the relation in ``relation.NAMES``; -1 where not asked for
    members: npt.NDArray[np.int32]  # [M_a, 4] the latents there that the relation rests on, -1 where fewer
    covered: npt.NDArray[np.float32]  # [M_a] the share of its firings that they cover, NaN where there are none


def compute_jaccard(together: npt.ArrayLike, one: npt.ArrayLike, other: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the tokens at which both fire over those at which either does; 0 if neither ever fires."""
    together, one, other = (np.asarray(x, dtype=np.float64) for x in (together, one, other))
    either = one + other - together
    return np.divide(together, either, out=np.zeros_like(either), where=either > 0)


def count_cofirings(
    store: FiringStore,
    other: FiringStore,
    asked: npt.NDArray[np.int32],
    relate: npt.NDArray[np.bool_],
    advance: Callable[[int], None] | None = None,
    shift: int = 0,
) -> Cofirings:
    """Count the joint firings of every latent of ``store`` with those of ``other``, over the tokens that both hold.

    Args:
        store, other: harvests of the same tokens in the same order (one may hold more).
        asked: [M_a, Q] latents of the other whose count is always wanted; -1 for none.
        relate: [M_a] the latents whose relation (:mod:`sae.alignment.relation`) is wanted.
        advance: called with the number of latents done since the last call.
        shift: a firing of the other at token t + shift counts at t, circularly
            (:func:`sae.alignment.nulls.draw_offset`).
    Raises:
        BadInput: a shift that is not from 0 to T - 1.
    """
    n_tokens = min(store.n_tokens, other.n_tokens)
    if not 0 <= shift < max(n_tokens, 1):
        raise BadInput(f"firings cannot be shifted by {shift} of {n_tokens} tokens; choose 0 to {n_tokens - 1}")
    here, there = (_count_firings(s, n_tokens) for s in (store, other))
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
        covered=np.full(m, np.nan, np.float32),
    )
    possible = n_tokens - round(n_tokens * store.n_skipped_tokens / max(store.n_tokens, 1))  # where latents can fire
    lookup, telling, stopped = _ByToken(other), Lock(), Event()

    def count(low: int, high: int) -> None:
        m_b = len(there)
        counts, left, buffer = np.zeros(m_b, np.int64), np.zeros(m_b, np.int64), np.empty(m_b, np.int32)
        for latent in range(low, high):
            if stopped.is_set():
                return
            position = _shift(np.asarray(store.firings(latent)[0])[: here[latent]], shift, n_tokens)
            tokens, size = FiringTokens(lookup, position, left), 0
            for _, ids, _ in tokens.read():
                size = _tally(ids, counts, buffer, size)
            tokens.touched = touched = buffer[:size]
            _nearest(touched, counts, len(position), there, found.near[latent], found.near_together[latent])
            found.asked_together[latent] = np.where(asked[latent] >= 0, counts[asked[latent]], 0)
            if relate[latent]:
                touched.sort()  # ties go to the lower number
                found.relation[latent], members, found.covered[latent] = relation.find_relation(
                    counts[touched], there[touched], len(position), possible, tokens
                )
                found.members[latent, : len(members)] = touched[members]
            counts[touched] = 0
            done = latent - low + 1
            if advance is not None and (done % _TELL == 0 or latent == high - 1):
                with telling:
                    advance((done - 1) % _TELL + 1)

    try:
        run_in_parallel(count, split_by_load(np.concatenate([[0], np.cumsum(here)])))
    finally:
        stopped.set()  # after an error in one thread, or Ctrl-C, the others stop too
    return found


class FiringTokens:
    """The tokens at which a latent fires: the latents there, read in pieces, and which of the tokens are taken."""

    def __init__(self, lookup: _ByToken, position: Array, left: Ints) -> None:
        self._lookup, self._position, self._left = lookup, position, left
        self._taken = np.zeros(len(position), np.bool_)
        self._only: tuple[Array, Array] | None = None
        self.touched = np.empty(0, np.int32)  # the t latents of the other dictionary that fire at any of them

    def read(self) -> Iterator[tuple[slice, Array, Array]]:
        """Yield a slice of the tokens, the latents at them, and where each token's latents end."""
        for start in range(0, len(self._position), _PIECE):
            part = slice(start, start + _PIECE)
            known = self._only or self._lookup.latents(self._position[part])
            if len(self._position) <= _PIECE:
                self._only = known
            yield part, *known

    def reset(self) -> None:
        """Take none of the tokens."""
        self._taken[:] = False

    def take(self, i: int) -> None:
        """Take the tokens at which the i-th of the t latents fires."""
        for part, ids, ends in self.read():
            _take(ids, ends, self.touched[i], self._taken[part])

    def count_left(self) -> Ints:
        """Return at how many of the tokens that are not taken each of the t latents fires: [t]."""
        for part, ids, ends in self.read():
            _tally_left(ids, ends, self._taken[part], self._left)
        found = self._left[self.touched]
        self._left[self.touched] = 0
        return found


def _shift(position: Array, shift: int, n_tokens: int) -> Array:
    """Move ascending tokens [n] by ``shift``, circularly; ascending again."""
    if shift == 0:
        return position
    turn = np.uint32(n_tokens - shift)
    cut = int(np.searchsorted(position, turn))
    return np.concatenate([position[cut:] - turn, position[:cut] + np.uint32(shift)])


def _count_firings(store: FiringStore, n_tokens: int) -> Ints:
    """Return how often each latent fires at the first ``n_tokens`` tokens: [M]."""
    if n_tokens == store.n_tokens:
        return np.diff(store.latent_offsets).astype(np.int64)
    counts = (np.searchsorted(store.firings(m)[0], np.uint32(n_tokens)) for m in range(store.num_latents))
    return np.fromiter(counts, np.int64, store.num_latents)


class _ByToken:
    """The latents that fire at given tokens of a store. Threads may share one."""

    def __init__(self, store: FiringStore) -> None:
        n_firings = int(store.latent_offsets[-1])
        self._store = store
        self._shards = store.n_shards if 4 * (n_firings + store.n_tokens) <= _IN_MEMORY else 1  # opened as one
        self._per_part = self._shards * store.tokens_per_shard
        self._at_a_token = 1.25 * n_firings / max(store.n_tokens, 1)
        # Of the positions' own type, or NumPy would widen all positions first.
        n_parts = -(-store.n_shards // max(self._shards, 1))
        self._borders = (np.arange(1, n_parts, dtype=np.int64) * self._per_part).astype(np.uint32)
        # Each mapped array holds an open file, and some systems allow a process only 256.
        self._part = lru_cache(maxsize=_MAPPED)(self._open)

    def _open(self, number: int) -> tuple[Array, Array]:
        """Return the latents of a part (one shard, or all), and where each of its tokens begins."""
        shards = [self._store.shard(number + i) for i in range(self._shards)]
        latents, counts = [np.asarray(shard[0]) for shard in shards], np.concatenate([shard[1] for shard in shards])
        starts = np.zeros(len(counts) + 1, np.uint32)
        np.cumsum(counts, dtype=np.uint32, out=starts[1:])
        return latents[0] if len(latents) == 1 else np.concatenate(latents), starts

    def latents(self, position: Array) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return the latents at ascending tokens ``position``, and where each token's end."""
        cuts = [0, *np.searchsorted(position, self._borders).tolist(), len(position)]
        ids, total = np.empty(int(self._at_a_token * len(position)), np.int32), 0
        ends = np.empty(len(position), np.int64)
        for number, (low, high) in enumerate(pairwise(cuts)):
            if low == high:
                continue
            (latents, starts), first = self._part(number), number * self._per_part
            needed = _ends(position, low, high, first, starts, total, ends)
            if needed > len(ids):
                ids = np.concatenate([ids[:total], np.empty(max(needed, 2 * len(ids)) - total, np.int32)])
            _gather(position, low, high, first, starts, latents, total, ids)
            total = needed
        return ids[:total], ends


@_compiled
def _ends(position: np.ndarray, low: int, high: int, first: int, starts: np.ndarray, end: int, ends: np.ndarray) -> Any:
    """Write where the latents of the tokens ``low`` to ``high`` end, if those before end at ``end``."""
    at = np.int64(end)
    for i in range(low, high):
        token = np.int64(position[i]) - first
        at += np.int64(starts[token + 1]) - np.int64(starts[token])
        ends[i] = at
    return at


@_compiled
def _gather(position: Any, low: int, high: int, first: int, starts: Any, latents: Any, at: int, out: Any) -> None:
    for i in range(low, high):
        token = np.int64(position[i]) - first
        for k in range(np.int64(starts[token]), np.int64(starts[token + 1])):
            out[at] = latents[k]
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
    """Find the largest Jaccards by insertion; compared as fractions, so that ties are exact."""
    size, most = 0, len(near)
    for b in touched:
        c, either = counts[b], n + firings[b] - counts[b]
        at = size
        while at > 0:
            other = near[at - 1]
            if not _before(c, either, b, together[at - 1], n + firings[other] - together[at - 1], other):
                break
            if at < most:
                near[at], together[at] = other, together[at - 1]
            at -= 1
        if at < most:
            near[at], together[at] = b, c
            size = min(size + 1, most)


@_compiled
def _before(c: int, either: int, b: int, other_c: int, other_either: int, other: int) -> bool:
    left, right = c * other_either, other_c * either
    return left > right or (left == right and b < other)


@_compiled
def _take(ids: np.ndarray, ends: np.ndarray, latent: int, taken: np.ndarray) -> None:
    start = 0
    for token in range(len(ends)):
        for i in range(start, ends[token]):
            if ids[i] == latent:
                taken[token] = True
        start = ends[token]


@_compiled
def _tally_left(ids: np.ndarray, ends: np.ndarray, taken: np.ndarray, left: np.ndarray) -> None:
    start = 0
    for token in range(len(ends)):
        if not taken[token]:
            for i in range(start, ends[token]):
                left[ids[i]] += 1
        start = ends[token]
