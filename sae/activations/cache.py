"""Keep activations on disk, for later epochs and for the harvest.

The cache only saves time: without it, the stream computes the same numbers. Its size is bounded. A checksum per slot
detects damaged and unfinished slots. Files are read and written, not mapped: mapped pages count as this process's
memory, and a full disk would kill the process instead of raising an error.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import xxhash

from sae.activations.subject import Subject
from sae.common.amounts import human
from sae.common.files import digest, is_disk_full, read_json, write_json
from sae.common.progress import say
from sae.text.corpus import BLOCK_TOKENS, Corpus

_SPARE_DISK_BYTES = 2 << 30
_SUM_BYTES = 8
_META = "meta.json"
# NumPy has no bfloat16: its bits are stored as 16-bit integers.
_ON_DISK = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}


class ActivationCache:
    """One slot [T, D] per sequence, in the subject's precision, with an XXH3 checksum (0: an empty slot).

    Attributes:
        slots: the number of sequences that fit, the first ones in block order.
        fills: whether this process may fill slots; one process per cache does.
    """

    def __init__(
        self, folder: Path, slots: int, shape: tuple[int, int], dtype: torch.dtype, fills: bool = True
    ) -> None:
        self.folder, self.slots, self.fills = folder, slots, fills
        self._shape, self._dtype = shape, dtype
        self._slot_bytes = count_slot_bytes(shape, dtype)
        if fills:
            self._prepare()
        self._slots_file = os.open(folder / "slots.bin", os.O_RDWR if fills else os.O_RDONLY)
        self._sums_file = os.open(folder / "sums.bin", os.O_RDWR if fills else os.O_RDONLY)
        self._close = weakref.finalize(self, _close_files, self._slots_file, self._sums_file)
        self._sums = np.frombuffer(os.pread(self._sums_file, slots * _SUM_BYTES, 0), dtype="<u8").copy()
        self._full = self._has_damage = False

    def _prepare(self) -> None:
        """Create or resize the files; delete those of another shape or precision."""
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"shape": list(self._shape), "dtype": str(self._dtype), "checksum": "xxh3-64"}
        slots_path, sums_path = folder / "slots.bin", folder / "sums.bin"
        stored = None
        with suppress(OSError, ValueError):
            stored = read_json(folder / _META)
        if stored != meta:
            slots_path.unlink(missing_ok=True)
            sums_path.unlink(missing_ok=True)
            write_json(folder / _META, meta)
        os.utime(folder / _META)  # its age shows which cache is least recently used
        slots_path.touch(0o644)
        sums_path.touch(0o644)
        os.truncate(sums_path, self.slots * _SUM_BYTES)
        if slots_path.stat().st_size > self.slots * self._slot_bytes:  # of an earlier, larger limit
            os.truncate(slots_path, self.slots * self._slot_bytes)

    def has(self, slots: np.ndarray) -> np.ndarray:
        """Return which of ``slots`` [n] are filled: bool [n]."""
        inside = slots < self.slots
        return inside & (self._sums[np.where(inside, slots, 0)] != 0) if self.slots else inside

    def takes(self, slots: np.ndarray) -> bool:
        """Return whether ``slots`` can be filled: they are within the limit, and the disk is not full."""
        return self.fills and not self._full and bool((slots < self.slots).all())

    def get(self, slots: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Return filled ``slots`` [n] as [n, T, D] on the CPU, and which are intact, bool [n]; empty the others."""
        values = np.empty((len(slots), *self._shape), dtype=_ON_DISK[self._dtype])
        raw = values.reshape(-1).view(np.uint8).data
        whole = np.zeros(len(slots), dtype=bool)
        for i, slot in enumerate(slots):
            target = raw[i * self._slot_bytes : (i + 1) * self._slot_bytes]
            read = os.preadv(self._slots_file, [target], int(slot) * self._slot_bytes)
            whole[i] = read == self._slot_bytes and _checksum(target) == self._sums[slot]
        if not whole.all():
            if not self._has_damage:
                say(
                    f"activations: {(~whole).sum()} sequences in {str(self.folder)!r} do not match their checksums; "
                    "recomputing them and any others like them"
                )
            self._has_damage = True
            self._sums[slots[~whole]] = 0
        return torch.from_numpy(values).view(self._dtype), whole

    def put(self, first: int, values: torch.Tensor) -> bool:
        """Fill the slots from ``first`` with ``values`` [n, T, D]. Returns False if they do not fit."""
        slots = np.arange(first, first + len(values))
        if not self.takes(slots):
            return False
        raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        size = self._slot_bytes
        sums = np.array([_checksum(raw[i * size : (i + 1) * size]) for i in range(len(values))], dtype="<u8")
        try:
            _write_all(self._slots_file, raw, first * size)
            _write_all(self._sums_file, memoryview(sums.tobytes()), first * _SUM_BYTES)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._full = True
            say("activations: the disk is full; the rest will be recomputed when needed")
            return False
        self._sums[slots] = sums
        return True

    def delete(self) -> None:
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)


def open_caches(
    corpus: Corpus, subject: Subject, hookpoints: Sequence[str], limit_bytes: int
) -> dict[str, ActivationCache]:
    """Open the caches of hookpoints in the corpus's folder; existing contents stay.

    ``limit_bytes`` limits all caches under the root. The hookpoints share it evenly; other caches are deleted for
    space, least recently used first. A hookpoint gets no cache if not even one block fits.
    """
    names = [subject.resolve(hookpoint) for hookpoint in hookpoints]
    if limit_bytes <= 0 or not names:
        return {}
    shapes = {name: (corpus.context, subject.width(name)) for name in names}
    folders = {name: corpus.folder / "activations" / _cache_key(corpus, subject, name) for name in names}
    sizes = {name: count_slot_bytes(shapes[name], subject.dtype) for name in names}
    kept = sum(_on_disk(folder) for folder in folders.values())
    room = min(limit_bytes, max(kept, shutil.disk_usage(corpus.folder).free + kept - _SPARE_DISK_BYTES))
    slots = {name: _slots(corpus, sizes[name], room // len(names)) for name in names}
    wanted = corpus.n_tokens * sum(sizes.values()) // corpus.context
    if wanted > room:
        why = "the limit (--activation-cache)" if room == limit_bytes else "the free disk space"
        say(
            f"activations: {human(sum(slots[n] * sizes[n] for n in names))}B of {human(wanted)}B are kept on disk, "
            f"within {why}; later epochs and the harvest recompute the rest"
        )
    _make_room(corpus.folder.parent, set(folders.values()), limit_bytes - sum(slots[n] * sizes[n] for n in names))
    kept_names = [name for name in names if slots[name]]
    return {name: ActivationCache(folders[name], slots[name], shapes[name], subject.dtype) for name in kept_names}


def open_caches_to_read(corpus: Corpus, subject: Subject, hookpoints: Sequence[str]) -> dict[str, ActivationCache]:
    """Open, for reading, the caches that another process may be filling (:func:`open_caches`)."""
    found = {}
    for name in (subject.resolve(hookpoint) for hookpoint in hookpoints):
        folder = corpus.folder / "activations" / _cache_key(corpus, subject, name)
        if (folder / "sums.bin").is_file():
            slots = (folder / "sums.bin").stat().st_size // _SUM_BYTES
            shape = corpus.context, subject.width(name)
            found[name] = ActivationCache(folder, slots, shape, subject.dtype, fills=False)
    return found


def count_slot_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return the bytes of a sequence's activations [T, D]."""
    return shape[0] * shape[1] * dtype.itemsize


def _slots(corpus: Corpus, size: int, room: int) -> int:
    """Return how many sequences fit, in whole blocks."""
    fitting = room // (size + _SUM_BYTES)
    return corpus.n_sequences if fitting >= corpus.n_sequences else fitting // corpus.block_rows * corpus.block_rows


def _make_room(corpora: Path, ours: set[Path], room: int) -> None:
    """Delete other caches under the root, least recently used first, until they take at most ``room`` bytes."""
    others = [meta for meta in corpora.glob(f"*/activations/*/{_META}") if meta.parent not in ours]
    found = sorted((meta.stat().st_mtime, _on_disk(meta.parent), meta.parent) for meta in others)
    taken = sum(size for _, size, _ in found)
    for _, size, folder in found:
        if taken <= max(0, room):
            return
        say(f"activations: deleting {human(size)}B of another study to make room; its harvest recomputes them")
        shutil.rmtree(folder, ignore_errors=True)
        taken -= size


def _on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.glob("*.bin"))


def _checksum(data: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data) or 1


def _close_files(*files: int) -> None:
    for file in files:
        os.close(file)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _cache_key(corpus: Corpus, subject: Subject, hookpoint: str) -> str:
    model = [subject.fingerprint, subject.prefix, hookpoint, str(subject.dtype), subject.device.type]
    return digest([corpus.fingerprint, *model, torch.__version__, BLOCK_TOKENS])[:16]
