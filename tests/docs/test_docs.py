"""The pages say what is: their commands run, their links lead somewhere, their tables are those of the files.

The commands of README and docs/ are run in the order in which one reads them, small and against the stand-ins of
``doc_commands``; everything else here looks at what they left behind.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from doc_commands import STAND_INS, Reader, check, flags, ours
from doc_pages import OUTPUT, REPOSITORY, SHELL, Page, codes, pages, tables
from fake_server import FakeServer
from tiny_study import write_texts

from autointerp.findings.evidence import Study, View
from autointerp.findings.shape import StudyFindings
from autointerp.findings.study import findings_of
from autointerp.report.html.columns import columns_of
from autointerp.report.html.figures import figures_of
from autointerp.report.html.page import CHAPTERS
from autointerp.report.report import sections
from sae.alignment.overlap import DEFINITIONS
from sae.alignment.relation import RELATIONS
from sae.common.files import read_json
from sae.settings import Settings
from sae.study.run import Run, study_runs

PAGES = {page.name: page for page in pages()}
EXTENDING = "docs/extending.md"
"""Its files are used by ``test_extending.py``; here it is only read."""
each_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


@dataclass(frozen=True)
class Read:
    """What reading all pages did."""

    root: Path
    reader: Reader
    study: str
    """the tutorial's"""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    """Every command and every piece of Python in the pages, run in order."""
    folder = tmp_path_factory.mktemp("reader")
    texts = write_texts(folder / "corpus", n_lines=1000)
    model = REPOSITORY / "sae" / "activations" / "bundled" / "pystdlib-4m"
    with FakeServer() as server, contextlib.chdir(folder), pytest.MonkeyPatch.context() as environment:
        for name in ("AUTOINTERP_API_KEY", "OPENAI_API_KEY", "COLUMNS"):
            environment.delenv(name, raising=False)
        reader = Reader({"model": str(model), "texts": str(texts), "server": server.url})
        for page in (page for name, page in PAGES.items() if name != EXTENDING):
            names: dict[str, Any] = {}
            for block in page.blocks():
                reader.read(block, names)
        yield Read(folder / "eval_runs", reader, "mine")


@pytest.mark.slow
def test_the_pages_commands_run(read: Read) -> None:
    assert len(read.reader.ran) >= 20
    assert {block.page for block, _, _ in read.reader.ran} >= {"README.md", "docs/tutorial.md"}


@pytest.mark.slow
def test_every_stand_in_is_needed(read: Read) -> None:
    assert read.reader.used == set(STAND_INS)


# --- what is only read ----------------------------------------------------------------------------------------


@each_page
def test_commands_exist_though_they_may_not_be_run(page: Page) -> None:
    for block in page.blocks():
        assert block.language in (*SHELL, *OUTPUT, "python", "toml"), f"{block.place}: language {block.language!r}"
        assert block.not_run is None or len(block.not_run) > 5, f"{block.place}: say why it is not run"
        for line in block.commands():
            if (arguments := ours(line)) is not None:
                check(arguments, f"{block.place}: {line}")
        if block.language == "python":
            compile(block.text, block.place, "exec")
        if block.language in OUTPUT:
            assert not re.search(r"^(\$ )?python cli\.py \w+ .*\\$", block.text, re.MULTILINE), f"{block.place}: as sh"
    for line in page.code():
        if line.startswith("python cli.py "):
            check(ours(line) or [], f"{page.name}: {line}")


FLAGS_OF_OTHERS = {
    "--enable-prompt-tokens-details",
    "--reasoning-parser",
    "--max-model-len",
    "--quantization",
    "--nnodes",
    "--nproc-per-node",
    "--rdzv-endpoint",
}


@each_page
def test_flags_exist(page: Page) -> None:
    named = {flag for code in page.code() for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)}
    assert named <= flags() | FLAGS_OF_OTHERS


@each_page
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links():
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.folder / path).resolve() if path else REPOSITORY / page.name
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            other = Page(str(target.relative_to(REPOSITORY)), target.read_text())
            assert anchor in other.anchors(), f"{page.name}: {link}: {sorted(other.anchors())}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[str] = set()
    waiting = ["README.md"]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            page = PAGES[name]
            paths = [(page.folder / link.partition("#")[0]).resolve() for link in page.links() if ":" not in link]
            found = [str(path.relative_to(REPOSITORY)) for path in paths if path.suffix == ".md"]
            waiting += [other for other in found if other in PAGES]
    assert seen == set(PAGES)


@each_page
def test_files_modules_and_settings_exist(page: Page) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    tops = {"sae", "autointerp", "tests", "docs", "benchmarks", "prompts"} if tracked.stdout else set()
    for code in page.code():
        if re.fullmatch(r"[\w./-]+", code) and "/" in code and code.split("/")[0] in tops:
            written = code in re.findall(r"^# (\S+\.py)$", page.text, re.MULTILINE)
            assert written or (REPOSITORY / code).exists() or "NAME" in code, f"{page.name}: {code}"
        dotted = re.fullmatch(r"(?:sae|autointerp)(?:\.\w+)+", code)
        if dotted and not code.endswith((".safetensors", ".parquet", ".json")):
            assert _is_importable(code), f"{page.name}: {code}"
        setting = re.fullmatch(r"(subject|corpus|training|harvest|contexts)\.(\w+)", code)
        if setting and setting[2] not in ("parquet", "json"):
            assert setting[2] in type(getattr(Settings(), setting[1])).model_fields, f"{page.name}: {code}"


def _is_importable(name: str) -> bool:
    """Whether there is such a module, or something of that name in one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            found: Any = importlib.import_module(".".join(parts[:n]))
            return all(hasattr(found, part) for part in parts[n : n + 1])
    return False


@each_page
def test_formulas_are_whole(page: Page) -> None:
    """GitHub takes a backslash before punctuation for Markdown's, and formulas that do not close for text."""
    text = re.sub(r"`[^`\n]*`", "", page.prose)
    assert text.count("$$") % 2 == 0
    for formula in re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text, re.DOTALL):
        assert not re.search(r"\\[^A-Za-z ]", formula), f"{page.name}: {formula}"
        assert formula.count("{") == formula.count("}"), f"{page.name}: {formula}"
        assert formula.count(r"\left") - formula.count(r"\leftarrow") == formula.count(r"\right"), formula
    left = re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", "", text, flags=re.DOTALL)
    assert "$" not in left, f"{page.name}: {left[left.index('$') - 40 : left.index('$') + 40]!r}"


# --- docs/files.md against the files ----------------------------------------------------------------------------

FILES = PAGES["docs/files.md"]


def test_every_file_is_described(read: Read) -> None:
    sections = FILES.sections()
    always, at_times = tables(sections["What lies where"])
    store = [[f"`RUN/firings/{codes(row[0])[0]}`"] for row in tables(sections["The firing store"])[0][1:]]
    patterns = {_pattern(code) for row in (*always[1:], *store) for code in codes(row[0]) if not code.endswith("/")}
    temporary = {_pattern(code) for row in at_times[1:] for code in codes(row[0])}
    found = [str(path.relative_to(read.root)) for path in read.root.rglob("*") if path.is_file()]
    assert found
    for path in found:
        assert any(_describes(pattern, path) for pattern in patterns | temporary), f"not described: {path}"
    for pattern in patterns:
        assert any(fnmatch(path, pattern) for path in found), f"described, and not there: {pattern}"


def _describes(pattern: str, path: str) -> bool:
    """A folder stands for what is in it; a pattern that begins with a star is for any folder."""
    if pattern.endswith("/"):
        return fnmatch(path, f"{pattern}*")
    return fnmatch(path, pattern) and (pattern.startswith("*.") or pattern.count("/") == path.count("/"))


def _pattern(described: str) -> str:
    return re.sub(r"\b(?:RUN|A|B|KEY|STUDY|NAME|N|FROM|TO|HASH|MODEL)\b", "*", described)


@pytest.mark.parametrize(
    "name",
    [
        *("training.parquet", "latents.firing.parquet", "latents.overlap.parquet", "latents.contexts.parquet"),
        *("latents.sample.parquet", "latents.scores.parquet"),
        *("alignments/A--B.parquet", "alignments/behaviour/A--B.parquet"),
    ],
)
def test_columns_are_those_of_the_tables(name: str, read: Read) -> None:
    path = read.root / (name.replace("A--B", "run_a--run_b") if "/" in name else f"run_a/{name}")
    found = {_general(column) for column in pq.read_schema(path).names}
    (table,) = tables(FILES.sections()[name])
    described = [column for row in table[1:] for column in codes(row[0])]
    assert len(described) == len(set(described))
    assert set(described) == found


def _general(column: str) -> str:
    """The name of a column as the page has it."""
    column = re.sub(r"__run_[bc]$", "__RUN", column)
    column = re.sub(r"__rotated$", "__NULL", column) if "rebuilt" not in column else column
    column = re.sub(rf"^((?:n_)?shared|stability)_(?:{'|'.join(DEFINITIONS)})(?=__|$)", r"\1_DEFINITION", column)
    return re.sub(r"^(ba|tnr|auroc|n|n_failed)_(?:hard|same_token)(?=_|$)", r"\1_KIND", column)


@pytest.mark.parametrize(("name", "path"), [("journal.sqlite", "run_a/journal.sqlite"), ("cache.sqlite",) * 2])
def test_columns_are_those_of_the_databases(name: str, path: str, read: Read) -> None:
    (table,) = tables(FILES.sections()[name])
    described = [(codes(row[0])[0], column) for row in table[1:] for column in codes(row[1])]
    with contextlib.closing(sqlite3.connect(read.root / path)) as database:
        names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = [(of, row[1]) for of in names for row in database.execute(f"PRAGMA table_info({of})")]
    assert sorted(described) == sorted(found)


def test_firing_store_arrays_have_the_documented_types(read: Read) -> None:
    (table,) = tables(FILES.sections()["The firing store"])
    store = read.root / "run_a" / "firings"
    for row in table[1:]:
        (file,) = codes(row[0])
        if file.endswith(".npy"):
            path = next(store.glob(_pattern(file)))
            assert codes(row[1]) == [np.load(path, mmap_mode="r").dtype.name], file


def test_keys_of_run_json_are_described(read: Read) -> None:
    described = set(codes(FILES.sections()["run.json"]))
    assert set(read_json(read.root / "run_a" / "run.json")) <= described


def test_weights_are_named(read: Read) -> None:
    from safetensors import safe_open

    with safe_open(read.root / "run_a" / "sae.safetensors", framework="numpy") as weights:
        assert set(weights.keys()) <= set(codes(FILES.sections()["Weights"]))


# --- the report and its page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(read: Read) -> StudyFindings:
    runs = study_runs(read.study, read.root)
    return findings_of(runs[0], runs)


def test_reading_the_report_follows_its_sections(found: StudyFindings) -> None:
    """What failed is there only where something did."""
    parts = [build(found) for build in sections().values()]
    titles = [part.title.replace(found.focus, "RUN") for part in parts if part is not None]
    page = [h for h in PAGES["docs/reading-the-report.md"].sections() if h not in ("The head", "What failed")]
    assert page[: len(titles)] == titles
    assert page[len(titles) :] == ["One latent", "The HTML page"]


def test_reading_the_report_names_every_chapter_and_figure(found: StudyFindings, read: Read) -> None:
    text = PAGES["docs/reading-the-report.md"].sections()["The HTML page"]
    run = Run.open(found.focus, read.root)
    study = Study.open(read.root, [r.name for r in study_runs(run.study, read.root)], View(focus=run.name))
    figures = [figure.title for figure in figures_of(found, columns_of(study, study.journal()))]
    assert len(figures) > 10
    for title in (*(f'"{figure}"' for figure in figures), *(title for title, _ in CHAPTERS.values())):
        assert title in text, title


def test_every_finding_has_its_rule_on_the_page(found: StudyFindings) -> None:
    (table,) = tables(PAGES["docs/methods/studies.md"].sections()["The findings table"])
    assert [code for row in table[1:] for code in codes(row[0])] == [row.id for row in found.findings]


def test_definitions_and_relations_are_on_the_page() -> None:
    sections = PAGES["docs/methods/overlap.md"].sections()
    named = [code for row in tables(sections["Shared: five definitions"])[0][1:] for code in codes(row[0])]
    assert [*DEFINITIONS, "nearest", "--definition"] == named
    relations = [code for row in tables(sections["What became of lost latents"])[0][1:] for code in codes(row[1])]
    assert sorted(relations) == sorted(RELATIONS)
