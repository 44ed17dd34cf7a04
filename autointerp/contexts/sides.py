"""Decide which windows an explainer may see and which a judge: whole documents on one side, no text on both.

A judge must be tested on text that the explainer never saw. Each document of the corpus is on one side, chosen by its
number and length alone, hence the same for every run, latent and sample seed, however much is harvested:

- Documents are taken by length, those within a factor of two in the order of a hash, and each goes to the side that
  brings the explainer's share of the tokens nearer to :data:`EXPLAIN_SHARE`. The share is off by less than half of the
  longest document.
- A window that holds tokens of several documents is used only if all of them are on one side.
- A group of near-duplicate windows is used on the side of its earliest window; those of its windows that lie in
  documents of the other side are used on neither.

Where few long documents leave the share off by more than :data:`TOLERANCE`, as a single one does, documents longer than
1/50 of the text are cut into sections of equal length, which then count as documents.

Runs from before (``contexts.split = "text"``) keep the side of each group that a hash of the group gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autointerp.contexts.positions import Hashes
from sae.firings.store import FiringStore, Ints, mix_bits

EXPLAIN_SHARE = 0.4  # of all texts; the test set is larger because its error bars are reported
TOLERANCE = 0.1
SECTIONS = 50  # of a text that is one document
EXPLAIN, JUDGE, NEITHER = 1, 0, -1
_BLOCK = 1 << 20  # windows

SideArray = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]


class Sides(NamedTuple):
    """The side of each window [W], and how documents were split."""

    of_window: SideArray
    n_documents: int
    n_cut: int
    """Documents cut into sections."""

    def describe(self) -> dict[str, Any]:
        """Return the record in the table of eligible latents."""
        n = max(1, len(self.of_window))
        shares = {name: round(float((self.of_window == side).sum() / n), 4) for name, side in _NAMES.items()}
        return {"documents": self.n_documents, "documents_cut": self.n_cut, **shares}


_NAMES = {"explain": EXPLAIN, "judge": JUDGE, "neither": NEITHER}


def split_by_text(groups: Hashes) -> SideArray:
    """Return the side of each window [W] by a hash of its group."""
    return (mix_bits(groups) < np.uint64(int(EXPLAIN_SHARE * 2**64))).astype(np.int8)


def split_by_document(store: FiringStore, groups: Hashes, seed: int = 0) -> Sides:
    """Return the sides of the harvest's windows, given the group of each [W]; ``seed`` draws another split."""
    ends = store.corpus.document_ends
    n_documents, n_cut = len(ends), 0
    explain = assign_documents(np.diff(ends, prepend=0), seed)
    if abs(_compute_share(ends, explain) - EXPLAIN_SHARE) > TOLERANCE:
        ends, n_cut = cut_long_documents(ends)
        explain = assign_documents(np.diff(ends, prepend=0), seed)
    of_window = np.empty(store.n_windows, np.int8)
    for begin in range(0, store.n_windows, _BLOCK):
        windows = np.arange(begin, min(begin + _BLOCK, store.n_windows))
        first_token = store.sequences_of(windows) * store.provenance["context"] + store.slot(windows) * store.window
        of_window[windows] = find_sides(first_token, store.window, ends, explain)
    return Sides(keep_groups_together(of_window, groups, store.has_special()), n_documents, n_cut)


def assign_documents(lengths: Ints, seed: int = 0) -> Bools:
    """Return which documents are the explainer's, given the tokens in each [n]."""
    key = mix_bits(np.arange(len(lengths), dtype=np.uint64) ^ mix_bits(np.array([seed], np.uint64)))
    order = np.lexsort((key, -np.frexp(lengths)[1]))
    explain = np.zeros(len(lengths), bool)
    ahead = 0.0  # tokens that the explainer's side has above its share
    for number, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        taken = 2 * ahead + (1 - 2 * EXPLAIN_SHARE) * length < 0  # |ahead| is less if the explainer gets it
        explain[number] = taken
        ahead += (taken - EXPLAIN_SHARE) * length
    return explain


def _compute_share(ends: Ints, explain: Bools) -> float:
    return float(np.diff(ends, prepend=0)[explain].sum() / max(1, ends[-1]))


def cut_long_documents(ends: Ints) -> tuple[Ints, int]:
    """Cut documents longer than 1/50 of the text into equal sections; return all ends, and how many were cut."""
    lengths = np.diff(ends, prepend=0)
    most = max(1, int(ends[-1]) // SECTIONS)
    pieces = np.maximum(1, -(-lengths // most))
    document = np.repeat(np.arange(len(ends)), pieces)
    piece = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = (ends - lengths)[document]
    return starts + lengths[document] * (piece + 1) // pieces[document], int((pieces > 1).sum())


def find_sides(first_token: Ints, width: int, ends: Ints, explain: Bools) -> SideArray:
    """Return the side of windows of ``width`` tokens that begin at ``first_token`` [n]: that of all their documents."""
    n_explain_before = np.concatenate([[0], np.cumsum(explain)])
    first = np.searchsorted(ends, first_token, side="right")
    last = np.searchsorted(ends, first_token + width - 1, side="right")
    n_explain = n_explain_before[last + 1] - n_explain_before[first]
    whole = np.where(n_explain == last - first + 1, EXPLAIN, NEITHER)
    return np.where(n_explain == 0, JUDGE, whole).astype(np.int8)


def keep_groups_together(of_window: SideArray, groups: Hashes, has_special: Bools) -> SideArray:
    """Return the sides without the windows whose group is used on the other side: that of its earliest window."""
    sides = of_window.copy()
    usable = np.flatnonzero((of_window != NEITHER) & ~has_special)
    _, first, inverse = np.unique(groups[usable], return_index=True, return_inverse=True)
    side_of_group = of_window[usable[first]]
    sides[usable[side_of_group[inverse] != of_window[usable]]] = NEITHER
    return sides
