"""Deleting runs and what no run uses any more: exactly that, whole after a kill, and nothing outside the root."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path

import pytest
import small_study

from sae.common.errors import BadInput, NotFound, UserError
from sae.study import deletion
from sae.study.deletion import delete, disk_bytes, lock_runs, plan_deletion, plan_pruning
from sae.study.run import Run
from sae.study.stage import lock_study

REPORT = "<title>run: which latents come back, and what they mean</title>Latents of <bdi>{}</bdi>"
KEYS = {"run": "0" * 16, "other": "1" * 16}


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.name.endswith(".lock")}


def of(root: Path, *beginnings: str) -> set[str]:
    """The files whose paths begin so."""
    return {name for name in files(root) if name.startswith(beginnings)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two studies of three and two runs, one with a control, each with a corpus of its own, alignments and reports."""
    root = tmp_path / "root"
    for study, seeds in (("run", 3), ("run-frozen", 1), ("other", 2)):
        kept = small_study.runs_of(root, seeds, study=study, m=8, frozen="decoder" if "-" in study else "nothing")
        small_study.harvested(kept)
        for run in kept:
            record = run.record
            record["corpus"]["key"] = KEYS[study.partition("-")[0]]
            (run.folder / "run.json").write_text(json.dumps(record))
            (run.folder / "firings").mkdir()
            (run.folder / "firings" / "store.json").write_text("{}")
            (run.folder / "journal.sqlite").write_bytes(b"")
        for a in kept:
            for b in kept:
                if a.name < b.name:
                    for name in ("", "behaviour/"):
                        path = root / "alignments" / f"{name}{a.name}--{b.name}.parquet"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text("table")
                    (root / "alignments" / f"{a.name}--{b.name}.json").write_text("{}")
    for key in KEYS.values():
        cache = root / "corpora" / key / "activations" / "abc"
        cache.mkdir(parents=True)
        (cache / "slots.bin").write_bytes(b"x" * 10_000)
        (root / "corpora" / key / "corpus.json").write_text("{}")
        (root / "corpora" / key / "tokens.bin").write_bytes(b"x" * 10_000)
    (root / "corpora" / "hashes.json").write_text("{}")
    (root / "cache.sqlite").write_bytes(b"paid for")
    (root / "reports").mkdir()
    for name in ("run_a", "other_a"):
        (root / "reports" / f"{name}.html").write_text(REPORT.format(name))
    (root / "reports" / "mine.html").write_text("a page of the user's")
    (root / "reports" / "copy.html").write_text(REPORT.format("run_a"))
    (root / "reports" / "widths.sweep.json").write_text("{}")
    return root


def test_a_run_goes_with_its_alignments_and_report(root: Path) -> None:
    before = files(root)
    plan = plan_deletion("run_a", root)
    gone = of(root, "run_a/", "alignments/run_a--", "alignments/behaviour/run_a--", "reports/run_a.html") | {"run_a"}
    assert plan.n_bytes == sum(disk_bytes(part.path) for part in plan.parts) > 0
    assert files(root) == before, "a plan deletes nothing"
    delete(plan)
    assert files(root) == before - gone
    assert (root / "alignments" / "run_b--run_c.parquet").is_file()


def test_a_study_is_deleted_with_only_its_controls(root: Path) -> None:
    before = files(root)
    plan = plan_deletion("run", root)
    assert [run.name for run in plan.runs] == ["run-frozen_a", "run_a", "run_b", "run_c"]
    gone = of(root, "run", "alignments/run", "alignments/behaviour/run", "reports/run")
    delete(plan)
    assert files(root) == before - gone
    assert [path.name for path in sorted(root.glob("[a-z]*_?"))] == ["other_a", "other_b"]


def test_pruning_takes_what_no_run_uses(root: Path) -> None:
    plan = plan_pruning(root)
    assert {part.kind for part in plan.parts} == {"activations"}, "all runs are harvested"
    delete(plan_deletion("run", root))
    before = files(root)
    plan = plan_pruning(root)
    delete(plan)
    gone = {
        name for name in before if name.startswith(f"corpora/{KEYS['run']}") or name.endswith(("/abc", "slots.bin"))
    }
    assert files(root) == before - gone
    assert plan_pruning(root).parts == []
    for kept in (
        "cache.sqlite",
        "corpora/hashes.json",
        "reports/mine.html",
        "reports/copy.html",
        "reports/other_a.html",
    ):
        assert (root / kept).is_file()
    assert any("cache.sqlite stays" in words for words in plan.kept)


def test_alignments_and_reports_of_deleted_runs_are_pruned(root: Path) -> None:
    shutil.rmtree(root / "run_a")
    before = files(root)
    delete(plan_pruning(root))
    gone = before - files(root)
    expected = {name for name in before if "run_a--" in name} | {"reports/run_a.html"}
    assert {name for name in gone if "activations" not in name} == expected
    assert (root / "corpora" / KEYS["run"] / "corpus.json").is_file(), "run_b uses it"


def test_activations_stay_for_an_unharvested_run(root: Path) -> None:
    Run("run_b", root).stage_path("firing").unlink()
    delete(plan_pruning(root))
    assert (root / "corpora" / KEYS["run"] / "activations" / "abc" / "slots.bin").is_file()
    assert not (root / "corpora" / KEYS["other"] / "activations" / "abc").exists()


@pytest.mark.parametrize("what", ["run", "run_a", "prune"])
def test_killed_anywhere_the_same_command_finishes(root: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each removal in turn the program dies; what the last run of the command leaves is the same."""
    if what == "prune":
        delete(plan_deletion("run", root))

    def plan() -> deletion.Plan:
        return plan_pruning(root) if what == "prune" else plan_deletion(what, root)

    whole = root.with_name("whole")
    shutil.copytree(root, whole)
    delete(plan())
    expected = files(root)
    remove = deletion._remove
    for n in count():
        shutil.rmtree(root)
        shutil.copytree(whole, root)
        left = n

        def dies(path: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            remove(path)

        monkeypatch.setattr(deletion, "_remove", dies)
        try:
            delete(plan())
            break
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(deletion, "_remove", remove)
        delete(plan())
        assert files(root) == expected
    assert n > 1


def test_a_run_emptied_by_a_kill_is_deleted(root: Path) -> None:
    (root / "run_z").mkdir()
    delete(plan_deletion("run_z", root))
    assert not (root / "run_z").exists()


@pytest.mark.parametrize(
    "name", ["../root", "..", ".", "/", "corpora", "alignments", "recipes", "reports", "run_a/firings", "", "run_a/.."]
)
def test_an_invalid_run_name_is_refused(root: Path, name: str) -> None:
    before = files(root)
    with pytest.raises(BadInput), lock_runs(root, name):
        delete(plan_deletion(name, root))
    assert files(root) == before


def test_an_unknown_name_has_a_hint(root: Path) -> None:
    with pytest.raises(NotFound, match="did you mean 'other'"):
        plan_deletion("othr", root)


def test_nothing_outside_the_root_is_deleted(root: Path) -> None:
    outside = root.parent / "outside"
    for name in ("firings", "run_q", "alignments", "activations", "corpus"):
        (outside / name).mkdir(parents=True)
        (outside / name / "precious--thing.parquet").write_text("x")
    shutil.rmtree(root / "run_a" / "firings")
    (root / "run_a" / "firings").symlink_to(outside / "firings")
    shutil.rmtree(root / "alignments")
    (root / "alignments").symlink_to(outside / "alignments")
    (root / "corpora" / "unused").symlink_to(outside / "corpus")
    before = files(outside)
    plan = plan_deletion("run_a", root)
    delete(plan)
    pruning = plan_pruning(root)
    assert any("outside" in words for words in pruning.kept)
    delete(pruning)
    assert files(outside) == before
    assert not (root / "corpora" / "unused").is_symlink()
    (outside / "run_q" / "run.json").write_text((root / "run_b" / "run.json").read_text())
    (root / "run_q").symlink_to(outside / "run_q")
    with pytest.raises(BadInput, match="is a link"):
        plan_deletion("run_q", root)


@pytest.mark.parametrize("held", ["run", "run-frozen"])
def test_a_study_in_use_is_refused(root: Path, held: str) -> None:
    with lock_study(root, held):
        with pytest.raises(UserError, match=f"using study '{held}'"), lock_runs(root, "run"):
            pass
        with pytest.raises(UserError, match=f"using study '{held}'"), lock_runs(root):
            pass
        with lock_runs(root, "other"):
            pass


def test_a_run_that_is_being_scored_is_refused(root: Path) -> None:
    from autointerp.journal.journal import Journal

    run = Run("run_b", root)
    with Journal(run.journal_path) as journal, journal.claim():
        for name in ("run", "run_b"):
            with pytest.raises(UserError, match="explains or scores run 'run_b'"), lock_runs(root, name):
                pass
    with lock_runs(root, "run"):
        pass


def test_a_damaged_record_keeps_every_corpus(root: Path) -> None:
    delete(plan_deletion("other", root))
    (root / "run_b" / "run.json").write_text("{")
    plan = plan_pruning(root)
    assert "corpus" not in {part.kind for part in plan.parts}
    assert any("run_b" in words and "corpora stay" in words for words in plan.kept)
    of_study = plan_deletion("run", root)
    assert "run_b" not in [run.name for run in of_study.runs]
    assert any("`--delete run_b`" in words for words in of_study.kept)
    delete(plan_deletion("run_b", root))
    assert "corpus" in {part.kind for part in plan_pruning(root).parts}


def test_a_corpus_that_is_being_made_stays(root: Path) -> None:
    from filelock import FileLock

    delete(plan_deletion("run", root))
    plan = plan_pruning(root)
    with FileLock(root / "corpora" / KEYS["run"] / ".lock"), pytest.raises(UserError, match="is making corpus"):
        delete(plan)
    assert (root / "corpora" / KEYS["run"] / "corpus.json").is_file()


def test_the_reports_of_this_program_are_recognised(tmp_path: Path) -> None:
    """The page that `report --html` writes has what a report is known by."""
    from autointerp.report.html.page import write_report

    runs = small_study.whole(tmp_path, seeds=2, m=40, n_scored=12)
    write_report(runs[0], runs)
    assert [part.path.name for part in plan_deletion("run_a", tmp_path).parts if part.kind == "report"] == [
        "run_a.html"
    ]
