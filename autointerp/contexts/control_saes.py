"""The control SAEs of a study (:mod:`sae.study.controls`) in `explain` and `score`: what less learning scores.

A sample of the latents of each is explained by the same explainer and judged by the same judge, from as many contexts
of the same kinds, as the latents of the run. What the run's latents score above them is owed to training. `explain`
explains the sample, `score` judges the explanations that it finds there.
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
"""Explained of each control SAE, by whether a model is asked; at most as many as of the run itself."""


def beside(runs: Sequence[Run]) -> list[Run]:
    """The control SAEs of the studies of ``runs``, each once; those that are among ``runs`` are left out."""
    found = {control.name: control for run in runs for control in find_controls(run).values()}
    return [control for name, control in found.items() if name not in {run.name for run in runs}]


def sample_size(choice: Choice, asks_model: bool, asked: int | None, n_of_run: int) -> int:
    """How many latents of each control SAE are to be explained.

    Args:
        choice: of the run's latents; one that names them is no sample, and gets none unless asked for.
        asks_model: of the explainer.
        asked: what the user said; ``None``: nothing.
        n_of_run: latents of the run that are explained.
    """
    if asked is not None:
        return asked
    return 0 if choice.indices else min(LATENTS[asks_model], n_of_run)


def sample_of(control: Run, n: int) -> list[int]:
    """The ``n`` latents of a control SAE that are explained: a plain random sample of those with contexts enough.

    Contexts are counted only of as many latents as it takes to find ``n`` that have enough.
    """
    sampler = Material.of(control).sampler
    able = (x for x in in_turn(range(control.settings.training.num_latents)) if sampler.eligible(x)[0])
    return sorted(itertools.islice(able, n))


def in_turn(latents: Iterable[int]) -> list[int]:
    """Latents in an order that says nothing of them, the same whatever others there are."""
    return sorted(latents, key=lambda latent: permanent_number(0, latent))


def first(explanations: pd.DataFrame, n: int | None) -> pd.DataFrame:
    """The explanations of the first ``n`` latents, :func:`in_turn`; all for ``None``."""
    if n is None or explanations.empty:
        return explanations
    return explanations[explanations["latent"].isin(in_turn(set(explanations["latent"].astype(int)))[:n])]


def was_explained(run: Run) -> bool:
    """Whether anything was ever asked about its latents; an ``explain`` stopped early leaves a journal without rows."""
    if not run.journal_path.exists():
        return False
    with Journal(run.journal_path) as journal:
        return not journal.explanations().empty
