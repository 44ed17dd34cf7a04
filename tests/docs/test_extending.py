"""The files of ``docs/extending.md``, taken out of the page and used: a study of these alone, by the command line."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_study import Ran, cli

from autointerp.explaining.explainers import EXPLAINERS
from autointerp.journal.journal import Journal
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.scorers import SCORERS
from sae.common.errors import BadInput
from sae.common.registry import Registry
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.checkpoint import load_sae
from sae.study.run import Run

HOME = Path(__file__).resolve().parents[2]
PAGE = (HOME / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SNIPPETS = re.findall(r"^```python\n(?!# )(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PACKAGES = {
    "autointerp.explaining.explainers",
    "autointerp.scoring.judges",
    "autointerp.scoring.scorers",
    "sae.dictionaries.architectures",
}
ADDED = {"explain": "top_token", "judge": "quoted", "score": "top_and_random", "train": "matryoshka"}


def write(folder: Path) -> None:
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


class Folders:
    """Lays folders beside those of packages, and takes them and what was imported from them away again."""

    def __init__(self) -> None:
        self._laid: list[tuple[ModuleType, str]] = []

    def lay(self, package: str, folder: Path) -> None:
        module = importlib.import_module(package)
        module.__path__.append(str(folder))
        self._laid.append((module, str(folder)))
        importlib.invalidate_caches()

    def undo(self) -> None:
        for package, folder in self._laid:
            package.__path__.remove(folder)
            for path in Path(folder).glob("*.py"):
                sys.modules.pop(f"{package.__name__}.{path.stem}", None)
                vars(package).pop(path.stem, None)
        importlib.invalidate_caches()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's files, found by the packages that they are for."""
    found, folders = tmp_path_factory.mktemp("added"), Folders()
    write(found)
    for package in sorted(PACKAGES):
        folders.lay(package, found / package.replace(".", "/"))
    yield found
    folders.undo()


@pytest.fixture(scope="module")
def study(folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> tuple[Path, dict[str, Ran]]:  # noqa: ARG001
    root = tmp_path_factory.mktemp("extended") / "runs"
    by = ("--sae", "run_a")
    steps: dict[str, tuple[object, ...]] = {
        "train": ("--name", "run", "--seeds", 0, "--architecture", "matryoshka", "--tokens", 5120, "--no-controls"),
        "explain": (*by, "--explainer", "top_token", "--latents", 6),
        "score": (*by, "--judge", "quoted", "--scorer", "detection", "--scorer", "top_and_random"),
        "report": (*by,),
    }
    steps["train"] += ("--recipe", tiny_recipe)
    return root, {name: cli(name, *words, "--root", root, "--json").well() for name, words in steps.items()}


def test_the_page_has_a_file_for_each() -> None:
    assert {str(Path(name).parent).replace("/", ".") for name in FILES} == {*PACKAGES, "tests.sae.dictionaries"}


def test_the_study_is_theirs(study: tuple[Path, dict[str, Ran]]) -> None:
    root, ran = study
    run = Run.open("run_a", root)
    assert run.settings.training.architecture == load_sae(run.folder).architecture == "matryoshka"
    with Journal(run.journal_path) as journal:
        told, verdicts = journal.explanations(status="ok"), journal.verdicts()
    assert set(told["explainer"]) == {"top_token", "ngram"}  # the baseline stands beside it
    own = verdicts[verdicts["explanation_id"].isin(told["id"][told["explainer"] == "top_token"])]
    assert set(own["judge"]) == {"quoted"}
    assert set(own["scorer"]) == {"detection", "top_and_random"}
    assert set(own["control"]) == {"none", "swap"}
    scores = ran["report"].json["scores"]
    assert scores["n_scored"] >= 5
    assert scores["mean"] > 0.7, "a hookpoint of words is explained by words"
    assert scores["control"]["mean"] < 0.6
    (other,) = scores["other_scorers"]
    assert other["scorer"] == "top_and_random"
    assert (other["explainer"], other["judge"]) == ("top_token", "quoted")
    assert other["n_scored"] >= 5
    assert other["interval"][0] <= other["mean"] <= other["interval"][1]
    assert other["control"]["above_control"]["mean"] > 0.1
    assert run.latents()["top_and_random_balanced_accuracy"].notna().sum() == other["n_scored"]


def test_every_report_calls_them_by_their_names(study: tuple[Path, dict[str, Ran]]) -> None:
    root, ran = study
    agents = ran["report"].json["methods"]
    assert (agents["explainer"]["name"], agents["judge"]["name"]) == ("top_token", "quoted")
    terminal = cli("report", "--full", "--sae", "run_a", "--root", root).well().out
    html = Path(cli("report", "--sae", "run_a", "--html", "--root", root, "--json").well().json["path"]).read_text()
    for name in ADDED.values():
        assert name in terminal
        assert name in html


def test_what_is_done_is_not_done_again(study: tuple[Path, dict[str, Ran]]) -> None:
    root, _ = study
    of = ("--sae", "run_a", "--root", root, "--json")
    explained = cli("explain", *of, "--explainer", "top_token", "--latents", 6).well().json
    assert explained["n_new"] == 0
    assert "--judge quoted" in explained["next"]
    scorers = ("--scorer", "detection", "--scorer", "top_and_random")
    assert cli("score", *of, "--judge", "quoted", *scorers).well().json["n_new"] == 0


def test_a_dry_run_knows_that_they_cost_nothing(study: tuple[Path, dict[str, Ran]]) -> None:
    root, _ = study
    for command, name in (("explain", "top_token"), ("score", "quoted")):
        flag = {"explain": "--explainer", "score": "--judge"}[command]
        ran = cli(command, "--sae", "run_a", flag, name, "--dry-run", "--root", root, "--json").well()
        assert ran.json["dollars"] == 0
        assert f"{name} asks no model" in ran.json["counted_by"]


def test_export_is_of_what_other_programs_have(study: tuple[Path, dict[str, Ran]], tmp_path: Path) -> None:
    root, _ = study
    cli("export", "--sae", "run_a", "--format", "sparsify", "--to", tmp_path / "out", "--root", root).well()
    ours, theirs = load_sae(root / "run_a"), load_sae(tmp_path / "out")
    assert (ours.architecture, theirs.architecture) == ("matryoshka", "topk")
    assert all((theirs.weights()[name] == weight).all() for name, weight in ours.weights().items())


def test_a_wrong_name_is_told_the_nearest(study: tuple[Path, dict[str, Ran]]) -> None:
    root, _ = study
    of = ("--sae", "run_a", "--root", root)
    cli("explain", *of, "--explainer", "top_tokens").failed_in_one_line(
        "'--explainer'", "'top_tokens'", "'top_token'", code=2
    )
    cli("score", *of, "--judge", "quotes").failed_in_one_line("'--judge'", "'quoted'", code=2)
    cli("score", *of, "--scorer", "random").failed_in_one_line("'--scorer'", "'random'", "'top_and_random'", code=2)
    train = ("train", "--name", "x", "--root", root, "--architecture")
    cli(*train, "matroshka").failed_in_one_line("training.architecture", "'matroshka'", "'matryoshka'")


def test_the_snippets_of_the_page_hold(folder: Path) -> None:  # noqa: ARG001
    assert SNIPPETS
    for text in SNIPPETS:
        exec(compile(text, "docs/extending.md", "exec"), {})


def test_the_gradient_check_of_the_page_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder / "tests" / "sae" / "dictionaries"))
    module = importlib.import_module("test_matryoshka")
    for n_dead in (0, 5, module.M):
        module.test_the_gradient_is_that_of_autograd(n_dead)
    sys.modules.pop("test_matryoshka")


def test_help_lists_a_new_file_without_importing_it(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("__pycache__", "pystdlib-*", "*.js", "prompts")
    for package in ("autointerp", "sae"):
        shutil.copytree(HOME / package, tmp_path / package, ignore=left_out)
    shutil.copy(HOME / "cli.py", tmp_path)
    for name in FILES:
        if not name.startswith("tests"):
            (tmp_path / name).write_text("raise ImportError('help needs none of this')\n")
    for command in ("explain", "score", "train"):
        words = [sys.executable, "cli.py", command, "--help"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ADDED[command] in done.stdout
        assert command != "score" or ADDED["judge"] in done.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module\n", ("cannot be imported", "ModuleNotFoundError", "no_such_module")),
        ("def broken(:\n", ("cannot be imported", "SyntaxError")),
        ("class Other:\n    name = 'other'\n", ("has no class with name = 'broken'",)),
        ("class A:\n    name = 'broken'\n\nclass B:\n    name = 'broken'\n", ("2 classes with name = 'broken'",)),
        ("raise SystemExit('bye')\n", ("cannot be imported", "SystemExit")),
    ],
)
def test_a_broken_plugin_file_is_one_error_line(
    study: tuple[Path, dict[str, Ran]], tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    root, _ = study
    folders = Folders()
    registries: dict[str, Registry[Any]] = {
        "autointerp.explaining.explainers": EXPLAINERS,
        "autointerp.scoring.judges": JUDGES,
        "autointerp.scoring.scorers": SCORERS,
    }
    try:
        for package, registry in registries.items():
            place = tmp_path / package
            place.mkdir()
            (place / "broken.py").write_text(text)
            folders.lay(package, place)
            assert "broken" in registry
            with pytest.raises(BadInput, match=re.escape(str(place / "broken.py"))):
                registry["broken"]
        of = ("--sae", "run_a", "--root", root)
        cli("explain", *of, "--explainer", "broken").failed_in_one_line("broken.py", *words)
        cli("score", *of, "--judge", "broken").failed_in_one_line("broken.py", *words)
        cli("score", *of, "--judge", "quoted").well()
    finally:
        folders.undo()
    assert "broken" not in EXPLAINERS
    assert "matryoshka" in ARCHITECTURES


def test_a_removed_scorer_leaves_its_verdicts(study: tuple[Path, dict[str, Ran]], tmp_path: Path) -> None:
    root = Path(shutil.copytree(study[0], tmp_path / "runs"))
    of = ("--sae", "run_a", "--judge", "quoted", "--root", root, "--json")
    folders, place = Folders(), tmp_path / "scorers"
    place.mkdir()

    def notes_of_scorers(*more: object) -> list[str]:
        return [note for note in cli("score", *of, *more).well().json["notes"] if "scorer" in note]

    text = FILES["autointerp/scoring/scorers/top_and_random.py"]
    (place / "passing.py").write_text(text.replace('= "top_and_random"', '= "passing"'))
    try:
        folders.lay("autointerp.scoring.scorers", place)
        assert not notes_of_scorers("--scorer", "passing")
    finally:
        folders.undo()
    with Journal(root / "run_a" / "journal.sqlite") as journal:
        before = journal.verdicts(scorer="passing")
    assert len(before)
    (note,) = notes_of_scorers("--control-latents", 3)
    assert note.startswith("run_a: verdicts of the scorer passing stay in the journal")
    with Journal(root / "run_a" / "journal.sqlite") as journal:
        assert len(journal.verdicts(scorer="passing")) == len(before)
    reported = cli("report", "--full", *of[:2], *of[4:]).well().json["scores"]["other_scorers"]
    assert [row["scorer"] for row in reported] == ["top_and_random"]
