"""Find tokens with huge activations, which dominate FVU and L0.

In many language models a few tokens (the first of a sequence, delimiters) have norms tens of times the median ("massive
activations", Sun et al. 2024). FVU, a ratio of sums of squares, then measures little else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.activations.stream import TrainingBatches
from sae.dictionaries.sae import Sae

SAMPLE = 16_384  # tokens of the first batch that are searched for outliers
TIMES_MEDIAN = 10.0
_FEW, _MOST = 0.1, 0.5
_MOST_POSITIONS, _MOST_IDS, _NEARLY_ALL = 8, 4, 0.95  # of flags that are advised


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


def advise(batches: TrainingBatches, x: Tensor) -> str:
    """Name the flag that skips the outlier tokens of ``x`` [B, D], the first rows of the first of ``batches``."""
    outlying = outlier_rows(x).cpu()
    squares = (x.double() - x.double().mean(0)).square().sum(1).cpu()
    most = _NEARLY_ALL * squares[outlying].sum()
    places = batches.places(0)
    if places is not None:
        at = torch.from_numpy(places[: len(x)])
        columns = at[:, 1]
        before = torch.stack([squares[outlying & (columns < n)].sum() for n in range(_MOST_POSITIONS + 1)])
        enough = before >= most
        if enough.any():
            n = int(enough.int().argmax())
            where = "position 0" if n == 1 else f"positions 0 to {n - 1}"
            return f"they are at {where} of the sequences: --skip-positions {n} skips them"
        tokens = batches.stream.corpus.rows(batches.sequences(0))[at[:, 0], at[:, 1]]
        ids, counts = np.unique(tokens[outlying], return_counts=True)
        frequent = ids[np.argsort(-counts, kind="stable")][:_MOST_IDS]
        if squares[outlying & torch.from_numpy(np.isin(tokens, frequent))].sum() >= most:
            words = ", ".join(repr(batches.stream.corpus.decode(np.array([i]))[0]) for i in frequent)
            listed = " ".join(str(i) for i in frequent)
            return f"they are {words}: --exclude-tokens {listed} skips them"
    return f"--max-norm {TIMES_MEDIAN:.0f} skips them"


@dataclass(frozen=True)
class Quality:
    """FVU and L0 of a dictionary on a sample, with and without outlier tokens, or those that are skipped."""

    fvu: float
    fvu_without: float
    l0: float
    l0_without: float
    skipped: bool = False  # whether the tokens that are missing in ``_without`` were skipped in training

    def describe(self) -> str:
        which = "skipped" if self.skipped else "outlier"
        return (
            f"FVU {self.fvu:.3f}, without the {which} tokens {self.fvu_without:.3f} · "
            f"L0 {self.l0:.1f}, without {self.l0_without:.1f}"
        )


@dataclass(frozen=True)
class Compared:
    """A sample ``x`` [B, D] of activations, and the rows ``kept`` [B] without outliers or skipped tokens."""

    x: Tensor
    kept: Tensor
    skipped: bool = False

    @classmethod
    def without_outliers(cls, x: Tensor) -> Compared:
        """Compare with the rows that are no outliers."""
        sample = x[:SAMPLE].clone()
        return cls(sample, ~outlier_rows(sample))

    @classmethod
    def with_skipped(cls, batches: TrainingBatches) -> Compared:
        """Compare all tokens of the first step but the special ones with those that dictionaries see."""
        stream, index = batches.stream, batches.sequences(0)
        index = index[: max(1, SAMPLE // stream.context)]
        values = stream.rows(index)
        ordinary = torch.from_numpy(~stream.corpus.is_special(stream.corpus.rows(index))).to(values.device)
        return cls(values[ordinary].float(), stream.find_kept(index, values)[ordinary], skipped=True)

    def measure(self, sae: Sae) -> Quality:
        """Measure FVU (about the mean of the rows) and L0 of ``sae``, on all rows and on the kept ones."""
        x = self.x.to(device=sae.device, dtype=sae.dtype)
        kept = self.kept.to(x.device)
        firings = sae.encode(x)
        squares = (sae.decode(firings) - x).double().square().sum(1)
        fired = (firings.activations > 0).sum(1).double()

        def fvu(rows: Tensor) -> float:
            of = x[rows].double()
            return float(squares[rows].sum() / (of - of.mean(0)).square().sum())

        every = kept | True
        return Quality(fvu(every), fvu(kept), float(fired.mean()), float(fired[kept].mean()), self.skipped)
