"""Find the largest pre-activations of a whole batch (BatchTopK) without holding all of them.

Each token's few largest are found as by TopK; the B k-th largest of these is a lower bound of the threshold. A token
whose few are all above the bound is searched again for four times as many, until no token has more. A token searched
for K' has K' / 4 among the B k largest, so there are at most 4 B k / K' such tokens: memory stays a small multiple of B
k slots. Processes that share a batch gather the candidates of all and so find the same threshold as one process.

Legend: B batch, D model width, M latents, K' slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.common.precision import Precision
from sae.common.ranks import ALONE, Job
from sae.dictionaries.encoding import topk_firings
from sae.dictionaries.entries import Slots, pack

_FIRST = 4  # times k: how many of a token's pre-activations are searched at first


class Chosen(NamedTuple):
    """The latents that fire in a batch."""

    groups: list[tuple[Tensor, Slots]]  # int64 [R] and firings; tokens with many firings apart
    least: Tensor  # the smallest activation among them; 0 if fewer than B k are positive


def batch_topk(
    centred: Tensor, weight: Tensor, bias: Tensor, k: int, job: Job = ALONE, precision: Precision = "float32"
) -> Chosen:
    """Return the B k largest of the positive pre-activations ``centred @ weight.T + bias`` of ``centred`` [B, D].

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
