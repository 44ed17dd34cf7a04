"""Group windows of a harvest that nearly repeat each other, such as a licence header with another year.

Two windows are near-duplicates if the Jaccard index of their token 5-grams reaches a threshold. Groups are the
connected components of that relation, so near-duplicates are never separated.

Candidates come from MinHash (Broder 1997) with banding: windows that agree in all three minima of any of 21 bands. A
pair of similarity .6 is a candidate with probability .994, one of .2 with .15. Every candidate is checked by its exact
Jaccard index. In a crowded bucket only some pairs are compared: neighbours in the order of the next band, and each with
the first.

A group is named by the content hash of its earliest window, so the name is stable when the harvest grows, unless a new
window joins it to an earlier group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from autointerp.contexts.positions import Hashes
from sae.common.files import digest, read_table, table_metadata, write_table
from sae.common.progress import say
from sae.firings.store import FiringStore, Ints, mix_bits
from sae.study.run import Run

METHOD = 1  # raise it when the same windows would be grouped differently
GRAM = 5  # tokens
BANDS, ROWS = 21, 3
_STEPS = (1, 2, 3, 5, 8)  # distances in a bucket at which two windows are compared
_BLOCK = 1 << 13  # windows or pairs read at once: some tens of MiB

Pairs = tuple[Ints, Ints]


def load_groups(run: Run, store: FiringStore, threshold: float) -> Hashes:
    """Return the group of every window of the run's harvest [W]. Computed once, then read from the firing store."""
    if threshold >= 1:
        return np.asarray(store.content())
    path = run.firings_folder / "groups.parquet"
    inputs = digest({"store": store.digest, "threshold": threshold, "method": METHOD})
    if table_metadata(path).get("inputs") != inputs:
        say(f"{run.name}: looking for windows that nearly repeat each other")
        import pandas as pd

        table = pd.DataFrame({"group": group_windows(store, threshold)})
        if not os.access(path.parent, os.W_OK):  # a study that is only read
            return table["group"].to_numpy()
        write_table(path, table, inputs=inputs)
    return read_table(path)["group"].to_numpy(np.uint64)


def group_windows(store: FiringStore, threshold: float) -> Hashes:
    """Return the group number of each window [W]; near-duplicates share one.

    Takes about 150 bytes for each different window (50 MiB for 10M tokens in windows of 32). ``threshold`` is the least
    Jaccard index of near-duplicates, above 0.
    """
    content = np.asarray(store.content())
    _, windows, copies = np.unique(content, return_index=True, return_inverse=True)  # the earliest window of each text
    n = len(windows)
    if n == 0:
        return content
    keys = _hash_bands(store, windows)
    label = np.arange(n)
    edges: list[Pairs] = [(label, label)]
    for band in range(BANDS):
        for a, b in _find_candidates(keys[band], keys[(band + 1) % BANDS]):
            apart = label[a] != label[b]
            a, b = a[apart], b[apart]
            alike = _compute_jaccard(store, windows, a, b) >= threshold
            edges.append((a[alike], b[alike]))
        label = _find_components(edges, n)
        edges = [(np.arange(n), _find_first(label))]  # the shortest form of the groups so far
    earliest = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(earliest, label, windows)
    return content[earliest[label]][copies]


def _hash_grams(tokens: npt.NDArray[np.int64]) -> Hashes:
    """Return a hash of each run of five tokens [n, w - 4]; tokens [n, w]."""
    length = min(GRAM, tokens.shape[1])
    n_grams = tokens.shape[1] - length + 1
    state: Hashes = np.zeros((len(tokens), n_grams), np.uint64)
    for i in range(length):
        column: Hashes = tokens[:, i : i + n_grams].astype(np.uint64)
        state = mix_bits(np.bitwise_xor(state, column))
    return state


def _hash_bands(store: FiringStore, windows: Ints) -> npt.NDArray[np.uint32]:
    """Return a hash of the minima in each band [BANDS, n]."""
    odd = mix_bits(np.arange(BANDS * ROWS, dtype=np.uint64)) | np.uint64(1)
    keys = np.empty((BANDS, len(windows)), np.uint32)
    for start in range(0, len(windows), _BLOCK):
        grams = _hash_grams(store.tokens(windows[start : start + _BLOCK]))
        for band in range(BANDS):
            state = np.zeros(len(grams), np.uint64)
            for row in range(ROWS):
                # Multiplying by an odd number permutes the 64-bit words; the hashes are already well mixed.
                state = mix_bits(state ^ (grams * odd[band * ROWS + row]).min(axis=1))
            keys[band, start : start + _BLOCK] = state >> np.uint64(32)
    return keys


def _find_candidates(keys: npt.NDArray[np.uint32], then: npt.NDArray[np.uint32]) -> Iterator[Pairs]:
    """Yield pairs of equal key by blocks: neighbours in a bucket ordered by ``then``, and each with its first."""
    order = np.lexsort((then, keys))
    ordered = keys[order]
    first = np.searchsorted(ordered, ordered)
    starts = [first, *(np.arange(len(order)) - step for step in _STEPS)]
    for start in starts:
        here = np.flatnonzero((start >= first) & (start < np.arange(len(order))))
        for begin in range(0, len(here), _BLOCK):
            part = here[begin : begin + _BLOCK]
            yield order[start[part]], order[part]


def _compute_jaccard(store: FiringStore, windows: Ints, a: Ints, b: Ints) -> npt.NDArray[np.float64]:
    """Return the share of 5-grams that two windows have in common [n]."""
    if not len(a):
        return np.empty(0)
    one, other = (_hash_grams(store.tokens(windows[i])) for i in (a, b))
    here, there, either = (_count_distinct(x) for x in (one, other, np.concatenate([one, other], axis=1)))
    return (here + there - either) / either


def _count_distinct(rows: Hashes) -> Ints:
    return 1 + (np.diff(np.sort(rows, axis=1), axis=1) != 0).sum(axis=1)


def _find_components(edges: list[Pairs], n: int) -> Ints:
    from scipy.sparse import coo_array  # here, since reading the groups needs none
    from scipy.sparse.csgraph import connected_components

    a, b = (np.concatenate(ends) for ends in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _find_first(label: Ints) -> Ints:
    """Return the first member of each window's component [n]."""
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return first[inverse]
