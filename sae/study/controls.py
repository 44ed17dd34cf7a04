"""Add control SAEs, whose weights are partly or never trained: scores mean little unless they beat these.

Random decoders and even untrained SAEs can score nearly as well as trained ones (arXiv 2501.17727, 2602.14111). Each
control is a study with one run, with the same settings and batches:

- ``NAME-frozen_a``: the random decoder is never trained, everything else is;
- ``NAME-untrained_a``: nothing is trained. One batch is read, to initialise the bias.

They are harvested, explained and scored like any run, but are not siblings: their weights are not aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae.study.run import Run, Study, check_name, study_runs

CONTROLS = {"frozen": "a random decoder that is never trained", "untrained": "nothing is trained"}
"""suffix of a control's study → description"""
_FROZEN = {"frozen": "decoder", "untrained": "everything"}


def add_controls(studies: Sequence[Study], root: Path) -> list[Study]:
    """Return ``studies`` and their controls, with the seeds of controls that have already begun."""
    return [*studies, *(_control(study, kind, root) for study in studies for kind in CONTROLS)]


def find_controls(run: Run) -> dict[str, Run]:
    """Return the trained controls of the run's study by kind; a control has none."""
    found: dict[str, Run] = {}
    if run.is_control:
        return found
    for kind in CONTROLS:
        trained = [r for r in study_runs(_name(run.study, kind), run.root) if r.is_trained and r.is_control]
        if trained:
            found[kind] = trained[0]
    return found


def get_parent(study: Study) -> str:
    """Return the name of the study that ``study`` is a control of, else its own."""
    return study.name if study.settings.training.frozen == "nothing" else study.name.rpartition("-")[0]


def _control(study: Study, kind: str, root: Path) -> Study:
    name, training = check_name(_name(check_name(study.name), kind)), dict[str, Any](frozen=_FROZEN[kind])
    if kind == "untrained":
        training["tokens"] = study.settings.training.batch_tokens
    settings = study.settings.with_values(training=training)
    begun = tuple(run.seed for run in study_runs(name, root) if run.seed is not None)
    return replace(study, name=name, settings=settings, seeds=begun or study.seeds[:1])


def _name(study: str, kind: str) -> str:
    return f"{study}-{kind}"
