"""The sparse steps in PyTorch operations, for devices without compiled loops or programs. See ``steps.Kernels``.

Rows are gathered a piece at a time, never B x K x D. On a GPU, :func:`weight_gradients` adds in no fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.dictionaries.kernels.cpu_loops import BETAS, EPS

_GATHER_ELEMENTS = 1 << 26  # elements gathered at once: 256 MiB of float32


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    activations, latents = pre.relu().topk(k, sorted=False)
    return activations, torch.where(activations > 0, latents, 0)


def rounded_topk(pre: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    near = pre.topk(min(pre.shape[-1], k + max(8, k // 4)), sorted=False).indices
    rows = _rows(near, weight.shape[-2])
    exact = _dot_products(rows, weight, centred) + bias.flatten()[rows]
    activations, slots = exact.relu().topk(k, sorted=False)
    return activations, torch.where(activations > 0, near.gather(-1, slots), 0)


def decode(activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows, width = _rows(latents, weight.shape[-2]).flatten(0, -2), weight.shape[-1]
    sums = torch.nn.functional.embedding_bag(
        rows, weight.reshape(-1, width), per_sample_weights=activations.flatten(0, -2), mode="sum"
    )
    return sums.view(*latents.shape[:-1], width) + bias.unsqueeze(-2)


def residuals(
    activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    residual = decode(activations, latents, weight, bias) - target
    products = _dot_products(_rows(latents, weight.shape[-2]), weight, residual)
    products *= activations > 0
    return residual, products, residual.double().square().sum((-2, -1))


def weight_gradients(
    values: Tensor, products: Tensor, latents: Tensor, residual: Tensor, centred: Tensor, scale: float, num_latents: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead, widths = latents.shape[:-2], (residual.shape[-1], centred.shape[-1])
    n = num_latents * lead.numel()
    values, slopes, owners = (t.flatten(0, -2) for t in (values, products, _rows(latents, num_latents)))
    errors, inputs = residual.reshape(-1, widths[0]), centred.reshape(-1, widths[1])
    token, column = torch.nonzero(values > 0, as_tuple=True)
    owner = owners[token, column]
    dec, enc = (residual.new_zeros(n, width) for width in widths)
    bias = residual.new_zeros(n)
    slots = max(1, _GATHER_ELEMENTS // max(widths))
    for start in range(0, len(token), slots):
        t, c, m = (x[start : start + slots] for x in (token, column, owner))
        dec.index_add_(0, m, errors[t] * values[t, c, None])
        enc.index_add_(0, m, inputs[t] * slopes[t, c, None])
        bias.index_add_(0, m, slopes[t, c])
    sums = dec.mul_(scale), enc.mul_(scale), bias.mul_(scale), torch.bincount(owner, minlength=n)
    W_dec, W_enc, b_enc, firings = (t.view(*lead, num_latents, *t.shape[1:]) for t in sums)
    return W_dec, W_enc, b_enc, firings


def adam(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, step: int, rate: float, unit_rows: bool
) -> None:
    if unit_rows:
        grad = grad - (grad * weight).sum(-1, keepdim=True) * weight
    beta1, beta2 = BETAS
    first.mul_(beta1).add_(grad, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.addcdiv_(first, (second / (1 - beta2**step)).sqrt_().add_(EPS), value=-rate / (1 - beta1**step))
    if unit_rows:
        weight.div_(weight.norm(dim=-1, keepdim=True))


def _rows(latents: Tensor, num_latents: int) -> Tensor:
    """Return the latents' row numbers in the weights of all seeds, one seed's after the other."""
    if latents.ndim == 2:
        return latents
    return latents + num_latents * torch.arange(len(latents), device=latents.device)[:, None, None]


def _dot_products(rows: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Return the product of each token of ``x`` [..., D] with its ``rows`` [..., K] of ``weight``."""
    out, width = x.new_empty(rows.shape), weight.shape[-1]
    tokens, weight = x.reshape(-1, width), weight.reshape(-1, width)
    step = max(1, _GATHER_ELEMENTS // (rows.shape[-1] * width))
    pieces = (t.split(step) for t in (rows.flatten(0, -2), tokens, out.flatten(0, -2)))
    for who, token, into in zip(*pieces, strict=True):
        into.copy_(torch.einsum("bkd,bd->bk", weight[who], token))
    return out
