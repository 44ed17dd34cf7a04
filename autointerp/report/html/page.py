"""The report as one HTML file that opens without a network: words and tables as in the terminal, figures, every latent.

The words come from :mod:`autointerp.report` (taken apart by ``prose``), the numbers of the figures from the findings
and from ``columns``. The template escapes whatever it is given; scripts and style sheets are files beside this one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from autointerp.findings.evidence import Study
from autointerp.report import dictionaries, terminal
from autointerp.report.html import prose
from autointerp.report.html.columns import columns_of
from autointerp.report.html.details import BUDGET, Details, details_of
from autointerp.report.html.embedded import json_in_script, policy, script
from autointerp.report.html.figures import Figure, figures_of
from autointerp.report.layout import Section
from sae.common.amounts import decimal, interval

SCRIPTS = ("base.js", "plots.js", "scatter.js", "figures.js", "scored.js", "table.js", "detail.js", "main.js")
#: The chapters of the page, each with its parts of the terminal's report, in order.
CHAPTERS = {
    "overlap": ("What comes back", ("overlap", "similarity", "membership", "counterparts")),
    "frequency": ("How often latents fire", ("frequency", "training")),
    "scores": ("What can be explained", ("scores", "controls", "counted", "failures")),
    "relation": ("How the two go together", ("relation", "interesting")),
}
_METHODS = "methods"
_ELSEWHERE = (_METHODS, "findings")  # parts that have a place of their own on the page
#: In place of what the terminal says of a chart that a page does not have.
_SAYS = {"frequency": "How often latents fire (‰: firings per thousand tokens), by whether other seeds have them."}


@dataclass(frozen=True)
class Part:
    """A part of the terminal's report with its figures."""

    name: str
    title: str
    says: str
    blocks: list[prose.Block]
    figures: list[Figure]


@dataclass(frozen=True)
class Rendered:
    """The page, how many latents there are, and of how many it has the details."""

    html: str
    n_latents: int
    n_details: int


def render(found: Mapping[str, Any], study: Study, budget: int = BUDGET) -> Rendered:
    """The page of ``found``, the findings of ``study``. The same input gives the same bytes.

    Args:
        budget: bytes of details of latents; see :mod:`autointerp.report.html.details`.
    """
    columns = columns_of(study, study.journal())
    failed = [latent for row in found["failures"]["reasons"] for latent in row["latents"]]
    first = [entry["latent"] for entry in found["interesting"] or []] + failed
    details = details_of(study, columns["latents"]["status"], first, budget)
    return Rendered(_html(found, study, columns, details), columns["n_latents"], len(details.place))


def _html(found: Mapping[str, Any], study: Study, columns: Mapping[str, Any], details: Details) -> str:
    from plotly.offline import get_plotlyjs

    figures = figures_of(found, columns)
    parts = _parts(found, figures)
    scripts = [_between_tags(_file(name)) for name in SCRIPTS]
    plotly = _between_tags(get_plotlyjs())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(_FILTERS)
    return environment.from_string(_file("page.html")).render(
        found=found,
        policy=policy([*scripts, plotly]),
        style=Markup(_file("page.css")),
        scripts=[script(source) for source in scripts],
        plotly=script(plotly),
        head=_head(found, study),
        short=terminal.in_short(found),
        findings=found.get("findings") or [],
        chapters=_chapters(parts),
        methods=parts.get(_METHODS),
        json_of={
            "findings": json_in_script(found),
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


def _parts(found: Mapping[str, Any], figures: Sequence[Figure]) -> dict[str, Part]:
    """What the terminal's report says, part by part; a part without anything to say is left out."""
    parts = {}
    for name, build in terminal.parts_of_report().items():
        section = build(found, prose.WIDE)
        if isinstance(section, Section):
            of_part = [figure for figure in figures if figure.part == name]
            words = [] if name == "interesting" and found["interesting"] else list(prose.blocks(section))
            parts[name] = Part(name, section.title, _SAYS.get(name, section.says), words, of_part)
    return parts


def _chapters(parts: Mapping[str, Part]) -> list[tuple[str, str, list[Part]]]:
    """(id, title, parts) for each chapter that has any; parts that no chapter names stand in the last."""
    named = {name for _, (_, names) in CHAPTERS.items() for name in names}
    rest = [name for name in parts if name not in (*named, *_ELSEWHERE)]
    chapters = []
    for i, (key, (title, names)) in enumerate(CHAPTERS.items()):
        wanted = [*names, *(rest if i == len(CHAPTERS) - 1 else [])]
        if held := [parts[name] for name in wanted if name in parts]:
            chapters.append((key, title, held))
    return chapters


def _head(found: Mapping[str, Any], study: Study) -> dict[str, Any]:
    told = study.journal()
    created = [str(run.record["created"]) for run in study.runs if run.record.get("created")]
    if len(told.table):
        created.append(str(told.table["created"].max()))
    return {**terminal.head_in_words(found), "as of": max(created)[:10] if created else "–"}


def _finding_value(row: Mapping[str, Any]) -> str:
    return decimal(row["value"], sign=row.get("unit") == "signed")


def _finding_interval(row: Mapping[str, Any]) -> str:
    return interval([row["low"], row["high"]], sign=row.get("unit") == "signed")


def _verdict_class(row: Mapping[str, Any]) -> str:
    return str(row["verdict"]).split()[0] if str(row["verdict"]).startswith(("agrees", "disagrees")) else "undecided"


def _groupwise(them: Sequence[prose.Block]) -> list[tuple[str, list[prose.Block]]]:
    """Blocks of one kind that follow each other, together: small tables stand side by side."""
    return [(kind, list(run)) for kind, run in itertools.groupby(them, lambda block: block.kind)]


_FILTERS = {
    "shown": prose.shown,
    "groupwise": _groupwise,
    "decimal": decimal,
    "interval": interval,
    "rate": dictionaries.rate,
    "finding_value": _finding_value,
    "finding_interval": _finding_interval,
    "verdict_class": _verdict_class,
}


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _between_tags(source: str) -> str:
    """As it stands in the page, line ends included: the policy's hash is of exactly this."""
    return re.sub(r"\r\n?", "\n", source)
