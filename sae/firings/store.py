"""The firing store: which latent fired where, and how strongly.

It finds where a latent fires, and which latents fire in a window, in memory-mapped arrays, without the model or torch.

    firings/
      store.json                inputs and totals; written last, so its presence means complete
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

Sequence r of the order has windows ``r * windows_per_sequence + slot``; a window has tokens ``window_id * window +
offset``. Legend: M latents, F firings, W windows, w tokens in a window.
"""

from __future__ import annotations

import functools
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
_BLOCK_FIRINGS = 1 << 22  # firings per piece when the whole store is read: some tens of MiB

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


class FiringStore:
    """A finished harvest of one SAE, memory-mapped. Open it with :meth:`open`."""

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
        """Map the store in ``folder``; raise NotFound without a harvest, SettingsDiffer for another schema."""
        folder = Path(folder)
        record = _read_finished(folder)
        for relative, shape in _expected_shapes(record).items():
            try:
                found = map_array(folder / relative).shape
            except (FileNotFoundError, ValueError, EOFError):
                raise _damage_error(folder, f"{relative} is missing or cut short") from None
            if found != shape:
                raise _damage_error(folder, f"{relative} has shape {list(found)}, not {list(shape)}")
        return cls(folder, record)

    @property
    def digest(self) -> str:
        """Digest of inputs and amount, for tables made from this store: 64 hex characters."""
        return _digest(self.record)

    def firings(self, latent: int) -> tuple[Array, Array]:
        """Return the tokens (uint32, ascending) and activations (float16) of a latent's firings."""
        if not 0 <= latent < self.num_latents:
            raise NotFound(f"latent {latent} does not exist; this SAE has latents 0 to {self.num_latents - 1}")
        start, stop = int(self.latent_offsets[latent]), int(self.latent_offsets[latent + 1])
        return self.position[start:stop], self.activation[start:stop]

    def windows(self, latent: int) -> tuple[Ints, npt.NDArray[np.float32]]:
        """Return the windows in which a latent fires (ascending) and its peak activation in each."""
        position, activation = self.firings(latent)
        if len(position) == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        window = (position // np.uint32(self.window)).astype(np.int64)
        first = np.flatnonzero(np.diff(window, prepend=-1))
        return window[first], np.maximum.reduceat(activation.astype(np.float32), first)

    def activations(self, latent: int, window_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the activations of a latent in some windows, [n, w]."""
        ids = self._checked(window_ids)
        position, activation = self.firings(latent)
        # Keys of the same type: with wider keys NumPy would convert the whole array.
        start = np.searchsorted(position, (ids * self.window).astype(np.uint32), side="left")
        stop = np.searchsorted(position, (ids * self.window + (self.window - 1)).astype(np.uint32), side="right")
        row, taken = _ranges(start, stop)
        dense = np.zeros((len(ids), self.window), np.float32)
        dense[row, position[taken].astype(np.int64) - ids[row] * self.window] = activation[taken]
        return dense

    def firing_in(self, window_ids: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Return each firing in some windows, unordered: the index into ``window_ids``, and the latent."""
        ids = self._checked(window_ids)
        shard, local = np.divmod(ids, self._windows_per_shard)
        rows, found = [], []
        for number in np.unique(shard).tolist():  # map each shard once, which takes most of the time
            latents, _, window_offsets = self.shard(number)
            here = np.flatnonzero(shard == number)
            start, stop = (window_offsets[local[here] + i].astype(np.int64) for i in (0, 1))
            row, taken = _ranges(start, stop)
            rows.append(here[row])
            found.append(latents[taken].astype(np.int64))
        return np.concatenate([np.empty(0, np.int64), *rows]), np.concatenate([np.empty(0, np.int64), *found])

    def tokens(self, window_ids: npt.ArrayLike) -> Ints:
        """Return the token ids of some windows, [n, w]."""
        ids = self._checked(window_ids)
        columns = self.slot(ids)[:, None] * self.window + np.arange(self.window)
        rows = self.sequences_of(ids)
        return self.corpus.tokens[rows[:, None], columns].astype(np.int64)

    def sequences_of(self, window_ids: npt.ArrayLike) -> Ints:
        """Return the corpus sequence of each window."""
        return np.asarray(self._sequences[np.asarray(window_ids, dtype=np.int64) // self.windows_per_sequence])

    def slot(self, window_ids: npt.ArrayLike) -> Ints:
        """Return the place of each window in its sequence: 0 to ``windows_per_sequence`` - 1."""
        return np.asarray(window_ids, dtype=np.int64) % self.windows_per_sequence

    def content(self, window_ids: npt.ArrayLike | None = None) -> npt.NDArray[np.uint64]:
        """Return the hash of each window's tokens; all windows by default."""
        return self._content if window_ids is None else self._content[self._checked(window_ids)]

    def has_special(self, window_ids: npt.ArrayLike | None = None) -> npt.NDArray[np.bool_]:
        """Return whether each window has a special token; all windows by default."""
        return self._special if window_ids is None else self._special[self._checked(window_ids)]

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The study's corpus, checked to be the one that was harvested."""
        from sae.text.corpus import Corpus

        folder = (self.folder / self.record["corpus_path"]).resolve()
        if not folder.is_dir():
            raise NotFound(f"corpus {str(folder)!r} of store {str(self.folder)!r} is gone; restore it or harvest again")
        corpus = Corpus.open(folder)
        if corpus.fingerprint != self.provenance["corpus_fingerprint"]:
            raise BadInput(
                f"corpus {str(folder)!r} is not the harvested one; delete {str(self.folder)!r} and harvest again"
            )
        return corpus

    @property
    def n_shards(self) -> int:
        return len(self.record["shards"])

    @property
    def tokens_per_shard(self) -> int:
        """Tokens in each shard but the last, which may have fewer."""
        return self._windows_per_shard * self.window

    def shard(self, number: int) -> tuple[Array, ...]:
        """Map ``latents``, ``counts`` and ``window_offsets`` of a shard, uncached, because open files are limited."""
        name = self.record["shards"][number]["name"]
        paths = [self.folder / "shards" / name / f"{kind}.npy" for kind in SHARD_FILES]
        if number not in self._layouts:
            arrays = tuple(map_array(path) for path in paths)
            self._layouts[number] = [(a.dtype, a.offset, a.shape) for a in arrays]
            return arrays
        layouts = zip(paths, self._layouts[number], strict=True)
        return tuple(np.memmap(path, dtype, "r", offset, shape) for path, (dtype, offset, shape) in layouts)

    def _checked(self, window_ids: npt.ArrayLike) -> Ints:
        ids = np.asarray(window_ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.n_windows):
            raise NotFound(f"window {int(ids.max())} does not exist; this store has windows 0 to {self.n_windows - 1}")
        return ids


def latent_statistics(store: FiringStore) -> pd.DataFrame:
    """Compute how often and how strongly each latent fires: a table of M rows.

    ``n_firings`` and ``n_windows`` count tokens and windows; ``firing_frequency`` is per non-special token; mean and
    maximum activation are over firings (0 if none); ``dead`` means no firing in this harvest.
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
    """Return a 64-bit hash of each row of ``tokens`` [n, w]."""
    state = np.full(len(tokens), 0x243F6A8885A308D3, np.uint64)
    for column in tokens.T:
        state = mix_bits(state ^ column.astype(np.uint64))
    return state


def mix_bits(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of 64-bit words with SplitMix64's finaliser (Steele, Lea and Flood 2014), the same everywhere."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def split_latents(offsets: Ints, firings: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of latents with at most ``firings`` firings each, or one latent if it has more."""
    first, latents = 0, len(offsets) - 1
    while first < latents:
        last = int(np.searchsorted(offsets, offsets[first] + firings, side="right")) - 1
        last = min(max(last, first + 1), latents)
        yield first, last
        first = last


def read_digest(folder: Path) -> str:
    """Return :attr:`FiringStore.digest` of the store in ``folder`` from its record; errors as in ``open``."""
    return _digest(_read_finished(folder))


def _digest(record: dict[str, Any]) -> str:
    return digest({"provenance": record["provenance"], "n_sequences": record["n_sequences"]})


def _read_finished(folder: Path) -> dict[str, Any]:
    path = folder / STORE_FILE
    if not path.is_file():
        state = "is unfinished" if (folder / "shards").is_dir() else "does not exist"
        raise NotFound(f"firing store {str(folder)!r} {state}; harvest the run (the same command resumes)")
    return read_record(path)


def read_record(path: Path) -> dict[str, Any]:
    """Read a ``store.json`` or ``plan.json``. Raises BadInput if damaged, SettingsDiffer for another schema."""
    try:
        record = read_json(path)
        schema = record["schema"]
        _ = record["provenance"]
    except (ValueError, KeyError, TypeError):
        raise _damage_error(path.parent, f"{path.name} cannot be read") from None
    if schema != SCHEMA:
        raise SettingsDiffer(
            f"firing store {str(path.parent)!r} has schema {schema}, this program reads {SCHEMA}; "
            "delete the folder and harvest again, or use the version that wrote it"
        )
    return record


def _expected_shapes(record: dict[str, Any]) -> dict[str, tuple[int]]:
    """Return {path in the store: shape} of all files of a finished store."""
    provenance, firings, windows = record["provenance"], record["n_firings"], record["n_windows"]
    sizes = (provenance["num_latents"] + 1, firings, firings, record["n_sequences"], windows, windows)
    shapes = {f"{record['index']}/{name}.npy": (n,) for name, n in zip(INDEX_FILES, sizes, strict=True)}
    for shard in record["shards"]:
        shard_windows = shard["n_sequences"] * (provenance["context"] // provenance["window"])
        lengths = (shard["n_firings"], shard_windows * provenance["window"], shard_windows + 1)
        shapes |= {f"shards/{shard['name']}/{kind}.npy": (n,) for kind, n in zip(SHARD_FILES, lengths, strict=True)}
    return shapes


def create_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Create a ``.npy`` file of zeros and map it. Raises OSError if the disk has no space for all of it.

    Space is reserved first, since a write to a mapped page that has none kills the process.
    """
    array: np.memmap[Any, Any] = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.seek(array.offset)
            for start in range(array.offset, size, 1 << 20):
                file.write(bytes(min(1 << 20, size - start)))
    return array


def map_array(path: Path) -> np.memmap[Any, Any]:
    """Map a ``.npy`` file; raise OSError, ValueError or EOFError if it is missing or cut short."""
    array: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _damage_error(folder: Path, what: str) -> BadInput:
    return BadInput(f"firing store {str(folder)!r} is damaged ({what}); delete the folder and harvest again")


def _ranges(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Return the i of each integer of the ranges start[i]:stop[i], and the integers."""
    length = stop - start
    row = np.repeat(np.arange(len(length)), length)
    return row, np.arange(len(row)) + np.repeat(start - (np.cumsum(length) - length), length)
