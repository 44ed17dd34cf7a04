"""The report as one HTML file that opens without a network: summary, tables, figures, every latent.

Texts and tables are the blocks that the terminal shows too; ``page.html`` arranges them. Scripts and Plotly are in the
file itself, and its content security policy allows no other script and no network access.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from autointerp.findings.evidence import Study, View
from autointerp.findings.json_values import to_json
from autointerp.findings.paper.finding import AGREES, DISAGREES, SIGNED, Finding
from autointerp.findings.shape import StudyFindings
from autointerp.findings.study import open_contexts, study_findings
from autointerp.report import blocks as doc
from autointerp.report import report
from autointerp.report.html.columns import columns_of
from autointerp.report.html.details import BUDGET, details_of, json_in_script
from autointerp.report.html.figures import Figure, figures_of
from autointerp.report.visible import visible
from sae.common.amounts import decimal, interval
from sae.common.errors import BadInput
from sae.common.files import atomic
from sae.study.deletion import is_page
from sae.study.run import Run

SCRIPTS = ("base.js", "plots.js", "figures.js", "table.js", "detail.js", "main.js")
#: The chapters of the page, each with its sections of the report, in order.
CHAPTERS = {
    "overlap": ("What is shared", ("overlap", "similarity", "membership", "counterparts")),
    "frequency": ("How often latents fire", ("frequency", "training")),
    "scores": ("What can be explained", ("scores", "counted", "failures")),
    "relation": ("How scores relate to sharing", ("relation", "interesting")),
}
_CLASSES = {name: f"in-{name}" for name in ("one", "some", "all")}


def write_report(run: Run, study: Sequence[Run], path: Path | None = None, **view: Any) -> dict[str, Any]:
    """Write the report of ``study`` with focus run ``run`` to ``path`` (default: reports/RUN.html under the root).

    ``view`` is as in :func:`autointerp.findings.study.findings_of`. Return the path, and the numbers of bytes, of
    latents, and of latents with details. Raises BadInput if ``path`` holds something else than a report.
    """
    path = path or run.root / "reports" / f"{run.name}.html"
    if path.exists() and not is_page(path):
        raise BadInput(f"{str(path)!r} exists and holds something else; delete it, or name another file with --to")
    opened = Study.open(run.root, [r.name for r in study], View(run.name, **view))
    page = render(study_findings(opened, open_contexts(run)), opened)
    content = page.html.encode()
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return {"path": str(path), "n_bytes": len(content), "n_latents": page.n_latents, "n_details": page.n_details}


@dataclass(frozen=True)
class Rendered:
    """The page, the number of latents, and the number with details."""

    html: str
    n_latents: int
    n_details: int


def render(found: StudyFindings, study: Study, budget: int = BUDGET) -> Rendered:
    """Return the page of ``found``, the findings of ``study``. The same input gives the same bytes.

    ``budget``: bytes of details of latents; see :mod:`autointerp.report.html.details`.
    """
    from plotly.offline import get_plotlyjs

    columns = columns_of(study, study.journal())
    failed = [latent for row in found.failures.reasons for latent in row.latents]
    first = [entry.latent for entry in found.interesting or []] + failed
    details = details_of(study, columns["latents"]["status"], first, budget)
    parts = _parts(found, figures_of(found, columns))
    scripts = [_script(read_file(name)) for name in SCRIPTS]
    plotly = _script(get_plotlyjs())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(_FILTERS)
    html = environment.from_string(read_file("page.html")).render(
        found=found,
        policy=_policy([*scripts, plotly]),
        style=Markup(read_file("page.css")),
        scripts=[*scripts, plotly],
        answers=report.answer(found),
        about={**report.describe_study(found), "as of": _as_of(study)},
        problems=report.problems(found),
        commands=report.next_commands(found),
        findings=found.findings,
        chapters=[(key, title, [parts[n] for n in names if n in parts]) for key, (title, names) in CHAPTERS.items()],
        methods=parts["methods"],
        json_of={
            "findings": json_in_script(to_json(found)),
            "columns": json_in_script(columns),
            "places": json_in_script({str(latent): chunk for latent, chunk in details.place.items()}),
        },
        chunks=[Markup(chunk) for chunk in details.chunks],
        n_details=len(details.place),
        n_latents=columns["n_latents"],
        n_siblings=len(columns["against"]),
        without_contexts=details.without_contexts,
        show=study.command("show", "--sae", study.focus.name, "--latent", "17"),
    )
    return Rendered(html, columns["n_latents"], len(details.place))


def _parts(found: StudyFindings, figures: Sequence[Figure]) -> dict[str, dict[str, Any]]:
    """Return the non-empty sections of the report, with their figures in place of terminal charts."""
    parts = {}
    for name, build in report.sections().items():
        if (section := build(found)) is not None:
            blocks = doc.make_sentences([*section.body, *section.details])
            blocks = [block for block in blocks if not _is_chart(block)]
            of_part = [figure for figure in figures if figure.part == name]
            texts = {"name": name, "title": section.title, "says": section.says}
            parts[name] = {**texts, "blocks": blocks, "figures": of_part}
    return parts


def _as_of(study: Study) -> str:
    explained = study.journal().table
    created = [str(run.record["created"]) for run in study.runs if run.record.get("created")]
    if len(explained):
        created.append(str(explained["created"].max()))
    return max(created)[:10] if created else "–"


# --- blocks as HTML -----------------------------------------------------------------------------------------------


def _is_chart(block: object) -> bool:
    """Return whether a block is a chart, or a table of charts mostly, whose rest means nothing alone."""
    if not isinstance(block, doc.Table):
        return isinstance(block, doc.Chart)
    n_kept, n_columns = len(kept_columns(block)), len(block.columns)
    return 2 * n_kept <= n_columns and n_kept < n_columns


def kept_columns(table: doc.Table) -> list[tuple[int, doc.Column]]:
    """Return the columns of a table that are not charts, each with its index."""
    return [(i, column) for i, column in enumerate(table.columns) if column.kind not in ("chart", "key")]


def _rows(table: doc.Table) -> list[list[doc.Words]]:
    """Return the cells of the kept columns, without rows that hold only charts."""
    rows = [[row[i] for i, _ in kept_columns(table)] for row in table.rows]
    return [
        [cell for cell in row if not isinstance(cell, doc.Chart)]
        for row in rows
        if any(not isinstance(cell, doc.Chart) and any(span.text.strip() for span in doc.spans(cell)) for cell in row)
    ]


def _marks(context: doc.Context) -> list[doc.Span]:
    """Return the tokens of a context, with a shade of the style sheet by activation."""
    peak = max(context.activations, default=0.0)
    shades = ((0.75, "s3"), (0.5, "s2"), (0.3, "s1"), (1e-12, "s0"))
    strengths = [activation / peak if peak > 0 else 0.0 for activation in context.activations]
    return [
        doc.Span(token, next((shade for least, shade in shades if strength >= least), ""))
        for token, strength in zip(context.tokens, strengths, strict=True)
    ]


def _css(style: str) -> str:
    return " ".join(_CLASSES.get(word, word) for word in style.split())


def show_text(text: object) -> str:
    """Return text for the page: nothing hidden in it, and a number never parted from its per cent."""
    return re.sub(r"(?<=\d) (?=[%‰])", "\u00a0", visible(str(text)))


def _groupwise(blocks: Sequence[doc.Block]) -> list[tuple[str, list[doc.Block]]]:
    """Group neighbouring blocks of one kind: small tables are set side by side."""
    return [(kind, list(run)) for kind, run in itertools.groupby(blocks, lambda block: type(block).__name__)]


def _verdict_class(row: Finding) -> str:
    return row.verdict.split()[0] if row.verdict in (AGREES, DISAGREES) else "undecided"


_FILTERS = {
    "shown": show_text,
    "spans": doc.spans,
    "css": _css,
    "kept_columns": kept_columns,
    "rows": _rows,
    "marks": _marks,
    "groupwise": _groupwise,
    "finding_value": lambda row: decimal(row.value, sign=row.unit == SIGNED),
    "finding_interval": lambda row: interval([row.low, row.high], sign=row.unit == SIGNED),
    "verdict_class": _verdict_class,
}


# --- scripts ------------------------------------------------------------------------------------------------------


def read_file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script(source: str) -> Markup:
    """Return a script exactly as between its tags, because the policy has its hash.

    Raises ValueError for a script that would end itself.
    """
    if "</script" in source.lower() or "<!--" in source:
        raise ValueError("a script that is put into a page must hold neither </script nor <!--")
    return Markup(re.sub(r"\r\n?", "\n", source))


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy: only these scripts run, and nothing is fetched.

    Plotly needs its own inline styles, and data and blob URLs for pictures.
    """
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
