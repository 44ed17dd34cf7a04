"""The sparse steps on a CPU: compiled loops over rows, shared out among threads. See ``steps.Kernels``.

Threads are plain Python threads, because the loops hold no interpreter lock; OpenMP threads of Numba's would spin
against PyTorch's. Each row of a result is one thread's work, so no result depends on the number of threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from sae.dictionaries.kernels import buffers, cpu_shortlist
from sae.dictionaries.kernels import cpu_loops as loops

TILE_BYTES = 32 * 2**20  # pre-activations that a thread of :func:`product_topk` holds at once
_FEWEST_ROWS = 64  # with fewer, rearranging the weights for each product costs as much as the product
_PIECES = min(16, max(2, os.cpu_count() or 1))  # of a batch, at least; each rearranges the weights once more


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    slots = _empty_slots(pre, k)
    depth = _depth(pre.shape[1], k)
    pre_array, *out = _arrays(pre, *slots)
    _in_parallel(lambda low, high: loops.topk_rows(pre_array, depth, *out, low, high), _even(len(pre)))
    return slots


def multiplies_in_tiles(matrix: Tensor) -> bool:
    """Return whether :func:`product_topk` is faster, up to 2 times: without AVX-512, where NumPy has OpenBLAS."""
    is_plain = matrix.is_cpu and matrix.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return is_plain and bool(_openblas().lib_controllers)


def product_topk(centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return :func:`topk` of ``centred @ weight.T + bias``, for float32 [B, D], [M, D] and [M].

    Each thread multiplies some rows by NumPy's BLAS and chooses while the results are in its cache. The sizes of the
    pieces, and so the bits of the results, depend on the machine, but not on the number of threads.
    """
    n, num_latents = len(centred), len(weight)
    slots = _empty_slots(centred, k)
    rows = min(max(_FEWEST_ROWS, -(-n // _PIECES)), max(_FEWEST_ROWS, TILE_BYTES // (4 * num_latents)))
    x, w, b, *out = _arrays(centred, weight, bias, *slots)
    depth = _depth(num_latents, k)

    def work(first: int, last: int) -> None:
        memory = buffers.empty((min(rows, n), num_latents), torch.float32).numpy()
        for low in range(first * rows, min(last * rows, n), rows):
            high = min(low + rows, n)
            pre = _matmul(x[low:high], w, memory[: high - low])
            loops.add_to_rows(pre, b)
            loops.topk_rows(pre, depth, out[0][low:high], out[1][low:high], 0, high - low)

    with _openblas().limit(limits=1):  # the threads are ours
        _in_parallel(work, _even(-(-n // rows)))
    return slots


def products(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write ``x @ weight.T`` of [B, D] and [M, D] into ``out`` [B, M], with the faster library on this machine."""
    if not multiplies_in_tiles(x):
        return torch.mm(x, weight.T, out=out)
    a, w, into = _arrays(x, weight, out)
    with _openblas().limit(limits=1):  # the threads are ours
        _in_parallel(lambda low, high: _matmul(a[low:high], w, into[low:high]), _even(len(a)))
    return out


def _matmul(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write ``x @ weight.T`` into ``out`` without NumPy's warnings: callers report numbers that are not finite."""
    with np.errstate(all="ignore"):
        return np.matmul(x, weight.T, out=out)


@cache
def _openblas() -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")


def rounded_topk(pre: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    slots = _empty_slots(centred, k)
    width = _lanes(pre.shape[1], k)
    bits, *rest = _arrays(pre.view(torch.int16), centred, weight, bias, *slots)
    _in_parallel(lambda low, high: cpu_shortlist.topk_of_bfloat16(bits, width, *rest, low, high), _even(len(pre)))
    return slots


class Quantised(NamedTuple):
    """A matrix whose rows are rounded to 8 bits, each with a step of its own."""

    rows: Tensor  # [N, D] int8, at most 127
    steps: Tensor  # [N] float32: row i is about ``steps[i] * rows[i]``
    lengths: Tensor  # [N] float32: the norms of the original rows; not finite where an entry is not


def quantise(matrix: Tensor) -> Quantised:
    """Round ``matrix`` [N, D] float32 to 8 bits."""
    n = len(matrix)
    out = Quantised(buffers.empty(matrix.shape, torch.int8), matrix.new_empty(n), matrix.new_empty(n))
    arrays = _arrays(matrix, *out)
    _in_parallel(lambda low, high: cpu_shortlist.quantise_rows(*arrays, low, high), _even(n))
    return out


def quantised_topk(
    products: Tensor, x: Quantised, w: Quantised, centred: Tensor, weight: Tensor, bias: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return :func:`topk` of ``centred @ weight.T + bias``, given ``products``, ``x.rows @ w.rows.T`` [B, M] int32.

    ``x`` and ``w`` are the quantised ``centred`` [B, D] and ``weight`` [M, D]. Activations are those of float32. A
    latent is missed only where the rounding errors of two rows, taken as random, reach six standard deviations.
    """
    slots = _empty_slots(centred, k)
    largest = (float(t.max()) for t in (w.lengths, w.steps, bias.abs()))
    numbers = (*largest, _lanes(products.shape[1], k))
    rough = _arrays(products, x.steps, x.lengths, w.steps)
    exact = _arrays(centred, weight, bias, *slots)
    _in_parallel(lambda low, high: cpu_shortlist.topk_of_int8(*rough, *numbers, *exact, low, high), _even(len(centred)))
    return slots


def _empty_slots(like: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(len(like), k), torch.empty(len(like), k, dtype=torch.int64)


def _depth(num_latents: int, k: int) -> int:
    """Return how many pre-activations a lane of ``topk_rows`` represents: sqrt(M / K) is the cheapest."""
    return 2 ** round(0.5 * math.log2(max(1.0, num_latents / k)))


def _lanes(num_latents: int, k: int) -> int:
    return max(1, min(num_latents, 2 ** round(math.log2(8 * k)), num_latents // 4))


def decode(activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = buffers.empty((len(activations), weight.shape[1]), weight.dtype)
    arrays = _arrays(activations, latents, weight, bias, out)
    _in_parallel(lambda low, high: loops.decode_rows(*arrays, low, high), _even(len(out)))
    return out


def residuals(
    activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    residual, products = buffers.empty(target.shape, target.dtype), torch.empty_like(activations)
    squares = target.new_empty(len(target))
    arrays = _arrays(activations, latents, weight, bias, target, residual, products, squares)
    _in_parallel(lambda low, high: loops.residual_rows(*arrays, low, high), _even(len(target)))
    return residual, products, squares.sum(dtype=torch.float64)


def weight_gradients(
    values: Tensor, products: Tensor, latents: Tensor, residual: Tensor, centred: Tensor, scale: float, num_latents: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_dec, W_enc = (buffers.empty((num_latents, residual.shape[1]), residual.dtype) for _ in range(2))
    b_enc = residual.new_empty(num_latents)
    v, p, who, r, c, *out = _arrays(values, products, latents, residual, centred, W_dec, W_enc, b_enc)
    offsets = np.zeros(num_latents + 2, np.int64)
    active = int(np.count_nonzero(v > 0))
    token, slot = np.empty(active, np.int64), np.empty(active, np.int64)
    loops.sort_slots(v, who, offsets, token, slot)
    offsets = offsets[:-1]
    arrays = (v.reshape(-1), p.reshape(-1), offsets, token, slot, r, c, scale, *out)
    _in_parallel(lambda low, high: loops.weight_gradient_rows(*arrays, low, high), _by_load(offsets))
    return W_dec, W_enc, b_enc, torch.from_numpy(np.diff(offsets))


def adam(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, step: int, rate: float, unit_rows: bool
) -> None:
    arrays = _arrays(*(torch.atleast_2d(t) for t in (weight, grad, first, second)))
    corrections = (1 - beta**step for beta in loops.BETAS)
    numbers = (rate, *loops.BETAS, loops.EPS, *corrections, unit_rows)
    _in_parallel(lambda low, high: loops.adam_rows(*arrays, *numbers, low, high), _even(len(arrays[0])))


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Return the tensors' own memory. The loops are compiled for contiguous rows, and results must not be copies."""
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("the sparse steps need contiguous tensors")
    return [t.detach().numpy() for t in tensors]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sae-kernel")


if hasattr(os, "register_at_fork"):  # a forked child has the pool, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _in_parallel(work: Callable[[int, int], Any], bounds: np.ndarray) -> None:
    ranges = [(int(low), int(high)) for low, high in pairwise(bounds) if high > low]
    waiting = [_pool(len(bounds) - 1).submit(work, low, high) for low, high in ranges[1:]]
    if ranges:
        work(*ranges[0])
    for future in waiting:
        future.result()


def _even(n: int) -> np.ndarray:
    return np.linspace(0, n, torch.get_num_threads() + 1).astype(np.int64)


def _by_load(offsets: np.ndarray) -> np.ndarray:
    """Return ranges of latents with about the same number of firings: a few latents may fire for most tokens."""
    cuts = np.linspace(0, int(offsets[-1]), torch.get_num_threads() + 1)[1:-1]
    return np.concatenate(([0], np.searchsorted(offsets[:-1], cuts), [len(offsets) - 1])).astype(np.int64)
