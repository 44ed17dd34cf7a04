"""Rebuild a direction from at most four rows of another dictionary.

A set S of unit rows explains |P_S x|² of a unit row x, the squared length of x's projection on their span (least
squares; coefficients may be negative). Trying all M⁴/24 sets is impossible, so the set is found by

1. orthogonal least squares (Chen, Billings & Luo, 1989): four times, add the row of all M that explains most in
   addition to those already taken;
2. exchanges: replace each of the four by the row that explains most in addition to the other three, among the 64 with
   the largest cosines, until none is better.

The best set may explain more than the one found.

Legend: R rows rebuilt, M rows to choose from, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sae.alignment.alignment import normalize_rows

TERMS = 4
_POOL = 64
_SWEEPS = 4  # of exchanges; few rows need a second
_BYTES = 32 * 2**20  # of products made at once
_NOTHING = 1e-6  # a coefficient below it is rounding
_DEPENDENT = 1e-4  # a row of which less than this share is not in the span of those taken adds nothing


class Rebuilt(NamedTuple):
    rows: NDArray[np.int32]  # [R, 4] of the other dictionary, the largest coefficient first; -1 where fewer are of use
    weights: NDArray[np.float32]  # [R, 4] coefficients of the unit rows, 0 where there is none
    explained: NDArray[np.float32]  # [R] variance explained, 0 to 1; 0 for a row of zeros
    nearest: NDArray[np.int32]  # [R, 4] the rows with the largest cosines, falling; -1 where there are fewer
    cosines: NDArray[np.float32]  # [R, 4] theirs


def rebuild(x: ArrayLike, b: ArrayLike, device: str = "cpu") -> Rebuilt:
    """Rebuild each row of ``x`` [R, D], at unit length, from at most four of ``b`` [M, D] that are not zero."""
    whole = torch.from_numpy(normalize_rows(b).astype(np.float32)).to(device)
    rows = torch.from_numpy(normalize_rows(x).astype(np.float32)).to(device)
    step = max(1, _BYTES // (4 * max(len(whole), (_POOL + TERMS) * whole.shape[1])))
    parts = [_rebuilt(rows[i : i + step], whole) for i in range(0, max(1, len(rows)), step)]
    return Rebuilt(*(np.concatenate(of) for of in zip(*parts, strict=True)))


def _rebuilt(x: Tensor, b: Tensor) -> Rebuilt:
    terms = min(TERMS, len(b))
    likeness = x @ b.T
    near = likeness.topk(terms, dim=1)
    pool = likeness.abs().topk(min(_POOL, len(b)), dim=1).indices
    taken = torch.cat([_forward(x, b, likeness, terms), pool], dim=1)
    rows = torch.gather(taken, 1, _exchanged(x, b[taken], terms))
    atoms = b[rows].double()
    for slot in range(1, terms):  # where no further row is of use, one may be taken twice
        atoms[:, slot][(rows[:, :slot] == rows[:, slot : slot + 1]).any(1)] = 0
    target = atoms @ x.double()[:, :, None]
    weights = torch.linalg.pinv(atoms @ atoms.transpose(1, 2), hermitian=True, rtol=1e-9) @ target
    explained = (weights * target).sum((1, 2)).clamp(0, 1)
    weights, order = weights[:, :, 0], weights[:, :, 0].abs().argsort(dim=1, descending=True, stable=True)
    weights, rows = torch.gather(weights, 1, order), torch.gather(rows, 1, order)
    rows = torch.where(weights.abs() > _NOTHING, rows, -1)
    weights = torch.where(rows >= 0, weights, 0)
    return Rebuilt(
        _padded(rows, -1).astype(np.int32),
        _padded(weights, 0).astype(np.float32),
        explained.float().cpu().numpy(),
        _padded(near.indices, -1).astype(np.int32),
        _padded(near.values, 0).astype(np.float32),
    )


def _padded(values: Tensor, fill: float) -> NDArray[Any]:
    return torch.nn.functional.pad(values, (0, TERMS - values.shape[1]), value=fill).cpu().numpy()


def _forward(x: Tensor, b: Tensor, likeness: Tensor, terms: int) -> Tensor:
    """Take one row after another, each time the one that explains most of the rest: [R, terms]."""
    left = likeness.clone()  # products with the rest of x
    inside = torch.zeros_like(likeness)  # the share of each row in the span of those taken
    basis: list[Tensor] = []
    taken: list[Tensor] = []
    for _ in range(terms):
        own = 1 - inside
        gain = left.square() / own.clamp_min(_DEPENDENT)
        gain[own < _DEPENDENT] = -1
        best = gain.argmax(dim=1)
        taken.append(best)
        q = b[best]
        for _ in range(2):  # twice, since rounding errors remain where rows are nearly equal
            for other in basis:
                q = q - (q * other).sum(1, keepdim=True) * other
        q = q / q.norm(dim=1, keepdim=True).clamp_min(1e-12)
        basis.append(q)
        along = q @ b.T
        left -= (x * q).sum(1, keepdim=True) * along
        inside += along.square()
    return torch.stack(taken, dim=1)


def _exchanged(x: Tensor, pool: Tensor, terms: int) -> Tensor:
    """Choose from each row's ``pool`` [R, P, D], beginning with the first ``terms``: [R, terms].

    In addition to a set O, row j explains t² / s of x, with s the squared length of j's part outside the span of O, and
    t the product of that part with x. Only products among the pool are needed.
    """
    gram, with_x = pool @ pool.transpose(1, 2), (pool @ x[:, :, None])[:, :, 0]
    n, every = len(x), torch.arange(len(x), device=x.device)
    chosen = torch.arange(terms, device=x.device).repeat(n, 1)
    for _ in range(_SWEEPS):
        before = chosen.clone()
        for slot in range(terms):
            others = torch.cat([chosen[:, :slot], chosen[:, slot + 1 :]], dim=1)
            to = gram[every[:, None], others]  # [R, terms - 1, P]
            among = torch.gather(to, 2, others[:, None, :].expand(-1, terms - 1, -1))
            ridge = _DEPENDENT * 1e-2 * torch.eye(terms - 1, device=x.device)
            solved = torch.linalg.solve(among + ridge, to)
            own = torch.diagonal(gram, dim1=1, dim2=2) - (to * solved).sum(1)
            along = with_x - (solved * torch.gather(with_x, 1, others)[:, :, None]).sum(1)
            gain = along.square() / own.clamp_min(_DEPENDENT)
            gain[own < _DEPENDENT] = -1
            now = gain[every, chosen[:, slot]]
            best = gain.argmax(dim=1)
            chosen[:, slot] = torch.where(gain[every, best] > now + 1e-6, best, chosen[:, slot])
        if torch.equal(before, chosen):
            break
    return chosen
