"""Estimate figures over scored latents, unweighted or for all eligible latents that they are a sample of.

*Unweighted*, if no sample is recorded (latents named outright, journals of older versions): plain means and quartiles;
bootstrap intervals over latents, as if drawn from infinitely many.

*With a sample* (:mod:`autointerp.contexts.sampling`), every figure is weighted by the inverse inclusion probability
(Hájek's ratio estimators for means) and estimates its value over *all eligible latents that can be scored*. A sampled
latent that failed keeps its place in the design, without a score. Latents explained outside the sample do not count.

The interval of a sample covers how far the figure may be from that of all eligible latents *with each score measured
without error*. It has two parts: which latents were drawn, which shrinks to 0 in a census; and on which contexts each
score was measured, known from the scores' own intervals, which stays in a census. For a mean over strata of N_h
latents, n_h of them drawn, it is the two-stage variance (Cochran 1977, ch. 10)

    sum_h W_h^2 [ (1 - f_h) s_h^2 / n_h + v_h / N_h ] = sum_h W_h^2 (1 - f_h rho) s_h^2 / n_h,   f_h = n_h / N_h

with s_h^2 the variance of the measured scores, v_h the mean of their error variances and rho = 1 - v / s^2 over all
strata. The bootstrap takes ``known`` = f_h rho, which is exact for a mean. For a quantile see
:func:`known_of_quantile`; rank correlations use the rho of their scores. Both are those of *measured* scores.
Not covered: another training, another explanation of the same latent, another judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy import special

from autointerp.findings.statistics.correlation import QUARTILES, bootstrap_mean
from autointerp.findings.statistics.resampling import Bools, Floats, Resamples, interval_of
from sae.common.estimate import UNKNOWN, Estimate

METHODS = {
    "weighted": "weights 1 / inclusion probability; expanded percentile of the rescaling bootstrap (Rao, Wu and Yue "
    "1992) within strata, 1000 resamples, seeded; finite population correction; covers which latents were drawn and "
    "on which contexts they were scored",
}
_Z = 1.959964  # of the 95 % intervals that give the error variances


@dataclass(frozen=True)
class Estimator:
    """Computes means and quartiles over latents.

    ``sample``: by latent, the ``weight``, ``stratum`` and ``fraction`` of all finished latents
    (:meth:`autointerp.contexts.sampling.Sample.weights`); ``None``: unweighted.
    """

    sample: pd.DataFrame | None = None
    seed: int = 0
    """Of the resamples; two independent samples that are compared need different seeds."""

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows (by latent) that count."""
        return rows if self.sample is None else rows[rows.index.isin(self.sample.index)]

    def mean(self, values: pd.Series, error: pd.Series | None = None) -> Estimate:
        """Return the mean of values by latent (none missing), with its interval.

        Without the values' ``error`` variances there is no finite population correction, and the interval is too wide.
        """
        if self.sample is None:
            return bootstrap_mean(values)
        if values.empty:
            return UNKNOWN
        return interval_of(*self.mean_draws(values, error))

    def mean_draws(self, values: pd.Series, error: pd.Series | None = None) -> tuple[Floats, int]:
        """Return the mean of values by latent and of their resamples, [R + 1], and the number of observations."""
        if self.sample is None:
            return Resamples(np.arange(len(values)), seed=self.seed).means(values), len(values)
        x, kept, resamples = self._resampled(values, error)
        return resamples.means(x, kept), _free(resamples, kept)

    def quartiles(self, values: pd.Series, error: pd.Series | None = None) -> list[Estimate]:
        """Return the quartiles of values by latent, with their intervals."""
        if values.empty:
            return [UNKNOWN] * 3
        if self.sample is None:
            draws = Resamples(np.arange(len(values))).quantiles(values.to_numpy(float), QUARTILES)
            return [interval_of(column, len(values)) for column in draws.T]
        found = []
        for p in QUARTILES:
            x, kept, resamples = self._resampled(values, error, partial(known_of_quantile, p=p))
            found.append(interval_of(resamples.quantiles(x, [p], kept)[:, 0], _free(resamples, kept)))
        return found

    def share(self, holds: pd.Series) -> float:
        """Return the fraction of the latents for which ``holds`` is true."""
        if self.sample is None or holds.empty:
            return float(holds.mean())
        return float(np.average(holds.to_numpy(float), weights=self.weights(holds)))

    def plain_mean(self, values: pd.Series) -> float:
        """Return the mean without an interval."""
        return self.share(values.astype(float))

    def weights(self, values: pd.Series) -> Floats:
        """Return the number of eligible latents that each value represents, [N]; 1 without a sample."""
        if self.sample is None:
            return np.ones(len(values))
        return self.sample["weight"].reindex(values.index).to_numpy(float)

    def _resampled(
        self, values: pd.Series, error: pd.Series | None, known_of: Callable[[float], float] = float
    ) -> tuple[Floats, Bools, Resamples]:
        """Return values and their places in the whole sample, and its resamples.

        ``known_of`` maps rho to the fraction of the figure's variance that comes from the latents.
        """
        sample = self.sample
        assert sample is not None
        x = values.astype(float).reindex(sample.index)
        kept = np.asarray(x.notna(), dtype=np.bool_)
        filled = np.asarray(x.fillna(0), dtype=np.float64)
        known = np.zeros(len(sample))
        if error is not None:
            noise = np.asarray(error.astype(float).reindex(sample.index), dtype=np.float64)
            known = sample["fraction"].to_numpy() * known_of(real_share(filled, kept, noise, sample))
        resamples = Resamples(
            np.arange(len(sample)), seed=self.seed, weights=sample["weight"], strata=sample["stratum"], known=known
        )
        return filled, kept, resamples


AS_THEY_ARE = Estimator()
"""Without a sample."""


def real_share(values: Floats, kept: Bools, error: Floats, sample: pd.DataFrame) -> float:
    """Return rho, the fraction of the variance within strata that is not measurement error; 0 if an error is missing.

    ``values`` [N], of which ``kept`` [N] count, and ``error`` variances [N] are of every latent of the ``sample``.
    """
    weight = sample["weight"].to_numpy(float)
    if not kept.any() or np.isnan(error[kept]).any():
        return 0.0
    mean = np.average(values[kept], weights=weight[kept])
    # A latent without a value keeps its place: the number of values differs between samples too.
    residual = np.where(kept, values - mean, 0.0)
    of = pd.Series(residual).groupby(sample["stratum"].to_numpy())
    held = pd.Series(weight).groupby(sample["stratum"].to_numpy()).sum()
    spread = float((held * of.var(ddof=1).fillna(0)).sum())
    noise = float((weight * np.where(kept, error, 0.0)).sum())
    return float(np.clip(1 - noise / spread, 0, 1)) if spread > 0 else 0.0


def known_of_quantile(rho: float, p: float) -> float:
    """Return the fraction of a quantile's sampling variance that is not measurement error.

    A quantile at ``p`` varies like the fraction of scores below it. Two measurements of one latent, normal with
    correlation ``rho``, are both below with probability Phi2(z_p, z_p; rho), so the indicators have the correlation

        (Phi2(z_p, z_p; rho) - p^2) / (p (1 - p)),

    which is 2 asin(rho) / pi at the median, and less than rho.
    """
    z = special.ndtri(p)
    both = p - 2 * special.owens_t(z, np.sqrt((1 - rho) / (1 + rho)))
    return float(np.clip((both - p * p) / (p * (1 - p)), 0, 1))


def _free(resamples: Resamples, kept: Bools) -> int:
    """Return the effective number of observations: latents less strata; 1, which has no interval, for one value."""
    n = int(kept.sum())
    return 1 if n == 1 else max(2, min(resamples.n_free, n))


def error_of(rows: pd.DataFrame, column: str = "balanced_accuracy") -> pd.Series | None:
    """Return the error variances of a column of scores from its 95 % intervals, if there are any."""
    value = "ba" if column == "balanced_accuracy" else column
    if f"{value}_low" not in rows:
        return None
    return ((rows[f"{value}_high"].astype(float) - rows[f"{value}_low"].astype(float)) / (2 * _Z)) ** 2
