"""A latent and its partner in another run, where both are scored in the same way: do their scores agree?

Partners are decoder-matched. The pairs that hold a latent in common are one observation, and are resampled together
(:func:`sae.alignment.bootstrap.partner_units`). The scores are as they are, unweighted: what is paired is no sample of
all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from autointerp.contexts.sample_record import sample_of
from autointerp.findings.evidence import Study
from autointerp.findings.json_values import number
from autointerp.findings.relation import Part, pooled_findings
from autointerp.findings.reliability import verdicts_of
from autointerp.findings.statistics.resampling import Resamples, interval_of
from autointerp.scoring.setups import precision_of, rows_of, setups_of, status_kind
from sae.alignment.bootstrap import partner_units
from sae.alignment.overlap import shared
from sae.common.estimate import UNKNOWN, Estimate
from sae.common.files import read_table
from sae.study.run import Run

METHODS = {
    "score agreement": "expanded percentile bootstrap over pairs, 1000 resamples, seeded; pairs that hold a latent in "
    "common are resampled together; unweighted"
}
_COLUMNS = ("latent", "partner", "score", "score_there", "aligned", "unit")


def scored_pairs(study: Study, threshold: float = 0.7) -> pd.DataFrame | None:
    """The pairs over every two of the compared runs, as the earlier named one sees them; ``None`` where no two runs
    are scored alike.

    Columns: ``latent`` and ``partner``, ``score`` and ``score_there``, ``aligned`` (both matched cosines above
    ``threshold``) and ``unit``, one number for all that are partners of each other.
    """
    if study.setup is None or len(study.compared) < 2:
        return None
    by_name = {run.name: run for run in study.runs}
    scores = {name: found for name in study.compared if len(found := _scores(study, by_name[name]))}
    units, parts = partner_units(study.compared, study.tables), []
    for i, a in enumerate(study.compared):
        for b in study.compared[i + 1 :]:
            if a in scores and b in scores:
                parts.append(_pairs_of(study.tables[a, b], scores[a], scores[b], units[a], threshold))
    return pd.concat(parts, ignore_index=True) if parts else None


def _pairs_of(
    table: pd.DataFrame, here: pd.Series, there: pd.Series, unit: npt.NDArray[np.integer], threshold: float
) -> pd.DataFrame:
    partner, aligned = table["decoder_partner"].to_numpy(), shared(table, "both", threshold)
    kept = [latent for latent in here.index if partner[latent] in there.index]
    columns: Sequence[Any] = (
        np.asarray(kept, np.int64),
        partner[kept],
        here.loc[kept].to_numpy(float),
        there.loc[partner[kept]].to_numpy(float),
        aligned[kept],
        unit[kept],
    )
    return pd.DataFrame(dict(zip(_COLUMNS, columns, strict=True)))


def _scores(study: Study, run: Run) -> pd.Series:
    """Latent → score of a run, of those that are scored as the focus run is."""
    found = scored_alike(study, run)
    return pd.Series(dtype=float) if found is None else good_scores(found[0])["balanced_accuracy"].astype(float)


def good_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a set-up that are scores of a latent's own explanation, by latent."""
    good = rows[(rows["control"] == "none") & (rows["status"].map(status_kind) == "ok")]
    return good.set_index("latent")


class Agreement(NamedTuple):
    """How far the scores of ``n`` pairs agree; each figure with its 95 % interval (see :data:`METHODS`)."""

    n: int
    spearman: Estimate
    """Of a latent's score and its partner's."""
    difference: Estimate
    """Mean of the latent's score less its partner's."""
    gap: Estimate
    """Mean of that difference's size."""
    mean: float
    """Mean score of the latents."""
    mean_there: float
    """Mean score of their partners."""

    def as_dict(self) -> dict[str, Any]:
        estimates = {name: getattr(self, name).as_dict() for name in ("spearman", "difference", "gap")}
        return {"n": self.n, **estimates, "mean": number(self.mean), "mean_there": number(self.mean_there)}


def agreement(pairs: pd.DataFrame, kept: npt.NDArray[np.bool_]) -> Agreement:
    """The agreement of those of :func:`scored_pairs` that are ``kept`` [N]; all figures NaN where none is."""
    if not kept.any():
        return Agreement(0, UNKNOWN, UNKNOWN, UNKNOWN, math.nan, math.nan)
    draw, n = Resamples(pairs["unit"]), int(kept.sum())
    one, other = pairs["score"].to_numpy(float), pairs["score_there"].to_numpy(float)
    n_units = draw.count(kept)

    def mean(values: npt.NDArray[np.float64]) -> Estimate:
        return interval_of(draw.means(values, kept), n_units)

    return Agreement(
        n=n,
        spearman=interval_of(draw.correlations([one, other], kept)[:, 0, 1], n_units),
        difference=mean(one - other),
        gap=mean(np.abs(one - other)),
        mean=float(one[kept].mean()),
        mean_there=float(other[kept].mean()),
    )


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
