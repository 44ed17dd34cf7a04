"""`runs --delete` and `runs --prune` as a user meets them: what goes is listed, asked about, and deleted."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import small_study
from tiny_study import Ran, cli

from sae.study.run import Run
from sae.study.stage import lock_study


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs and the corpus that they use."""
    runs = small_study.runs_of(tmp_path, 2, m=8)
    small_study.harvested(runs)
    for key in ("0" * 16, "9" * 16):
        (tmp_path / "corpora" / key).mkdir(parents=True)
        (tmp_path / "corpora" / key / "tokens.bin").write_bytes(b"x" * 50_000)
    (tmp_path / "cache.sqlite").write_bytes(b"paid for")
    return tmp_path


def runs(root: Path, *words: str) -> Ran:
    return cli("runs", *words, "--root", root)


def test_deletion_lists_and_asks_first(root: Path) -> None:
    ran = runs(root, "--delete", "run_b")
    assert ran.code == 1
    assert ran.err.startswith("error: nothing was deleted: no terminal to ask at")
    assert len(ran.err.splitlines()) == 1
    assert "run_b" in ran.out
    runs(root, "--delete", "run_b", "--json").failed_in_one_line("nothing was deleted", "--yes")
    listed = runs(root, "--delete", "run_b", "--dry-run").well()
    assert "run_b" in listed.out
    assert "cache.sqlite stays" in listed.out
    assert (root / "run_b" / "run.json").is_file()


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("YES", True), ("", False), ("n", False), ("maybe", False)])
def test_at_a_terminal_it_asks(root: Path, answer: str, goes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer + "\n"))
    ran = runs(root, "--delete", "run_b")
    assert "[y/N]" in ran.out
    assert (root / "run_b").exists() is not goes
    assert ran.code == (0 if goes else 1)
    if not goes:
        assert ran.err.strip() == "error: nothing was deleted"


def test_the_end_of_the_input_is_no_yes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert runs(root, "--prune").code == 1
    assert (root / "corpora" / ("9" * 16)).exists()


def test_a_study_then_its_corpus(root: Path) -> None:
    found = runs(root, "--delete", "run", "--yes", "--json").well().json
    assert [part["path"] for part in found["parts"]] == ["run_a", "run_b"]
    assert found["bytes"] > 0
    assert not found["dry_run"]
    assert runs(root, "--json").well().json["runs"] == []
    only = runs(root, "--prune", "--dry-run", "--json").well().json
    assert {part["path"] for part in only["parts"]} == {f"corpora/{key * 16}" for key in "09"}
    assert only["dry_run"]
    assert runs(root, "--prune", "--yes", "--json").well().json["bytes"] == only["bytes"] > 100_000
    assert not list((root / "corpora").iterdir())
    assert (root / "cache.sqlite").read_bytes() == b"paid for"
    assert runs(root, "--prune", "--yes").well().out.startswith("Nothing to delete")


def test_deleting_says_what_else_is_of_no_use(root: Path) -> None:
    out = runs(root, "--delete", "run", "--yes").well().out
    assert "used by any run" in out.replace("\n", " ")
    assert "runs --prune" in out


def test_a_study_at_work_is_refused(root: Path) -> None:
    with lock_study(root, "run"):
        for words in (("--delete", "run_a"), ("--prune",)):
            runs(root, *words, "--yes").failed_in_one_line("another command is using study 'run'")
    assert Run("run_a", root).is_trained


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--yes",), "--yes has no effect"),
        (("--dry-run",), "--dry-run has no effect"),
        (("--prune", "--delete", "run"), "exclude each other"),
        (("--prune", "--yes", "--dry-run"), "exclude each other"),
        (("--delete", "rum"), "did you mean"),
        (("--delete", "../x"), "use letters, digits"),
        (("--delete", "corpora"), "reserved"),
    ],
)
def test_wrong_requests_are_one_line(root: Path, words: tuple[str, ...], line: str) -> None:
    runs(root, *words).failed_in_one_line(line)
    runs(root, *words, "--json").failed_in_one_line(line)
