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
        special.npy             bool    [W]    whether a special token is among them, or all are skipped
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, with_config
from typing_extensions import TypedDict

from sae.common.errors import BadInput, NotFound
from sae.common.files import check_regular, digest
from sae.common.records import OPEN, check_pieces, read_record

if TYPE_CHECKING:
    from sae.text.corpus import Corpus

STORE_FILE = "store.json"
INDEX_FILES = ("offsets", "positions", "activations", "sequences", "content", "special")
SHARD_FILES = ("latents", "counts", "window_offsets")
_TYPES = {
    "offsets": ("<i8",),
    "positions": ("<u4",),
    "activations": ("<f2",),
    "sequences": ("<i8",),
    "content": ("<u8",),
    "special": ("|b1",),
    "window_offsets": ("<u4",),
    "latents": ("<u2", "<u4"),
    "counts": ("<u2", "<u4"),
}
HARVEST_AGAIN = "delete the folder and harvest again"
_BLOCK_FIRINGS = 1 << 22  # firings per piece when the whole store is read: some tens of MiB

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]


@with_config(OPEN)
class Provenance(TypedDict):
    """The inputs of a harvest."""

    corpus: str
    corpus_fingerprint: str
    hookpoint: str
    order: str
    context: _Positive
    window: _Positive
    sequences_per_shard: _Positive
    num_latents: _Positive
    weights: str


@with_config(OPEN)
class ShardFacts(TypedDict):
    """The content of ``facts.json``."""

    n_firings: _Count
    n_clipped: NotRequired[_Count]
    n_raised: NotRequired[_Count]
    n_skipped: NotRequired[_Count]
    digests: NotRequired[dict[str, list[str]]]  # of the pieces of its files; older stores have none


@with_config(OPEN)
class ShardRecord(ShardFacts):
    name: Annotated[str, Field(pattern=r"^\d+-\d+$")]
    n_sequences: _Positive


@with_config(OPEN)
class Plan(TypedDict):
    """The content of ``plan.json``."""

    schema: Literal[1]
    provenance: Provenance


@with_config(OPEN)
class StoreRecord(Plan):
    """The content of ``store.json``."""

    run: NotRequired[str | None]  # Run.id
    n_sequences: _Positive
    n_windows: _Count
    n_tokens: _Count
    n_special_tokens: _Count
    n_skipped_tokens: NotRequired[_Count]  # other tokens that are not encoded (settings.skip)
    n_firings: _Count
    n_clipped: NotRequired[_Count]
    n_raised: NotRequired[_Count]
    index: Annotated[str, Field(pattern=r"^index-\d+$")]
    corpus_path: str
    shards: list[ShardRecord]
    digests: NotRequired[dict[str, list[str]]]  # of the pieces of the index's files


class FiringStore:
    """A finished harvest of one SAE, memory-mapped. Open it with :meth:`open`."""

    def __init__(self, folder: Path, record: StoreRecord) -> None:
        self.folder = folder
        self.record = record
        self.provenance = record["provenance"]
        self.num_latents: int = self.provenance["num_latents"]
        self.window: int = self.provenance["window"]
        self.windows_per_sequence: int = self.provenance["context"] // self.window
        self.n_sequences: int = record["n_sequences"]
        self.n_windows: int = record["n_windows"]
        self.n_tokens: int = record["n_tokens"]
        self.n_special_tokens: int = record["n_special_tokens"]
        self.n_skipped_tokens: int = record.get("n_skipped_tokens", 0)
        self.n_firings: int = record["n_firings"]
        index = folder / record["index"]
        self._index = {name: map_array(index / f"{name}.npy") for name in INDEX_FILES}
        self._windows_per_shard = self.provenance["sequences_per_shard"] * self.windows_per_sequence
        self._layouts: dict[int, list[tuple[np.dtype[Any], int, tuple[int, ...]]]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> FiringStore:
        """Map the store in ``folder``; raise NotFound without a harvest, SettingsDiffer for another schema."""
        folder = Path(folder)
        record = _read_finished(folder)
        for relative, n in _expected_lengths(record).items():
            try:
                array = map_array(folder / relative)
            except (
                FileNotFoundError,
                ValueError,
                EOFError,
                SyntaxError,
                TokenError,
            ):  # the last two by NumPy
                raise _damage_error(folder, f"{relative} is missing or cut short") from None
            if array.shape != (n,) or array.dtype.str not in _TYPES[Path(relative).stem]:
                raise _damage_error(folder, f"{relative} holds {list(array.shape)} of type {array.dtype}, not {n}")
        return cls(folder, record)

    def check(self) -> bool:
        """Check all parts against their digests; return False for an older store without any."""
        for name in INDEX_FILES:
            self._checked_array(name)
        for number in range(self.n_shards):
            self.shard(number)
        return bool(self.record.get("digests"))

    def _check_part(
        self, relative: str, digests: Sequence[str] | None, first: int = 0, last: int | None = None
    ) -> None:
        if digests is not None and not check_pieces(self.folder / relative, digests, first, last):
            raise _damage_error(self.folder, f"{relative} does not match its digest")

    def _checked_array(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return entries ``start`` to ``stop`` of a part of the index, whose digests are checked when first read."""
        array = self._index[name]
        stop = len(array) if stop is None else stop
        bounds = (array.offset + i * array.itemsize for i in (start, stop))
        self._check_part(f"{self.record['index']}/{name}.npy", self.record.get("digests", {}).get(name, ()), *bounds)
        return array[start:stop]

    @functools.cached_property
    def latent_offsets(self) -> Ints:
        """The first firing of each latent, and the number of firings: int64 [M+1]."""
        offsets = self._checked_array("offsets")
        if offsets[0] != 0 or offsets[-1] != self.n_firings or (np.diff(offsets) < 0).any():
            raise _damage_error(self.folder, "its offsets do not ascend from 0 to the number of firings")
        return offsets

    @functools.cached_property
    def position(self) -> Array:
        return self._checked_array("positions")

    @functools.cached_property
    def activation(self) -> Array:
        return self._checked_array("activations")

    @functools.cached_property
    def _sequences(self) -> Ints:
        return self._checked_array("sequences")

    @functools.cached_property
    def _content(self) -> Array:
        return self._checked_array("content")

    @functools.cached_property
    def _special(self) -> Array:
        return self._checked_array("special")

    @property
    def n_encoded_tokens(self) -> int:
        """Tokens at which latents can fire: neither special nor skipped."""
        return self.n_tokens - self.n_special_tokens - self.n_skipped_tokens

    @property
    def digest(self) -> str:
        """Digest of inputs and amount, for tables made from this store: 64 hex characters."""
        return _digest(self.record)

    def firings(self, latent: int) -> tuple[Array, Array]:
        """Return the tokens (uint32, ascending) and activations (float16) of a latent's firings."""
        if not 0 <= latent < self.num_latents:
            raise NotFound(f"latent {latent} does not exist; this SAE has latents 0 to {self.num_latents - 1}")
        start, stop = int(self.latent_offsets[latent]), int(self.latent_offsets[latent + 1])
        return self._checked_array("positions", start, stop), self._checked_array("activations", start, stop)

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
        return np.take_along_axis(self.corpus.rows(self.sequences_of(ids)), columns, axis=1)

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
        """Return whether each window has a special token, or skipped ones alone; all windows by default."""
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
        shard = self.record["shards"][number]
        paths = [self.folder / "shards" / shard["name"] / f"{kind}.npy" for kind in SHARD_FILES]
        if number not in self._layouts:
            for kind in SHARD_FILES:
                self._check_part(f"shards/{shard['name']}/{kind}.npy", shard.get("digests", {}).get(kind, ()))
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

    ``n_firings`` and ``n_windows`` count tokens and windows; ``firing_frequency`` is per token that is neither special
    nor skipped; mean and maximum activation are over firings (0 if none); ``dead`` means no firing in this harvest.
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
    n_tokens = store.n_encoded_tokens
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


def _digest(record: StoreRecord) -> str:
    return digest({"provenance": record["provenance"], "n_sequences": record["n_sequences"]})


def _read_finished(folder: Path) -> StoreRecord:
    if not (folder / STORE_FILE).is_file():
        state = "is unfinished" if (folder / "shards").is_dir() else "does not exist"
        raise NotFound(f"firing store {str(folder)!r} {state}; harvest the run (the same command resumes)")
    return read_store_record(folder)


def read_store_record(folder: Path) -> StoreRecord:
    """Read ``store.json``. Raises BadInput if damaged, SettingsDiffer for another schema."""
    record = read_record(folder / STORE_FILE, StoreRecord, HARVEST_AGAIN)
    of, sequences = record["provenance"], record["n_sequences"]
    totals = (sum(shard[key] for shard in record["shards"]) for key in ("n_sequences", "n_firings"))
    tokens = sequences * (of["context"] // of["window"]) * of["window"]
    found = (*totals, record["n_windows"] * of["window"], record["n_tokens"])
    if found != (sequences, record["n_firings"], tokens, tokens):
        raise _damage_error(folder, f"the totals in {STORE_FILE} contradict each other")
    return record


def _expected_lengths(record: StoreRecord) -> dict[str, int]:
    """Return {path in the store: length} of all files of a finished store."""
    provenance, firings, windows = record["provenance"], record["n_firings"], record["n_windows"]
    sizes = (provenance["num_latents"] + 1, firings, firings, record["n_sequences"], windows, windows)
    lengths = {f"{record['index']}/{name}.npy": n for name, n in zip(INDEX_FILES, sizes, strict=True)}
    for shard in record["shards"]:
        shard_windows = shard["n_sequences"] * (provenance["context"] // provenance["window"])
        of_shard = (shard["n_firings"], shard_windows * provenance["window"], shard_windows + 1)
        lengths |= {f"shards/{shard['name']}/{kind}.npy": n for kind, n in zip(SHARD_FILES, of_shard, strict=True)}
    return lengths


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
    check_regular(path, "file")
    array: np.memmap[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _damage_error(folder: Path, what: str) -> BadInput:
    return BadInput(f"firing store {str(folder)!r} is damaged ({what}); {HARVEST_AGAIN}")


def _ranges(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Return the i of each integer of the ranges start[i]:stop[i], and the integers."""
    length = stop - start
    row = np.repeat(np.arange(len(length)), length)
    return row, np.arange(len(row)) + np.repeat(start - (np.cumsum(length) - length), length)
