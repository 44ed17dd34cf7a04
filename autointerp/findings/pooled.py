"""The scores of all runs of a study together, where they were explained and judged alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from autointerp.contexts.sample_record import sample_of
from autointerp.findings.evidence import Study
from autointerp.findings.relation import Part, pooled_findings
from autointerp.findings.reliability import verdicts_of
from autointerp.scoring.setups import precision_of, rows_of, setups_of
from sae.alignment.bootstrap import partner_units
from sae.common.files import read_table
from sae.study.run import Run

_ALIKE = ("explainer", "explainer_model", "explain_prompt_hash", "judge", "model", "scorer", "judge_prompt_hash")
"""What two runs' set-ups must have in common. Their settings hashes differ by the run's own contexts."""


def pooled_relation(study: Study, of_focus: pd.DataFrame) -> dict[str, Any] | None:
    """:func:`autointerp.findings.relation.pooled_findings` of the runs that are scored as the focus run is.

    ``of_focus`` are the verdicts behind the focus run's scores, which the caller has read already.
    """
    if study.shared is None or study.setup is None or len(study.compared) < 2:
        return None
    units = partner_units(study.compared, study.tables)
    parts = []
    for run in study.runs:
        if run.name in study.compared and (found := scored_alike(study, run)) is not None:
            rows, setup = found
            latents = study.latents_of(run)
            if "firing_frequency" in latents:
                verdicts = of_focus if run.name == study.focus.name else verdicts_of(run, rows, setup)
                sample = study.sample() if run.name == study.focus.name else sample_of(run, setup)
                parts.append(Part(run.name, rows, latents, verdicts, units[run.name], sample))
    return pooled_findings(parts)


def scored_alike(study: Study, run: Run) -> tuple[pd.DataFrame, Mapping[str, Any]] | None:
    """The rows of the run's newest set-up that is like the focus run's, and the set-up; ``None`` where it has none.

    Like it in who explained and judged, in how many contexts of what, and in the precision of adaptive judging.
    """
    setup, own = study.setup or {}, study.score_rows()
    if run.name == study.focus.name:
        return None if own is None else (own, setup)
    ours, theirs = study.focus.settings, run.settings
    path = run.stage_path("scores")
    if own is None or not path.exists():
        return None
    if (ours.contexts, ours.harvest.window) != (theirs.contexts, theirs.harvest.window):
        return None
    table = read_table(path)
    for found in setups_of(table):
        if all(found.get(key) == setup.get(key) for key in _ALIKE):
            rows = rows_of(table, found)
            if precision_of(rows) == precision_of(own):
                return rows, found
    return None
