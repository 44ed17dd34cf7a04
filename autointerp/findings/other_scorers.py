"""The scores of other scorers than the one reported on: of the same explainer and judge, each in its own set-up.

What they mean is each scorer's own affair, so they are never joined with the scores nor put in one mean with them; they
stand beside them, under their names, each with its interval and its swapped control.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from autointerp.findings.evidence import Study, Told
from autointerp.findings.scores import score_findings
from autointerp.scoring.setups import rows_of, setups_of

_FIGURES = ("mean", "interval", "auroc_mean", "auroc_interval", "n_scored", "n_failed", "n_ineligible", "control")
_SAME = ("explainer", "explainer_model", "judge", "model")


def other_scorer_findings(study: Study, latents: pd.DataFrame, told: Told) -> list[dict[str, Any]]:
    """A row for each other scorer in the focus run's score table, by name, as JSON values."""
    if study.scores is None or "scorer" not in study.scores:
        return []
    view, same = study.view, {key: (study.setup or {}).get(key) for key in _SAME}
    wanted = same if study.setup else {"explainer": view.explainer, "judge": view.judge}
    found = []
    for scorer in sorted(set(study.scores["scorer"].dropna()) - {view.scorer, (study.setup or {}).get("scorer")}):
        setups = setups_of(study.scores, scorer=scorer, **wanted)
        if setups:
            rows = rows_of(study.scores, setups[0])
            sample = study.sample_of(setups[0])
            figures = score_findings(rows, latents, told.explained, told.too_few, sample)
            who = {"explainer": setups[0].get("explainer"), "judge": setups[0].get("judge")}
            found.append({"scorer": scorer, **who, **{key: figures[key] for key in _FIGURES}})
    return found
