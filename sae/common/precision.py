"""Choose the precision of dense products from the instructions that the machine has, not by timing.

Each run records its precision, so seeds added on another machine use the same.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from sae.common.errors import UserError
from sae.common.progress import say_once

FloatPrecision = Literal["float32", "bfloat16"]
Precision = Literal["float32", "bfloat16", "int8"]
Asked = Literal["auto", "float32", "bfloat16", "int8"]


def resolve(asked: Asked, device: torch.device | str) -> Precision:
    """Return ``asked``; for "auto", the fewest bits that ``device`` supports. Raises UserError for int8 on a GPU."""
    device = torch.device(device)
    if asked == "int8" and device.type != "cpu":
        raise UserError(f"precision int8 is for CPUs, not for {device}; use bfloat16 or auto there")
    if asked != "auto":
        return asked
    if device.type == "cpu" and has_int8_products():
        return "int8"
    return resolve_float("auto", device)


def resolve_float(asked: Literal["auto", "float32", "bfloat16"], device: torch.device | str) -> FloatPrecision:
    """Return ``asked``; for "auto", bfloat16 if ``device`` has instructions for it, else float32."""
    if asked != "auto":
        return asked
    return "bfloat16" if _multiplies_bfloat16(torch.device(device)) else "float32"


def warn_if_emulated(setting: str, precision: str, device: torch.device | str) -> None:
    """Warn once if ``device`` has no instructions for products in ``precision``, the value of ``setting``."""
    if is_emulated(precision, device):
        say_once(
            f"warning: {setting} is {precision}, and this machine's {torch.device(device).type} has no instructions "
            f"for it ({_INSTRUCTIONS[precision]}): products are emulated, several times slower than in float32; a new "
            "study can use auto"
        )


def is_emulated(precision: str, device: torch.device | str) -> bool:
    """Return whether ``device`` lacks instructions for products in ``precision``."""
    device = torch.device(device)
    if precision == "bfloat16":
        return not _multiplies_bfloat16(device)
    if precision == "float16":
        return device.type == "cpu" and not _cpu_has("_is_amx_fp16_supported", needs="FP16")
    return precision == "int8" and device.type == "cpu" and not has_int8_products()


_INSTRUCTIONS = {"bfloat16": "AVX-512-BF16 or AMX; on GPUs, Ampere", "float16": "AMX-FP16", "int8": "AVX-512-VNNI"}


def has_int8_products() -> bool:
    """Return whether PyTorch multiplies 8-bit integers exactly, with instructions of this processor."""
    return hasattr(torch, "_int_mm") and _cpu_has("_is_vnni_supported", needs="VNNI")


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has("_is_avx512_bf16_supported", "_is_amx_tile_supported", needs="BF16")


def _cpu_has(*questions: str, needs: str) -> bool:
    """Return whether this CPU has some AVX-512 or AMX instructions and oneDNN may use them.

    ``questions`` are private functions of ``torch.cpu`` (missing: no); ``needs`` is part of the oneDNN set's name.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    order = ("VNNI", "BF16", "FP16")  # each set includes those before it
    included = order[order.index(needs) :]
    if not (limit in ("ALL", "DEFAULT") or "AMX" in limit or "AVX10" in limit or any(i in limit for i in included)):
        return False
    return any(bool(ask()) for name in questions if (ask := getattr(torch.cpu, name, None)) is not None)
