"""Pair latents with their decoder-matched partners in runs that are scored alike: do their scores agree?

Pairs that hold a latent in common are one observation, and are resampled together
(:func:`sae.alignment.bootstrap.partner_units`). Scores of pairs are unweighted: pairs are no sample of all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from autointerp.contexts.sampling import load_sample
from autointerp.findings.evidence import Study
from autointerp.findings.relation import Part, pooled_findings
from autointerp.findings.reliability import verdicts_of
from autointerp.findings.shape import Agreement, PooledRelation
from autointerp.findings.statistics.resampling import Resamples, interval_of
from autointerp.scoring.setups import FIRST, own_scores, precision_of, rows_of, setups_of
from sae.alignment.bootstrap import partner_units
from sae.alignment.overlap import find_shared
from sae.common.estimate import UNKNOWN
from sae.common.files import read_table
from sae.study.run import Run

METHODS = {
    "score agreement": "expanded percentile bootstrap over pairs, 1000 resamples, seeded; pairs that hold a latent in "
    "common are resampled together; unweighted"
}
_ALIKE = (
    *("explainer", "explainer_model", "explain_prompt_hash", "judge", "model", "scorer", "judge_prompt_hash"),
    *FIRST,
)
"""Columns that the set-ups of two runs must share. Their settings hashes differ by the run's own contexts."""


def scored_pairs(study: Study, threshold: float = 0.7) -> pd.DataFrame | None:
    """Return the pairs over every two of the compared runs; ``None`` if no two runs are scored alike.

    Columns: ``latent`` and ``partner``, ``score`` and ``score_there``, ``aligned`` (both matched cosines above
    ``threshold``) and ``unit``, one number for all that are partners of each other.
    """
    if study.setup is None or len(study.compared) < 2:
        return None
    scores = {}
    for run in study.runs:
        if run.name in study.compared and (found := scored_alike(study, run)) is not None:
            scores[run.name] = own_scores(found[0])["balanced_accuracy"].astype(float)
    units, parts = partner_units(study.compared, study.tables), []
    for i, a in enumerate(study.compared):
        for b in study.compared[i + 1 :]:
            if not len(scores.get(a, ())) or not len(scores.get(b, ())):
                continue
            table = study.tables[a, b]
            partner = table["decoder_partner"].to_numpy()
            latents = scores[a].index.to_numpy()
            latents = latents[np.isin(partner[latents], scores[b].index)]
            columns = {
                "latent": latents.astype(np.int64),
                "partner": partner[latents],
                "score": scores[a].loc[latents].to_numpy(float),
                "score_there": scores[b].loc[partner[latents]].to_numpy(float),
                "aligned": find_shared(table, "both", threshold)[latents],
                "unit": units[a][latents],
            }
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True) if parts else None


def agreement(pairs: pd.DataFrame, kept: npt.NDArray[np.bool_]) -> Agreement:
    """Return the agreement of the ``kept`` [N] :func:`scored_pairs`; NaN if none is kept."""
    if not kept.any():
        return Agreement(0, UNKNOWN, UNKNOWN, UNKNOWN, math.nan, math.nan)
    draw = Resamples(pairs["unit"])
    one, other = pairs["score"].to_numpy(float), pairs["score_there"].to_numpy(float)
    n_units = draw.count(kept)
    return Agreement(
        n=int(kept.sum()),
        spearman=interval_of(draw.correlations([one, other], kept)[:, 0, 1], n_units),
        difference=interval_of(draw.means(one - other, kept), n_units),
        gap=interval_of(draw.means(np.abs(one - other), kept), n_units),
        mean=float(one[kept].mean()),
        mean_there=float(other[kept].mean()),
    )


def pooled_relation(study: Study, of_focus: pd.DataFrame) -> PooledRelation | None:
    """Return :func:`autointerp.findings.relation.pooled_findings` of the runs that are scored like the focus run.

    ``of_focus`` are the verdicts behind the focus run's scores.
    """
    if study.shared is None or study.setup is None or len(study.compared) < 2:
        return None
    units = partner_units(study.compared, study.tables)
    parts = []
    for run in study.runs:
        if run.name in study.compared and (found := scored_alike(study, run)) is not None:
            rows, setup = found
            latents, is_focus = study.latents_of(run), run.name == study.focus.name
            if "firing_frequency" in latents:
                verdicts = of_focus if is_focus else verdicts_of(run, rows, setup)
                sample = study.sample if is_focus else load_sample(run, setup)
                parts.append(Part(run.name, rows, latents, verdicts, units[run.name], sample))
    return pooled_findings(parts)


def scored_alike(study: Study, run: Run) -> tuple[pd.DataFrame, Mapping[str, Any]] | None:
    """Return the rows and the set-up of the run's newest scores that are like the focus run's; ``None`` if none are.

    The explainer, the judge, the numbers of contexts and the precision of adaptive judging must be equal.
    """
    setup, own = study.setup or {}, study.score_rows()
    if run.name == study.focus.name:
        return None if own is None else (own, setup)
    ours, theirs, path = study.focus.settings, run.settings, run.stage_path("scores")
    if own is None or not path.exists():
        return None
    if (ours.contexts, ours.harvest.window) != (theirs.contexts, theirs.harvest.window):
        return None
    table = read_table(path)
    for found in setups_of(table, draw=None, replicate=None):
        if all(found.get(key) == setup.get(key) for key in _ALIKE):
            rows = rows_of(table, found)
            if precision_of(rows) == precision_of(own):
                return rows, found
    return None
