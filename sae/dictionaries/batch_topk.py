"""The choice of BatchTopK: the largest pre-activations of a whole batch, found without holding them all.

Each token's few largest pre-activations are found first, as TopK finds them, and the B k largest of these are a
lower bound of what is sought. A token all of whose few are among them may have more: it is asked again for four times
as many, until no token has more to offer. A token that is asked for K' has K' / 4 among B k, so there are at most
4 B k / K' of them: memory stays a small multiple of B k slots, however unevenly the firings are spread.

Where several processes share a batch, each looks among its own tokens, and all are handed everybody's candidates: what
is the B k-th largest is then the same number for all, and the one that a single process would have found.

Legend: B batch, D model width, M latents, K' slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.common.precision import Precision
from sae.common.ranks import ALONE, Job
from sae.dictionaries.encoding import topk_firings
from sae.dictionaries.entries import Slots, packed

_FIRST = 4  # times k: how many of a token's pre-activations are looked at first


class Chosen(NamedTuple):
    """The latents that fire in a batch."""

    groups: list[tuple[Tensor, Slots]]
    """tokens' numbers, int64 [R], and their firings; tokens with many firings in groups of their own"""
    least: Tensor
    """the smallest activation among them; 0 where fewer than B k are positive"""


def batch_topk(
    centred: Tensor, weight: Tensor, bias: Tensor, k: int, job: Job = ALONE, precision: Precision = "float32"
) -> Chosen:
    """The B k largest of the positive pre-activations ``centred @ weight.T + bias`` of a batch ``centred`` [B, D].

    Where the processes of ``job`` share a batch, B counts the tokens of all, and each is given what fires for its own.
    All of them where fewer than B k are positive; which of several equal ones at the end of the order is fixed, but
    has no meaning. ``precision`` is that of the product, see :func:`sae.dictionaries.encoding.topk_firings`.
    """
    wanted, num_latents = int(_of_all(job, len(centred), centred).sum()) * k, len(weight)
    rows = torch.arange(len(centred), device=centred.device)
    groups: list[tuple[Tensor, Tensor, Tensor]] = []
    width = min(_FIRST * k, num_latents)
    while True:
        groups.append((rows, *topk_firings(centred[rows], weight, bias, width, precision)))
        least = _largest([values for _, values, _ in groups], wanted, job)
        rows, values, indices = groups[-1]
        more = (values > least).all(1)
        if width == num_latents or not bool(_of_all(job, more.sum(), centred).any()):
            break
        groups[-1] = rows[~more], values[~more], indices[~more]
        rows, width = rows[more], min(_FIRST * width, num_latents)
    return _chosen(groups, wanted, least, num_latents, job)


def _of_all(job: Job, number: Tensor | int, like: Tensor) -> Tensor:
    """A whole number of each process that shares the batch, int64."""
    return torch.cat(job.gather(torch.as_tensor(number, device=like.device).reshape(1)))


def _largest(values: list[Tensor], wanted: int, job: Job) -> Tensor:
    """The ``wanted``-th largest of everybody's ``values``, a scalar; 0 where there are fewer."""
    flat = torch.cat(job.gather(torch.cat([v.flatten() for v in values])))
    return flat.kthvalue(len(flat) - wanted + 1).values if wanted <= len(flat) else flat.new_zeros(())


def _chosen(
    groups: list[tuple[Tensor, Tensor, Tensor]], wanted: int, least: Tensor, num_latents: int, job: Job
) -> Chosen:
    every = torch.cat([values.flatten() for _, values, _ in groups])
    above = _of_all(job, (every > least).sum(), every).sum()
    equal = _of_all(job, ((every == least) & (every > 0)).sum(), every)
    left = wanted - above - equal[: job.place].sum()  # for those that equal the least: first come, first served
    found = []
    for rows, values, indices in groups:
        if not len(rows):
            continue
        last = (values == least) & (values > 0)
        last &= last.flatten().cumsum(0).view_as(last) <= left
        left = left - last.sum()
        found.append((rows, packed(values, indices, (values > least) | last, num_latents)))
    return Chosen(found, least)
