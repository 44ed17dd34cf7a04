"""The firing store: which latent fired where, and how strongly, as look-ups instead of forward passes.

Everything after training asks one of two questions. "Where does latent 17 fire?" (contexts for explainers
and judges, firing frequencies) and "what fires in this window?" (controls, hard negatives). A harvest
answers each of them once and leaves both answers on disk in compressed sparse form, so that later stages
map the files and never load the model, nor torch, again. Memory does not grow with the tokens: every
array is memory-mapped and read in pieces.

    firings/
      store.json                what was harvested, from what; written last, so its presence means complete
      index-<n>/                by latent, over the first n sequences of the order
        offsets.npy             int64   [M+1]  latent l owns firings offsets[l] : offsets[l+1]
        positions.npy           uint32  [F]    harvested token, ascending within a latent
        activations.npy         float16 [F]
        sequences.npy           int64   [n]    the corpus row behind each harvested sequence
        content.npy             uint64  [W]    hash of each window's tokens
        special.npy             bool    [W]    whether a special token is among them
      shards/<from>-<to>/       by token, for the sequences of one piece of the order
        latents.npy             uint16 or uint32, ordered by token
        counts.npy              uint16 or uint32: how many latents fired at each token
        window_offsets.npy      uint32: where each window begins in latents.npy

Addresses: harvested sequence r (its rank in the order) is cut into ``windows_per_sequence`` windows of
``window`` tokens; window ``r * windows_per_sequence + slot``; token ``window_id * window + offset``.
Legend: B tokens in a batch, T tokens in a sequence, M latents, F firings, W windows, w tokens in a window.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from sae.common.errors import BadInput, NotFound, SettingsDiffer
from sae.common.files import digest, read_json

if TYPE_CHECKING:
    from sae.text.corpus import Corpus

SCHEMA = 1
STORE_FILE = "store.json"
INDEX_FILES = ("offsets", "positions", "activations", "sequences", "content", "special")
SHARD_FILES = ("latents", "counts", "window_offsets")
_BLOCK_FIRINGS = 1 << 22  # firings looked at in one piece by whole-store scans: some tens of MiB

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


class FiringStore:
    """A finished harvest of one SAE. Open one with :meth:`open`; nothing is read until it is asked for."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self.provenance: dict[str, Any] = record["provenance"]
        self.num_latents: int = self.provenance["num_latents"]
        self.window: int = self.provenance["window"]
        self.windows_per_sequence: int = self.provenance["context"] // self.window
        self.n_sequences: int = record["n_sequences"]
        self.n_windows: int = record["n_windows"]
        self.n_tokens: int = record["n_tokens"]
        self.n_special_tokens: int = record["n_special_tokens"]
        self.n_firings: int = record["n_firings"]
        index = folder / record["index"]
        self.latent_offsets, self.position, self.activation, self._sequences, self._content, self._special = (
            map_array(index / f"{name}.npy") for name in INDEX_FILES
        )
        self._windows_per_shard = self.provenance["sequences_per_shard"] * self.windows_per_sequence
        self._layouts: dict[int, list[tuple[np.dtype[Any], int, tuple[int, ...]]]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> FiringStore:
        """Map the store in ``folder``.

        Raises :class:`NotFound` where there is no finished harvest, :class:`SettingsDiffer` for another
        schema and :class:`BadInput` for files that are missing, cut short or not those that were written.
        """
        folder = Path(folder)
        record = _finished(folder)
        shapes = _expected_shapes(record)
        for relative, shape in shapes.items():
            try:
                found = _shape_of(folder / relative)
            except (OSError, ValueError):
                raise _damaged(folder, f"{relative} is missing or cut short") from None
            if found != shape:
                raise _damaged(folder, f"{relative} has shape {list(found)}, not {list(shape)}")
        return cls(folder, record)

    @property
    def digest(self) -> str:
        """What a table made from this store depends on: provenance and amount. 64 hex characters."""
        return _digest(self.record)

    # --- by latent ------------------------------------------------------------------------------------

    def firings(self, latent: int) -> tuple[Array, Array]:
        """Harvested tokens (uint32, ascending) and activations (float16) of ``latent``, memory-mapped."""
        if not 0 <= latent < self.num_latents:
            raise NotFound(f"latent {latent} does not exist; this SAE has latents 0 to {self.num_latents - 1}")
        start, stop = int(self.latent_offsets[latent]), int(self.latent_offsets[latent + 1])
        return self.position[start:stop], self.activation[start:stop]

    def windows(self, latent: int) -> tuple[Ints, npt.NDArray[np.float32]]:
        """Windows in which ``latent`` fires (ascending) and its peak activation in each."""
        position, activation = self.firings(latent)
        if len(position) == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        window = (position // np.uint32(self.window)).astype(np.int64)
        first = np.flatnonzero(np.diff(window, prepend=-1))
        return window[first], np.maximum.reduceat(activation.astype(np.float32), first)

    def activations(self, latent: int, window_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Activations of ``latent`` in the given windows, zero where it is silent: [n, w]."""
        ids = self._checked(window_ids)
        position, activation = self.firings(latent)
        # The keys take the array's own type: with wider keys NumPy would first widen the whole array.
        start = np.searchsorted(position, (ids * self.window).astype(np.uint32), side="left")
        stop = np.searchsorted(position, (ids * self.window + (self.window - 1)).astype(np.uint32), side="right")
        row, taken = _ranges(start, stop)
        dense = np.zeros((len(ids), self.window), np.float32)
        dense[row, position[taken].astype(np.int64) - ids[row] * self.window] = activation[taken]
        return dense

    # --- by window ------------------------------------------------------------------------------------

    def latents_at(self, window_id: int) -> list[Array]:
        """For each of the window's w tokens, the latents that fired there."""
        (window_id,) = self._checked([window_id]).tolist()
        shard, local = divmod(window_id, self._windows_per_shard)
        latents, counts, window_offsets = self.shard(shard)
        here = latents[int(window_offsets[local]) : int(window_offsets[local + 1])]
        ends = np.cumsum(counts[local * self.window : (local + 1) * self.window], dtype=np.int64)
        return np.split(np.asarray(here), ends[:-1])

    def firing_in(self, window_ids: npt.ArrayLike) -> tuple[Ints, Ints]:
        """The firings in any windows: of each, which of ``window_ids`` it is in (its index) and the latent.

        In no particular order; a latent that fires at several tokens of a window is there several times.
        """
        ids = self._checked(window_ids)
        shard, local = np.divmod(ids, self._windows_per_shard)
        rows, found = [], []
        for number in np.unique(shard).tolist():  # each mapped once: for many windows the mapping is what takes time
            latents, _, window_offsets = self.shard(number)
            here = np.flatnonzero(shard == number)
            start, stop = (window_offsets[local[here] + i].astype(np.int64) for i in (0, 1))
            row, taken = _ranges(start, stop)
            rows.append(here[row])
            found.append(latents[taken].astype(np.int64))
        return np.concatenate([np.empty(0, np.int64), *rows]), np.concatenate([np.empty(0, np.int64), *found])

    def tokens(self, window_ids: npt.ArrayLike) -> Ints:
        """Token ids of the given windows, out of the study's corpus: [n, w]."""
        ids = self._checked(window_ids)
        columns = self.slot(ids)[:, None] * self.window + np.arange(self.window)
        rows = self.sequences_of(ids)
        return self.corpus.tokens[rows[:, None], columns].astype(np.int64)

    def sequences_of(self, window_ids: npt.ArrayLike) -> Ints:
        """Which sequence of the corpus each window is a piece of."""
        return np.asarray(self._sequences[np.asarray(window_ids, dtype=np.int64) // self.windows_per_sequence])

    def slot(self, window_ids: npt.ArrayLike) -> Ints:
        """Which window of its sequence each one is: 0 to ``windows_per_sequence`` - 1."""
        return np.asarray(window_ids, dtype=np.int64) % self.windows_per_sequence

    def content(self, window_ids: npt.ArrayLike | None = None) -> npt.NDArray[np.uint64]:
        """Hash of each window's tokens, equal for equal tokens wherever they stand; all windows by default."""
        return self._content if window_ids is None else self._content[self._checked(window_ids)]

    def has_special(self, window_ids: npt.ArrayLike | None = None) -> npt.NDArray[np.bool_]:
        """Whether a special token is among each window's tokens; all windows by default."""
        return self._special if window_ids is None else self._special[self._checked(window_ids)]

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The study's corpus, where the tokens are; checked to be the one that was harvested."""
        from sae.text.corpus import Corpus

        folder = (self.folder / self.record["corpus_path"]).resolve()
        if not folder.is_dir():
            raise NotFound(f"corpus {str(folder)!r} of firing store {str(self.folder)!r} is gone; put it back")
        corpus = Corpus.open(folder)
        if corpus.fingerprint != self.provenance["corpus_fingerprint"]:
            raise BadInput(f"corpus {str(folder)!r} is not the one that {str(self.folder)!r} was harvested from")
        return corpus

    @property
    def n_shards(self) -> int:
        return len(self.record["shards"])

    @property
    def tokens_per_shard(self) -> int:
        """Of every shard but the last, which may have fewer."""
        return self._windows_per_shard * self.window

    def shard(self, number: int) -> tuple[Array, ...]:
        """``latents``, ``counts`` and ``window_offsets`` of one shard (see the module's head), memory-mapped.

        Mapped afresh each time: a map costs microseconds, an open file is scarce. What does take time is reading the
        files' heads, so these are kept.
        """
        name = self.record["shards"][number]["name"]
        paths = [self.folder / "shards" / name / f"{kind}.npy" for kind in SHARD_FILES]
        if number not in self._layouts:
            arrays = tuple(map_array(path) for path in paths)
            self._layouts[number] = [(a.dtype, a.offset, a.shape) for a in arrays]
            return arrays
        layouts = zip(paths, self._layouts[number], strict=True)
        return tuple(np.memmap(path, dtype, "r", offset, shape) for path, (dtype, offset, shape) in layouts)

    # --- within ---------------------------------------------------------------------------------------

    def _checked(self, window_ids: npt.ArrayLike) -> Ints:
        ids = np.asarray(window_ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.n_windows):
            raise NotFound(f"window {int(ids.max())} does not exist; this store has windows 0 to {self.n_windows - 1}")
        return ids


def latent_statistics(store: FiringStore) -> pd.DataFrame:
    """How often and how strongly each latent fires: one row per latent, M rows.

    ``n_firings`` and ``n_windows`` count tokens and windows; ``firing_frequency`` is firings per
    non-special harvested token; ``mean_activation`` and ``max_activation`` are over firings (0 if none).
    ``dead`` is "did not fire in this harvest": whether that many tokens justify the word is the reader's
    to judge (the study asks for a million).
    """
    offsets = np.asarray(store.latent_offsets)
    n_firings = np.diff(offsets)
    n_windows = np.zeros(store.num_latents, np.int64)
    total = np.zeros(store.num_latents, np.float64)
    peak = np.zeros(store.num_latents, np.float64)
    for first, last in split_latents(offsets, _BLOCK_FIRINGS):
        alive = first + np.flatnonzero(n_firings[first:last])
        if len(alive) == 0:
            continue
        base = int(offsets[first])
        starts = offsets[alive] - base
        window = store.position[base : int(offsets[last])] // np.uint32(store.window)
        new_window = np.diff(window, prepend=window[0]) != 0
        new_window[starts] = True
        activation = store.activation[base : int(offsets[last])]
        n_windows[alive] = np.add.reduceat(new_window, starts, dtype=np.int64)
        total[alive] = np.add.reduceat(activation, starts, dtype=np.float64)
        peak[alive] = np.maximum.reduceat(activation, starts)
    n_tokens = store.n_tokens - store.n_special_tokens
    return pd.DataFrame(
        {
            "latent": np.arange(store.num_latents),
            "n_firings": n_firings,
            "firing_frequency": n_firings / max(n_tokens, 1),
            "n_windows": n_windows,
            "mean_activation": total / np.maximum(n_firings, 1),
            "max_activation": peak,
            "dead": n_firings == 0,
        }
    )


def hash_windows(tokens: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each row of ``tokens`` [n, w]; depends on nothing but the ids and their order."""
    state = np.full(len(tokens), 0x243F6A8885A308D3, np.uint64)
    for column in tokens.T:
        state = mix_bits(state ^ column.astype(np.uint64))
    return state


def mix_bits(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64-bit words in which every input bit moves every output bit (SplitMix64's finaliser).

    Steele, Lea and Flood 2014. The same words on every machine and in every version of NumPy, which its
    random generators do not promise.
    """
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def split_latents(offsets: Ints, firings: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of latents holding at most ``firings`` firings each, or one latent if it has more."""
    first, latents = 0, len(offsets) - 1
    while first < latents:
        last = int(np.searchsorted(offsets, offsets[first] + firings, side="right")) - 1
        last = min(max(last, first + 1), latents)
        yield first, last
        first = last


def read_digest(folder: Path) -> str:
    """:attr:`FiringStore.digest` of the store in ``folder``, out of its record alone: its arrays are not looked at.

    Raises as :meth:`FiringStore.open` does where there is no finished harvest, or no record that can be read.
    """
    return _digest(_finished(folder))


def _digest(record: dict[str, Any]) -> str:
    return digest({"provenance": record["provenance"], "n_sequences": record["n_sequences"]})


def _finished(folder: Path) -> dict[str, Any]:
    """The record of the store in ``folder``; NotFound where there is no finished harvest."""
    path = folder / STORE_FILE
    if not path.is_file():
        state = "is unfinished" if (folder / "shards").is_dir() else "does not exist"
        raise NotFound(f"firing store {str(folder)!r} {state}; harvest the run (the same command goes on)")
    return read_record(path)


def read_record(path: Path) -> dict[str, Any]:
    """A ``store.json`` or ``plan.json``, or one line: damaged, or written in another schema."""
    try:
        record = read_json(path)
        schema = record["schema"]
        _ = record["provenance"]
    except (ValueError, KeyError, TypeError):
        raise _damaged(path.parent, f"{path.name} cannot be read") from None
    if schema != SCHEMA:
        raise SettingsDiffer(
            f"firing store {str(path.parent)!r} was written in schema {schema}, this program reads {SCHEMA}; "
            "remove the folder and harvest again, or use the version that wrote it"
        )
    return record


def _expected_shapes(record: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Each file of a finished store, by its path within, and the shape that it must have."""
    provenance, firings, windows = record["provenance"], record["n_firings"], record["n_windows"]
    sizes = (provenance["num_latents"] + 1, firings, firings, record["n_sequences"], windows, windows)
    shapes: dict[str, tuple[int, ...]] = {
        f"{record['index']}/{name}.npy": (n,) for name, n in zip(INDEX_FILES, sizes, strict=True)
    }
    for shard in record["shards"]:
        shard_windows = shard["n_sequences"] * (provenance["context"] // provenance["window"])
        lengths = (shard["n_firings"], shard_windows * provenance["window"], shard_windows + 1)
        shapes |= {f"shards/{shard['name']}/{kind}.npy": (n,) for kind, n in zip(SHARD_FILES, lengths, strict=True)}
    return shapes


def _shape_of(path: Path) -> tuple[int, ...]:
    """The shape of a ``.npy`` file that is as long as its head says; ValueError where it is not. Nothing is mapped."""
    with path.open("rb") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        if os.fstat(stream.fileno()).st_size < stream.tell() + math.prod(shape) * dtype.itemsize:
            raise ValueError("cut short")
    return shape


def map_array(path: Path) -> np.memmap[Any, Any]:
    """A ``.npy`` file as a read-only memory map."""
    array: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _damaged(folder: Path, what: str) -> BadInput:
    return BadInput(f"firing store {str(folder)!r} is damaged ({what}); remove the folder and harvest again")


def _ranges(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """The integers of the ranges start[i]:stop[i], one after another, and the i that each belongs to."""
    length = stop - start
    row = np.repeat(np.arange(len(length)), length)
    return row, np.arange(len(row)) + np.repeat(start - (np.cumsum(length) - length), length)
