"""Simulate latents with a known true score and similarity, each scored by a number of verdicts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

SHAPES = {
    "even": lambda u: 0.5 + 0.5 * u,
    "paper": lambda u: 0.5 + 0.5 * stats.beta.ppf(u, 2, 2.5),
    "ceiling": lambda u: 0.5 + 0.5 * stats.beta.ppf(u, 3, 1.2),
    "narrow": lambda u: 0.65 + 0.2 * u,
    "a third unexplained": lambda u: np.where(u < 1 / 3, 0.5, 0.5 + 0.75 * (u - 1 / 3)),
}
"""From a uniform variable to the true balanced accuracy: its distribution over latents."""


@dataclass(frozen=True)
class Made:
    """N latents."""

    true: Floats
    """[N] the score that endless verdicts would give."""
    tpr: Floats
    tnr: Floats
    similarity: Floats
    frequency: Floats

    @classmethod
    def draw(cls, n: int, correlation: float, shape: str, rng: np.random.Generator) -> Made:
        """``correlation`` is that of the normal variables behind score and similarity; both go with frequency, too."""
        mean, frequency = np.zeros(2), rng.normal(size=n)
        cov = [[1, correlation], [correlation, 1]]
        score, similar = rng.multivariate_normal(mean, cov, size=n).T
        score, similar = (np.sqrt(0.9) * x + np.sqrt(0.1) * frequency for x in (score, similar))
        true = SHAPES[shape](stats.norm.cdf(score))
        lean = (1 - true) * rng.uniform(-1, 1, n)  # towards yes or no
        return cls(true, true + lean, true - lean, similar, frequency)

    def only(self, kept: NDArray[Any]) -> Made:
        """Those that are ``kept``: a mask [N], or their places."""
        return Made(*(getattr(self, field.name)[kept] for field in fields(self)))

    def verdicts(self, n: int, rng: np.random.Generator, *, by_request: float = 0.0) -> pd.DataFrame:
        """``n`` verdicts on either kind of context of each latent, in random order.

        ``by_request`` is the share of a latent's requests, of five each, in which all answers are wrong together;
        ``request`` numbers them.
        """
        size = len(self.true)
        truth = rng.permuted(np.tile(np.arange(2 * n) < n, (size, 1)), axis=1)
        right = rng.random((size, 2 * n)) < np.where(truth, self.tpr[:, None], self.tnr[:, None])
        spoilt = rng.random((size, -(-2 * n // 5))) < by_request
        right &= ~np.repeat(spoilt, 5, axis=1)[:, : 2 * n]
        label = (truth == right).astype(float)
        latent = np.repeat(np.arange(size), 2 * n)
        made = pd.DataFrame({"latent": latent, "truth": truth.ravel(), "label": label.ravel()})
        return made.assign(request=np.tile(np.arange(2 * n) // 5, size)) if by_request else made


def score(verdicts: pd.DataFrame) -> Floats:
    """[N] the balanced accuracy of each latent's verdicts."""
    right = (verdicts["truth"] == verdicts["label"].astype(bool)).astype(float)
    rates = right.groupby([verdicts["latent"], verdicts["truth"]]).mean()
    return np.asarray(rates.groupby(level=0).mean(), dtype=np.float64)


def rank_correlation(x: Floats, y: Floats) -> float:
    return float(stats.spearmanr(x, y).statistic)
