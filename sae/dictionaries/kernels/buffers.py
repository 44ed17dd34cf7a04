"""Reuse the memory of large results once nobody holds them any more.

A training step makes the same few large tensors every time, and new memory, cleared page by page, costs up to a tenth
of the step. :func:`empty` reuses memory only when neither its tensor nor any view of it exists.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; smaller tensors come from memory that the process keeps anyway
_ALIGNED = 64  # bytes: a line of the cache, and the widest register
_KEPT = 64  # requests after which an unused piece is returned to the system
_FITTING = 1.25  # times the size needed: a piece may be this much larger


class Buffers:
    """Pieces of main memory, some of them in use."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._used: list[int] = []
        self._requests = 0
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in main memory."""
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
            # The list, the loop variable and the call itself hold the piece. So does a tensor made of it, for as long
            # as any view of that tensor's memory is alive.
            free = sys.getrefcount(piece) <= _UNHELD
            fits = size <= len(piece) <= _FITTING * size
            if free and fits and (best is None or len(piece) < len(self._pieces[best])):
                best = i
        if best is None:
            kept = [i for i, used in enumerate(self._used) if self._requests - used <= _KEPT]
            self._pieces = [*(self._pieces[i] for i in kept), _aligned(size)]
            self._used = [*(self._used[i] for i in kept), 0]
            best = len(self._pieces) - 1
        self._used[best] = self._requests
        return torch.from_numpy(self._pieces[best])


def _aligned(size: int) -> np.ndarray:
    """Return ``size`` bytes that begin at a multiple of ``_ALIGNED``."""
    whole = np.empty(size + _ALIGNED, np.uint8)
    start = -whole.ctypes.data % _ALIGNED
    return whole[start : start + size]


def _count_references() -> int:
    """Return ``sys.getrefcount`` of a list's element that only the list and a loop hold; interpreters differ."""
    pieces = [np.empty(1, np.uint8)]
    for _, piece in enumerate(pieces):
        return sys.getrefcount(piece)
    raise AssertionError


_UNHELD = _count_references()
empty = Buffers().empty
