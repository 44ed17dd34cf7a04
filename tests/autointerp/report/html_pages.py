"""Pages to look at in tests: of made-up studies, and of texts that mean harm."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import small_study

from autointerp.findings.evidence import Study, View
from autointerp.findings.study import study_findings
from autointerp.report.html.details import BUDGET
from autointerp.report.html.page import Rendered, render

#: Markup of several kinds, control characters, a reversal of the reading direction, halves of pairs, a family of emoji.
HOSTILE = (
    "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'> \"quotes\" & {{ 7 * 7 }} "
    f"<!-- ]]> [bold]rich[/bold] {small_study.NASTY} \u2028 👩‍👩‍👧 العربية =cmd()"
)
VOID = {"meta", "input", "img", "br", "hr", "link"}


@dataclass
class Parsed(HTMLParser):
    """A page taken apart: the tags with their attributes, the text that is seen, and what is in the scripts."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    scripts: list[tuple[dict[str, str | None], str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, html: str) -> Parsed:
        parsed = cls()
        HTMLParser.__init__(parsed, convert_charrefs=True)
        parsed.feed(html)
        parsed.close()
        return parsed

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1] == tag, (self.open, tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        within = self.open[-1] if self.open else ""
        if within == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif within == "style":
            self.styles.append(data)
        else:
            self.seen.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())

    @property
    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}

    @property
    def programs(self) -> list[str]:
        return [source for attributes, source in self.scripts if attributes.get("type") != "application/json"]

    def data(self, name: str) -> Any:
        """What the page's scripts read under this name."""
        (found,) = [source for attributes, source in self.scripts if attributes.get("id") == f"data-{name}"]
        return json.loads(found)


def rendered(root: Path, names: list[str], budget: int = BUDGET, **view: Any) -> Rendered:
    """The page of a study on disk, with made-up contexts."""
    study = Study.open(root, names, View(**view))
    return render(study_findings(study, small_study.contexts), study, budget)


def swept(root: Path) -> None:
    """A sweep's table, with as much of it as figure 4 and the findings take."""
    from sae.common.files import write_json

    points: list[dict[str, Any]] = [
        {
            "name": f"widths_{m}",
            "values": {"training.num_latents": m},
            "shared": {
                name: {
                    "value": value / (1 + m / 500),
                    "interval": [0.1, 0.9],
                    "null": {"rotated": 0.01},
                    "without": {},
                }
                for name, value in (("both", 0.9), ("lenient", 1.0))
            },
        }
        for m in (512, 64, 2048)
    ]
    points.append({"name": "alone", "values": {"training.num_latents": 4}, "shared": None})
    numbers = dict.fromkeys(("num_latents", "k", "tokens"), 1)
    unknown = dict.fromkeys(("learning_rate", "harvested", "alive", "fvu", "l0", "dead_fraction", "max_cosine"))
    rest: dict[str, Any] = {
        "runs": [],
        "seeds": [],
        "hookpoint": "h",
        "architecture": "topk",
        "findings": [],
        **numbers,
        **unknown,
    }
    points = [{**rest, "cosines": None, "scores": None, **point} for point in points]
    table: dict[str, Any] = {"schema": 1, "sweep": "widths", "inputs": "", "subject": {"fingerprint": "f" * 64}}
    table |= {"points": points}
    table |= {"created": "2026-01-01T00:00:00+00:00", "seeds": [0, 1], "together": []}
    write_json(root / "reports" / "widths.sweep.json", {**table, "axes": {"training.num_latents": [512, 64, 2048, 4]}})
    write_json(root / "reports" / "other.sweep.json", {**table, "subject": {"fingerprint": "g"}, "points": None})


def hostile(root: Path, seeds: int = 3) -> list[Any]:
    """A finished study whose explanations and failures mean harm."""
    from autointerp.journal.journal import Journal

    runs = small_study.runs_of(root, seeds)
    small_study.harvested(runs)
    small_study.aligned(runs)
    for run in runs[:2]:
        numbers = {}
        with Journal(run.journal_path) as journal:
            for latent in range(60):
                failed = latent % 20 == 7
                numbers[latent] = journal.add_explanation(
                    latent=latent,
                    explainer="llm",
                    settings_hash="e" * 64,
                    prompt_hash="",
                    model="<b>model</b>",
                    contexts=[1, 2],
                    text=None if failed else f"{latent} {HOSTILE}".encode("utf-8", "replace").decode(),
                    failure=f"bad reply: {HOSTILE}".encode("utf-8", "replace").decode() if failed else None,
                )
        by = {"explainer": "llm", "explainer_model": "<b>model</b>", "judge": "llm", "model": "<b>model</b>"}
        good = {latent: number for latent, number in numbers.items() if latent % 20 != 7}
        table = small_study.scored(run, good)
        from sae.common.files import write_table

        write_table(run.stage_path("scores"), table.assign(**by))
    return runs
