"""Print a command's JSON object for a person, on standard output or a given console.

Functions import lazily, so that a command loads only its own part of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from autointerp.report.visible import visible
from sae.common.commands import DEFAULT_ROOT

if TYPE_CHECKING:
    from autointerp.report.html.writing import Written

Found = Mapping[str, Any]


def render_report(found: Found, console: Console | None = None, *, is_full: bool = False) -> None:
    _show("report", "report_page", console, found, is_full=is_full)


def render_latent(found: Found, console: Console | None = None) -> None:
    _show("latent", "latent_page", console, found)


def render_written(written: Written) -> None:
    print(visible(_builder("stages", "written_line")(written.as_dict())))


def render_exported(found: Found) -> None:
    print(visible(_builder("stages", "exported_line")(found)))


def render_comparison(found: Found, pairs: Found, console: Console | None = None) -> None:
    """Print ``pairs``, those of ``found`` to show; see :func:`autointerp.report.compare.comparison_page`."""
    _show("compare", "comparison_page", console, found, pairs)


def render_alignment(found: Found, console: Console | None = None) -> None:
    _show("sharing", "alignment_page", console, found)


def render_sweep(found: Found, console: Console | None = None) -> None:
    _show("sweep", "sweep_page", console, found)


def render_forecast(found: Found, console: Console | None = None) -> None:
    _show("sweep", "forecast_page", console, found)


def render_outcome(found: Found, stage: str, console: Console | None = None) -> None:
    _show("stages", "outcome_page", console, found, stage)


def render_cost(found: Found, console: Console | None = None) -> None:
    _show("stages", "cost_page", console, found)


def render_runs(found: Sequence[Found], console: Console | None = None, root: Path = DEFAULT_ROOT) -> None:
    _show("stages", "runs_page", console, found, root)


def render_deletion(found: Found, console: Console | None = None) -> None:
    _show("stages", "deletion_page", console, found)


def _builder(module: str, name: str) -> Callable[..., Any]:
    builder: Callable[..., Any] = getattr(import_module(f"autointerp.report.{module}"), name)
    return builder


def _show(module: str, name: str, console: Console | None, *arguments: Any, **more: Any) -> None:
    from autointerp.report.terminal import show

    show(_builder(module, name)(*arguments, **more), console)
