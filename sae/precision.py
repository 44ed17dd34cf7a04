"""Which arithmetic the dense encoder product of training is done in, decided by what the machine can do.

By what it says of itself, not by timing it: two runs of one study must not differ because a machine was busy.
What was decided is recorded with a run, so that seeds added on another machine are trained alike.
"""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def resolve(asked: Literal["auto", "float32", "bfloat16"], device: torch.device | str) -> Precision:
    """``asked``, or for "auto" bfloat16 where ``device`` has instructions that multiply it, else float32."""
    if asked != "auto":
        return asked
    return "bfloat16" if _multiplies_bfloat16(torch.device(device)) else "float32"


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    # PyTorch's own questions, not public yet: where they are gone, float32 is what is sure.
    ask = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(question()) for question in ask if question is not None)
