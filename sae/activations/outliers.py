"""Find tokens with huge activations, which dominate FVU and L0.

In many language models a few tokens (the first of a sequence, delimiters) have norms tens of times the median ("massive
activations", Sun et al. 2024). FVU, a ratio of sums of squares, then measures little else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sae.dictionaries.sae import Sae

TIMES_MEDIAN = 10.0
_FEW, _MOST = 0.1, 0.5


@dataclass(frozen=True)
class Outliers:
    """The tokens of a sample with more than :data:`TIMES_MEDIAN` times the median norm."""

    tokens: int  # B of the sample
    fraction: float  # of the tokens
    variance_share: float  # of the sum of squared distances from the mean

    @property
    def dominate(self) -> bool:
        """Return whether a few tokens hold most of the variance."""
        return self.fraction < _FEW and self.variance_share > _MOST

    def describe(self) -> str:
        return (
            f"{self.fraction:.2%} of the tokens have over {TIMES_MEDIAN:.0f} times the median norm and hold "
            f"{self.variance_share:.0%} of the variance"
        )

    def record(self) -> dict[str, Any]:
        return {"times_median_norm": TIMES_MEDIAN, **asdict(self)}


def outlier_rows(x: Tensor) -> Tensor:
    """Return which rows of ``x`` [B, D] have more than :data:`TIMES_MEDIAN` times the median norm: bool [B]."""
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
    """FVU and L0 of a dictionary on a sample, with and without outlier tokens."""

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
    """Measure FVU (about the mean of these rows) and L0 of ``sae`` on ``x`` [B, D], with and without outlier rows."""
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
