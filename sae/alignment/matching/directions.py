"""The rows of a dictionary as directions: exact cosines pair by pair, and rounded copies for products of blocks.

Let x and y be unit rows and x̃, ỹ their roundings to bfloat16 or float32, which a *screen* holds. With e = max |x - x̃|
and f = max |y - ỹ|, both measured,

    |x·y - x̃·ỹ| ≤ |x - x̃| |y| + |x̃| |y - ỹ| ≤ e + (1 + e) f.

Products are accumulated in float32: each of at most 2D roundings (vdpbf16ps rounds product and sum) costs 2⁻²⁴ of
Σ|x̃ᵈỹᵈ| ≤ (1 + e)(1 + f), together less than 4D · 2⁻²⁴. In bfloat16 the result c̃ is rounded once more, by 2⁻⁸ of
itself:

    |x·y - c̃| ≤ margin + relative · |c̃|,    margin = e + (1 + e) f + 4D · 2⁻²⁴,    relative = 0 or 2⁻⁸ (1 + 2⁻⁷).

Screened cosines are used only within this error (:class:`Margin`); results are made of exact ones.

Shapes: D model width, M latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sae.common.precision import FloatPrecision
from sae.dictionaries.kernels.cpu import run_in_parallel, split_evenly
from sae.dictionaries.kernels.cpu_loops import FAST

Floats = NDArray[np.float64]

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
_BLOCK = 4096  # rows brought to unit length at a time
_SAFE = 2.0**40  # rows longer than this, or shorter than its inverse, are scaled before they are multiplied
_ROUNDINGS = 4 * 2.0**-24
_BFLOAT16 = 2.0**-8 * (1 + 2.0**-7)
_SLACK = 1e-6  # for the measurement of rounding errors, itself done in float32


@dataclass(frozen=True)
class Directions:
    """The rows of a dictionary, unscaled, and the factor that brings each to unit length."""

    rows: NDArray[Any]  # [M, D] float32 or float64, C-contiguous
    inverse: Floats  # [M]: 1 / length, 0 for a row of zeros

    @classmethod
    def of(cls, weights: ArrayLike) -> Directions:
        """Take finite ``weights`` [M, D], without a copy where they are float32 or float64 of ordinary size."""
        rows = np.asarray(weights)
        rows = np.ascontiguousarray(rows, dtype=np.float64 if rows.dtype == np.float64 else np.float32)
        length = np.sqrt(_squares(rows))
        # The squares of very small and very large rows leave float64's range, and products float32's.
        odd = np.flatnonzero(((length > _SAFE) | (length < 1 / _SAFE)) & rows.any(axis=1))
        if len(odd):
            rows = rows.copy()
            # Powers of two round nothing, so the direction stays exact.
            exponent = np.frexp(np.abs(rows[odd]).max(axis=1, keepdims=True))[1]
            rows[odd] = np.ldexp(rows[odd], -exponent)
            length[odd] = np.sqrt(_squares(rows[odd]))
        inverse = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
        return cls(rows, inverse)

    def __len__(self) -> int:
        return len(self.rows)

    def unit(self, which: Any) -> Floats:
        return self.rows[which].astype(np.float64) * self.inverse[which][:, None]


class Margin(NamedTuple):
    """How far a screened cosine c̃ can be from the true one: ``absolute + relative * |c̃|``."""

    absolute: float
    relative: float

    def above(self, screened: Floats) -> Floats:
        """Return the most that the true cosine can be; it rises with ``screened``."""
        finite = np.where(np.isfinite(screened), screened, 0)
        return screened + self.absolute + self.relative * np.abs(finite)


@dataclass(frozen=True)
class Screen:
    """Unit rows rounded for products in bulk."""

    rows: Tensor  # [M, D] float32 or bfloat16, on the device that multiplies
    error: float  # the largest distance of a rounded row from the true one

    @classmethod
    def of(cls, directions: Directions, precision: FloatPrecision, device: torch.device | str) -> Screen:
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        out = torch.empty(directions.rows.shape, dtype=kind, device=device)
        error = 0.0
        for start in range(0, len(directions), _BLOCK):
            rows = torch.from_numpy(directions.rows[start : start + _BLOCK])
            scale = torch.from_numpy(directions.inverse[start : start + _BLOCK]).to(rows.dtype)
            unit = rows * scale[:, None]
            rounded = unit.to(kind)
            error = max(error, float((rounded.to(unit.dtype) - unit).norm(dim=1).max()))
            out[start : start + _BLOCK] = rounded
        return cls(out, error + _SLACK)

    def __len__(self) -> int:
        return len(self.rows)

    def margin(self, other: Screen) -> Margin:
        """Return this module's error bound for products of rows of the two."""
        error = self.error + (1 + self.error) * other.error + self.rows.shape[1] * _ROUNDINGS
        return Margin(error, _BFLOAT16 if self.rows.dtype == torch.bfloat16 else 0.0)


@contextmanager
def plain_products() -> Iterator[None]:
    """Form float32 products without TF32 or bfloat16, and keep the sums of bfloat16 products in float32."""
    cuda = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), cuda.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cuda.allow_bf16_reduced_precision_reduction = before[1]


def compute_cosines(a: Directions, b: Directions, i: NDArray[Any], j: NDArray[Any]) -> Floats:
    """Return the cosines of the pairs (i, j) [E] in float64; a pair's never depends on other pairs or on threads."""
    out = np.empty(len(i))
    run_in_parallel(
        lambda low, high: _dots(a.rows, b.rows, a.inverse, b.inverse, i, j, out, low, high),
        split_evenly(len(i), least=4096),
    )
    return out


@_compiled
def _squares(rows: np.ndarray) -> np.ndarray:
    out = np.empty(len(rows))
    for i in range(len(rows)):
        total = 0.0
        row = rows[i]
        for d in range(len(row)):
            total += np.float64(row[d]) * np.float64(row[d])
        out[i] = total
    return out


@_compiled
def _dots(a: Any, b: Any, scale_a: Any, scale_b: Any, i: Any, j: Any, out: Any, low: int, high: int) -> None:
    for e in range(low, high):
        x, y = a[i[e]], b[j[e]]
        total = 0.0
        for d in range(len(x)):
            total += np.float64(x[d]) * np.float64(y[d])
        out[e] = total * scale_a[i[e]] * scale_b[j[e]]
