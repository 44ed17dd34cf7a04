"""The HTML report says what the terminal says, ships what it says it ships, and takes no text for anything but text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import unicodedata
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import html_pages
import numpy as np
import pytest
import small_study
from html_pages import HOSTILE, Parsed
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text
from small_study import findings
from tiny_study import cli

from autointerp.findings import study
from autointerp.report import report
from autointerp.report.blocks import Chart, Column, Facts, Section, Table, spans
from autointerp.report.html.details import OTHERS, json_in_script, order
from autointerp.report.html.figures import figures_of
from autointerp.report.html.page import CHAPTERS, SCRIPTS, _is_chart, _script, kept_columns, show_text
from autointerp.report.visible import visible
from sae.common.estimate import Estimate
from sae.study.run import Run

NAMES = ["run_a", "run_b", "run_c"]
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
FOLDER = files("autointerp.report.html")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("html")
    runs = small_study.whole(folder, nulls=True)
    small_study.scored(runs[1], small_study.explained(runs[1], list(range(0, 108, 2))))
    html_pages.swept(folder)
    return folder


@pytest.fixture(scope="module")
def html(root: Path) -> str:
    return html_pages.rendered(root, NAMES).html


@pytest.fixture(scope="module")
def page(html: str) -> Parsed:
    return Parsed.of(html)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    html_pages.hostile(folder)
    return html_pages.rendered(folder, NAMES).html


def ours(html: str) -> str:
    """The page without Plotly, which is not ours to answer for."""
    begin = html.index("plotly.js v")
    return html[:begin] + html[html.index("</script>", begin) :]


# --- what is in it --------------------------------------------------------------------------------------------


def test_the_page_has_every_part_of_the_terminal(page: Parsed) -> None:
    assert {"summary", "latents", "methods", "browser", *CHAPTERS} <= page.ids
    parts = {name for name in report.sections() if name not in ("findings", "methods", "failures", "counterparts")}
    assert {f"part-{name}" for name in parts} <= page.ids


def test_the_head_sentences_are_those_of_the_terminal(root: Path, page: Parsed) -> None:
    found = study.findings(root, NAMES)
    for _, sentence in report.answer(found):
        assert " ".join(show_text(sentence).split()) in page.text
    for words in report.describe_study(found).values():
        assert words in page.text


@pytest.mark.parametrize("name", ["overlap", "similarity", "membership", "scores", "counted", "relation", "methods"])
def test_every_terminal_number_is_on_the_page(root: Path, page: Parsed, name: str) -> None:
    section = report.sections()[name](study.findings(root, NAMES))
    assert isinstance(section, Section)
    assert section.title in page.text
    cells = [
        "".join(span.text for span in spans(cell))
        for block in (*section.body, *section.details)
        if isinstance(block, Table)
        for row in block.rows
        for cell in row
        if not isinstance(cell, Chart)
    ]
    cells += [
        span.text
        for block in section.body
        if isinstance(block, Facts)
        for _, words in block.facts
        for span in spans(words)
    ]
    assert len(cells) > 8
    assert all(" ".join(show_text(cell).split()) in page.text for cell in cells)


def test_figures_are_drawn_and_described_in_words(page: Parsed) -> None:
    drawn = set(re.findall(r"^  figures\.(\w+) =", "".join(read(name) for name in SCRIPTS), re.MULTILINE))
    shown = {attributes["data-figure"] for _, attributes in page.tags if "data-figure" in attributes}
    assert shown == drawn
    labels = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(labels) == len(shown)
    assert all(label and len(label) > 30 and "None" not in label and "nan" not in label for label in labels)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == len(shown)


def test_the_columns_are_those_of_the_study(root: Path, page: Parsed) -> None:
    columns, table = page.data("columns"), Run.open("run_a", root).latents()
    assert columns["n_latents"] == len(table)
    firing = columns["latents"]
    assert firing["n_firings"] == table["n_firings"].tolist()
    classes = [columns["classes"][i] if i >= 0 else None for i in firing["shared_class"]]
    found = findings(root, NAMES)
    for part in ("one", "some", "all"):
        assert classes.count(part) == sum(p["n"] for p in found["membership"]["parts"] if p["shared_class"] == part)
    assert np.mean(columns["scored"]["score"]) == pytest.approx(found["scores"]["mean"], abs=1e-4)
    assert np.mean(columns["scored"]["control"]) == pytest.approx(found["scores"]["control"]["mean"], abs=1e-4)
    assert {columns["statuses"][i] for i in firing["status"]} == {"scored", "not asked for"}


def test_partners_are_paired_by_the_decoder(root: Path, page: Parsed) -> None:
    columns = page.data("columns")
    (pairs,) = columns["partners"]
    assert pairs["run"] == "run_b"
    (against,) = [of for of in columns["against"] if of["run"] == "run_b"]
    theirs = Run.open("run_b", root).stage_path("scores")
    from sae.common.files import read_table

    scores = read_table(theirs).query("control == 'none'").set_index("latent")["balanced_accuracy"]
    assert len(pairs["latent"]) > 10
    for latent, partner, score in zip(pairs["latent"], pairs["partner"], pairs["partner_score"], strict=True):
        assert against["decoder_partner"][latent] == partner
        assert score == pytest.approx(scores[partner], abs=1e-4)


def test_the_json_findings_are_in_the_file(root: Path, page: Parsed) -> None:
    plain = json.loads(json.dumps(findings(root, NAMES, contexts=small_study.contexts)))
    assert page.data("findings") == plain


def test_sweep_of_the_same_subject_is_figure_4(page: Parsed) -> None:
    (sweep,) = page.data("columns")["sweeps"]
    assert sweep["axis"] == "training.num_latents"
    assert [point["at"] for point in sweep["points"]] == [512, 64, 2048]
    assert sweep["points"][1]["both"] == {"value": 0.9 / (1 + 64 / 500), "interval": [0.1, 0.9], "chance": 0.01}
    assert "widths, 64: 79.8 % and 88.7 %" in page.text


def test_a_damaged_sweep_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_study.whole(tmp_path, seeds=1)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "x.sweep.json").write_text('{"schema": 1, "subject": 3, "points": []}')
    page = Parsed.of(html_pages.rendered(tmp_path, ["run_a"]).html)
    assert page.data("columns")["sweeps"] == []
    assert "x.sweep.json' is damaged (" in capsys.readouterr().err


def test_a_findings_table_is_shown_with_its_verdicts(root: Path) -> None:
    from autointerp.findings.evidence import Study, View
    from autointerp.findings.paper.finding import DISAGREES, About
    from autointerp.report.html.page import render

    about = About("shared", "wide <b>", ".53", "share")
    rows = [about.row(Estimate(0.416, 0.4, 0.43), DISAGREES, "below"), about.missing("", "python cli.py sweep x")]
    opened = Study.open(root, NAMES, View())
    page = Parsed.of(render(replace(study.study_findings(opened), findings=rows), opened, 0).html)
    assert "findings-table" in page.ids
    for words in ("wide <b>", ".416", "[.400, .430]", "disagrees", "cannot tell", "python cli.py sweep x"):
        assert words in page.text
    classes = [attributes.get("class") for _, attributes in page.tags]
    assert "verdict disagrees" in classes
    assert "verdict undecided" in classes


def test_the_same_study_makes_the_same_bytes(root: Path, html: str) -> None:
    assert html_pages.rendered(root, NAMES).html == html


@pytest.mark.parametrize("stage", ["trained", "harvested", "aligned", "explained"])
def test_missing_stages_are_asked_for(tmp_path: Path, stage: str) -> None:
    runs = small_study.runs_of(tmp_path, 2)
    if stage != "trained":
        small_study.harvested(runs)
    if stage in ("aligned", "explained"):
        small_study.aligned(runs)
    if stage == "explained":
        small_study.explained(runs[0], [1, 2, 3], failing={2: "no answer"})
    page = Parsed.of(html_pages.rendered(tmp_path, NAMES[:2]).html)
    assert "python cli.py score" in page.text
    assert ("python cli.py harvest" in page.text) == (stage == "trained")
    assert ("figure-sweep" in page.ids) == (stage in ("aligned", "explained"))
    if stage == "explained":
        assert "no answer" in page.text


def test_one_run_alone_has_a_page(tmp_path: Path) -> None:
    small_study.whole(tmp_path, seeds=1)
    page = Parsed.of(html_pages.rendered(tmp_path, ["run_a"]).html)
    assert "figure-scores" in page.ids
    assert "figure-cosines" not in page.ids


# --- safety -----------------------------------------------------------------------------------------------------


def test_nothing_in_a_hostile_study_becomes_markup(hostile: str) -> None:
    page = Parsed.of(hostile)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"img", "iframe", "object", "embed", "link", "base", "svg", "b", "template"}
    assert len(page.programs) == len(SCRIPTS) + 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "49" not in re.findall(r"& (\S+) <!--", page.text)
    assert "</script><script>window.harmed" in page.text


def test_hostile_study_data_reaches_the_scripts_unchanged(hostile: str) -> None:
    told = Parsed.of(hostile).data("columns")["explanations"]
    assert told["3"] == f"3 {HOSTILE}".encode("utf-8", "replace").decode()


def test_nothing_hidden_is_in_the_file_as_itself(hostile: str, html: str) -> None:
    for source in (hostile, html):
        assert {unicodedata.category(c) for c in ours(source) if c != "\n"} & HIDDEN == set()
    assert "‹U+202E›" in Parsed.of(hostile).text


def test_only_the_pages_own_scripts_run(html: str, page: Parsed) -> None:
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    hashes = {base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in page.programs}
    assert set(rules["script-src"].split()) == {f"'sha256-{value}'" for value in hashes}
    assert "http" not in rules["img-src"]
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.findall(r"https?://|@import|url\(", ours(html))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_in_a_script_is_inert_and_whole(value: Any) -> None:
    text = str(json_in_script(value))
    assert json.loads(text) == value
    assert text.isascii()
    assert not set(text) & set("<>&")


def test_json_refuses_what_json_does_not_have() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_in_script([math.nan])


@pytest.mark.parametrize("source", ["a </script> b", "a </SCRIPT", "<!-- x"])
def test_a_script_that_would_end_itself_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="must hold neither"):
        _script(source)


def test_our_scripts_make_no_html_out_of_data() -> None:
    source = "".join(read(name) for name in SCRIPTS)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)


# --- size -------------------------------------------------------------------------------------------------------


def test_details_keep_to_their_budget_and_are_counted(root: Path) -> None:
    whole = html_pages.rendered(root, NAMES)
    assert whole.n_details == 120 - 6  # all that are alive
    some = html_pages.rendered(root, NAMES, budget=60_000)
    page = Parsed.of(some.html)
    chunks = [source for attributes, source in page.scripts if "data-details-" in str(attributes.get("id"))]
    assert 0 < some.n_details < whole.n_details
    assert 40_000 < sum(map(len, chunks)) <= 60_000
    assert sorted(d["latent"] for chunk in chunks for d in json.loads(chunk)) == sorted(map(int, page.data("places")))
    assert f"Details of {some.n_details} are in this file" in page.text
    assert "show --sae run_a --latent 17" in page.text


def test_details_are_what_show_prints(root: Path, page: Parsed) -> None:
    from autointerp.findings.latent import latent_findings

    chunk = page.data("places")["4"]
    (detail,) = [d for d in page.data(f"details-{chunk}") if d["latent"] == 4]
    shown = latent_findings(Run.open("run_a", root), 4)
    assert [m["decoder_partner"] for m in detail["matches"]] == [m["decoder_partner"] for m in shown["matches"]]
    assert detail["explanations"] == shown["explanations"]
    assert detail["scores"][0]["balanced_accuracy"] == pytest.approx(shown["scores"][0]["balanced_accuracy"], rel=1e-3)
    assert detail["firing"]["n_firings"] == shown["firing"]["n_firings"]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=400), st.lists(st.integers(0, 399), max_size=5, unique=True))
def test_named_latents_come_before_a_sample(status: list[int], first: list[int]) -> None:
    alive = np.arange(len(status)) % 3 > 0
    first = [latent for latent in first if latent < len(status)]
    found = order(status, alive, first)
    assert len(found) == len(set(found))
    assert found[: len(first)] == first
    asked = {i for i, s in enumerate(status) if s > 0}
    assert asked <= set(found)
    others = [latent for latent in found if latent not in asked and latent not in first]
    assert found[len(found) - len(others) :] == others
    assert len(others) <= OTHERS
    assert all(alive[latent] for latent in others)


# --- blocks as HTML -----------------------------------------------------------------------------------------------


def test_columns_and_tables_of_charts_are_left_out() -> None:
    chart = Chart(lambda _width, _colour: [Text("▁")])
    mixed = Table(["name", Column("n", "number"), Column("", "chart")], [["a", "1", chart]])
    assert [column.name for _, column in kept_columns(mixed)] == ["name", "n"]
    assert not _is_chart(mixed)
    assert _is_chart(Table(["", Column("a", "chart"), Column("b", "chart")], [["loss", chart, chart]]))


@given(st.text())
def test_text_for_the_page_hides_nothing(text: str) -> None:
    shown = show_text(text)
    assert {unicodedata.category(c) for c in shown} & HIDDEN == set()
    assert shown.replace("\u00a0", " ") == visible(text).replace("\u00a0", " ")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_reports_its_file_and_size(untouched_copy: Path) -> None:
    said = cli("report", "--html", "--root", untouched_copy).well()
    path = untouched_copy / "reports" / "run_a.html"
    assert said.out.startswith(f"{path}  {path.stat().st_size / 1e6:.1f} MB, details of ")
    page = Parsed.of(path.read_text(encoding="utf-8"))
    chunk = next(iter(page.data("places").values()))
    assert page.data(f"details-{chunk}")[0]["contexts"][0]["tokens"]
    scored = [d for i in set(page.data("places").values()) for d in page.data(f"details-{i}") if d["verdicts"]]
    assert len(scored) == 6
    for detail in scored:
        told = detail["verdicts"]["counts"]
        own = next(score for score in detail["scores"] if score["control"] == "none")
        right = {row["kind"]: row["n_right"] / row["n"] for row in told}
        assert (right["active"] + right["random"]) / 2 == pytest.approx(own["balanced_accuracy"], abs=1e-3)
    elsewhere = untouched_copy / "some where" / "page.html"
    elsewhere.parent.mkdir()
    json_said = cli("report", "--html", "--to", elsewhere, "--json", "--root", untouched_copy).well().json
    assert json_said["path"] == str(elsewhere)
    assert json_said["n_bytes"] == elsewhere.stat().st_size == path.stat().st_size
    assert json_said["n_latents"] == 64


def test_a_page_replaces_no_other_file(untouched: Path) -> None:
    record = untouched / "run_a" / "run.json"
    ran = cli("report", "--html", "--to", record, "--root", untouched)
    ran.failed_in_one_line("run_a/run.json", "name another place")


def test_a_study_without_corpus_has_a_page(untouched_copy: Path) -> None:
    (untouched_copy / "corpora").rename(untouched_copy / "gone")
    cli("report", "--html", "--root", untouched_copy).well()
    page = Parsed.of((untouched_copy / "reports" / "run_a.html").read_text(encoding="utf-8"))
    assert "Contexts are not available" in page.text


@pytest.fixture
def untouched_copy(tiny_root: Path) -> Path:
    return tiny_root


def test_the_page_is_made_from_the_files() -> None:
    held = [f.name for f in FOLDER.iterdir() if not f.name.endswith((".py", ".pyc")) and f.is_file()]
    assert {"page.html", "page.css", *SCRIPTS} == set(held)


def read(name: str) -> str:
    return FOLDER.joinpath(name).read_text(encoding="utf-8")


def test_every_figure_names_a_part_that_exists(root: Path, page: Parsed) -> None:
    figures = figures_of(study.findings(root, NAMES), page.data("columns"))
    assert {figure.part for figure in figures} <= set(report.sections())
