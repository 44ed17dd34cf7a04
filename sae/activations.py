"""Activations as a stream: computed once, in fixed company, kept on disk while a study needs them again.

The forward pass is the dear part, and floating-point sums may differ in the last bit with the shape of a
batch. So a sequence is always computed together with the others of its block (see :mod:`sae.corpus`):
training, harvest and a resumed run all see the same bits, whoever asks first and in whatever portions.

The cache is read and written with plain file calls, not through a mapping: mapped pages count as this
process's memory, and a full disk would end it by a signal instead of an error. It only ever saves time: full,
absent or deleted, the stream gives the same numbers.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from sae.corpus import BLOCK_TOKENS, MIXED_BLOCKS, Corpus
from sae.errors import UserError
from sae.files import digest, read_json, write_json
from sae.progress import human, say
from sae.subject import Subject

CACHE_LIMIT_BYTES = 8 << 30
_SPARE_DISK_BYTES = 2 << 30
# NumPy has no bfloat16: its bits travel as 16-bit integers.
_ON_DISK = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}


class ActivationCache:
    """One fixed-size slot ``[T, D]`` per sequence, in the subject's precision, and a byte that says it is filled.

    The byte is written after the slot, so a process killed between the two computes the sequence again. A
    machine that went down may have kept the one and lost the other: a cache from before the last start is
    emptied.
    """

    def __init__(self, folder: Path, slots: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder = folder
        self._shape, self._dtype = shape, dtype
        self._slot_bytes = shape[0] * shape[1] * dtype.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"slots": slots, "shape": list(shape), "dtype": str(dtype), "boot": _boot()}
        try:
            kept = read_json(folder / "meta.json") == meta
        except (OSError, ValueError):
            kept = False
        if not kept:
            for name in ("filled.bin", "slots.bin"):
                (folder / name).unlink(missing_ok=True)
            write_json(folder / "meta.json", meta)
        self._slots_file = os.open(folder / "slots.bin", os.O_RDWR | os.O_CREAT, 0o644)
        self._filled_file = os.open(folder / "filled.bin", os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, _close_files, self._slots_file, self._filled_file)
        os.truncate(self._filled_file, slots)
        self._filled = np.frombuffer(os.pread(self._filled_file, slots, 0), dtype=np.uint8).copy()
        self._full = False

    @classmethod
    def for_stream(
        cls, corpus: Corpus, subject: Subject, hookpoint: str, limit_bytes: int = CACHE_LIMIT_BYTES
    ) -> ActivationCache | None:
        """The cache of one hookpoint's activations over a corpus, beside the corpus; what is in it is kept.

        ``None``, and a line that says so, where it would take more than ``limit_bytes`` or the disk has no room.
        """
        hookpoint = subject.resolve(hookpoint)
        width = subject.width(hookpoint)
        folder = corpus.folder / "activations" / _cache_key(corpus, subject, hookpoint)
        size = corpus.n_tokens * width * subject.dtype.itemsize
        if size > limit_bytes:
            say(
                f"activations: not kept on disk ({human(size)}B would be more than the limit of "
                f"{human(limit_bytes)}B); later epochs and the harvest compute them again"
            )
            return None
        free = shutil.disk_usage(corpus.folder).free
        if not folder.exists() and size + _SPARE_DISK_BYTES > free:
            say(
                f"activations: not kept on disk ({human(size)}B, and {human(free)}B are free); computed again as needed"
            )
            return None
        return cls(folder, corpus.n_sequences, (corpus.context, width), subject.dtype)

    def has(self, slots: np.ndarray) -> np.ndarray:
        """Which of ``slots [n]`` are filled: bool ``[n]``."""
        return self._filled[slots] != 0

    def get(self, slots: np.ndarray) -> torch.Tensor:
        """The contents of filled ``slots [n]``: ``[n, T, D]`` on the CPU."""
        values = np.empty((len(slots), *self._shape), dtype=_ON_DISK[self._dtype])
        raw = values.reshape(-1).view(np.uint8).data
        for i, slot in enumerate(slots):
            target = raw[i * self._slot_bytes : (i + 1) * self._slot_bytes]
            if os.preadv(self._slots_file, [target], int(slot) * self._slot_bytes) != self._slot_bytes:
                raise UserError(f"activation cache {str(self.folder)!r} is cut short; delete the folder and run again")
        return torch.from_numpy(values).view(self._dtype)

    def put(self, first: int, values: torch.Tensor) -> bool:
        """Fill the slots from ``first`` on with ``values [n, T, D]``. False where the disk has become full."""
        if self._full:
            return False
        raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            _write_all(self._slots_file, raw, first * self._slot_bytes)
            os.pwrite(self._filled_file, b"\1" * len(values), first)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._full = True
            say("activations: the disk is full; the rest are not kept on disk but computed again as needed")
            return False
        self._filled[first : first + len(values)] = 1
        return True

    def delete(self) -> None:
        """Give the disk space back. The cache cannot be used afterwards."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _close_files(*files: int) -> None:
    for file in files:
        os.close(file)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _cache_key(corpus: Corpus, subject: Subject, hookpoint: str) -> str:
    """Everything that the bits depend on, the kind of device and the arithmetic library among it."""
    made_from = [
        corpus.fingerprint,
        subject.fingerprint,
        subject.prefix,
        hookpoint,
        str(subject.dtype),
        subject.device.type,
        torch.__version__,
        BLOCK_TOKENS,
    ]
    return digest(made_from)[:16]


def _boot() -> str:
    """Names the machine's current start; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class ActivationStream:
    """The activations of one hookpoint over a corpus, by sequence, the same bits whoever asks.

    Attributes:
        subject, corpus, cache: what it was made of.
        hookpoint: the hookpoint's one name (see :meth:`Subject.resolve`).
        width: D. context: T. device: where the activations lie.
    """

    def __init__(self, subject: Subject, corpus: Corpus, hookpoint: str, cache: ActivationCache | None = None) -> None:
        self.subject = subject
        self.corpus = corpus
        self.hookpoint = subject.resolve(hookpoint)
        self.cache = cache
        self.width = subject.width(self.hookpoint)
        self.context = corpus.context
        self.device = subject.device
        subject.check_context(corpus.context)
        # Without a cache on disk, one group of an order (see Corpus.order) is held in memory.
        self._held: OrderedDict[int, torch.Tensor] = OrderedDict()

    def rows(self, index: np.ndarray) -> torch.Tensor:
        """The activations of sequences ``index [n]``: ``[n, T, D]`` in the subject's precision on its device.

        Cheapest when read along :meth:`Corpus.order`: then every block is computed once.
        Raises :class:`UserError` where the model gives NaN or infinity.
        """
        index = np.asarray(index, dtype=np.int64)
        blocks, places = self.corpus.place(index)
        out = torch.empty((len(index), self.context, self.width), dtype=self.subject.dtype, device=self.device)
        wanted = np.ones(len(index), dtype=bool)
        if self.cache is not None:
            slots = blocks * self.corpus.block_rows + places
            stored = self.cache.has(slots)
            if stored.any():
                _assign(out, stored, self.cache.get(slots[stored]).to(self.device))
            wanted = ~stored
        # Held blocks first, since computing others may push them out; then by their last use, so that what
        # stays held is what the next call is likely to go on with.
        last_use = {int(b): i for i, b in enumerate(blocks) if wanted[i]}
        for block in sorted(last_use, key=lambda b: (b not in self._held, last_use[b])):
            mine = wanted & (blocks == block)
            _assign(out, mine, self._block(block)[torch.from_numpy(places[mine]).to(self.device)])
        return out

    def _block(self, number: int) -> torch.Tensor:
        values = self._held.pop(number, None)
        if values is None:
            values = self._compute(number)
            if self.cache is not None and self.cache.put(number * self.corpus.block_rows, values):
                return values
        self._held[number] = values
        while len(self._held) > MIXED_BLOCKS:
            self._held.popitem(last=False)
        return values

    def _compute(self, number: int) -> torch.Tensor:
        rows = self.corpus.block(number)
        values = self.subject.activations(self.corpus.rows(rows), [self.hookpoint])[self.hookpoint]
        if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
            bad = rows[~torch.isfinite(values).flatten(1).all(dim=1).cpu().numpy()]
            kind = "NaN" if torch.isnan(values).any() else "infinity"
            cure = (
                "its weights are damaged: fetch them again"
                if self.subject.dtype == torch.float32
                else "use subject.dtype float32 (or bfloat16 in place of float16)"
            )
            raise UserError(
                f"model {self.subject.source!r} gives {kind} at {self.hookpoint} in block {number} of the corpus "
                f"(sequence {bad[0]} and {len(bad) - 1} more); {cure}"
            )
        return values


def _assign(out: torch.Tensor, mask: np.ndarray, values: torch.Tensor) -> None:
    out[torch.from_numpy(mask).to(out.device)] = values.to(out.dtype)


class TrainingBatches(Sequence[torch.Tensor]):
    """The training batches: ``len`` steps, each ``[B, D]`` float32, reproducible one by one.

    A step takes whole sequences in the order of their epoch and leaves special tokens out, so B varies a
    little below ``sequences_per_step · T``. Past the corpus's end the next epoch begins, in an order of its own.

    Attributes:
        sequences_per_step: whole sequences in a step.
        tokens_per_step: their tokens, the special ones included.
        fingerprint: SHA-256 of which sequences each step takes, and of what is left out.
    """

    def __init__(self, stream: ActivationStream, tokens: int, batch_tokens: int, order_seed: int = 0) -> None:
        self.stream = stream
        self.order_seed = order_seed
        corpus = stream.corpus
        self.sequences_per_step = max(1, round(batch_tokens / corpus.context))
        self.tokens_per_step = self.sequences_per_step * corpus.context
        self._steps = max(1, -(-tokens // self.tokens_per_step))
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: corpus.order(epoch, order_seed))

    def __len__(self) -> int:
        return self._steps

    @functools.cached_property
    def fingerprint(self) -> str:
        corpus = self.stream.corpus
        last_epoch = (self._steps * self.sequences_per_step - 1) // corpus.n_sequences
        # The orders themselves, not only their seed: a generator may change between library versions.
        orders = [digest(self._order(epoch).tolist()) for epoch in sorted({0, last_epoch})]
        made_from = [corpus.fingerprint, corpus.special_ids, self.order_seed, self.sequences_per_step, self._steps]
        return digest([*made_from, orders])

    def sequences(self, step: int) -> np.ndarray:
        """Which sequences a step takes, int64 ``[sequences_per_step]``."""
        first = step * self.sequences_per_step
        epochs, places = np.divmod(np.arange(first, first + self.sequences_per_step), self.stream.corpus.n_sequences)
        taken = [self._order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(taken)

    @overload
    def __getitem__(self, step: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, step: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, step: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(self._steps))]
        if not -self._steps <= step < self._steps:
            raise IndexError(f"step {step} of {self._steps}")
        index = self.sequences(step % self._steps)
        x = self.stream.rows(index).reshape(-1, self.stream.width)
        special = self.stream.corpus.is_special(self.stream.corpus.rows(index)).reshape(-1)
        if special.any():
            x = x[torch.from_numpy(~special).to(x.device)]
        if len(x) == 0:
            raise UserError(f"step {step} holds special tokens only; the corpus is no text")
        return x.float()
