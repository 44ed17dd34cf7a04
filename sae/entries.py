"""The entries of the pre-activation matrix that matter, where their number differs from token to token.

An architecture with a threshold fires for half of its latents when training begins and for a few when it ends.
Where few fire, they are kept as slots and the sparse steps do what there is to do; where many fire, the same sums
are dense products over some rows of the batch. :func:`parts` cuts a batch into groups of rows of the one kind or the
other, and both kinds answer to the same few methods, so an architecture writes its gradient once.

Memory: at most about three pieces of ``_PIECE_BYTES`` of pre-activations exist at once, and ``_SLOTS`` slots, whatever
the batch and whatever fires: nothing of size B x M.

Legend: R rows of a batch, D model width, M latents, K' slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae import kernels
from sae.dictionary import Firings

_PIECE_BYTES = 32 * 2**20  # dense pre-activations made at once
_SLOTS = 1 << 21  # slots handed on at once
_DENSE = 1 / 12  # the share of M from which on a token's latents are cheaper as a row of dense products
_GATHERED = 1 << 22  # elements of decoder rows gathered at once


class Error(NamedTuple):
    """How far a reconstruction is from its target."""

    residual: Tensor
    """[R, D] reconstruction minus target"""
    products: Tensor
    """the residual's product with each entry's decoder row, in the shape of the entries"""
    squares: Tensor
    """the sum of squared errors, a float64 scalar"""


class Sums(NamedTuple):
    """What entries add to a gradient."""

    W_enc: Tensor
    """[M, D]"""
    b_enc: Tensor
    """[M]"""
    W_dec: Tensor
    """[M, D]"""
    firings: Tensor
    """[M] int64: entries with a positive activation"""


class Entries(ABC):
    """Some entries of the pre-activations of R tokens. All tensors by entry have the shape of ``pre``."""

    pre: Tensor
    """pre-activations"""
    real: Tensor
    """bool: what is no entry lies in ``pre`` all the same, and must be given the value 0"""

    @abstractmethod
    def of(self, per_latent: Tensor) -> Tensor:
        """Each entry's latent's value out of ``per_latent`` [M]; broadcasts to the shape of ``pre``."""

    @abstractmethod
    def by_latent(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the entries of each latent: [M]."""

    @abstractmethod
    def error(self, activations: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Error:
        """The error of ``activations @ W_dec + b_dec``; products where an activation is positive, else 0."""

    @abstractmethod
    def products(self, where: Tensor, residual: Tensor, W_dec: Tensor) -> Tensor:
        """The product of ``residual`` [R, D] with the decoder row of each entry where ``where`` (bool), else 0."""

    @abstractmethod
    def sums(self, activations: Tensor, slopes: Tensor, residual: Tensor, centred: Tensor) -> Sums:
        """Over the entries: ``activations * residual`` for W_dec, ``slopes * centred`` for W_enc, ``slopes`` for b_enc.

        ``slopes`` is taken for 0 where an activation is not positive.
        """


class Dense(Entries):
    """All M pre-activations of each token: [R, M]."""

    def __init__(self, pre: Tensor, real: Tensor) -> None:
        self.pre, self.real = pre, real

    def of(self, per_latent: Tensor) -> Tensor:
        return per_latent

    def by_latent(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def error(self, activations: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Error:
        residual = torch.addmm(b_dec, activations, W_dec).sub_(target)
        return Error(residual, self.products(activations > 0, residual, W_dec), _squares(residual))

    def products(self, where: Tensor, residual: Tensor, W_dec: Tensor) -> Tensor:
        return (residual @ W_dec.T).masked_fill_(~where, 0)

    def sums(self, activations: Tensor, slopes: Tensor, residual: Tensor, centred: Tensor) -> Sums:
        fires = activations > 0
        slopes = slopes * fires
        return Sums(slopes.T @ centred, slopes.sum(0), activations.T @ residual, fires.sum(0))


class Slots(Entries):
    """The entries alone, in K' slots per token of which some may be empty: [R, K']."""

    def __init__(self, pre: Tensor, indices: Tensor, real: Tensor, num_latents: int) -> None:
        self.pre, self.indices, self.real, self.num_latents = pre, indices, real, num_latents

    def of(self, per_latent: Tensor) -> Tensor:
        return per_latent[self.indices]

    def by_latent(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(self.num_latents)
        return sums.index_add_(0, self.indices.flatten(), (values * self.real).flatten())

    def error(self, activations: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Error:
        return Error(*kernels.residuals(activations, self._where(activations), W_dec, b_dec, target))

    def products(self, where: Tensor, residual: Tensor, W_dec: Tensor) -> Tensor:
        found = torch.zeros_like(self.pre)
        rows, columns = where.nonzero(as_tuple=True)
        if len(rows):
            latents, step = self.indices[rows, columns], max(1, _GATHERED // W_dec.shape[1])
            pairs = zip(rows.split(step), latents.split(step), strict=True)
            found[rows, columns] = torch.cat([(residual[r] * W_dec[m]).sum(1) for r, m in pairs])
        return found

    def sums(self, activations: Tensor, slopes: Tensor, residual: Tensor, centred: Tensor) -> Sums:
        where = self._where(activations)
        of = kernels.weight_gradients(activations, slopes, where, residual, centred, 1.0, self.num_latents)
        return Sums(of.W_enc, of.b_enc, of.W_dec, of.firings)

    def _where(self, activations: Tensor) -> Tensor:
        return torch.where(activations > 0, self.indices, 0)


# --------------------------------------------------------------------------------------------------- a batch in parts


def pre_activations(centred: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """``centred @ weight.T + bias`` for some rows at a time: the first row's number, and [R, M]."""
    rows = max(1, _PIECE_BYTES // (weight.shape[0] * weight.element_size()))
    for start in range(0, len(centred), rows):
        part = centred[start : start + rows]
        yield start, part @ weight.T if bias is None else torch.addmm(bias, part, weight.T)


def parts(
    centred: Tensor, weight: Tensor, bias: Tensor | None, floor: Tensor | float
) -> Iterator[tuple[Tensor, Entries]]:
    """The pre-activations above ``floor`` (a number, or [M]) of a batch ``centred`` [B, D], in groups of tokens.

    Yields the tokens' numbers, int64 [R], and their entries. Together the groups hold every token once.
    """
    sparse, dense = _Held(), _Held()
    for start, pre in pre_activations(centred, weight, bias):
        real = pre > floor
        many = real.sum(1) > len(weight) * _DENSE
        rows = torch.arange(start, start + len(pre), device=pre.device)
        if bool(many.any()):
            piece = Dense(pre[many], real[many])
            if dense.size + piece.pre.numel() > _PIECE_BYTES // pre.element_size():
                yield from dense.take()
            dense.put(rows[many], piece, piece.pre.numel())
            pre, real, rows = (t[~many] for t in (pre, real, rows))
        if len(rows):
            slots = packed(pre, None, real, len(weight))
            if sparse.size + slots.pre.numel() > _SLOTS:
                yield from sparse.take()
            sparse.put(rows, slots, slots.pre.numel())
    yield from dense.take()
    yield from sparse.take()


class _Held:
    """Groups of one kind that wait to be handed on together: each group's sums cost M x D numbers."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.pieces: list[Entries] = []
        self.size = 0

    def put(self, rows: Tensor, piece: Entries, size: int) -> None:
        self.rows.append(rows)
        self.pieces.append(piece)
        self.size += size

    def take(self) -> Iterator[tuple[Tensor, Entries]]:
        if self.rows:
            rows, joined = torch.cat(self.rows), _joined(self.pieces)
            self.rows, self.pieces, self.size = [], [], 0
            yield rows, joined


def _joined(pieces: list[Entries]) -> Entries:
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if not isinstance(first, Slots):
        return Dense(torch.cat([p.pre for p in pieces]), torch.cat([p.real for p in pieces]))
    slots = [piece for piece in pieces if isinstance(piece, Slots)]
    pre, indices, real = (cat_padded([getattr(piece, name) for piece in slots]) for name in ("pre", "indices", "real"))
    return Slots(pre, indices, real, first.num_latents)


def packed(values: Tensor, indices: Tensor | None, real: Tensor, num_latents: int) -> Slots:
    """The entries of ``values`` [R, K] where ``real``, pushed together to the left of as few slots as hold them all.

    ``indices`` [R, K] says which latents they are of; without it, K = M and the column is the latent.
    """
    counts = real.sum(1)
    shape = len(values), max(1, int(counts.max()))
    row, column = real.nonzero(as_tuple=True)
    slot = torch.arange(len(row), device=values.device) - (counts.cumsum(0) - counts)[row]
    pre, latents = values.new_zeros(shape), torch.zeros(shape, dtype=torch.int64, device=values.device)
    pre[row, slot] = values[row, column]
    latents[row, slot] = column if indices is None else indices[row, column]
    return Slots(pre, latents, torch.arange(shape[1], device=values.device) < counts[:, None], num_latents)


def cat_padded(tensors: list[Tensor]) -> Tensor:
    """[R1, K1], [R2, K2], … one below the other, as wide as the widest; the rest is 0."""
    width = max(t.shape[1] for t in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])


def firings_by(activate: Callable[[Tensor], Tensor], centred: Tensor, weight: Tensor, bias: Tensor | None) -> Firings:
    """Firings of a batch ``centred`` [B, D], where ``activate`` turns pre-activations [R, M] into activations >= 0."""
    found = []
    for _, pre in pre_activations(centred, weight, bias):
        activations = activate(pre)
        slots = packed(activations, None, activations > 0, len(weight))
        found.append(Firings(slots.pre, slots.indices))
    if not found:
        return Firings(centred.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64, device=centred.device))
    return Firings(cat_padded([f.activations for f in found]), cat_padded([f.indices for f in found]))


def _squares(residual: Tensor) -> Tensor:
    return residual.square().sum(1).sum(dtype=torch.float64)
