"""The pre-activations that may fire, for architectures where their number differs from token to token.

Where few fire, they are kept as slots for the sparse steps; where many fire (early in training), the same sums are
dense products over some rows. :func:`parts` cuts a batch into groups of one kind or the other. Both kinds have the same
methods, so an architecture writes its gradient once.

Memory: about three pieces of ``_PIECE_BYTES`` of pre-activations at once, and ``_SLOTS`` slots for each of a few
classes of tokens with about as many firings.

Legend: R rows of a batch, D model width, M latents, K' slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae.common.precision import Precision
from sae.common.ranks import ALONE, Job
from sae.dictionaries.encoding import topk_firings
from sae.dictionaries.kernels.steps import kernels_for
from sae.dictionaries.sae import Firings

_PIECE_BYTES = 32 * 2**20  # dense pre-activations made at once
_SLOTS = 1 << 21  # slots passed on at once
_NARROW = 64  # slots in the narrowest class of tokens; each further class has 4 times as many
_DENSE = 1 / 12  # the share of M from which on a token's latents are cheaper as a row of dense products
_GATHERED = 1 << 22  # elements of decoder rows gathered at once
_FIRST = 4  # times k: how many of a token's pre-activations BatchTopK searches at first


class Error(NamedTuple):
    """The error of a reconstruction."""

    residual: Tensor  # [R, D] reconstruction minus target
    products: Tensor  # the residual's product with each entry's decoder row, in the shape of the entries
    squares: Tensor  # the sum of squared errors, a float64 scalar


class Sums(NamedTuple):
    """The sums that entries add to a gradient."""

    W_enc: Tensor  # [M, D]
    b_enc: Tensor  # [M]
    W_dec: Tensor  # [M, D]
    firings: Tensor  # [M] int64: entries with a positive activation


class Dense:
    """All M pre-activations of each token: [R, M]. Where ``real`` is False, activations must be 0."""

    def __init__(self, pre: Tensor, real: Tensor) -> None:
        self.pre, self.real = pre, real

    def of(self, per_latent: Tensor) -> Tensor:
        """Return the value of each entry's latent, out of ``per_latent`` [M]; broadcasts to the shape of ``pre``."""
        return per_latent

    def by_latent(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over the entries of each latent, [M]."""
        return values.sum(0)

    def error(self, activations: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Error:
        """Return the error of ``activations @ W_dec + b_dec``; products are 0 where an activation is not positive."""
        residual = torch.addmm(b_dec, activations, W_dec).sub_(target)
        squares = residual.square().sum(1).sum(dtype=torch.float64)
        return Error(residual, self.products(activations > 0, residual, W_dec), squares)

    def products(self, where: Tensor, residual: Tensor, W_dec: Tensor) -> Tensor:
        """Return the product of ``residual`` [R, D] with each entry's decoder row where ``where`` (bool), else 0."""
        return (residual @ W_dec.T).masked_fill_(~where, 0)

    def sums(self, activations: Tensor, slopes: Tensor, residual: Tensor, centred: Tensor) -> Sums:
        """Sum ``activations * residual`` for W_dec, ``slopes * centred`` for W_enc and ``slopes`` for b_enc.

        ``slopes`` counts as 0 where an activation is not positive.
        """
        fires = activations > 0
        slopes = slopes * fires
        return Sums(slopes.T @ centred, slopes.sum(0), activations.T @ residual, fires.sum(0))


class Slots:
    """The entries alone, in K' slots per token, empty where not ``real``: [R, K']. Methods are those of ``Dense``."""

    def __init__(self, pre: Tensor, indices: Tensor, real: Tensor, num_latents: int) -> None:
        self.pre, self.indices, self.real, self.num_latents = pre, indices, real, num_latents

    def of(self, per_latent: Tensor) -> Tensor:
        return per_latent[self.indices]

    def by_latent(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(self.num_latents)
        return sums.index_add_(0, self.indices.flatten(), (values * self.real).flatten())

    def error(self, activations: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Error:
        return Error(*kernels_for(target.device).residuals(activations, self._where(activations), W_dec, b_dec, target))

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
        W_dec, W_enc, b_enc, firings = kernels_for(residual.device).weight_gradients(
            activations, slopes, where, residual, centred, 1.0, self.num_latents
        )
        return Sums(W_enc, b_enc, W_dec, firings)

    def _where(self, activations: Tensor) -> Tensor:
        return torch.where(activations > 0, self.indices, 0)


Entries = Dense | Slots  # of the pre-activations of R tokens


def tokens_at_once(num_latents: int, element_size: int = 4) -> int:
    """Return the number of tokens for which M pre-activations are computed at once."""
    return max(1, _PIECE_BYTES // (num_latents * element_size))


def pre_activations(centred: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield ``centred @ weight.T + bias`` for some rows at a time: the first row's number, and [R, M].

    The same memory is yielded each time and may be changed. (Repeated allocations of some MiB may take gigabytes.)
    """
    rows = min(len(centred), tokens_at_once(weight.shape[0], weight.element_size()))
    memory = centred.new_empty(rows, len(weight))
    for start in range(0, len(centred), max(1, rows)):
        part = centred[start : start + rows]
        pre = torch.mm(part, weight.T, out=memory[: len(part)])
        yield start, pre if bias is None else pre.add_(bias)


def parts(
    centred: Tensor, weight: Tensor, bias: Tensor | None, floor: Tensor | float
) -> Iterator[tuple[Tensor, Entries]]:
    """Yield groups of a batch ``centred`` [B, D] with their pre-activations above ``floor`` (a number, or [M]).

    A group is its tokens' numbers, int64 [R], and their entries. Every token is in one group.
    """
    dense, sparse = _Held(), dict[int, _Held]()
    above = torch.empty(0, dtype=torch.bool, device=centred.device)
    for start, pre in pre_activations(centred, weight, bias):
        above = above if len(above) >= len(pre) else torch.empty_like(pre, dtype=torch.bool)
        real = torch.gt(pre, floor, out=above[: len(pre)])
        counts = real.sum(1)
        many = counts > len(weight) * _DENSE
        if bool(many.any()):
            if dense.length(many) * len(weight) > _PIECE_BYTES // pre.element_size():
                yield from dense.take()
            dense.put(start + many.nonzero().squeeze(1), Dense(pre[many], real[many]))
            real[many] = False
        row, latents = real.nonzero(as_tuple=True)
        values = pre[row, latents]
        for width, of in _by_width(counts, ~many):
            held = sparse.setdefault(width, _Held())
            if held.length(of) * width > _SLOTS:
                yield from held.take()
            held.put(start + of.nonzero().squeeze(1), _slots(values, row, latents, counts, of, len(weight)))
    for held in (dense, *sparse.values()):
        yield from held.take()


def _by_width(counts: Tensor, of: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield classes of the tokens ``of`` [R] bool with similar counts of entries, and how many slots each needs."""
    counts = torch.where(of, counts, -1)
    most = int(counts.max()) if len(counts) else -1
    least, width = -1, _NARROW
    while least < most:
        of = (counts > least) & (counts <= width)
        if bool(of.any()):
            yield width, of
        least, width = width, 4 * width


class _Held:
    """Groups of one kind that wait to be passed on together: each group's sums cost M x D numbers."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.pieces: list[Entries] = []

    def length(self, more: Tensor) -> int:
        return sum(map(len, self.rows)) + int(more.sum())

    def put(self, rows: Tensor, piece: Entries) -> None:
        self.rows.append(rows)
        self.pieces.append(piece)

    def take(self) -> Iterator[tuple[Tensor, Entries]]:
        if self.rows:
            rows, joined = torch.cat(self.rows), _join(self.pieces)
            self.rows, self.pieces = [], []
            yield rows, joined


def _join(pieces: list[Entries]) -> Entries:
    if len(pieces) == 1:
        return pieces[0]
    slots = [piece for piece in pieces if isinstance(piece, Slots)]
    if not slots:
        return Dense(torch.cat([p.pre for p in pieces]), torch.cat([p.real for p in pieces]))
    pre, indices, real = (cat_padded([getattr(piece, name) for piece in slots]) for name in ("pre", "indices", "real"))
    return Slots(pre, indices, real, slots[0].num_latents)


def pack(values: Tensor, indices: Tensor | None, real: Tensor, num_latents: int) -> Slots:
    """Pack the entries of ``values`` [R, K] where ``real`` into as few slots as hold them all, from the left.

    ``indices`` [R, K] are their latents; without it, K = M and the column is the latent.
    """
    row, column = real.nonzero(as_tuple=True)
    latents = column if indices is None else indices[row, column]
    every = torch.ones(len(values), dtype=torch.bool, device=values.device)
    return _slots(values[row, column], row, latents, real.sum(1), every, num_latents)


def _slots(values: Tensor, row: Tensor, latents: Tensor, counts: Tensor, of: Tensor, num_latents: int) -> Slots:
    """Return entries, given by ``row`` and latent, as slots of the rows ``of`` (bool [R]); ``counts`` [R] per row."""
    if not bool(of.all()):
        chosen = of[row]
        values, latents, row = values[chosen], latents[chosen], (of.cumsum(0) - 1)[row[chosen]]
        counts = counts[of]
    shape = len(counts), max(1, int(counts.max()) if len(counts) else 1)
    slot = torch.arange(len(row), device=values.device) - (counts.cumsum(0) - counts)[row]
    pre, indices = values.new_zeros(shape), torch.zeros(shape, dtype=torch.int64, device=values.device)
    pre[row, slot], indices[row, slot] = values, latents
    return Slots(pre, indices, torch.arange(shape[1], device=values.device) < counts[:, None], num_latents)


def cat_padded(tensors: list[Tensor]) -> Tensor:
    """Concatenate [R1, K1], [R2, K2], … as rows, padded with 0 to the widest."""
    width = max(t.shape[1] for t in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors])


def firings_by(activate: Callable[[Tensor], Tensor], centred: Tensor, weight: Tensor, bias: Tensor | None) -> Firings:
    """Return the firings of ``centred`` [B, D]; ``activate`` turns [R, M] into activations, maybe in place.

    The token with the most firings sets the slots of all: pass at most :func:`tokens_at_once` tokens.
    """
    found = []
    for _, pre in pre_activations(centred, weight, bias):
        activations = activate(pre)
        slots = pack(activations, None, activations > 0, len(weight))
        found.append(Firings(slots.pre, slots.indices))
    if not found:
        return Firings(centred.new_zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64, device=centred.device))
    return Firings(cat_padded([f.activations for f in found]), cat_padded([f.indices for f in found]))


class Chosen(NamedTuple):
    """The latents that fire in a batch."""

    groups: list[tuple[Tensor, Slots]]  # int64 [R] and firings; tokens with many firings apart
    least: Tensor  # the smallest activation among them; 0 if fewer than B k are positive


def batch_topk(
    centred: Tensor, weight: Tensor, bias: Tensor, k: int, job: Job = ALONE, precision: Precision = "float32"
) -> Chosen:
    """Return the B k largest of the positive pre-activations ``centred @ weight.T + bias`` of ``centred`` [B, D].

    Each token's few largest are found as by TopK; the B k-th largest of these is a lower bound of the threshold. A
    token whose few are all above the bound is searched again for four times as many, until no token has more. A token
    searched for K' has K' / 4 among the B k largest, so there are at most 4 B k / K' such tokens: memory stays a small
    multiple of B k slots. Processes that share a batch gather the candidates of all and so find the same threshold as
    one process.

    If fewer than B k are positive, all of them fire. The order of ties is fixed, but has no meaning. If the processes
    of ``job`` share a batch, B counts the tokens of all, and each process gets its own firings. ``precision`` is that
    of the product (:func:`sae.dictionaries.encoding.topk_firings`).
    """
    wanted, num_latents = int(_gather_number(job, len(centred), centred).sum()) * k, len(weight)
    rows = torch.arange(len(centred), device=centred.device)
    groups: list[tuple[Tensor, Tensor, Tensor]] = []
    width = min(_FIRST * k, num_latents)
    while True:
        groups.append((rows, *topk_firings(centred[rows], weight, bias, width, precision)))
        flat = torch.cat(job.gather(torch.cat([values.flatten() for _, values, _ in groups])))
        least = flat.kthvalue(len(flat) - wanted + 1).values if wanted <= len(flat) else flat.new_zeros(())
        rows, values, indices = groups[-1]
        more = (values > least).all(1)
        if width == num_latents or not bool(_gather_number(job, more.sum(), centred).any()):
            break
        groups[-1] = rows[~more], values[~more], indices[~more]
        rows, width = rows[more], min(_FIRST * width, num_latents)
    return _choose(groups, wanted, least, num_latents, job)


def _gather_number(job: Job, number: Tensor | int, like: Tensor) -> Tensor:
    """Return a whole number of each process that shares the batch, int64."""
    return torch.cat(job.gather(torch.as_tensor(number, device=like.device).reshape(1)))


def _choose(
    groups: list[tuple[Tensor, Tensor, Tensor]], wanted: int, least: Tensor, num_latents: int, job: Job
) -> Chosen:
    every = torch.cat([values.flatten() for _, values, _ in groups])
    above = _gather_number(job, (every > least).sum(), every).sum()
    equal = _gather_number(job, ((every == least) & (every > 0)).sum(), every)
    left = wanted - above - equal[: job.place].sum()  # for values that equal the least: first come, first served
    found = []
    for rows, values, indices in groups:
        if not len(rows):
            continue
        last = (values == least) & (values > 0)
        last &= last.flatten().cumsum(0).view_as(last) <= left
        left = left - last.sum()
        found.append((rows, pack(values, indices, (values > least) | last, num_latents)))
    return Chosen(found, least)
