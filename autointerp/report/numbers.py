"""Format numbers and lists: fractions as ``26.4 %``, scores and cosines as ``.264``, missing values as a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from autointerp.findings.shape import Mean
from sae.common import amounts
from sae.common.amounts import choose_digits, decimal, estimate, is_known
from sae.common.estimate import Estimate

T = TypeVar("T")


def percent(value: float | None, digits: int = 1) -> str:
    """Return ``26.4 %``, with more digits where a value that is not 0 or 100 would be written so."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.{choose_digits([value], digits + 2) - 2}f} %"


def percent_interval(bounds: Sequence[float | None] | None) -> str:
    known = [b for b in bounds or () if b is not None and is_known(b)]
    if len(known) < 2:
        return ""
    digits = choose_digits(known, 3) - 2
    return f"[{', '.join(f'{100 * b:.{digits}f}' for b in known)}]"


def chance_level(of: Mapping[str, T]) -> T | None:
    """Return the chance level, measured with the sibling rotated at random; ``None`` where there is none."""
    return of.get("rotated")


def estimate_of(found: Estimate | Mean | None, digits: int = 3, *, sign: bool = False) -> str:
    """Return an estimate, or the mean of a row, with its interval; a dash without one."""
    of = found.mean if isinstance(found, Mean) else found
    return "–" if of is None else estimate(of.value, of.interval, digits, sign=sign)


def count(n: float | None) -> str:
    return f"{round(n):,}" if n is not None and math.isfinite(n) else "–"


def human(n: float | None) -> str:
    """Return a count in at most three digits: ``950``, ``12.3k``, ``2M``."""
    return "–" if n is None or not math.isfinite(n) else amounts.human(n)


def rate(value: float | None) -> str:
    """Return a firing frequency in firings per thousand tokens: ``7.8 ‰``, ``0.12 ‰``."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{1000 * value:.{3 if value >= 0.001 else 2}g} ‰"


def origin(seed: int | None) -> str:
    """Return a run's seed, or ``imported`` for a run that was not trained here."""
    return "imported" if seed is None else str(seed)


def plural(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """Return ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def threshold_of(value: float) -> str:
    return decimal(value, 2).rstrip("0")


def class_label(name: str, n_runs: int) -> str:
    """Return the label of a shared class in a study of ``n_runs`` runs."""
    if name == "one":
        return "in no other seed"
    return "in the other seed" if n_runs == 2 else "in every seed" if name == "all" else "in some seeds"
