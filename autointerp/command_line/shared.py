"""What several commands do alike: open the runs that were named, and tell how far runs have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.command_line.ending import end, finish

if TYPE_CHECKING:
    from sae.study.run import Run


def opened(names: Sequence[str] | None, root: Path, whole_study: bool = False) -> list[Run]:
    """The runs ``names``; where none is named the newest study's first, or all of that study."""
    from sae.study.run import Run, newest_study

    if names:
        return [Run.open(name, root) for name in dict.fromkeys(names)]
    study = newest_study(root)
    return study if whole_study else study[:1]


def opened_one(name: str | None, root: Path) -> Run:
    """The run ``name``; where none is named the newest study's first."""
    return opened([name] if name else None, root)[0]


@contextmanager
def reading(run: Run) -> Iterator[None]:
    """A line at a terminal for as long as the files of the run's study are read, which may take many seconds."""
    from sae.common.progress import waiting

    with waiting(f"reading the study {run.study}"):
        yield


def finish_with_runs(
    as_json: bool, command: str, found: Sequence[Run], root: Path, damaged: Sequence[str] = ()
) -> None:
    """End by telling how far each of ``found`` has come, and what is wrong with those that are ``damaged``."""

    def progress() -> list[dict[str, Any]]:
        from sae.study.run import progress_of

        return [progress_of(run) for run in found]

    def render() -> None:
        from autointerp.report.rendering import render_runs

        render_runs(progress(), root=root)

    finish(as_json, command, lambda: {"runs": progress(), **({"damaged": list(damaged)} if damaged else {})}, render)
    if damaged:
        end(1, "\n".join(f"error: {line}" for line in damaged))


def finish_with_report(
    as_json: bool,
    run: Run,
    study: list[Run],
    definition: str = "strict",
    threshold: float = 0.7,
    against: Sequence[str] = (),
    explainer: str | None = None,
) -> None:
    """End with the report of ``run`` in its study."""
    from autointerp.findings.study import findings_of
    from autointerp.report.rendering import render_report

    with reading(run):
        found = findings_of(
            run, study, definition=definition, threshold=threshold, against=against, explainer=explainer
        )
    finish(as_json, "report", lambda: found, lambda: render_report(found))
