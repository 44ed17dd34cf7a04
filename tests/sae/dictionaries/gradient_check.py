"""What each architecture computes, as its paper reads, and the check of a gradient made by hand against autograd.

A new architecture joins by an entry in ``EXPECTED``: every test of ``test_architectures.py`` then takes it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.architectures.gated import GatedSae
from sae.dictionaries.architectures.jumprelu import JumpReluSae
from sae.dictionaries.sae import Firings, Objective, Sae

D, M, K, B = 12, 48, 4, 70
Weights = Mapping[str, Tensor]


def dense(firings: Firings, num_latents: int = M) -> Tensor:
    out = torch.zeros(len(firings.indices), num_latents, dtype=firings.activations.dtype)
    return out.scatter_add_(1, firings.indices, firings.activations)


def example(kind: str, seed: int = 0) -> tuple[Sae, Tensor]:
    """A dictionary in float64 none of whose weights is special, and a batch [B, D] for which many latents fire."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = noise(B, D) + 0.5
    sae = ARCHITECTURES[kind].init(D, M, K, seed, x.float()).to(dtype=torch.float64)
    for name, weight in sae.weights().items():
        if name not in ("threshold", "log_threshold"):
            weight += 0.1 * noise(*weight.shape)
    if isinstance(sae, JumpReluSae):
        sae.threshold.copy_(0.5 * noise(M).exp())
        sae.log_threshold.copy_(2 / D**0.5 * sae.threshold.log())
    return sae, x


# --- what each architecture computes, as its equations read -------------------------------------------------------


class Expected(NamedTuple):
    activations: Tensor
    sparsity: Tensor
    other: Tensor
    """G"""
    pre: Tensor
    """[B, M] pre-activations, from which AuxK chooses"""


def largest(values: Tensor, n: int) -> Tensor:
    """The ``n`` largest of each row, the rest 0."""
    return torch.where(values >= values.topk(n).values[:, -1:], values, 0)


class Step(torch.autograd.Function):
    """1[z > theta], differentiated by theta as the paper's estimator says (Rajamanoharan et al. 2024b, eq. 12)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[override]
        z, theta = ctx.saved_tensors
        near = ((z - theta) / ctx.width).abs() < 0.5
        return torch.zeros_like(z), -(grads[0] * near).sum(0) / ctx.width, None


class Jump(torch.autograd.Function):
    """z 1[z > theta] with the paper's estimator (eq. 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        z, theta = ctx.saved_tensors
        near = ((z - theta) / ctx.width).abs() < 0.5
        return grads[0] * (z > theta), -(theta / ctx.width * grads[0] * near).sum(0), None


def expected_topk(w: Weights, x: Tensor, o: Objective) -> Expected:  # noqa: ARG001
    pre = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    return Expected(largest(pre.relu(), K), torch.zeros(()), torch.zeros(()), pre)


def expected_batchtopk(w: Weights, x: Tensor, o: Objective) -> Expected:  # noqa: ARG001
    pre = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    least = pre.relu().flatten().topk(len(x) * K).values[-1]
    return Expected(torch.where(pre >= least, pre, 0).relu(), torch.zeros(()), torch.zeros(()), pre)


def expected_relu(w: Weights, x: Tensor, o: Objective) -> Expected:
    pre = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    a = pre.relu()
    return Expected(a, a.sum(1).mean() / (o.variance / len(x)) ** 0.5, torch.zeros(()), pre)


def expected_gated(w: Weights, x: Tensor, o: Objective) -> Expected:
    p = (x - w["b_dec"]) @ w["W_enc"].T
    gate = (p + w["b_gate"]).relu()
    a = (p + w["b_gate"] > 0) * (w["r_mag"].exp() * p + w["b_mag"]).relu()
    frozen = gate @ w["W_dec"].detach() + w["b_dec"].detach()
    other = (frozen - x).square().sum() / o.variance
    return Expected(a, gate.sum(1).mean() / (o.variance / len(x)) ** 0.5, other, p + w["b_gate"])


def expected_jumprelu(w: Weights, x: Tensor, o: Objective) -> Expected:
    z = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    theta, width = (D**0.5 / 2 * w["log_threshold"]).exp(), o.bandwidth * (o.variance / len(x)) ** 0.5
    sparsity = Step.apply(z, theta, width).sum(1).mean()
    return Expected(Jump.apply(z, theta, width), sparsity, torch.zeros(()), z)


Equations = Callable[[Weights, Tensor, Objective], Expected]
EXPECTED: dict[str, Equations] = {
    "topk": expected_topk,
    "batchtopk": expected_batchtopk,
    "relu": expected_relu,
    "gated": expected_gated,
    "jumprelu": expected_jumprelu,
}


def expected_revival(sae: Sae, pre: Tensor, w: Weights, residual: Tensor, o: Objective) -> Tensor:
    """AuxK, or how far the dead latents' pre-activations lie below the threshold, as a function of the bias alone."""
    assert o.auxk is not None
    if not sae.penalised:
        rebuilt = largest(pre.relu() * o.auxk.dead, min(o.auxk.k, int(o.auxk.dead.sum()))) @ w["W_dec"]
        return (rebuilt + residual).square().sum() / o.variance
    if isinstance(sae, GatedSae):
        projected = (pre - w["b_gate"]).detach()
        threshold = -torch.minimum(w["b_gate"], w["b_mag"] / w["r_mag"].detach().exp())
    else:
        projected = (pre - w["b_enc"]).detach()
        threshold = (sae.threshold if isinstance(sae, JumpReluSae) else 0.0) - w["b_enc"]
    below = (threshold - projected)[:, o.auxk.dead]
    return below.sum() / (len(pre) * M * (o.variance / len(pre)) ** 0.5)


def check_gradient(sae: Sae, x: Tensor, objective: Objective, expected: Equations | None = None) -> None:
    """That the hand-made loss and gradient are those of ``expected``, the architecture's own unless it is given."""
    loss, gradient = sae.loss_and_gradient(x, objective)
    weights = {name: w.clone().requires_grad_() for name, w in sae.parameters().items()}
    found = (expected or EXPECTED[sae.architecture])(weights, x, objective)
    residual = found.activations @ weights["W_dec"] + weights["b_dec"] - x
    fvu = residual.square().sum() / objective.variance
    extra, alpha = torch.zeros((), dtype=torch.float64), 0.0
    if objective.auxk is not None and bool(objective.auxk.dead.any()):
        alpha = objective.auxk.coefficient
        extra = expected_revival(sae, found.pre, weights, residual.detach(), objective)
    (fvu + alpha * extra + objective.sparsity * found.sparsity + found.other).backward()  # type: ignore[no-untyped-call]
    assert float(loss.fvu) == pytest.approx(float(fvu.detach()))
    assert float(loss.auxk) == pytest.approx(float(extra.detach()))
    assert float(loss.sparsity) == pytest.approx(float(found.sparsity.detach()))
    assert float(0 if loss.other is None else loss.other) == pytest.approx(float(found.other.detach()))
    assert torch.equal(loss.firings, (found.activations > 0).sum(0))
    assert set(gradient) == set(weights)
    for name, weight in weights.items():
        reference = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        torch.testing.assert_close(gradient[name], reference, rtol=1e-9, atol=1e-12, msg=partial("{}: {}".format, name))
