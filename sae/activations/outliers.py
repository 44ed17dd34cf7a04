"""Tokens with enormous activations, which decide what FVU and L0 say.

In many language models a few tokens (the first of a sequence, delimiters) have activations tens of times as long as all
others' ("massive activations", Sun et al. 2024). FVU is a ratio of sums of squares, so it is then about those tokens: a
dictionary that gets them right, and little else, has a small FVU.

Legend: B tokens, D model width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sae.dictionaries.sae import Sae

TIMES_MEDIAN = 10.0
_FEW, _MOST = 0.1, 0.5


@dataclass(frozen=True)
class Outliers:
    """How many tokens of a sample have over :data:`TIMES_MEDIAN` times the median norm, and what they hold."""

    tokens: int
    """B of the sample"""
    fraction: float
    """of the tokens"""
    variance_share: float
    """of the sum of squared distances from the mean"""

    @property
    def dominate(self) -> bool:
        """Whether a few tokens hold most of the variance."""
        return self.fraction < _FEW and self.variance_share > _MOST

    def describe(self) -> str:
        return (
            f"{self.fraction:.2%} of the tokens have over {TIMES_MEDIAN:.0f} times the median norm and hold "
            f"{self.variance_share:.0%} of the variance"
        )

    def record(self) -> dict[str, Any]:
        """The measure as JSON."""
        return {"times_median_norm": TIMES_MEDIAN, **asdict(self)}


def outlier_rows(x: Tensor) -> Tensor:
    """Which rows of ``x`` [B, D] are longer than :data:`TIMES_MEDIAN` times the median: bool [B]."""
    norms = x.double().norm(dim=1)
    return norms > TIMES_MEDIAN * norms.median()


def find_outliers(x: Tensor) -> Outliers:
    """Measure a sample of activations ``x`` [B, D]."""
    outlying = outlier_rows(x)
    squares = (x.double() - x.double().mean(0)).square().sum(1)
    total = float(squares.sum())
    share = float(squares[outlying].sum()) / total if total > 0 else 0.0
    return Outliers(len(x), float(outlying.double().mean()), share)


@dataclass(frozen=True)
class Quality:
    """What a dictionary does with a sample of tokens: all of them, and those that are no outliers."""

    fvu: float
    fvu_without: float
    l0: float
    l0_without: float

    def describe(self) -> str:
        return (
            f"FVU {self.fvu:.3f}, without the outlier tokens {self.fvu_without:.3f} · "
            f"L0 {self.l0:.1f}, without {self.l0_without:.1f}"
        )


def measure_quality(sae: Sae, x: Tensor) -> Quality:
    """FVU and L0 of ``sae`` on ``x`` [B, D], over all rows and over those that are no outliers.

    FVU is the sum of squared errors over the sum of squared distances from the mean of the rows in question.
    """
    x = x.to(device=sae.device, dtype=sae.dtype)
    firings = sae.encode(x)
    squares = (sae.decode(firings) - x).double().square().sum(1)
    fired = (firings.activations > 0).sum(1).double()
    kept = ~outlier_rows(x)

    def fvu(rows: Tensor) -> float:
        of = x[rows].double()
        return float(squares[rows].sum() / (of - of.mean(0)).square().sum())

    every = kept | True
    return Quality(fvu(every), fvu(kept), float(fired.mean()), float(fired[kept].mean()))
