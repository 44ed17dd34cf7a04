"""Compare a run's scores with others by the same protocol: control SAEs, the n-gram baseline, other explainers.

A *control SAE* (:mod:`sae.study.controls`) has other latents, a plain random sample, so the interval of the difference
of means resamples both samples; the run's own are weighted if stratified
(:mod:`autointerp.findings.statistics.estimation`). The *baseline* explained the same latents from the same contexts, so
it is compared latent by latent, as is any other explainer of the run.

The same protocol means the same explainer, judge, prompts, models, scorer, numbers of contexts and precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from autointerp.contexts.sampling import Sample
from autointerp.findings.evidence import JournalFacts, Study
from autointerp.findings.pairs import scored_alike
from autointerp.findings.scores import Scored, estimator_of
from autointerp.findings.shape import Control, ControlSae, Difference, HarderDifference, LackingControls, Mean
from autointerp.findings.statistics.estimation import AS_THEY_ARE, Estimator, error_of
from autointerp.findings.statistics.resampling import interval_of
from autointerp.journal.journal import open_journal
from autointerp.journal.method import BASELINE
from autointerp.scoring.scorers.base import HARDER
from autointerp.scoring.setups import JUDGED_BY, own_scores, precision_of, rows_of, setups_of, status_kind
from sae.common.estimate import UNKNOWN, Estimate
from sae.study.controls import CONTROLS, find_controls
from sae.study.run import Run

METHODS = {
    "difference": "expanded percentile bootstrap of the difference of two means, both resampled, 1000 resamples, seeded"
}


def control_sae_findings(
    study: Study, rows: pd.DataFrame, facts: JournalFacts, sample: Sample | None
) -> tuple[list[ControlSae], LackingControls | None]:
    """Return the control SAEs scored like ``rows``, and the missing ones with the command that provides them."""
    controls, own = find_controls(study.focus), own_scored(rows, facts, sample)
    entries, lacking = [], []
    for kind in CONTROLS:
        alike = scored_alike(study, controls[kind]) if kind in controls else None
        if alike is None or own_scores(alike[0]).empty:
            lacking.append(kind)
        else:
            entries.append(_compare_control(kind, controls[kind].name, own, alike[0]))
    return entries, _lacking(study, lacking, controls, facts)


def own_scored(rows: pd.DataFrame, facts: JournalFacts, sample: Sample | None) -> Scored:
    """Return the run's own scores in ``rows``, weighted if there is a ``sample``."""
    of = estimator_of(rows, facts.too_few, sample)
    return Scored(of.of(own_scores(rows)), of)


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


def _compare_control(kind: str, name: str, own: Scored, rows: pd.DataFrame) -> ControlSae:
    """Return one control SAE's scores, and how far those of ``own`` are above them."""
    kinds = rows["status"][rows["control"] == "none"].map(status_kind)

    def difference(own: Scored, theirs: Scored) -> Estimate:
        return difference_of_means(own.values(), theirs.values(), own.of, error_of(own.rows))

    return ControlSae(
        **_compare(own, Scored(own_scores(rows)), difference),
        kind=kind,
        run=name,
        n_failed=int((kinds == "failed").sum()),
        n_ineligible=int((kinds == "ineligible").sum()),
    )


def _compare(own: Scored, theirs: Scored, difference: Callable[[Scored, Scored], Estimate]) -> dict[str, Any]:
    """Return the fields of :class:`Control` for ``theirs``; ``difference`` is that of the means."""
    negatives = {}
    for kind in HARDER:
        mine, others = own.over(kind), theirs.over(kind)
        if len(mine.rows) and len(others.rows):
            negatives[kind] = HarderDifference(others.mean(), len(others.rows), Mean(difference(mine, others)))
    shape = theirs.histogram()
    return {**theirs.figures(), "histogram": shape, "above": Mean(difference(own, theirs)), "negatives": negatives}


def baseline_findings(study: Study, own: Scored) -> Control | None:
    """Return the scores of the n-gram baseline over the same latents; ``None`` if the scores are the baseline's."""
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
            return Control(**_compare(ours, others, lambda mine, baseline: baseline.difference(mine)))
    return None


def compare_explainer(study: Study, setup: Mapping[str, Any], facts: JournalFacts) -> Difference | None:
    """Return how far the run's scores are above those of another explainer of its latents, latent by latent.

    ``None`` if another judge or precision made them, or no latent has both. The contexts are the same.
    """
    rows, scores = study.score_rows(), study.scores
    if rows is None or scores is None or any(setup.get(key) != (study.setup or {}).get(key) for key in JUDGED_BY):
        return None
    theirs = rows_of(scores, setup)
    if precision_of(theirs) != precision_of(rows):
        return None
    own = own_scored(rows, facts, study.sample)
    return Scored(own_scores(theirs), own.of).below(own)


# --- missing controls -------------------------------------------------------------------------------------


def _lacking(
    study: Study, kinds: list[str], controls: Mapping[str, Run], facts: JournalFacts
) -> LackingControls | None:
    focus = study.focus
    if not kinds or focus.is_control:
        return None
    if any(kind not in controls for kind in kinds):
        if focus.imported:
            says = "An imported study has no control SAEs: they are trained with the SAEs of a study."
            return LackingControls(kinds, says)
        says = "This study has no control SAEs. This trains them, and nothing else:"
        words = ["train", "--name", focus.study]
    elif any(not _is_explained_alike(controls[kind], facts) for kind in kinds):
        says = "Control SAEs are not explained yet. With the same options as before, this explains a sample of each:"
        words = ["explain", "--sae", focus.name]
    else:
        says = "Control SAEs are not scored like this run yet. With the same options as before, this scores them:"
        words = ["score", "--sae", focus.name]
    return LackingControls(kinds, says, study.command(*words))


def _is_explained_alike(control: Run, facts: JournalFacts) -> bool:
    """Whether the control has an explanation by the explainer, model and prompts of the run's explanations."""
    if not control.journal_path.exists() or facts.table.empty:
        return False
    last = facts.table.iloc[-1]
    same = {key: str(last[key]) for key in ("explainer", "model", "prompt_hash")}
    with open_journal(control) as journal:
        return not journal.explanations(status="ok", **same).empty
