"""The sparse steps in PyTorch operations, for devices on which the compiled loops of ``kernels_cpu`` cannot run.

Same meaning, function by function (see ``kernels`` for what each returns); the tests hold the two against each
other. Rows are gathered a bounded piece at a time, so that memory does not grow to B x K x D.
On a GPU the additions of :func:`weight_gradients` come in no fixed order: two runs agree to rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GATHER_ELEMENTS = 1 << 26  # elements gathered at once: 256 MiB of float32


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    activations, latents = pre.relu().topk(k, sorted=False)
    return activations, torch.where(activations > 0, latents, 0)


def rounded_topk(pre: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    near = pre.topk(min(pre.shape[1], k + max(8, k // 4)), sorted=False).indices
    exact = centred.new_empty(near.shape)
    tokens = max(1, _GATHER_ELEMENTS // (near.shape[1] * centred.shape[1]))
    for start in range(0, len(near), tokens):
        part = slice(start, start + tokens)
        exact[part] = torch.einsum("bnd,bd->bn", weight[near[part]], centred[part]) + bias[near[part]]
    activations, slots = exact.relu().topk(k, sorted=False)
    return activations, torch.where(activations > 0, near.gather(1, slots), 0)


def decode(activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(latents, weight, per_sample_weights=activations, mode="sum") + bias


def residuals(
    activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    residual = decode(activations, latents, weight, bias) - target
    products = torch.empty_like(activations)
    tokens = max(1, _GATHER_ELEMENTS // (latents.shape[1] * weight.shape[1]))
    for start in range(0, len(latents), tokens):
        part = slice(start, start + tokens)
        products[part] = torch.einsum("bkd,bd->bk", weight[latents[part]], residual[part])
    products *= activations > 0
    return residual, products, residual.double().square().sum()


def weight_gradients(
    activations: Tensor,
    products: Tensor,
    latents: Tensor,
    residual: Tensor,
    centred: Tensor,
    scale: float,
    num_latents: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token, column = torch.nonzero(activations > 0, as_tuple=True)
    who = latents[token, column]
    dec = residual.new_zeros(num_latents, residual.shape[1])
    enc, bias = torch.zeros_like(dec), residual.new_zeros(num_latents)
    slots = max(1, _GATHER_ELEMENTS // residual.shape[1])
    for start in range(0, len(token), slots):
        t, c, m = (x[start : start + slots] for x in (token, column, who))
        dec.index_add_(0, m, residual[t] * activations[t, c, None])
        enc.index_add_(0, m, centred[t] * products[t, c, None])
        bias.index_add_(0, m, products[t, c])
    return dec.mul_(scale), enc.mul_(scale), bias.mul_(scale), torch.bincount(who, minlength=num_latents)


def adam(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    corrections: tuple[float, float],
    unit_rows: bool,
) -> None:
    if unit_rows:
        grad = grad - (grad * weight).sum(-1, keepdim=True) * weight
    first.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    weight.addcdiv_(first, (second / corrections[1]).sqrt_().add_(eps), value=-rate / corrections[0])
    if unit_rows:
        weight.div_(weight.norm(dim=-1, keepdim=True))
