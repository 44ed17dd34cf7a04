"""Compare a run's scores with its controls, scored by the same protocol: control SAEs and the n-gram baseline.

A *control SAE* (:mod:`sae.study.controls`) has other latents, a plain random sample, so the interval of the difference
of means resamples both samples; the run's own are weighted if stratified
(:mod:`autointerp.findings.statistics.estimation`). The *baseline* explained the same latents from the same contexts, so
it is compared latent by latent.

The same protocol means the same explainer, judge, prompts, models, scorer, numbers of contexts and precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from autointerp.contexts.sampling import Sample
from autointerp.findings.evidence import JournalFacts, Study
from autointerp.findings.json_values import mean_of
from autointerp.findings.pairs import scored_alike
from autointerp.findings.scores import Scored, estimator_of
from autointerp.findings.statistics.estimation import AS_THEY_ARE, Estimator, error_of
from autointerp.findings.statistics.resampling import interval_of
from autointerp.journal.journal import open_journal
from autointerp.journal.method import BASELINE
from autointerp.scoring.scorers.base import HARDER
from autointerp.scoring.setups import own_scores, precision_of, rows_of, setups_of, status_kind
from sae.common.estimate import UNKNOWN, Estimate
from sae.study.controls import CONTROLS, find_controls
from sae.study.run import Run

METHODS = {
    "difference": "expanded percentile bootstrap of the difference of two means, both resampled, 1000 resamples, seeded"
}


def comparison_findings(
    study: Study, rows: pd.DataFrame, facts: JournalFacts, sample: Sample | None = None
) -> dict[str, Any]:
    """Return ``control_saes`` and ``baseline`` for the scores in ``rows``, weighted if there is a ``sample``.

    ``control_saes`` has an entry for each control SAE scored alike; ``lacking_controls`` names the missing ones and the
    command that provides them.
    """
    controls = find_controls(study.focus)
    of = estimator_of(rows, facts.too_few, sample)
    own = Scored(of.of(own_scores(rows)), of)
    entries, lacking = [], []
    for kind in CONTROLS:
        alike = scored_alike(study, controls[kind]) if kind in controls else None
        if alike is None or own_scores(alike[0]).empty:
            lacking.append(kind)
        else:
            entries.append({"kind": kind, "run": controls[kind].name, **_control_figures(own, alike[0])})
    return {
        "control_saes": entries,
        "lacking_controls": _lacking(study, lacking, controls, facts),
        "baseline": _baseline(study, own),
    }


def difference_of_means(
    a: pd.Series, b: pd.Series, of: Estimator = AS_THEY_ARE, error: pd.Series | None = None
) -> Estimate:
    """Return mean(a) − mean(b) of two independent samples, NaN skipped, with its interval (see :data:`METHODS`).

    ``of`` describes the sample of ``a``, ``error`` its error variances if known; ``b`` is unweighted.
    """
    a, b = a.astype(float).dropna(), b.astype(float).dropna()
    if a.empty or b.empty:
        return UNKNOWN
    draws, n = of.mean_draws(a, error)
    theirs, m = Estimator(seed=1).mean_draws(b)
    return interval_of(draws - theirs, min(n, m))


def _control_figures(own: Scored, rows: pd.DataFrame) -> dict[str, Any]:
    """Return one control SAE's scores, and how far those of ``own`` are above them."""
    kinds = rows["status"][rows["control"] == "none"].map(status_kind)

    def difference(own: Scored, theirs: Scored) -> Estimate:
        return difference_of_means(own.values(), theirs.values(), own.of, error_of(own.rows))

    return {
        **_figures(own, Scored(own_scores(rows)), difference),
        "n_failed": int((kinds == "failed").sum()),
        "n_ineligible": int((kinds == "ineligible").sum()),
    }


def _figures(own: Scored, theirs: Scored, difference: Callable[[Scored, Scored], Estimate]) -> dict[str, Any]:
    """Return the figures of ``theirs``, and how far ``own`` is above them by the ``difference`` of means."""
    found = {
        **theirs.figures(),
        "auroc_mean": theirs.plain_mean("auroc"),
        "n_scored": len(theirs.rows),
        "histogram": theirs.histogram(),
        "above": mean_of(difference(own, theirs)),
        "negatives": {},
    }
    for kind in HARDER:
        mine, others = own.over(kind), theirs.over(kind)
        if len(mine.rows) and len(others.rows):
            above = mean_of(difference(mine, others))
            found["negatives"][kind] = {**mean_of(others.mean()), "n_scored": len(others.rows), "above": above}
    return found


def _baseline(study: Study, own: Scored) -> dict[str, Any] | None:
    """Return the figures of the n-gram baseline over the same latents; ``None`` if the scores are the baseline's."""
    setup, scores = study.setup, study.scores
    if setup is None or scores is None or setup["judge"] == BASELINE:
        return None
    found = setups_of(scores, scorer=setup["scorer"], explainer=BASELINE, judge=BASELINE)
    wanted = precision_of(rows_of(scores, setup))
    for baseline in found:
        rows = rows_of(scores, baseline)
        theirs = own_scores(rows)
        both = theirs.index.intersection(own.rows.index)
        if len(both) and precision_of(rows) == wanted:
            ours, others = Scored(own.rows.loc[both], own.of), Scored(theirs.loc[both], own.of)
            return _figures(ours, others, lambda mine, baseline: baseline.difference(mine))
    return None


# --- missing controls -------------------------------------------------------------------------------------


def _lacking(study: Study, kinds: list[str], controls: Mapping[str, Run], facts: JournalFacts) -> dict[str, Any] | None:
    focus = study.focus
    if not kinds or focus.is_control:
        return None

    def said(says: str, *words: str) -> dict[str, Any]:
        return {"kinds": kinds, "says": says, "command": study.command(*words) if words else None}

    if any(kind not in controls for kind in kinds):
        if focus.imported:
            return said("An imported study has no control SAEs: they are trained with the SAEs of a study.")
        says = "This study has no control SAEs. This trains them, and nothing else:"
        return said(says, "train", "--name", focus.study)
    if any(not _is_explained_alike(controls[kind], facts) for kind in kinds):
        says = "Control SAEs are not explained yet. With the same options as before, this explains a sample of each:"
        return said(says, "explain", "--sae", focus.name)
    says = "Control SAEs are not scored like this run yet. With the same options as before, this scores them:"
    return said(says, "score", "--sae", focus.name)


def _is_explained_alike(control: Run, facts: JournalFacts) -> bool:
    """Whether the control has an explanation by the explainer, model and prompts of the run's explanations."""
    if not control.journal_path.exists() or facts.table.empty:
        return False
    last = facts.table.iloc[-1]
    same = {key: str(last[key]) for key in ("explainer", "model", "prompt_hash")}
    with open_journal(control) as journal:
        return not journal.explanations(status="ok", **same).empty
