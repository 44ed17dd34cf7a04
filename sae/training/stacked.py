"""Train S TopK dictionaries as one: their weights are stacked, and each step is launched once for all seeds.

A GPU does a small dictionary's step in less time than its launch takes. A seed's tensors are views into the stack,
under their old names, so updates, checkpoints and logs work as before, and no seed's numbers enter another's. The seeds
differ in which latents are dead. By AuxK some hundred of a few thousand dead latents fire for a token: dense enough for
plain matrix products, seed by seed over some rows of the batch at a time.

Memory: see :mod:`sae.training.memory`; pre-activations, or AuxK's, take at most ``_PIECE_BYTES``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.kernels.steps import Kernels, triton_kernels
from sae.dictionaries.sae import AuxK, Loss, Objective, Sae

_PIECE_BYTES = 512 * 2**20  # dense pre-activations of all seeds that may exist at once: large products, few launches
_ROWS = 128  # products of this many rows or a multiple fill a GPU's tiles


LossAndGradient = tuple[Loss, dict[str, Tensor]]
"""The result of ``Sae.loss_and_gradient`` for one seed; in a stack, gradients are views into the stack's."""


def can_be_stacked(kind: type[Sae]) -> bool:
    """Return whether a stack computes the same as the architecture: only TopK itself, nothing derived from it."""
    return kind is TopKSae


def stack_on_gpu(saes: Sequence[Sae]) -> Stack | None:
    """Stack ``saes`` if they are TopK dictionaries of one shape on a CUDA device with Triton; else return None."""
    kinds = [sae for sae in saes if isinstance(sae, TopKSae) and can_be_stacked(type(sae)) and not sae.transcodes]
    if not kinds or len(kinds) < len(saes) or kinds[0].device.type != "cuda":
        return None
    kernels = triton_kernels()
    if kernels is None or len({(sae.W_enc.shape, sae.k, sae.device, sae.dtype) for sae in kinds}) > 1:
        return None
    return Stack(kinds, kernels)


class Stack:
    """S dictionaries of one shape. Making a stack moves their weights into it. ``kernels`` must take a seeds axis."""

    def __init__(self, saes: Sequence[TopKSae], kernels: Kernels) -> None:
        self.k = saes[0].k
        self.weights: dict[str, Tensor] = {}  # [S, ...] by their names
        self._kernels = kernels
        for name in saes[0].parameters():  # one at a time: the old tensor is freed before the next is stacked
            whole = self.weights[name] = torch.stack([sae.parameters()[name] for sae in saes])
            for sae, view in zip(saes, whole, strict=True):
                setattr(sae, name, view)

    def loss_and_gradient(self, x: Tensor, objectives: Sequence[Objective]) -> list[LossAndGradient]:
        """Return each seed's ``Sae.loss_and_gradient`` for ``x`` [B, D]; ``objectives`` may differ in AuxK alone."""
        variance, precision = objectives[0].variance, objectives[0].precision
        weight, scale = self.weights, 2 / variance
        centred = x - weight["b_dec"][:, None]
        activations, latents = self._encode(centred, precision == "bfloat16")
        residual, products, squares = self._kernels.residuals(activations, latents, weight["W_dec"], weight["b_dec"], x)
        W_dec, W_enc, b_enc, firings = self._kernels.weight_gradients(
            activations, products, latents, residual, centred, scale, weight["W_enc"].shape[1]
        )
        # b_dec is added to the reconstruction and subtracted from the encoder's input.
        b_dec = residual.sum(1) * scale - torch.bmm(b_enc[:, None], weight["W_enc"])[:, 0]
        whole = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        gradients = [{name: g[seed] for name, g in whole.items()} for seed in range(len(objectives))]
        extra = torch.zeros_like(squares)
        for seed, auxk in enumerate(objective.auxk for objective in objectives):
            if auxk is not None and auxk.coefficient > 0:
                extra[seed] = self._add_auxk(seed, gradients[seed], centred[seed], residual[seed], scale, auxk)
        numbers = zip(squares / variance, extra / variance, torch.zeros_like(extra), firings, strict=True)
        return [(Loss(*of_seed), g) for of_seed, g in zip(numbers, gradients, strict=True)]

    def _encode(self, centred: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
        """Return slots [S, B, K] of ``centred`` [S, B, D]; pre-activations exist for some rows at a time."""
        weight, bias = self.weights["W_enc"], self.weights["b_enc"]
        seeds, tokens = centred.shape[:2]
        kind = torch.bfloat16 if rounded and centred.dtype == torch.float32 else centred.dtype
        product, offset = weight.to(kind), bias.to(kind)
        rows = min(max(1, tokens), _rows(weight.shape[0] * weight.shape[1] * kind.itemsize))
        memory = product.new_empty(seeds * rows * weight.shape[1])
        found = []
        for part in centred.split(rows, dim=1):
            pre = memory[: seeds * part.shape[1] * weight.shape[1]].view(seeds, part.shape[1], -1)
            for seed in range(seeds):  # not one batched product: that cannot add the bias as it goes
                torch.addmm(offset[seed], part[seed].to(kind), product[seed].T, out=pre[seed])
            if kind == torch.bfloat16:
                found.append(self._kernels.rounded_topk(pre, part, weight, bias, self.k))
            else:
                found.append(self._kernels.topk(pre, self.k))
        return torch.cat([f[0] for f in found], dim=1), torch.cat([f[1] for f in found], dim=1)

    def _add_auxk(
        self, seed: int, gradient: dict[str, Tensor], centred: Tensor, residual: Tensor, scale: float, auxk: AuxK
    ) -> Tensor:
        """Add a seed's AuxK to its gradient and return the sum of its squares; see ``sae.dictionaries.gradients``."""
        dead = auxk.dead.nonzero().squeeze(1)
        squares = torch.zeros((), dtype=torch.float64, device=dead.device)
        if not len(dead):
            return squares
        encoder, bias, decoder = (self.weights[name][seed][dead] for name in ("W_enc", "b_enc", "W_dec"))
        by_encoder, by_decoder, by_bias = (torch.zeros_like(t) for t in (encoder, decoder, bias))
        rows = _rows(4 * len(dead) * encoder.element_size())
        for c, r in zip(centred.split(rows), residual.split(rows), strict=True):
            pre = torch.addmm(bias, c, encoder.T)
            if auxk.k < len(dead):
                values, latents = (t[0] for t in self._kernels.topk(pre[None], auxk.k))
                fires = torch.zeros_like(pre).scatter_add_(1, latents, values)  # empty slots add 0 to the first
            else:
                fires = pre.relu_()
            error = torch.addmm(r, fires, decoder)  # reconstruction minus target, and the target is minus the residual
            products = (error @ decoder.T).mul_(fires > 0)
            squares += error.square().sum(1).sum(dtype=torch.float64)
            by_decoder.addmm_(fires.T, error)
            by_encoder.addmm_(products.T, c)
            by_bias += products.sum(0)
        scale *= auxk.coefficient
        gradient["W_enc"][dead] += by_encoder.mul_(scale)
        gradient["b_enc"][dead] += by_bias.mul_(scale)
        gradient["W_dec"][dead] += by_decoder.mul_(scale)
        gradient["b_dec"] -= by_bias @ encoder
        return squares


def _rows(row_bytes: int) -> int:
    rows = max(1, _PIECE_BYTES // row_bytes)
    return rows - rows % _ROWS if rows > _ROWS else rows
