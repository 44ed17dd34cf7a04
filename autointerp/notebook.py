"""``Run`` for notebooks: a run's folder, with its contexts, explanations and scores.

from autointerp import Run
run = Run.open("run_a")
run.latents()        # one row per latent, every stage's columns
run.contexts(17)     # activating contexts, strongest first
run.logits(17)       # the tokens that latent 17 promotes and suppresses
run.explanations(), run.scores(), run.reliability(), run.sae()
run.sample()         # which latents were drawn to be explained, with their inclusion probabilities and weights
"""

from __future__ import annotations

import pandas as pd

import sae.study.run
from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context
from autointerp.findings.latent import reliability_of
from autointerp.journal.journal import open_journal
from sae.common.files import read_table
from sae.study.logits import Logits, LogitTable, ensure_logits
from sae.study.stage import Compute


class Run(sae.study.run.Run):
    """One trained SAE and everything measured on it. Open one with :meth:`open`."""

    def contexts(self, latent: int) -> list[Context]:
        """Return the activating contexts that explainers see, strongest first.

        Raises :class:`NotFound` if the run is not harvested or has no such latent.
        """
        found = Material.of(self).sampler.explaining(latent)
        return sorted(found, key=lambda context: -max(context.activations))

    def logits(self, latent: int) -> Logits:
        """Return the tokens that a latent promotes and suppresses, and the moments of its logits.

        The first use loads the subject model, for the table of all latents. Raises :class:`NotApplicable` if the
        hookpoint does not write into the residual stream, :class:`NotFound` if the run has no such latent.
        """
        self.check_latent(latent)
        ensure_logits([self], Compute())
        return LogitTable(self)[latent]

    def explanations(self) -> pd.DataFrame:
        """Return every explanation asked for, one row each; failed ones with their reason."""
        if not self.journal_path.exists():
            raise self.missing_error("explanations", "explain")
        with open_journal(self) as journal:
            return journal.explanations()

    def scores(self) -> pd.DataFrame:
        """Return every score, one row per explanation, judge and control, with 95 % intervals (``…_low``, ``…_high``).

        ``balanced_accuracy``, ``tpr``, ``tnr`` and ``auroc`` are over random silent contexts (in fuzzing: wrong marks),
        ``ba_hard``, ``tnr_hard``, ``auroc_hard`` over those in which a neighbour fires, ``…_same_token`` over those
        with the latent's top token. :class:`autointerp.scoring.scorers.base.ScoreRow` describes all columns.
        """
        if not self.stage_path("scores").exists():
            raise self.missing_error("scores", "score")
        return read_table(self.stage_path("scores"))

    def reliability(self) -> pd.DataFrame:
        """Return ``value``, ``low``, ``high``, ``n`` of each set-up, newest first; see
        :mod:`autointerp.findings.reliability`.
        """
        self.scores()  # raises NotFound if there are none
        rows = [
            {**row, **dict(zip(("low", "high"), row["interval"] or (None, None), strict=True))}
            for row in reliability_of(self)
        ]
        table = pd.DataFrame(rows).drop(columns="interval", errors="ignore")
        return table.astype(dict.fromkeys(("value", "low", "high"), float)) if rows else table

    def sample(self) -> pd.DataFrame:
        """Return the population of every draw of latents to explain: ``draw``, ``drawn``, ``probability``, ``weight``,
        …
        """
        if not self.stage_path("sample").exists():
            raise self.missing_error("sample", "explain")
        return read_table(self.stage_path("sample"))
