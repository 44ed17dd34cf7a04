"""Select latents of the control SAEs of a study (:mod:`sae.study.controls`) for `explain` and `score`.

They are explained and judged in the same way as the run's latents; only the part of a run's score above its controls
comes from training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pandas as pd

from autointerp.contexts.material import Material
from autointerp.contexts.sampling import permanent_number
from autointerp.contexts.selection import Choice
from autointerp.journal.journal import Journal
from sae.study.controls import find_controls
from sae.study.run import Run

LATENTS = {False: 200, True: 50}
"""Latents explained of each control SAE, by whether a model is asked; never more than of the run itself."""


def list_control_saes(runs: Sequence[Run]) -> list[Run]:
    """Return the control SAEs of the studies of ``runs``, each once and without those among ``runs``."""
    controls = {control.name: control for run in runs for control in find_controls(run).values()}
    return [control for name, control in controls.items() if name not in {run.name for run in runs}]


def choose_sample_size(choice: Choice, asks_model: bool, asked: int | None, n_of_run: int) -> int:
    """Return how many latents of each control SAE to explain.

    Args:
        choice: of the run's latents. Named latents are not a sample, and get no controls unless asked for.
        asks_model: whether the explainer does.
        asked: the user's number, if any.
        n_of_run: latents of the run that are explained.
    """
    if asked is not None:
        return asked
    return 0 if choice.indices else min(LATENTS[asks_model], n_of_run)


def draw_control_latents(control: Run, n: int) -> list[int]:
    """Draw a plain random sample of ``n`` latents of a control SAE that have enough contexts."""
    sampler = Material.of(control).sampler
    latents = shuffle(range(control.settings.training.num_latents))
    return sorted(itertools.islice((x for x in latents if sampler.eligible(x)[0]), n))


def shuffle(latents: Iterable[int]) -> list[int]:
    """Return latents in a fixed random order, independent of which others there are."""
    return sorted(latents, key=lambda latent: permanent_number(0, latent))


def keep_first(explanations: pd.DataFrame, n: int | None) -> pd.DataFrame:
    """Return the explanations of the first ``n`` latents of :func:`shuffle`; all for ``None``."""
    if n is None or explanations.empty:
        return explanations
    return explanations[explanations["latent"].isin(shuffle(set(explanations["latent"].astype(int)))[:n])]


def was_explained(run: Run) -> bool:
    """Return whether the run has explanations; an ``explain`` stopped early leaves a journal without any."""
    if not run.journal_path.exists():
        return False
    with Journal(run.journal_path) as journal:
        return not journal.explanations().empty
