"""Make the activations that every side trains on: equal on all sides, and made before the clock starts.

Sparse sums of fixed directions plus noise, so that a dictionary has something to find and its choice of latents is as
clear-cut as on a model's activations; the trainers' work does not depend on what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

POOL = 4  # different batches; steps go round them


def batches(d_in: int, tokens: int, device: str = "cpu") -> list[Tensor]:
    """``POOL`` batches [B, D], float32."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    found = []
    for _ in range(POOL):
        which = torch.randint(len(directions), (tokens, 16), generator=generator)
        amount = torch.rand(tokens, 16, generator=generator)
        sums = torch.nn.functional.embedding_bag(which, directions, per_sample_weights=amount, mode="sum")
        found.append((sums + 0.02 * torch.randn(tokens, d_in, generator=generator) + directions[0]).to(device))
    return found
