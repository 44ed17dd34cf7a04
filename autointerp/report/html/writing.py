"""Write the report of a study to one HTML file; :mod:`autointerp.report.html.page` makes the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.study.run import Run


@dataclass(frozen=True)
class Written:
    """A page on disk."""

    path: str
    n_bytes: int
    n_latents: int
    n_details: int
    """Latents of which the file has everything."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_report(
    run: Run,
    study: Sequence[Run],
    path: Path | None = None,
    *,
    definition: str = "strict",
    threshold: float = 0.7,
    against: Sequence[str] = (),
    explainer: str | None = None,
) -> Written:
    """Write the report of ``study`` with focus run ``run`` to ``path`` (default: reports/RUN.html under the root).

    The other arguments are those of :func:`autointerp.findings.study.findings_of`.
    """
    from autointerp.findings.evidence import Study, View
    from autointerp.findings.study import open_contexts, study_findings
    from autointerp.report.html.page import render
    from sae.common.files import atomic

    view = View(run.name, definition, threshold, tuple(against), explainer=explainer)
    opened = Study.open(run.root, [r.name for r in study], view)
    page = render(study_findings(opened, open_contexts(run)), opened)
    path = path or run.root / "reports" / f"{run.name}.html"
    content = page.html.encode()
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return Written(str(path), len(content), page.n_latents, page.n_details)
