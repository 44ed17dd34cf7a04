"""Figures over scored latents: of these latents as they are, or of all eligible ones that they are a sample of.

*As they are*: where no sample is on record (latents named outright, journals of older versions). Plain means and
quartiles; intervals by the bootstrap over latents, as if these were drawn from endlessly many like them.

*Of a sample* (:mod:`autointerp.contexts.sampling`): every figure is weighted by the inverse inclusion probability
(Hájek's ratio estimators for means) and estimates what it would be over *all eligible latents that can be scored*. A
latent of the sample that failed takes part with its place in the design and with no score: were it scored in a census,
it would fail there as well. Latents explained outside the sample are not in it.

What the intervals of a sample cover is how far the figure may lie from that of all eligible latents *with each score
measured without error*. Two things go into it:

* which latents were drawn. That part shrinks with the finite population correction and is nil in a census;
* on which contexts each score was measured, known from the scores' own intervals. That part stays in a census.

For a mean over strata of N_h latents, n_h of them drawn, it is the two-stage variance (Cochran 1977, ch. 10)

    sum_h W_h^2 [ (1 - f_h) s_h^2 / n_h + v_h / N_h ] = sum_h W_h^2 (1 - f_h rho) s_h^2 / n_h,   f_h = n_h / N_h

with s_h^2 the variance of the measured scores, v_h the mean of their error variances and rho = 1 - v / s^2, both over
strata: only what differs between latents themselves becomes known by drawing more of them. The bootstrap takes
``known`` = f_h rho. For a mean this is exact. A quantile varies by whether scores lie below it, and of that less is the
latents' own (:func:`known_of_quantile`). Rank correlations take the rho of the scores they are of. Both are those of
*measured* scores (noise draws a correlation towards 0 and quartiles apart; the corrected correlation takes that back).
Not covered: another training, another explanation of the same latent, another judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from scipy import special

from autointerp.findings.statistics.correlation import bootstrap_mean
from autointerp.findings.statistics.resampling import Bools, Floats, Resamples, interval_of
from sae.common.estimate import UNKNOWN, Estimate

METHODS = {
    "weighted": "weights 1 / inclusion probability; expanded percentile of the rescaling bootstrap (Rao, Wu and Yue "
    "1992) within strata, 1000 resamples, seeded; finite population correction; covers which latents were drawn and "
    "on which contexts they were scored",
}
_QUARTILES = (0.25, 0.5, 0.75)
_Z = 1.959964  # of the 95 % intervals that error variances are read off


@dataclass(frozen=True)
class Estimator:
    """Means and quartiles over latents.

    ``sample``: by latent, the ``weight``, ``stratum`` and ``fraction`` of all that came to an end
    (:meth:`autointerp.contexts.sample_record.Sample.weights`); ``None``: of the latents as they are.
    """

    sample: pd.DataFrame | None = None
    seed: int = 0
    """Of the resamples: two independent samples that are compared take different ones."""

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Those of the rows (by latent) that figures are made of."""
        return rows if self.sample is None else rows[rows.index.isin(self.sample.index)]

    def mean(self, values: pd.Series, error: pd.Series | None = None) -> Estimate:
        """The mean of values by latent (none missing), with its interval.

        Args:
            error: the values' own error variances; ``None`` where they are not known: the interval then has no finite
                population correction, and is too wide rather than too narrow.
        """
        if self.sample is None:
            return bootstrap_mean(values)
        if values.empty:
            return UNKNOWN
        return interval_of(*self.mean_draws(values, error))

    def mean_draws(self, values: pd.Series, error: pd.Series | None = None) -> tuple[Floats, int]:
        """[R + 1] the mean of values by latent and over the resamples of them, and how many observations it rests on.

        What :func:`autointerp.findings.statistics.resampling.interval_of` makes an interval of, also of what is
        computed from it.
        """
        if self.sample is None:
            return Resamples(np.arange(len(values)), seed=self.seed).means(values), len(values)
        x, kept, resamples = self._resampled(values, error)
        return resamples.means(x, kept), _free(resamples, kept)

    def difference(self, own: pd.DataFrame, theirs: pd.DataFrame, column: str, value: str = "ba") -> Estimate:
        """The mean of own − theirs in a column over the latents that have both; unknown where none has.

        Args:
            value: the beginning of the names of the score's interval, for :func:`error_of`.
        """
        paired = (own[column].astype(float) - theirs[column].astype(float)).dropna()
        ours, others = error_of(own, value), error_of(theirs, value)
        error = None if ours is None or others is None else (ours + others).reindex(paired.index)
        return self.mean(paired, error)

    def quartiles(self, values: pd.Series, error: pd.Series | None = None) -> list[Estimate]:
        """The quartiles of values by latent, with their intervals."""
        if values.empty:
            return [UNKNOWN] * 3
        if self.sample is None:
            draws = Resamples(np.arange(len(values))).quantiles(values.to_numpy(float), _QUARTILES)
            return [interval_of(column, len(values)) for column in draws.T]
        found = []
        for p in _QUARTILES:
            x, kept, resamples = self._resampled(values, error, partial(known_of_quantile, p=p))
            found.append(interval_of(resamples.quantiles(x, [p], kept)[:, 0], _free(resamples, kept)))
        return found

    def share(self, holds: pd.Series) -> float:
        """Of the latents, the share for which something holds."""
        if self.sample is None or holds.empty:
            return float(holds.mean())
        return float(np.average(holds.to_numpy(float), weights=self.weights(holds)))

    def plain_mean(self, values: pd.Series) -> float:
        """The mean without an interval."""
        return self.share(values.astype(float))

    def weights(self, values: pd.Series) -> Floats:
        """[N] how many eligible latents each of the values stands for; 1 where there is no sample."""
        if self.sample is None:
            return np.ones(len(values))
        return self.sample["weight"].reindex(values.index).to_numpy(float)

    def _resampled(
        self, values: pd.Series, error: pd.Series | None, known_of: Callable[[float], float] = float
    ) -> tuple[Floats, Bools, Resamples]:
        """Values and their places among all of the sample, and its resamples.

        ``known_of`` has for rho the share of the figure's own variance that the latents make.
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
"""Of latents that are no sample of anything."""


def real_share(values: Floats, kept: Bools, error: Floats, sample: pd.DataFrame) -> float:
    """rho: of the variance of values within strata, the share that is not error of measurement, from 0 to 1.

    0, on the safe side, where an error variance is missing.

    Args:
        values: [N] of every latent of the ``sample``; counted where ``kept`` [N].
        error: [N] variances.
    """
    weight = sample["weight"].to_numpy(float)
    if not kept.any() or np.isnan(error[kept]).any():
        return 0.0
    mean = np.average(values[kept], weights=weight[kept])
    # A latent without a value counts with its place alone: how many have one differs from sample to sample too.
    residual = np.where(kept, values - mean, 0.0)
    of = pd.Series(residual).groupby(sample["stratum"].to_numpy())
    held = pd.Series(weight).groupby(sample["stratum"].to_numpy()).sum()
    spread = float((held * of.var(ddof=1).fillna(0)).sum())
    noise = float((weight * np.where(kept, error, 0.0)).sum())
    return float(np.clip(1 - noise / spread, 0, 1)) if spread > 0 else 0.0


def known_of_quantile(rho: float, p: float) -> float:
    """Of the sampling variance of a quantile, the share that is not error of measurement, from 0 to 1.

    A sample's quantile at ``p`` varies as the share of scores below it does. Of two measurements of one latent, normal
    and correlated by ``rho``, both lie below with probability Phi2(z_p, z_p; rho); so whether one does is correlated by

        (Phi2(z_p, z_p; rho) - p^2) / (p (1 - p)),

    which is 2 asin(rho) / pi at the median, and less than rho.
    """
    z = special.ndtri(p)
    both = p - 2 * special.owens_t(z, np.sqrt((1 - rho) / (1 + rho)))
    return float(np.clip((both - p * p) / (p * (1 - p)), 0, 1))


def _free(resamples: Resamples, kept: Bools) -> int:
    """What stands for the number of observations in an interval: latents less the strata that they are of.

    1, which has no interval, for a single value: the bootstrap would be sure of it.
    """
    n = int(kept.sum())
    return 1 if n == 1 else max(2, min(resamples.n_free, n))


def error_of(rows: pd.DataFrame, value: str = "ba") -> pd.Series | None:
    """The error variances of scores, off their 95 % intervals (``ba_low``, ``ba_high``); ``None`` without such."""
    if f"{value}_low" not in rows:
        return None
    return ((rows[f"{value}_high"].astype(float) - rows[f"{value}_low"].astype(float)) / (2 * _Z)) ** 2
