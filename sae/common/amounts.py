"""Read and format numbers for people: ``2M`` tokens, ``.264``, ``[.25, .29]``, ``4 min 10 s``.

A missing value is a dash, never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
LARGEST = 10**15


def parse_amount(text: str) -> int:
    """Read ``2M``, ``500k``, ``1e6`` or ``123`` as a whole number from 0 to 1e15; raise ValueError for other text."""
    scale = _SCALES.get(text[-1:].lower(), 1)
    try:
        value = Decimal(text[:-1] if scale > 1 else text) * scale  # as a float, 1.001M is no whole number
        if 0 <= value <= LARGEST and value == int(value):
            return int(value)
    except ArithmeticError:
        pass
    raise ValueError(f"{text!r} is not an amount; write it like 500k, 2M or 1000000")


def human(n: float) -> str:
    """Format a count with three digits: ``950``, ``12.3k``, ``2M``; as a power of ten from 1e15."""
    for scale, suffix in ((1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        shown = f"{n / scale:.3g}"
        if abs(float(shown)) < 1000:  # after rounding: 999,936 is 1M
            return shown + suffix
    return f"{n:.3g}"


def duration(seconds: float) -> str:
    """Format seconds with at most two units: ``7 s``, ``4 min 10 s``, ``1 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def decimal(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Format ``.264``, ``1.000`` or ``−.390``: no zero before the point, a true minus, a plus if asked for."""
    if value is None or not math.isfinite(value):
        return "–"
    body = f"{abs(value):.{digits}f}"
    body = body[1:] if body.startswith("0.") else body
    negative = value < 0 and float(f"{value:.{digits}f}") != 0
    return ("−" if negative else "+" if sign else "") + body


def interval(bounds: Sequence[float | None] | None, digits: int = 3, *, sign: bool = False) -> str:
    """Format ``[.25, .29]``; empty if there is no interval."""
    if bounds is None or not all(is_known(b) for b in bounds):
        return ""
    digits = choose_digits([b for b in bounds if b is not None], digits)
    return f"[{', '.join(decimal(b, digits, sign=sign) for b in bounds)}]"


def choose_digits(values: Sequence[float], digits: int, most: int = 5) -> int:
    """Return at least ``digits``, enough that an interval is never [.000, .000] unless both bounds are 0."""
    for n in range(digits, digits + most):
        written = {float(f"{value:.{n}f}") for value in values}
        if len(written) > 1 or not written <= {0.0, 1.0, -1.0}:
            return n
    return digits if all(abs(value - round(value)) < 1e-9 for value in values) else digits + most


def estimate(value: float | None, bounds: Sequence[float | None] | None, digits: int = 3, *, sign: bool = False) -> str:
    return f"{decimal(value, digits, sign=sign)} {interval(bounds, digits, sign=sign)}".rstrip()


def precision_in_words(half_width: float | None) -> str:
    """Describe how many contexts were judged: ``to ±.065``, or ``all contexts``."""
    return "all contexts" if half_width is None else f"to ±{decimal(half_width).rstrip('0')}"
