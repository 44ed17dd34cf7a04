"""``Run`` for notebooks: a run's folder, with its contexts, explanations and scores.

from autointerp import Run
run = Run.open("run_a")
run.latents()        # one row per latent, every stage's columns
run.contexts(17)     # activating contexts, strongest first
run.explanations(), run.scores(), run.reliability(), run.sae()
run.sample()         # which latents were drawn to be explained, with their inclusion probabilities and weights
"""

from __future__ import annotations

import pandas as pd

import sae.study.run
from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context
from autointerp.findings.latent import reliability_of
from autointerp.journal.journal import Journal
from sae.common.files import read_table


class Run(sae.study.run.Run):
    """One trained SAE and all that was measured on it. Open one with :meth:`open`."""

    def contexts(self, latent: int) -> list[Context]:
        """The activating contexts that explainers see, strongest first.

        Raises :class:`NotFound` where the run is not harvested or has no such latent.
        """
        found = Material.of(self).sampler.explaining(latent)
        return sorted(found, key=lambda context: -max(context.activations))

    def explanations(self) -> pd.DataFrame:
        """Every explanation asked for, those that failed with their reason: one row each."""
        if not self.journal_path.exists():
            raise self.missing_error("explanations", "explain")
        with Journal(self.journal_path) as journal:
            return journal.explanations()

    def scores(self) -> pd.DataFrame:
        """Every score with its interval and counts, controls included: one row per explanation, judge and control.

        ``scorer`` says whether it is of detection or fuzzing. ``balanced_accuracy``, ``tpr``, ``tnr`` and ``auroc`` are
        over random silent contexts (in fuzzing: wrong marks), ``ba_hard``, ``tnr_hard``, ``auroc_hard`` over those in
        which a neighbour fires, ``…_same_token`` over those that hold the latent's top token; each with its 95 %
        interval in ``…_low`` and ``…_high`` (of the balanced accuracy: ``ba_low``, ``ba_high``). All columns are told
        at :class:`autointerp.scoring.scorers.base.ScoreRow`.
        """
        if not self.stage_path("scores").exists():
            raise self.missing_error("scores", "score")
        return read_table(self.stage_path("scores"))

    def reliability(self) -> pd.DataFrame:
        """How well each set-up's scores would agree with those of another draw of contexts: one row per set-up.

        Who explained and judged, by which scorer and to what ``precision``, newest first; ``value`` (see
        :mod:`autointerp.findings.reliability`), NaN where it is not to be had, its 95 % interval ``low`` to ``high``,
        and over ``n`` latents.
        """
        self.scores()  # says what to do where there are none
        rows = [
            {**told, **dict(zip(("low", "high"), told["interval"] or (None, None), strict=True))}
            for told in reliability_of(self)
        ]
        table = pd.DataFrame(rows).drop(columns="interval", errors="ignore")
        return table.astype(dict.fromkeys(("value", "low", "high"), float)) if rows else table

    def sample(self) -> pd.DataFrame:
        """Every draw of latents to explain, its whole population in rows: ``drawn``, ``probability``, ``weight``, …

        See :func:`autointerp.contexts.sampling.drawn`; ``draw`` tells draws apart, of other explainers or populations.
        """
        if not self.stage_path("sample").exists():
            raise self.missing_error("sample", "explain")
        return read_table(self.stage_path("sample"))
