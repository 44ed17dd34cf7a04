"""What every scorer does with its verdicts: rates, their intervals, and what failed, in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from autointerp.scoring.intervals import auroc, balanced_accuracy
from autointerp.scoring.scorers.base import HARDER, ScoreRow
from sae.common.estimate import UNKNOWN, Estimate, proportion
from sae.firings.store import mix_bits

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context

MOST_FAILED = 0.2
"""Above this share of failures there is no score: what fails is seldom a fair sample of what was asked."""


def in_hash_order(contexts: Sequence[Context]) -> list[Context]:
    """The contexts in the order of a hash of their window: neither kind nor strength shows in it."""
    places = mix_bits(np.array([context.window for context in contexts], dtype=np.uint64))
    return [contexts[i] for i in np.argsort(places, kind="stable")]


def measure(verdicts: pd.DataFrame, items: Sequence[Context] = ()) -> ScoreRow:
    """See :meth:`autointerp.scoring.scorers.base.Scorer.score`.

    The judge's own yes or no (P(active) of at least one half, where it gives a probability) makes the balanced
    accuracy; AUROC is computed when every verdict has a probability. Negatives of the harder kinds are in none of the
    figures but their own, which take the TPR from the same activating contexts.
    """
    told = _Told.of(verdicts)
    if items:
        told = told.where(np.isin(told.context, [context.window for context in items]))
    if len(np.unique(told.context)) < len(told.context):
        raise ValueError("verdicts of several judgings mixed: a context is there twice")
    own = told.where(~np.isin(told.kind, HARDER))
    good = own.where(~own.failed)
    truth, label = good.truth, good.label
    n_active, n_inactive = int(truth.sum()), int((~truth).sum())
    n_failed = int(own.failed.sum()) + own.missing_of([c for c in items if c.kind not in HARDER])
    status = _status(n_active, n_inactive, n_failed, own.failure[own.failed])
    if status != "ok":
        return ScoreRow(*UNKNOWN, *UNKNOWN, *UNKNOWN, *UNKNOWN, n_active, n_inactive, n_failed, status, [], [], [])
    strata = _by_stratum(items, dict(zip(good.context.tolist(), label.tolist(), strict=True)))
    row = ScoreRow(
        *balanced_accuracy(truth, label),
        *_rate(label[truth]),
        *_rate(~label[~truth]),
        *_ranked(truth, good.p),
        n_active,
        n_inactive,
        n_failed,
        status,
        [estimate.value for estimate in strata],
        [estimate.low for estimate in strata],
        [estimate.high for estimate in strata],
    )
    for kind in HARDER:
        row = row._replace(**_harder(kind, told.where(told.kind == kind), items, good.where(truth)))
    return row


def _harder(kind: str, told: _Told, items: Sequence[Context], active: _Told) -> dict[str, Any]:
    """The columns of one harder kind of negative; what cannot be measured keeps its NaN."""
    n_failed = int(told.failed.sum()) + told.missing_of([c for c in items if c.kind == kind])
    good = told.where(~told.failed)
    n = len(good.context)
    found: dict[str, Any] = {f"n_{kind}": n, f"n_failed_{kind}": n_failed}
    if n == 0 or n_failed > MOST_FAILED * (n + n_failed):
        return found
    truth, label, p = (np.concatenate(pair) for pair in zip(active.answers, good.answers, strict=True))
    for name, estimate in (
        ("ba", balanced_accuracy(truth, label)),
        ("tnr", _rate(~label[~truth])),
        ("auroc", _ranked(truth, p)),
    ):
        found |= {f"{name}_{kind}": estimate.value, f"{name}_{kind}_low": estimate.low}
        found |= {f"{name}_{kind}_high": estimate.high}
    return found


class _Told(NamedTuple):
    """Verdicts, a column an array: rows are taken many times, and of a small table pandas takes them slowly."""

    context: npt.NDArray[np.int64]
    kind: npt.NDArray[np.object_]
    truth: npt.NDArray[np.bool_]
    label: npt.NDArray[np.bool_]
    """False, too, where the judge failed."""
    p: npt.NDArray[np.float64]
    failure: npt.NDArray[np.object_]
    failed: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, verdicts: pd.DataFrame) -> _Told:
        failed = verdicts["failure"].notna().to_numpy()
        return cls(
            verdicts["context"].to_numpy(dtype=np.int64),
            verdicts["negative_kind"].to_numpy(dtype=object),
            verdicts["truth"].to_numpy(dtype=bool),
            np.where(failed, 0.0, verdicts["label"].to_numpy(dtype=float)).astype(bool),
            verdicts["p"].to_numpy(dtype=float),
            verdicts["failure"].to_numpy(dtype=object),
            failed,
        )

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Told:
        return _Told(
            self.context[chosen],
            self.kind[chosen],
            self.truth[chosen],
            self.label[chosen],
            self.p[chosen],
            self.failure[chosen],
            self.failed[chosen],
        )

    @property
    def answers(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        """Truth, label and P(active)."""
        return self.truth, self.label, self.p

    def missing_of(self, asked: Sequence[Context]) -> int:
        """How many contexts were to be judged and have no verdict, not even a failed one."""
        return len({context.window for context in asked} - set(self.context.tolist()))


def _rate(right: np.ndarray) -> Estimate:
    return proportion(float(right.sum()), len(right))


def _ranked(truth: np.ndarray, p: np.ndarray) -> Estimate:
    return UNKNOWN if np.isnan(p).any() else auroc(truth, p)


def _status(n_active: int, n_inactive: int, n_failed: int, reasons: npt.NDArray[np.object_]) -> str:
    """``ok``, or why a score of so many verdicts and failures would mean nothing."""
    n = n_active + n_inactive + n_failed
    if n == 0:
        return "failed: nothing was judged"
    often = f" (most often: {pd.Series(reasons).mode().iloc[0]})" if len(reasons) else ""
    if n_failed > MOST_FAILED * n:
        return f"failed: {n_failed} of {n} contexts without a verdict{often}"
    if n_active == 0 or n_inactive == 0:
        return f"failed: no verdict on any {'silent' if n_active else 'activating'} context{often}"
    return "ok"


def _by_stratum(items: Sequence[Context], labels: dict[int, bool]) -> list[Estimate]:
    """TPR of the contexts of each stratum, the weakest first."""
    strata = {c.window: c.stratum for c in items if c.stratum is not None and c.kind != "mismarked"}
    said: list[list[bool]] = [[] for _ in range(max(strata.values(), default=-1) + 1)]
    for window, stratum in strata.items():
        if window in labels:
            said[stratum].append(labels[window])
    return [proportion(sum(answers), len(answers)) for answers in said]
