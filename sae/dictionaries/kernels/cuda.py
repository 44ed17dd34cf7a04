"""The sparse steps as Triton programs for CUDA: S seeds in one launch, and the same bits every time.

See ``steps.Kernels``. Every tensor may have a leading seeds axis, because a GPU would wait for the launches of one
seed. Shapes of blocks and numbers of warps are fixed, not tuned: another choice adds in another order.

Memory besides the results: the short lists of top-k (12 bytes for each of max(128, 2K) places a row, rounded up to a
power of two) and the sorting of S x B x K slots (about 40 bytes a slot).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.dictionaries.kernels import cuda_programs as programs
from sae.dictionaries.kernels import plain
from sae.dictionaries.kernels.cpu_loops import BETAS, EPS

_LANES = 2048  # a row is folded into this many; up to four times as many where K is large
_SHORT_LIST = 128  # places in a short list, at least
_TILE = 8192  # elements of gathered rows that one program holds at once: 64 registers a thread
_FLAT = 1024  # elements per program of an update without rows


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n = pre.shape[-1]
    total = pre.numel() // n
    dtype = torch.float64 if pre.dtype == torch.float64 else torch.float32  # half precision comes out in float32
    lanes = min(triton.next_power_of_2(n), max(_LANES, min(4 * _LANES, triton.next_power_of_2(4 * k))))
    capacity = max(_SHORT_LIST, triton.next_power_of_2(2 * k))
    found = torch.empty(total, capacity, dtype=dtype, device=pre.device)
    who = torch.empty(total, capacity, dtype=torch.int32, device=pre.device)
    count = torch.empty(total, dtype=torch.int32, device=pre.device)
    values = torch.empty(*pre.shape[:-1], k, dtype=dtype, device=pre.device)
    latents = torch.empty(*pre.shape[:-1], k, dtype=torch.int64, device=pre.device)
    pre, bits, slots = pre.contiguous(), _bits(pre.dtype), triton.next_power_of_2(k)
    size = {"CAPACITY": capacity, "FLOAT": tl.float64 if dtype == torch.float64 else tl.float32}
    with torch.cuda.device_of(pre):
        programs.shortlist[(total,)](
            pre, found, who, count, n, k, LANES=lanes, **size, **bits, num_warps=_warps(lanes, 512)
        )
        programs.choose[(total,)](
            found, who, count, values, latents, k, capacity,
            CAPACITY=capacity, SLOTS=slots, **bits, num_warps=_warps(capacity, 256),
        )  # fmt: skip
        lanes = min(lanes, _LANES)
        programs.choose_from_row[(total,)](
            pre, count, values, latents, n, k, LANES=lanes, SLOTS=slots, **size, **bits, num_warps=_warps(lanes, 512)
        )
    return values, latents


def decode(activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _decode(activations, latents, weight, bias, None)[0]


def residuals(
    activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    residual, products, squares = _decode(activations, latents, weight, bias, target)
    return residual, products, squares.sum(-1, dtype=torch.float64)


def _decode(
    activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return decoded minus ``target``, its products and its squares; without a target only the decoded."""
    values, *inputs = _contiguous(activations, latents, weight, bias)
    (rows, k), (m, width) = values.shape[-2:], weight.shape[-2:]
    out = weight.new_empty(*values.shape[:-1], width)
    aim, products, squares = out, out, out  # unused
    if target is not None:
        aim, products, squares = target.contiguous(), torch.empty_like(values), values.new_empty(values.shape[:-1])
    with torch.cuda.device_of(weight):
        programs.decode_rows[(values.numel() // k,)](
            values, *inputs, aim, out, products, squares, m, rows, aim.numel() // width, k, width,
            ERROR=target is not None, **_tiles(k, width),
        )  # fmt: skip
    return out, products, squares


def rounded_topk(pre: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    near, who = topk(pre, min(pre.shape[-1], k + max(8, k // 4)))
    total, c = near.numel() // near.shape[-1], near.shape[-1]
    x, w, b = _contiguous(centred, weight, bias)
    exact = torch.empty(near.shape, dtype=w.dtype, device=w.device)
    values = torch.empty(*near.shape[:-1], k, dtype=w.dtype, device=w.device)
    latents = torch.empty(values.shape, dtype=torch.int64, device=w.device)
    count = torch.full((total,), c, dtype=torch.int32, device=w.device)
    capacity, slots, (m, width) = triton.next_power_of_2(c), triton.next_power_of_2(k), w.shape[-2:]
    with torch.cuda.device_of(w):
        programs.encode_slots[(total,)](near, who, w, b, x, exact, m, near.shape[-2], c, width, **_tiles(c, width))
        programs.choose[(total,)](
            exact, who, count, values, latents, k, c,
            CAPACITY=capacity, SLOTS=slots, **_bits(w.dtype), num_warps=_warps(capacity, 256),
        )  # fmt: skip
    return values, latents


def weight_gradients(
    values: Tensor, products: Tensor, latents: Tensor, residual: Tensor, centred: Tensor, scale: float, num_latents: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if residual.shape[-1] != centred.shape[-1]:  # a transcoder between hookpoints of different widths
        return plain.weight_gradients(values, products, latents, residual, centred, scale, num_latents)
    values, slot_products, r, c = _contiguous(values, products, residual, centred)
    k, width, lead = values.shape[-1], r.shape[-1], values.shape[:-2]
    n = num_latents * lead.numel()
    first_row = torch.arange(lead.numel(), device=r.device).mul_(num_latents).view(*lead, 1, 1)
    # Empty slots are sorted behind the last latent. A stable sort keeps the order of the tokens.
    owner = torch.where(values > 0, latents + first_row, n).flatten().to(torch.int32 if n < 2**31 else torch.int64)
    owner, order = torch.sort(owner, stable=True)
    offsets = torch.searchsorted(owner, torch.arange(n + 1, dtype=owner.dtype, device=r.device))
    dec, enc = (r.new_empty(*lead, num_latents, width) for _ in range(2))
    bias = r.new_empty(*lead, num_latents)
    block = min(256, triton.next_power_of_2(width))
    with torch.cuda.device_of(r):
        programs.gradient_rows[(n, triton.cdiv(width, block))](
            order, offsets, values, slot_products, r, c, dec, enc, bias, scale, k, width,
            TILE=8, WIDTH=block, num_warps=2,
        )  # fmt: skip
    return dec, enc, bias, offsets.diff().view(*lead, num_latents)


def adam(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, step: int, rate: float, unit_rows: bool
) -> None:
    if not all(t.is_contiguous() for t in (weight, first, second)):
        raise ValueError("the sparse steps need contiguous tensors")
    total = weight.numel()
    width = weight.shape[-1] if unit_rows else _FLAT
    beta1, beta2 = BETAS
    numbers = rate / (1 - beta1**step), (1 - beta2**step) ** -0.5, EPS, beta1, beta2, 1 - beta1, 1 - beta2
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(weight):
        programs.adam_rows[(triton.cdiv(total, width),)](
            weight, grad.contiguous(), first, second, *numbers, total, width,
            WIDTH=block, UNIT_ROWS=unit_rows, num_warps=_warps(block, 256),
        )  # fmt: skip


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _bits(dtype: torch.dtype) -> dict[str, Any]:
    """Return how a program reads numbers of ``dtype`` as integers: their width, and where the bits begin and end."""
    if dtype == torch.float64:
        return {"INT": tl.int64, "TOP": 62, "HIGHEST": 2**63 - 1, "LAST": 1}
    unused = {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)
    return {"INT": tl.int32, "TOP": 30, "HIGHEST": 2**31 - 1, "LAST": 2**unused}


def _warps(elements: int, each: int) -> int:
    return min(16, max(1, triton.next_power_of_2(elements) // each))


def _tiles(k: int, width: int) -> dict[str, int]:
    """Return how many rows of ``width`` one program gathers at once, and its warps."""
    block = triton.next_power_of_2(width)
    tile = max(1, min(16, triton.next_power_of_2(k), _TILE // block))
    return {"TILE": tile, "WIDTH": block, "num_warps": min(16, max(1, tile * block // 2048))}
