"""What a run's scores stand above: the control SAEs of its study, and the n-gram baseline, scored by the same protocol.

Scores of a *control SAE* (:mod:`sae.controls`) are compared as two samples: its latents are others, so the difference
of the means has an interval that resamples both. What it says is of latents of these very SAEs; another random draw of
the frozen decoder would move it a little. The *baseline* explained the same latents from the same contexts, so it is
compared latent by latent.

The same protocol: explainer, judge, prompts, models and scorer are equal, so are the numbers of contexts of each kind
and the precision to which each explanation was judged. Only the contexts themselves differ, for they are the latents'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from autointerp import scored
from autointerp.evidence import Study, Told
from autointerp.journal import Journal
from autointerp.pooled import scored_alike
from autointerp.scorers.base import HARDER
from autointerp.statistics import UNKNOWN, Estimate, bootstrap_mean
from sae.controls import CONTROLS, controls_of
from sae.run import Run

METHODS = {"difference": "percentile bootstrap of the difference of two means, both resampled, 2000 resamples, seeded"}


def comparison_findings(study: Study, rows: pd.DataFrame, told: Told) -> dict[str, Any]:
    """``control_saes`` and ``baseline`` of the scores in ``rows``, as JSON values.

    ``control_saes`` has an entry for each control SAE that was scored alike; ``lacking_controls`` says of which there
    is none, and how it is had (``None`` where there is nothing to say).
    """
    own, controls = good(rows), controls_of(study.focus)
    entries, lacking = [], []
    for kind in CONTROLS:
        alike = scored_alike(study, controls[kind]) if kind in controls else None
        if alike is None or good(alike[0]).empty:
            lacking.append(kind)
        else:
            entries.append({"kind": kind, "run": controls[kind].name, **_beside(own, alike[0])})
    return {
        "control_saes": entries,
        "lacking_controls": _lacking(study, lacking, controls, told),
        "baseline": _baseline(study, own),
    }


def good(rows: pd.DataFrame) -> pd.DataFrame:
    """The latents' scores under their own explanations that did not fail, by latent."""
    return rows[(rows["control"] == "none") & (rows["status"] == "ok")].set_index("latent")


def difference_of_means(a: pd.Series, b: pd.Series) -> Estimate:
    """mean(a) − mean(b) of two independent samples, NaN left out, with its interval (see :data:`METHODS`)."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (a, b))
    x, y = x[~np.isnan(x)], y[~np.isnan(y)]
    if not len(x) or not len(y):
        return UNKNOWN
    value = float(x.mean() - y.mean())
    if min(len(x), len(y)) < 2:
        return Estimate(value, np.nan, np.nan)

    def statistic(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(x.mean(axis) - y.mean(axis))

    drawn = stats.bootstrap((x, y), statistic, n_resamples=2000, method="percentile", batch=200, rng=0)
    low, high = drawn.confidence_interval
    return Estimate(value, min(float(low), value), max(float(high), value))


def paired_difference(a: pd.Series, b: pd.Series) -> Estimate:
    """The mean of a − b over the latents that have both."""
    return bootstrap_mean((a.astype(float) - b.astype(float)).dropna())


def _beside(own: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    """One control SAE's scores, and how far those of ``own`` stand above them."""
    theirs = good(rows)
    failed = rows[(rows["control"] == "none") & (rows["status"] != "ok")]
    return {
        **_figures(own, theirs, difference_of_means),
        "n_failed": int((failed["status"].map(scored.status_kind) == "failed").sum()),
        "n_ineligible": int((failed["status"].map(scored.status_kind) == "ineligible").sum()),
    }


def _figures(
    own: pd.DataFrame, theirs: pd.DataFrame, difference: Callable[[pd.Series, pd.Series], Estimate]
) -> dict[str, Any]:
    values = theirs["balanced_accuracy"].astype(float)
    aurocs = theirs["auroc"].astype(float).dropna() if "auroc" in theirs else pd.Series(dtype=float)
    found = {
        **scored.mean_of(bootstrap_mean(values)),
        "quartiles": scored.quartiles_of(values),
        "auroc_mean": scored.number(aurocs.mean()) if len(aurocs) else None,
        "n_scored": len(values),
        "histogram": scored.histogram(values, scored.SCORE_EDGES),
        "above": scored.mean_of(difference(own["balanced_accuracy"], theirs["balanced_accuracy"])),
        "negatives": {},
    }
    for kind in HARDER:
        column = f"ba_{kind}"
        if column in own and column in theirs and own[column].notna().any() and theirs[column].notna().any():
            harder = theirs[column].astype(float).dropna()
            found["negatives"][kind] = {
                **scored.mean_of(bootstrap_mean(harder)),
                "n_scored": len(harder),
                "above": scored.mean_of(difference(own[column], theirs[column])),
            }
    return found


def _baseline(study: Study, own: pd.DataFrame) -> dict[str, Any] | None:
    """The n-gram explanations of the same latents, judged by the n-gram judge; ``None`` where the scores are theirs."""
    setup, scores = study.setup, study.scores
    if setup is None or scores is None or setup["judge"] == "ngram":
        return None
    found = scored.setups(scores, scorer=setup["scorer"], explainer="ngram", judge="ngram")
    wanted = scored.precision_of(scored.rows_of(scores, setup))
    for baseline in found:
        rows = scored.rows_of(scores, baseline)
        theirs = good(rows)
        both = theirs.index.intersection(own.index)
        if len(both) and scored.precision_of(rows) == wanted:
            return _figures(own.loc[both], theirs.loc[both], paired_difference)
    return None


# --- what is not there ------------------------------------------------------------------------------------


def _lacking(study: Study, kinds: list[str], controls: Mapping[str, Run], told: Told) -> dict[str, Any] | None:
    focus = study.focus
    if not kinds or focus.is_control:
        return None

    def said(says: str, *words: str) -> dict[str, Any]:
        return {"kinds": kinds, "says": says, "command": study.command(*words) if words else None}

    if any(kind not in controls for kind in kinds):
        if focus.imported:
            return said("An imported study has no control SAEs: they are trained with the SAEs of a study.")
        seeds = [str(run.seed) for run in study.runs if run.seed is not None]
        says = "This study has no control SAEs. With the same options as before, this trains them, and nothing else:"
        return said(says, "train", "--name", focus.study, "--seeds", *seeds)
    if any(not _explained_alike(controls[kind], told) for kind in kinds):
        says = "Control SAEs are not explained yet. With the same options as before, this explains a sample of each:"
        return said(says, "explain", "--sae", focus.name)
    says = "Control SAEs are not scored like this run yet. With the same options as before, this scores them:"
    return said(says, "score", "--sae", focus.name)


def _explained_alike(control: Run, told: Told) -> bool:
    """Whether a latent of it was explained by the explainer, model and prompts of the run's explanations."""
    if not control.journal_path.exists() or told.table.empty:
        return False
    last = told.table.iloc[-1]
    same = {key: str(last[key]) for key in ("explainer", "model", "prompt_hash")}
    with Journal(control.journal_path) as journal:
        return not journal.explanations(status="ok", **same).empty
