"""The findings table of a study: every finding of the paper, from the files of its stages.

The rows about sweeps use the sweeps of the same subject model under the same root.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from autointerp.findings.evidence import JournalFacts, Study, asking
from autointerp.findings.pairs import scored_pairs
from autointerp.findings.paper.dictionaries import THRESHOLD, Dictionaries, findings_of_dictionaries
from autointerp.findings.paper.finding import Finding
from autointerp.findings.paper.scores import ScoreEvidence, findings_of_scores
from autointerp.findings.paper.sweeps import findings_of_sweeps
from autointerp.findings.relation import Part
from autointerp.findings.shape import Relation, Scores
from autointerp.findings.sweep_table import sweeps_of
from sae.alignment.overlap import find_shared
from sae.common.commands import shell_command
from sae.common.package_data import bundled_recipes, shown_path

_RECIPES = {"width": "widths", "k": "ks", "tokens": "tokens", "architecture": "architectures"}


def findings_table(
    study: Study,
    facts: JournalFacts,
    scores: Scores | None,
    relation: Relation | None,
    part: Part | None,
    with_sweeps: bool = True,
) -> list[Finding]:
    """Return the rows in the paper's order.

    Args:
        scores, relation: the report's findings of these names.
        part: the focus run's scores, if any.
        with_sweeps: also the rows about width, k, tokens and architecture.
    """
    rows: list[Finding] = findings_of_dictionaries(_dictionaries(study))
    if with_sweeps:
        rows += findings_of_sweeps(sweeps_of(study.root, study.focus.record.get("subject", {})), _sweep_advice(study))
    rows += findings_of_scores(_evidence(study, facts, scores, relation, part))
    return rows


def _sweep_advice(study: Study) -> Callable[[str], tuple[str, str | None]]:
    """Return a function from a finding to the words and the command that provide its sweep.

    The bundled recipes are for the bundled model; another model needs a copy.
    """

    def advice(name: str) -> tuple[str, str | None]:
        recipe = _RECIPES[name]
        if study.focus.settings.subject.model == "bundled":
            return "", study.command("sweep", recipe)
        copied = shown_path(bundled_recipes()[recipe])
        return f"; copy {copied}, put this model and text in it, and give it to `{shell_command('sweep')}`", None

    return advice


def _dictionaries(study: Study) -> Dictionaries:
    names = [run.name for run in study.runs]
    seeds = [run.seed for run in study.runs if run.seed is not None]
    train = study.command(
        "train", "--name", study.focus.study, "--seeds", *map(str, [*seeds, max(seeds, default=-1) + 1])
    )
    if not seeds:
        train = study.command("import", "--from", "DIR", "--name", "NAME", "--study", study.focus.study)
    align = study.command("align", *names)
    return Dictionaries(
        runs=study.compared if study.tables else [study.focus.name],
        tables=study.tables,
        alive=study.alive,
        frequency={
            name: table.sort_values("latent")["firing_frequency"].to_numpy(float)
            for name, table in study.firing.items()
        },
        bimodality=None if study.shared is None else study.shared.bimodality,
        more={
            "pair": align if len(names) > 1 else train,
            "seed": align if len(names) > 2 else train,
            "harvest": study.command("harvest", *(word for name in names for word in ("--sae", name))),
        },
    )


def _evidence(
    study: Study, facts: JournalFacts, scores: Scores | None, relation: Relation | None, part: Part | None
) -> ScoreEvidence:
    setup = study.setup or {}
    similar = part is not None and "similarity" in part.latents
    waiting = scores is not None and scores.waiting is not None

    def ask(*words: str) -> str:
        """Return the command that explains more, or first the one that scores existing explanations."""
        return asking(study, facts, "score") if waiting else asking(study, facts, "explain", *words)

    return ScoreEvidence(
        scores=scores,
        relation=relation,
        table=part.joined() if part is not None and similar else None,
        pairs=scored_pairs(study, THRESHOLD),
        judge=" ".join(word for word in (setup.get("judge"), str(setup.get("model") or "")) if word) or "none",
        n_aligned=_n_aligned(study),
        most_latents=0 if scores is None else scores.n_eligible,
        more={
            "score": ask(),
            "pair": study.command("align", *study.names),
            "partners": ask("--with-partners"),
        },
        explain_more=lambda latents: ask("--latents", str(latents)),
    )


def _n_aligned(study: Study) -> int | None:
    """Count the focus run's latents with an aligned partner in a compared run."""
    focus = study.focus.name
    held = [find_shared(table, "both", THRESHOLD) for (a, _), table in study.tables.items() if a == focus]
    return int(np.any(held, axis=0).sum()) if held else None
