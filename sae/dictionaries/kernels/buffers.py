"""Memory for large results that is used again once nobody holds them any more.

The system hands out large pieces of memory page by page, cleared, and takes them back when they are freed. A step of
training makes the same few large tensors over and over: asking for them anew costs as much as a tenth of the step.
What :func:`empty` returns is an ordinary tensor; its memory is given out again only when neither the tensor nor any
view of it exists.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; what is smaller comes from memory that the process keeps anyway
_ALIGNED = 64  # bytes: a line of the cache, and the widest register
_KEPT = 64  # requests after which a piece that nobody wanted is returned to the system
_FITTING = 1.25  # times what is needed: a piece may be so much larger


class Buffers:
    """Pieces of main memory, some of them in use."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._used: list[int] = []
        self._requests = 0
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in main memory, of any content."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            piece = self._free_piece(size)
        return piece[:size].view(dtype).view(tuple(shape))

    def _free_piece(self, size: int) -> Tensor:
        self._requests += 1
        best: int | None = None
        for i, piece in enumerate(self._pieces):
            # The list, the loop's name and the question itself hold the piece. A tensor made of it does as well, for
            # as long as any view of that tensor's memory is alive.
            free = sys.getrefcount(piece) <= _NOBODY
            if (
                free
                and size <= len(piece) <= _FITTING * size
                and (best is None or len(piece) < len(self._pieces[best]))
            ):
                best = i
        if best is None:
            self._forget()
            self._pieces.append(_aligned(size))
            self._used.append(0)
            best = len(self._pieces) - 1
        self._used[best] = self._requests
        return torch.from_numpy(self._pieces[best])

    def _forget(self) -> None:
        """Return to the system what nobody holds and nobody has wanted for some time."""
        kept = [i for i, used in enumerate(self._used) if self._requests - used <= _KEPT]
        self._pieces, self._used = [self._pieces[i] for i in kept], [self._used[i] for i in kept]


def _aligned(size: int) -> np.ndarray:
    """``size`` bytes that begin at a multiple of ``_ALIGNED``."""
    whole = np.empty(size + _ALIGNED, np.uint8)
    start = -whole.ctypes.data % _ALIGNED
    return whole[start : start + size]


def _references_of_a_free_piece() -> int:
    """What ``sys.getrefcount`` says in a loop of a list's element that nobody else holds; interpreters differ."""
    pieces = [np.empty(1, np.uint8)]
    for _, piece in enumerate(pieces):
        return sys.getrefcount(piece)
    raise AssertionError


_NOBODY = _references_of_a_free_piece()
_of_process = Buffers()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape, dtype=dtype)`` in main memory, in memory that was used before where there is some."""
    return _of_process.empty(shape, dtype)
