"""How a number is written for people, in the terminal, on a page and in a sentence alike.

A score or a cosine is ``.264``, a negative one has a true minus, an interval is ``[.25, .29]``; what was not measured
is a dash, never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def decimal(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """``.264``, ``1.000``, ``−.390``: no zero before the point, a true minus, a plus where asked for."""
    if value is None or not math.isfinite(value):
        return "–"
    body = f"{abs(value):.{digits}f}"
    body = body[1:] if body.startswith("0.") else body
    negative = value < 0 and float(f"{value:.{digits}f}") != 0
    return ("−" if negative else "+" if sign else "") + body


def interval(bounds: Sequence[float | None] | None, digits: int = 3, *, sign: bool = False) -> str:
    """``[.25, .29]``; empty where there is none."""
    if bounds is None or not all(known(b) for b in bounds):
        return ""
    digits = digits_of([b for b in bounds if b is not None], digits)
    return f"[{', '.join(decimal(b, digits, sign=sign) for b in bounds)}]"


def digits_of(values: Sequence[float], digits: int, most: int = 5) -> int:
    """Return the digits, ``digits`` or a few more, at which not all values are written as 0, or as ±1, that are not.

    So an interval is never [.000, .000] unless both its bounds are 0.
    """
    for n in range(digits, digits + most):
        written = {float(f"{value:.{n}f}") for value in values}
        if len(written) > 1 or not written <= {0.0, 1.0, -1.0}:
            return n
    return digits if all(abs(value - round(value)) < 1e-9 for value in values) else digits + most


def estimate(value: float | None, bounds: Sequence[float | None] | None, digits: int = 3, *, sign: bool = False) -> str:
    return f"{decimal(value, digits, sign=sign)} {interval(bounds, digits, sign=sign)}".rstrip()


def precision_in_words(half_width: float | None) -> str:
    """To what precision contexts were judged: ``to ±.065``, or ``all contexts``."""
    return "all contexts" if half_width is None else f"to ±{decimal(half_width).rstrip('0')}"
