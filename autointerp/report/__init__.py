"""What was found, for a person to read: everything here only arranges what ``autointerp.findings.study`` measured.

Each ``render_…`` prints one JSON object of a command on standard output, or on the console it is given. What
is heavy to import is imported by the function that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from autointerp.report.visible import visible
from sae.common.commands import DEFAULT_ROOT

if TYPE_CHECKING:
    from autointerp.findings.interesting import ContextSource, ShownContext
    from autointerp.report.html import Written
    from sae.study.align import Compared
    from sae.study.run import Run


def findings_of(
    run: Run,
    study: Sequence[Run],
    *,
    definition: str = "strict",
    threshold: float = 0.7,
    against: Sequence[str] = (),
    explainer: str | None = None,
) -> dict[str, Any]:
    """The findings of a study with ``run`` in the middle, contexts included where its firing store is there.

    ``explainer``: scores are the newest of its explanations; by default the newest of all
    (:func:`autointerp.scoring.setups.setups_of`).
    """
    from autointerp.findings.evidence import View
    from autointerp.findings.study import findings

    view = View(run.name, definition, threshold, tuple(against), explainer=explainer)
    return findings(run.root, [r.name for r in study], view, contexts_at_hand(run))


def contexts_at_hand(run: Run) -> ContextSource:
    """Gives a latent its contexts, or none where the run's firing store or tokenizer is not there."""
    from autointerp.findings.latent import contexts_of
    from sae.common.errors import UserError

    def contexts(_: str, latent: int) -> Sequence[ShownContext]:
        try:
            return contexts_of(run, latent)
        except UserError:  # a store moved away, a hub out of reach: the report says so and shows the rest
            return []

    return contexts


def render_report(found: Mapping[str, Any], console: Console | None = None) -> None:
    from autointerp.report.terminal import render

    render(found, console or _output())


def latent_findings(run: Run, latent: int, *, n_contexts: int = 8) -> dict[str, Any]:
    """Everything known of one latent, as JSON values; see :func:`autointerp.findings.latent.latent_findings`."""
    from autointerp.findings.latent import latent_findings as gathered

    return gathered(run, latent, n_contexts)


def render_latent(found: Mapping[str, Any], console: Console | None = None) -> None:
    from autointerp.report.latent import show_latent

    show_latent(found, console or _output())


def alignment_findings(compared: Compared, definition: str = "strict") -> dict[str, Any]:
    """What aligned runs share under ``definition``, in the shape that it has in the report's own findings."""
    from autointerp.findings.counterparts import counterpart_findings
    from autointerp.findings.returning import overlap_tree, similarity_tree

    shared = compared.shared.as_dict()
    return {
        "runs": [{"name": run.name, "study": run.study, "seed": run.seed} for run in compared.runs],
        "compared": shared["runs"],
        "apart": compared.apart,
        "missing": [],
        "overlap": overlap_tree(shared, definition),
        "similarity": similarity_tree(shared),
        "counterparts": counterpart_findings(
            compared.behaviour, compared.alignments, compared.alive, compared.behaviour_facts
        ),
    }


def render_written(written: Written, console: Console | None = None) -> None:
    """Where a page is, how large, and how much of the study is in it."""
    (console or _output()).out(
        f"{visible(written.path)}  {written.n_bytes / 1e6:.1f} MB, details of {written.n_details:,} of "
        f"{written.n_latents:,} latents",
        highlight=False,
    )


def render_exported(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Where a table is, and how large."""
    there = "  (was there already)" if found["kept"] else ""
    (console or _output()).out(
        f"{visible(found['path'])}  {found['table']} of {visible(', '.join(found.get('runs', [found['run']])))}: "
        f"{found['rows']:,} rows, {len(found['columns'])} columns, {found['bytes'] / 1e6:.1f} MB{there}",
        highlight=False,
    )


def render_comparison(found: Mapping[str, Any], pairs: Mapping[str, Any], console: Console | None = None) -> None:
    """``pairs`` are those of ``found`` to show; see :func:`autointerp.report.compare.show_comparison`."""
    from autointerp.report.compare import show_comparison

    show_comparison(found, pairs, console or _output())


def render_alignment(found: Mapping[str, Any], console: Console | None = None) -> None:
    from autointerp.report.stages import show_alignment

    show_alignment(found, console or _output())


def render_sweep(found: Mapping[str, Any], console: Console | None = None) -> None:
    from autointerp.report.sweep import show_sweep

    show_sweep(found, console or _output())


def render_forecast(found: Mapping[str, Any], console: Console | None = None) -> None:
    from autointerp.report.sweep import show_forecast

    show_forecast(found, console or _output())


def render_outcome(found: Mapping[str, Any], stage: str, console: Console | None = None) -> None:
    from autointerp.report.stages import show_outcome

    show_outcome(found, stage, console or _output())


def render_runs(found: Sequence[Mapping[str, Any]], console: Console | None = None, root: Path = DEFAULT_ROOT) -> None:
    from autointerp.report.stages import show_runs

    show_runs(found, console or _output(), root)


def render_deletion(found: Mapping[str, Any], console: Console | None = None) -> None:
    """``found`` is a plan of :mod:`sae.study.deletion` as a mapping."""
    from autointerp.report.stages import show_deletion

    show_deletion(found, console or _output())


def _output() -> Console:
    # Nothing is guessed from the text: numbers in an explanation are not to be coloured as numbers.
    return Console(highlight=False, markup=False, emoji=False)
