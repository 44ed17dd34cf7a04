"""S TopK dictionaries worked on as one: their weights lie one behind the other, and each step is launched once.

A GPU does a small dictionary's step in less time than it takes to ask for it, so seeds that take turns would leave it
waiting. Nothing else changes: a seed's tensors are views into the stack, under their old names, so that updates,
checkpoints and logs go on as they are; and no seed's numbers enter another's.

What differs between the seeds is which latents are dead, and by AuxK some hundred of a few thousand dead latents fire
for a token. That is dense enough for plain matrix products, which a GPU does faster than it gathers rows; they are
done seed by seed over some rows of the batch at a time.

Memory, in bytes, beside weights and moments (each 4 S (2MD + M + D)): the gradient, as large as the weights; twice
4 S B D for centred activations and residuals; about 60 S B K for the slots and their sorting; with a bfloat16 product
2 S M D for the rounded encoder; and never more than ``_PIECE_BYTES`` of pre-activations, or of what AuxK makes of
them. Nothing grows with B x M.

Legend: S seeds, B batch, D model width, M latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.kernels import steps as kernels
from sae.dictionaries.objective import AuxK, Loss, Objective
from sae.dictionaries.sae import Sae

_PIECE_BYTES = 512 * 2**20  # dense pre-activations of all seeds that may exist at once: large products, few launches
_ROWS = 128  # products of this many rows or a multiple fill a GPU's tiles


class Steps(Protocol):
    """The sparse steps with a leading seeds axis on every tensor, or on all but the ``target`` of the residuals."""

    def topk(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See :func:`kernels.topk`."""
        ...

    def rounded_topk(self, pre: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See :func:`kernels.rounded_topk`."""
        ...

    def residuals(
        self, activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`kernels.residuals`; ``target`` [B, D] is that of all seeds, and the squares are [S]."""
        ...

    def weight_gradients(
        self,
        activations: Tensor,
        products: Tensor,
        latents: Tensor,
        residual: Tensor,
        centred: Tensor,
        scale: float,
        num_latents: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`kernels.weight_gradients`."""
        ...


class SeedBySeed:
    """The sparse steps of one seed after the other, for devices without programs that take all at once."""

    def topk(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        activations, latents = _stacked([kernels.topk(of_seed, k) for of_seed in pre])
        return activations, latents

    def rounded_topk(self, pre: Tensor, centred: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = [kernels.rounded_topk(*of, k) for of in zip(pre, centred, weight, bias, strict=True)]
        activations, latents = _stacked(found)
        return activations, latents

    def residuals(
        self, activations: Tensor, latents: Tensor, weight: Tensor, bias: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_seeds = zip(activations, latents, weight, bias, strict=True)
        residual, products, squares = _stacked([kernels.residuals(*of, target) for of in of_seeds])
        return residual, products, squares

    def weight_gradients(
        self,
        activations: Tensor,
        products: Tensor,
        latents: Tensor,
        residual: Tensor,
        centred: Tensor,
        scale: float,
        num_latents: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        of_seeds = zip(activations, products, latents, residual, centred, strict=True)
        W_dec, W_enc, b_enc, firings = _stacked([kernels.weight_gradients(*of, scale, num_latents) for of in of_seeds])
        return W_dec, W_enc, b_enc, firings


class Found(NamedTuple):
    """What ``Sae.loss_and_gradient`` returns for one seed."""

    loss: Loss
    gradient: dict[str, Tensor]
    """views into the stack's gradient"""


def can_be_stacked(kind: type[Sae]) -> bool:
    """Whether a stack does what the architecture does: the steps here are TopK's, and nothing derived from it."""
    return kind is TopKSae


def stacked(saes: Sequence[Sae]) -> Stack | None:
    """``saes`` as a stack, where that is of use: several TopK dictionaries of one form on a CUDA device with Triton."""
    kinds = [sae for sae in saes if isinstance(sae, TopKSae) and can_be_stacked(type(sae))]
    if not kinds or len(kinds) < len(saes) or kinds[0].device.type != "cuda":
        return None
    steps: Any = kernels.triton_steps()
    if steps is None or len({(sae.W_enc.shape, sae.k, sae.device, sae.dtype) for sae in kinds}) > 1:
        return None
    return Stack(kinds, steps)


class Stack:
    """S dictionaries of one form. Making a stack moves their weights into it."""

    def __init__(self, saes: Sequence[TopKSae], steps: Steps | None = None) -> None:
        self.k = saes[0].k
        self.weights: dict[str, Tensor] = {}
        """[S, ...] by their names"""
        self._steps: Steps = steps or SeedBySeed()
        for name in saes[0].parameters():  # one at a time: the old tensor is freed before the next is stacked
            whole = self.weights[name] = torch.stack([sae.parameters()[name] for sae in saes])
            for sae, view in zip(saes, whole, strict=True):
                setattr(sae, name, view)

    def loss_and_gradient(self, x: Tensor, objectives: Sequence[Objective]) -> list[Found]:
        """What ``Sae.loss_and_gradient`` gives each seed for the batch ``x`` [B, D], as they stand in the stack.

        ``objectives`` may differ in AuxK alone: all seeds see the same batch.
        """
        variance, precision = objectives[0].variance, objectives[0].precision
        weight, scale = self.weights, 2 / variance
        centred = x - weight["b_dec"][:, None]
        activations, latents = self._encode(centred, precision == "bfloat16")
        residual, products, squares = self._steps.residuals(activations, latents, weight["W_dec"], weight["b_dec"], x)
        W_dec, W_enc, b_enc, firings = self._steps.weight_gradients(
            activations, products, latents, residual, centred, scale, weight["W_enc"].shape[1]
        )
        # b_dec is added to the reconstruction and subtracted from the encoder's input.
        b_dec = residual.sum(1) * scale - torch.bmm(b_enc[:, None], weight["W_enc"])[:, 0]
        gradient = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        extra = torch.zeros_like(squares)
        for seed, objective in enumerate(objectives):
            if objective.auxk is not None and objective.auxk.coefficient > 0:
                views = {name: whole[seed] for name, whole in gradient.items()}
                extra[seed] = self._add_auxk(seed, views, centred[seed], residual[seed], scale, objective.auxk)
        fvu, extra, none = squares / variance, extra / variance, torch.zeros_like(extra)
        return [
            Found(
                Loss(fvu[seed], extra[seed], none[seed], firings[seed]),
                {name: whole[seed] for name, whole in gradient.items()},
            )
            for seed in range(len(objectives))
        ]

    def _encode(self, centred: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
        """Slots [S, B, K] of ``centred`` [S, B, D]; pre-activations exist for some rows at a time."""
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
                found.append(self._steps.rounded_topk(pre, part, weight, bias, self.k))
            else:
                found.append(self._steps.topk(pre, self.k))
        return torch.cat([f[0] for f in found], dim=1), torch.cat([f[1] for f in found], dim=1)

    def _add_auxk(
        self, seed: int, gradient: dict[str, Tensor], centred: Tensor, residual: Tensor, scale: float, auxk: AuxK
    ) -> Tensor:
        """Add a seed's AuxK to its gradient and return the sum of its squares; see ``sae.dictionaries.gradients``."""
        dead = auxk.dead.nonzero().squeeze(1)
        squares = torch.zeros((), dtype=torch.float64, device=dead.device)
        if not len(dead):
            return squares
        encoder, decoder = self.weights["W_enc"][seed][dead], self.weights["W_dec"][seed][dead]
        bias = self.weights["b_enc"][seed][dead]
        by_encoder, by_decoder, by_bias = (torch.zeros_like(t) for t in (encoder, decoder, bias))
        rows = _rows(4 * len(dead) * encoder.element_size())
        for c, r in zip(centred.split(rows), residual.split(rows), strict=True):
            pre = torch.addmm(bias, c, encoder.T)
            if auxk.k < len(dead):
                values, latents = (t[0] for t in self._steps.topk(pre[None], auxk.k))
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


def _stacked(of_seeds: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Each of the tensors that every seed has, with a seeds axis in front."""
    return [torch.stack(same) for same in zip(*of_seeds, strict=True)]


def _rows(row_bytes: int) -> int:
    """Rows of that size that may exist at once."""
    rows = max(1, _PIECE_BYTES // row_bytes)
    return rows - rows % _ROWS if rows > _ROWS else rows
