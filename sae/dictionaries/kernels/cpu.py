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
    _run(loops.topk_rows, split_evenly(len(pre)), pre, _depth(pre.shape[1], k), slots)
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
    (x, w, b), (values, latents) = _arrays((centred, weight, bias)), _arrays(slots)
    depth = _depth(num_latents, k)

    def work(first: int, last: int) -> None:
        memory = buffers.empty((min(rows, n), num_latents), torch.float32).numpy()
        for low in range(first * rows, min(last * rows, n), rows):
            high = min(low + rows, n)
            pre = _matmul(x[low:high], w, memory[: high - low])
            loops.add_to_rows(pre, b)
            loops.topk_rows(pre, depth, (values[low:high], latents[low:high]), 0, high - low)

    with _openblas().limit(limits=1):  # the threads are ours
        run_in_parallel(work, split_evenly(-(-n // rows)))
    return slots


def products(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write ``x @ weight.T`` of [B, D] and [M, D] into ``out`` [B, M], with the faster library on this machine."""
    if not multiplies_in_tiles(x):
        return torch.mm(x, weight.T, out=out)
    a, w, into = _arrays((x, weight, out))
    with _openblas().limit(limits=1):  # the threads are ours
        run_in_parallel(lambda low, high: _matmul(a[low:high], w, into[low:high]), split_evenly(len(a)))
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
    bits, width, ranges = pre.view(torch.int16), _lanes(pre.shape[1], k), split_evenly(len(pre))
    _run(cpu_shortlist.topk_of_bfloat16, ranges, bits, width, (centred, weight, bias), slots)
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
    _run(cpu_shortlist.quantise_rows, split_evenly(n), matrix, *out)
    return out


def quantised_topk(
    products: Tensor, x: Quantised, w: Quantised, centred: Tensor, weight: Tensor, bias: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return :func:`topk` of ``centred @ weight.T + bias``, given ``products``, ``x.rows @ w.rows.T`` [B, M] int32.

    ``x`` and ``w`` are the quantised ``centred`` [B, D] and ``weight`` [M, D]. Activations are those of float32. A
    latent is missed only where the rounding errors of two rows, taken as random, reach six standard deviations.
    """
    slots = _empty_slots(centred, k)
    largest = (float(w.lengths.max()), float(w.steps.max()), float(bias.abs().max()))
    rough = products, (x.steps, x.lengths), w.steps, largest, _lanes(products.shape[1], k)
    _run(cpu_shortlist.topk_of_int8, split_evenly(len(centred)), *rough, (centred, weight, bias), slots)
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
    _run(loops.decode_rows, split_evenly(len(out)), (activations, latents), (weight, bias), out)
    return out


def residuals(
    activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    residual, products = buffers.empty(target.shape, target.dtype), torch.empty_like(activations)
    squares, slots, ranges = target.new_empty(len(target)), (activations, latents), split_evenly(len(target))
    _run(loops.residual_rows, ranges, slots, (weight, bias), target, (residual, products, squares))
    return residual, products, squares.sum(dtype=torch.float64)


def weight_gradients(
    values: Tensor, products: Tensor, latents: Tensor, residual: Tensor, centred: Tensor, scale: float, num_latents: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W_dec, W_enc = (buffers.empty((num_latents, x.shape[1]), x.dtype) for x in (residual, centred))
    b_enc = residual.new_empty(num_latents)
    factors = _arrays((values, products))
    offsets = np.zeros(num_latents + 2, np.int64)
    active = int(np.count_nonzero(factors[0] > 0))
    token, slot = np.empty(active, np.int64), np.empty(active, np.int64)
    loops.sort_slots(factors[0], *_arrays((latents,)), offsets, token, slot)
    offsets = offsets[:-1]
    sources = tuple(f.reshape(-1) for f in factors), (offsets, token, slot), (residual, centred), scale
    _run(loops.weight_gradient_rows, split_by_load(offsets), *sources, (W_dec, W_enc, b_enc))
    return W_dec, W_enc, b_enc, torch.from_numpy(np.diff(offsets))


def adam(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, step: int, rate: float, unit_rows: bool
) -> None:
    tensors = tuple(torch.atleast_2d(t) for t in (weight, grad, first, second))
    corrections = tuple(1 - beta**step for beta in loops.BETAS)
    _run(loops.adam_rows, split_evenly(len(tensors[0])), tensors, rate, corrections, unit_rows)


def _run(loop: Callable[..., Any], ranges: list[tuple[int, int]], *arguments: Any) -> None:
    """Call a compiled loop for each range of rows, with the arrays of tensors and of tuples of tensors."""
    arrays = _arrays(arguments)
    run_in_parallel(lambda low, high: loop(*arrays, low, high), ranges)


def _arrays(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the tensors' own memory. The loops are compiled for contiguous rows, and results must not be copies."""
    if not all(x.is_contiguous() for x in arguments if isinstance(x, Tensor)):
        raise ValueError("the sparse steps need contiguous tensors")
    return tuple(
        x.detach().numpy() if isinstance(x, Tensor) else _arrays(x) if isinstance(x, tuple) else x for x in arguments
    )


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sae-kernel")


if hasattr(os, "register_at_fork"):  # a forked child has the pool, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run_in_parallel(work: Callable[[int, int], Any], ranges: list[tuple[int, int]]) -> list[Any]:
    """Return ``work(low, high)`` of each range; for compiled loops, which hold no interpreter lock."""
    waiting = [_pool(torch.get_num_threads()).submit(work, low, high) for low, high in ranges[1:]]
    first = work(*ranges[0])
    return [first, *(future.result() for future in waiting)]


def split_evenly(n: int, least: int = 1) -> list[tuple[int, int]]:
    """Split ``n`` rows into consecutive ranges (low, high), one per thread, of at least ``least`` (or one)."""
    parts = max(1, min(torch.get_num_threads(), n // least))
    return list(pairwise(np.linspace(0, n, parts + 1).astype(int).tolist()))


def split_by_load(offsets: np.ndarray) -> list[tuple[int, int]]:
    """Return ranges of latents with about the same number of firings, since a few latents may fire for most tokens.

    ``offsets`` [M + 1] are the firings before each latent.
    """
    cuts = np.linspace(0, int(offsets[-1]), torch.get_num_threads() + 1)[1:-1]
    return list(pairwise([0, *np.searchsorted(offsets[:-1], cuts).tolist(), len(offsets) - 1]))
