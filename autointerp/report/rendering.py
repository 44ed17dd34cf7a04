"""Print one JSON object of a command for a person to read, on standard output or on a given console.

Every function imports what it needs when it is called, so that a command loads only its own part of the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from autointerp.report.visible import visible
from sae.common.commands import DEFAULT_ROOT

if TYPE_CHECKING:
    from autointerp.report.html.writing import Written


def render_report(found: Mapping[str, Any], console: Console | None = None) -> None:
    from autointerp.report.terminal import render

    render(found, console or _output())


def render_latent(found: Mapping[str, Any], console: Console | None = None) -> None:
    from autointerp.report.latent import show_latent

    show_latent(found, console or _output())


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


def render_cost(found: Mapping[str, Any], console: Console | None = None) -> None:
    from autointerp.report.stages import show_cost

    show_cost(found, console or _output())


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
