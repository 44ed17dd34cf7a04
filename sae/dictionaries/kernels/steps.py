"""The sparse steps of a TopK autoencoder: choose, decode, differentiate, update. One meaning on every device.

Of M latents only K are active for a token, so decoding and every weight gradient need K/M of the dense
arithmetic. The dense encoder product stays with the BLAS library; all that follows it is here. Tensors in
main memory go to the compiled loops of ``kernels_cpu``, those on a CUDA device to the Triton programs of
``kernels_triton``, all others to PyTorch operations in ``kernels_torch``.

Threads are plain Python threads over compiled code that holds no interpreter lock. An OpenMP region of
Numba's own beside that of PyTorch would spin against it, and would need a threading layer that is not on
every machine. No result depends on their number: each row of each result is one thread's work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from sae.dictionaries.kernels import buffers
from sae.dictionaries.kernels import cpu as loops
from sae.dictionaries.kernels import cpu_bf16 as kernels_bf16
from sae.dictionaries.kernels import cpu_int8 as kernels_int8
from sae.dictionaries.kernels import plain as kernels_torch


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest positive pre-activations of each row: activations [B, K] and latents [B, K] int64.

    A row with fewer than ``k`` positive ones has empty slots (activation 0, latent 0). The order of the
    slots has no meaning; on one device it is always the same.
    """
    if not pre.is_cpu:
        return _elsewhere(pre).topk(pre, k)
    activations = pre.new_empty(len(pre), k)
    latents = torch.empty(len(pre), k, dtype=torch.int64)
    depth = _depth(pre.shape[1], k)
    pre_array, *out = _arrays(pre, activations, latents)
    _in_parallel(lambda low, high: loops.topk_rows(pre_array, depth, *out, low, high), _even(len(pre)))
    return activations, latents


def multiplies_in_tiles(matrix: Tensor) -> bool:
    """Whether :func:`product_topk` is faster than a whole product and :func:`topk` of it.

    It is on CPUs without AVX-512, by up to 2 times (benchmarks/README.md), where NumPy has OpenBLAS.
    """
    plain = matrix.is_cpu and matrix.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return plain and bool(_openblas().lib_controllers)


def product_topk(centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`topk` of ``centred @ weight.T + bias``, for float32 [B, D], [M, D] and [M] in main memory.

    Each thread multiplies some rows at a time by NumPy's BLAS and chooses among the results while they are in its
    cache. The sizes of the pieces, and so the bits of the results, do not depend on the number of threads.
    """
    n, num_latents = len(centred), len(weight)
    activations, latents = centred.new_empty(n, k), torch.empty(n, k, dtype=torch.int64)
    rows = min(max(_FEWEST_ROWS, -(-n // _PIECES)), max(_FEWEST_ROWS, TILE_BYTES // (4 * num_latents)))
    x, w, b, *out = _arrays(centred, weight, bias, activations, latents)
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
    return activations, latents


def products(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``x @ weight.T`` of [B, D] and [M, D] into ``out`` [B, M], by the library that is faster on this machine."""
    if not multiplies_in_tiles(x):
        return torch.mm(x, weight.T, out=out)
    a, w, into = _arrays(x, weight, out)
    with _openblas().limit(limits=1):  # the threads are ours
        _in_parallel(lambda low, high: _matmul(a[low:high], w, into[low:high]), _even(len(a)))
    return out


def _matmul(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``x @ weight.T`` into ``out``, without NumPy's warnings: what is not finite is reported by those who use it."""
    with np.errstate(all="ignore"):
        return np.matmul(x, weight.T, out=out)


TILE_BYTES = 32 * 2**20
"""pre-activations of :func:`product_topk` that a thread holds at once"""
_FEWEST_ROWS = 64  # with fewer, rearranging the weights for each product costs as much as the product
_PIECES = 16  # of a batch, or more


@cache
def _openblas() -> ThreadpoolController:
    """The OpenBLAS libraries in this process, NumPy's among them."""
    return ThreadpoolController().select(internal_api="openblas")


def rounded_topk(pre: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What :func:`topk` gives for ``centred @ weight.T + bias``, of which ``pre`` [B, M] is known, in bfloat16.

    ``centred`` [B, D], ``weight`` [M, D] and ``bias`` [M] are float32, and so are the activations [B, K]: those
    latents whose rounded pre-activation comes near the K-th are computed again. Of two latents that lie closer
    together than bfloat16 tells apart, the product may have hidden the larger one.
    """
    if not pre.is_cpu:
        return _elsewhere(pre).rounded_topk(pre, centred, weight, bias, k)
    activations = centred.new_empty(len(pre), k)
    latents = torch.empty(len(pre), k, dtype=torch.int64)
    width = _lanes(pre.shape[1], k)
    arrays = _arrays(pre.view(torch.int16), centred, weight, bias, activations, latents)
    bits, rest = arrays[0], arrays[1:]
    _in_parallel(lambda low, high: kernels_bf16.topk_rows(bits, width, *rest, low, high), _even(len(pre)))
    return activations, latents


class Quantised(NamedTuple):
    """A matrix whose rows were rounded to 8 bits, each by its own step."""

    rows: Tensor
    """[N, D] int8, at most 127"""
    steps: Tensor
    """[N] float32: row i is about ``steps[i] * rows[i]``"""
    lengths: Tensor
    """[N] float32: the norms of the original rows; not finite where an entry is not"""


def quantised(matrix: Tensor) -> Quantised:
    """``matrix`` [N, D] float32, in main memory, rounded to 8 bits."""
    n = len(matrix)
    out = Quantised(buffers.empty(matrix.shape, torch.int8), matrix.new_empty(n), matrix.new_empty(n))
    arrays = _arrays(matrix, *out)
    _in_parallel(lambda low, high: kernels_int8.quantise_rows(*arrays, low, high), _even(n))
    return out


def quantised_topk(
    products: Tensor, x: Quantised, w: Quantised, centred: Tensor, weight: Tensor, bias: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """What :func:`topk` gives for ``centred @ weight.T + bias``, of which ``x.rows @ w.rows.T`` [B, M] is known.

    The products are int32 in main memory; ``x`` is :func:`quantised` ``centred`` [B, D], ``w`` is ``weight`` [M, D].
    Activations are those of float32. A latent is left out by mistake only where the roundings of two rows, taken as
    random, add up to six standard deviations.
    """
    activations = centred.new_empty(len(products), k)
    latents = torch.empty(len(products), k, dtype=torch.int64)
    largest = (float(t.max()) for t in (w.lengths, w.steps, bias.abs()))
    numbers = (*largest, _lanes(products.shape[1], k))
    rough = _arrays(products, x.steps, x.lengths, w.steps)
    exact = _arrays(centred, weight, bias, activations, latents)
    _in_parallel(lambda low, high: kernels_int8.topk_rows(*rough, *numbers, *exact, low, high), _even(len(products)))
    return activations, latents


def _depth(num_latents: int, k: int) -> int:
    """How many pre-activations a lane of ``topk_rows`` stands for.

    Looking at M / depth maxima and then at about K lanes of that depth is cheapest at a depth of sqrt(M / K).
    """
    return 2 ** round(0.5 * math.log2(max(1.0, num_latents / k)))


def _lanes(num_latents: int, k: int) -> int:
    """Into how many lanes a row of rounded pre-activations is folded."""
    return max(1, min(num_latents, 2 ** round(math.log2(8 * k)), num_latents // 4))


def decode(activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``bias + sum_j activations[:, j] * weight[latents[:, j]]``: [B, D] from slots [B, K], weight [M, D]."""
    if not weight.is_cpu:
        return _elsewhere(weight).decode(activations, latents, weight, bias)
    out = buffers.empty((len(activations), weight.shape[1]), weight.dtype)
    arrays = _arrays(activations, latents, weight, bias, out)
    _in_parallel(lambda low, high: loops.decode_rows(*arrays, low, high), _even(len(out)))
    return out


def residuals(
    activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The error of the decoded slots, and what the gradient by the activations is made of.

    Returns the residual [B, D], decoded minus target; its product with each active slot's decoder row
    [B, K] (0 for an empty slot); and the sum of its squares, a float64 scalar.
    """
    if not weight.is_cpu:
        return _elsewhere(weight).residuals(activations, latents, weight, bias, target)
    residual, products = buffers.empty(target.shape, target.dtype), torch.empty_like(activations)
    squares = target.new_empty(len(target))
    arrays = _arrays(activations, latents, weight, bias, target, residual, products, squares)
    _in_parallel(lambda low, high: loops.residual_rows(*arrays, low, high), _even(len(target)))
    return residual, products, squares.sum(dtype=torch.float64)


class WeightGradients(NamedTuple):
    W_dec: Tensor
    """[M, D]"""
    W_enc: Tensor
    """[M, D]"""
    b_enc: Tensor
    """[M]"""
    firings: Tensor
    """[M] int64: how often each latent was active in the batch"""


def weight_gradients(
    activations: Tensor,
    products: Tensor,
    latents: Tensor,
    residual: Tensor,
    centred: Tensor,
    scale: float,
    num_latents: int,
) -> WeightGradients:
    """The gradient of ``scale / 2 * sum(residual**2)`` with respect to the weights of M latents.

    ``products`` [B, K] and ``residual`` [B, D] are those of :func:`residuals`; ``centred`` [B, D] is what
    the encoder's weights were multiplied with.
    """
    if not residual.is_cpu:
        arguments = activations, products, latents, residual, centred, scale, num_latents
        return WeightGradients(*_elsewhere(residual).weight_gradients(*arguments))
    out = WeightGradients(
        buffers.empty((num_latents, residual.shape[1]), residual.dtype),
        buffers.empty((num_latents, residual.shape[1]), residual.dtype),
        residual.new_empty(num_latents),
        torch.empty(num_latents, dtype=torch.int64),
    )
    values, slot_products, who, *rows = _arrays(activations, products, latents, residual, centred)
    offsets = np.zeros(num_latents + 2, np.int64)
    active = int(np.count_nonzero(values > 0))
    token, slot = np.empty(active, np.int64), np.empty(active, np.int64)
    loops.sort_slots(values, who, offsets, token, slot)
    offsets = offsets[:-1]
    out.firings.numpy()[:] = np.diff(offsets)
    arrays = (values.reshape(-1), slot_products.reshape(-1), offsets, token, slot, *rows, scale, *_arrays(*out[:3]))
    _in_parallel(lambda low, high: loops.weight_gradient_rows(*arrays, low, high), _by_load(offsets))
    return out


def adam(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    unit_rows: bool,
) -> None:
    """One step of Adam (Kingma & Ba 2015), in place on ``weight`` and on the moments ``first`` and ``second``.

    All four have shape [M, D] or [M]; ``step`` counts from 1. With ``unit_rows`` the part of the gradient
    along each row is left out, which could only change the row's length, and rows are brought back to
    length 1 afterwards.
    """
    corrections = 1 - betas[0] ** step, 1 - betas[1] ** step
    if not weight.is_cpu:
        _elsewhere(weight).adam(weight, grad, first, second, rate, betas, eps, corrections, unit_rows)
        return
    arrays = _arrays(*(torch.atleast_2d(t) for t in (weight, grad, first, second)))
    numbers = rate, *betas, eps, *corrections, unit_rows
    _in_parallel(lambda low, high: loops.adam_rows(*arrays, *numbers, low, high), _even(len(arrays[0])))


# --------------------------------------------------------------------------------------------- other devices


@cache
def triton_steps() -> ModuleType | None:
    """``kernels_triton``, or None where Triton is not installed. Asked for only where there is a CUDA tensor."""
    try:
        from sae.dictionaries.kernels import cuda as kernels_triton
    except ImportError:
        return None
    return kernels_triton


def _elsewhere(tensor: Tensor) -> ModuleType:
    """The steps for a tensor that is not in main memory."""
    return (triton_steps() if tensor.is_cuda else None) or kernels_torch


# ------------------------------------------------------------------------------------- arrays and threads


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors' own memory. The loops are compiled for contiguous rows, and results must not be copies."""
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("the sparse steps need contiguous tensors")
    return [t.detach().numpy() for t in tensors]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sae-kernel")


if hasattr(os, "register_at_fork"):  # a forked child has the pool, but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _in_parallel(work: Callable[[int, int], Any], bounds: np.ndarray) -> None:
    """``work(low, high)`` over the consecutive ranges that ``bounds`` delimits."""
    ranges = [(int(low), int(high)) for low, high in pairwise(bounds) if high > low]
    waiting = [_pool(len(bounds) - 1).submit(work, low, high) for low, high in ranges[1:]]
    if ranges:
        work(*ranges[0])
    for future in waiting:
        future.result()


def _even(n: int) -> np.ndarray:
    return np.linspace(0, n, torch.get_num_threads() + 1).astype(np.int64)


def _by_load(offsets: np.ndarray) -> np.ndarray:
    """Ranges of latents with about the same number of firings: a few latents may fire for most tokens."""
    cuts = np.linspace(0, int(offsets[-1]), torch.get_num_threads() + 1)[1:-1]
    return np.concatenate(([0], np.searchsorted(offsets[:-1], cuts), [len(offsets) - 1])).astype(np.int64)
