"""Which arithmetic dense products are done in, decided by what the machine can do.

By what it says of itself, not by timing it: two runs of one study must not differ because a machine was busy.
What was decided is recorded with a run, so that seeds added on another machine are trained alike.
"""

from __future__ import annotations

from typing import Literal

import torch

from sae.errors import UserError

FloatPrecision = Literal["float32", "bfloat16"]
Precision = Literal["float32", "bfloat16", "int8"]
Asked = Literal["auto", "float32", "bfloat16", "int8"]


def resolve(asked: Asked, device: torch.device | str) -> Precision:
    """``asked``, or for "auto" the fewest bits that ``device`` has instructions for: int8 (CPUs), bfloat16, float32.

    Raises :class:`UserError` for int8 elsewhere than on a CPU.
    """
    device = torch.device(device)
    if asked == "int8" and device.type != "cpu":
        raise UserError(f"precision int8 is for CPUs, not for {device}; use bfloat16 or auto there")
    if asked != "auto":
        return asked
    if device.type == "cpu" and has_int8_products():
        return "int8"
    return resolve_float("auto", device)


def resolve_float(asked: Literal["auto", "float32", "bfloat16"], device: torch.device | str) -> FloatPrecision:
    """``asked``, or for "auto" bfloat16 where ``device`` has instructions that multiply it, else float32.

    For products whose error has to be bounded whatever the numbers are: eight bits would leave too wide a bound.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if _multiplies_bfloat16(torch.device(device)) else "float32"


def has_int8_products() -> bool:
    """Whether this processor multiplies 8-bit integers without loss, and PyTorch makes use of it."""
    # PyTorch's own questions, not public yet: where they are gone, the others are what is sure.
    ask = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and torch.backends.mkldnn.is_available() and ask is not None and bool(ask())


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    ask = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(question()) for question in ask if question is not None)
