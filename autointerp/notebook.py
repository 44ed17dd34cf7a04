"""``Run`` for notebooks: a run's folder, with its contexts, explanations and scores.

from autointerp import Run
run = Run.open("run_a")
run.latents()        # one row per latent, every stage's columns
run.contexts(17)     # activating contexts, strongest first
run.explanations(), run.scores(), run.sae()
run.sample()         # which latents were drawn to be explained, with their inclusion probabilities and weights
"""

from __future__ import annotations

import pandas as pd

import sae.run
from autointerp.contexts import Context
from autointerp.journal import Journal
from autointerp.material import Material
from sae.errors import NotFound
from sae.files import read_table


class Run(sae.run.Run):
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
            raise NotFound(f"run {self.name!r} has no explanations; run `python cli.py explain --sae {self.name}`")
        with Journal(self.journal_path) as journal:
            return journal.explanations()

    def scores(self) -> pd.DataFrame:
        """Every score with its interval and counts, controls included: one row per explanation, judge and control."""
        if not self.stage_path("scores").exists():
            raise NotFound(f"run {self.name!r} has no scores; run `python cli.py score --sae {self.name}`")
        return read_table(self.stage_path("scores"))

    def sample(self) -> pd.DataFrame:
        """Every draw of latents to explain, its whole population in rows: ``drawn``, ``probability``, ``weight``, …

        See :func:`autointerp.sampling.drawn`; ``draw`` tells draws apart, of other explainers or populations.
        """
        if not self.stage_path("sample").exists():
            raise NotFound(f"run {self.name!r} has no sample; run `python cli.py explain --sae {self.name}`")
        return read_table(self.stage_path("sample"))
