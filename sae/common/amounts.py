"""Amounts as people write them: ``2M`` tokens, ``8G`` bytes."""

from __future__ import annotations

from decimal import Decimal

_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
LARGEST = 10**15


def parse_amount(text: str) -> int:
    """``2M``, ``500k``, ``1e6`` or ``123`` as a whole number from 0 to 1e15. Raises ValueError for anything else."""
    scale = _SCALES.get(text[-1:].lower(), 1)
    try:
        value = Decimal(text[:-1] if scale > 1 else text) * scale  # not as a float: 1.001M would be no whole number
        if 0 <= value <= LARGEST and value == int(value):
            return int(value)
    except ArithmeticError:
        pass
    raise ValueError(f"{text!r} is not an amount; write it like 500k, 2M or 1000000")
