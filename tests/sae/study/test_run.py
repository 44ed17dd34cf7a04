"""A run's folder: names, provenance, and what is done, missing or stale, read off the disk."""

from __future__ import annotations

import re
import shutil
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_study
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import change_record

from sae.alignment.alignment import read_both_ways
from sae.alignment.overlap import measure_overlap
from sae.common.errors import BadInput, NotFound, SettingsDiffer, UserError
from sae.common.files import read_json, read_table, write_json, write_table
from sae.settings import Settings
from sae.study import align as align_stage
from sae.study.harvest import harvest_runs
from sae.study.recipes import AXES
from sae.study.run import (
    RESERVED,
    Run,
    all_runs,
    check_name,
    git_commit,
    make_suffix,
    name_studies,
    newest_study,
    plan_study,
    progress_of,
    study_runs,
    write_record,
)
from sae.study.stage import Compute, lock_study

SETTINGS = Settings().with_values(training={"num_latents": 120, "k": 4, "tokens": 1_000_000})


@pytest.fixture(autouse=True, scope="module")
def no_git() -> Iterator[None]:
    """The commit is asked of git for every record that is written, which is what most of the time here would go to."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sae.study.run.git_commit", lambda: "0123abc+")
        yield


# --- names ------------------------------------------------------------------------------------------------


@given(st.integers(0, 100_000))
def test_suffixes_count_up_in_letters(n: int) -> None:
    assert re.fullmatch("[a-z]+", make_suffix(n))
    assert (len(make_suffix(n)), make_suffix(n)) < (len(make_suffix(n + 1)), make_suffix(n + 1))


def test_the_first_suffixes() -> None:
    assert [make_suffix(i) for i in (0, 1, 25, 26, 27, 51, 52, 701, 702)] == [
        *("a", "b", "z", "aa", "ab", "az", "ba", "zz", "aaa"),
    ]


@given(st.text(st.sampled_from(string.ascii_letters + string.digits + "._-/ \\\n\0é"), max_size=12))
def test_a_name_is_one_folder_and_no_other(name: str) -> None:
    try:
        check_name(name)
    except BadInput:
        return
    path = Path("/root") / name
    assert path.parent == Path("/root")
    assert path.name == name
    assert not name.startswith(".")
    assert "--" not in name  # what stands between two runs in the name of their alignment


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a--b", "a-", "-a", "a b", "a\n", "x" * 81, *sorted(RESERVED)]
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(BadInput):
        check_name(name)


@pytest.mark.parametrize("name", ["run", "run_a", "pythia-160m", "a.b", "7", "x" * 80])
def test_names_that_can(name: str) -> None:
    assert check_name(name) == name


# --- opening ----------------------------------------------------------------------------------------------


def test_opening_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="train one with"):
        Run.open("run_a", tmp_path / "nowhere")
    small_study.runs_of(tmp_path)
    assert Run.open("run_b", str(tmp_path)).seed == 1
    with pytest.raises(NotFound, match="did you mean 'run_"):
        Run.open("run_x", tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"name": "run_a"}'])
def test_a_damaged_record_is_told(content: str, tmp_path: Path) -> None:
    (run, *_) = small_study.runs_of(tmp_path, 1)
    (run.folder / "run.json").write_text(content)
    with pytest.raises(BadInput, match="damaged"):
        assert Run.open("run_a", tmp_path).record


def test_a_record_of_a_later_program_is_told(tmp_path: Path) -> None:
    (run, *_) = small_study.runs_of(tmp_path, 1)
    change_record(run.folder / "run.json", schema=99)
    with pytest.raises(SettingsDiffer, match="schema 99"):
        assert Run.open("run_a", tmp_path).record


def test_the_record_says_where_a_run_comes_from(tmp_path: Path) -> None:
    run = Run("run_a", tmp_path)
    write_record(run, 3, "run", SETTINGS, small_study.PROVENANCE | {"hookpoint": "layers.2.mlp"})
    record = read_json(run.folder / "run.json")
    assert (record["name"], record["study"], record["seed"]) == ("run_a", "run", 3)
    assert record["hookpoint"] == "layers.2.mlp"
    assert {"torch", "transformers", "numpy"} <= set(record["packages"])
    assert Run.open("run_a", tmp_path).settings == SETTINGS
    assert record["git_commit"] == "0123abc+"


def test_the_commit_of_this_program() -> None:
    commit = git_commit()  # None where the sources lie outside a checkout
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}\+?", commit)


def test_what_counts_as_a_run(tmp_path: Path) -> None:
    assert all_runs(tmp_path / "nowhere") == []
    small_study.runs_of(tmp_path)
    (tmp_path / "reports").mkdir()
    write_json(tmp_path / "reports" / "run.json", {})
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").touch()
    assert [run.name for run in all_runs(tmp_path)] == ["run_a", "run_b", "run_c"]


def test_a_study_is_ordered_by_suffix(tmp_path: Path) -> None:
    small_study.runs_of(tmp_path, 28)
    names = [run.name for run in study_runs("run", tmp_path)]
    assert names == [f"run_{make_suffix(i)}" for i in range(28)]


def test_the_newest_study_is_the_one_begun_last(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there are no runs"):
        newest_study(tmp_path)
    small_study.runs_of(tmp_path, 2, study="zebra")
    small_study.runs_of(tmp_path, 2, study="ant")
    assert [run.name for run in newest_study(tmp_path)] == ["ant_a", "ant_b"]


def test_siblings_are_the_other_trained_runs(tmp_path: Path) -> None:
    a, b, c = small_study.runs_of(tmp_path)
    assert [run.name for run in b.siblings()] == ["run_a", "run_c"]
    (c.folder / "cfg.json").unlink()
    assert not c.is_trained
    assert [run.name for run in a.siblings()] == ["run_b"]


# --- planning ---------------------------------------------------------------------------------------------


def planned(seeds: list[int], root: Path, settings: Settings = SETTINGS, name: str = "run") -> dict[int, str]:
    return {seed: run.name for run, seed in plan_study(name, seeds, settings, root)}


@settings(max_examples=25)
@given(st.lists(st.integers(0, 40), unique=True, min_size=1, max_size=5), st.data())
def test_seeds_keep_their_runs_however_a_study_grows(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("grow")
    known: dict[int, str] = {}
    cut = data.draw(st.integers(0, len(seeds)))
    for part in (seeds[:cut], seeds):
        if not part:
            continue
        found = planned(part, root)
        assert len(set(found.values())) == len(part)
        assert {seed: known[seed] for seed in part if seed in known} == {s: found[s] for s in part if s in known}
        known |= found
        for seed, name in found.items():
            if not (root / name).exists():
                write_record(Run(name, root), seed, "run", SETTINGS, small_study.PROVENANCE)
    assert sorted(known.values(), key=lambda n: (len(n), n)) == [f"run_{make_suffix(i)}" for i in range(len(known))]
    shutil.rmtree(root)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    small_study.runs_of(tmp_path)
    other = SETTINGS.with_values(training={"k": 5}, corpus={"context": 64})
    with pytest.raises(SettingsDiffer) as error:
        planned([0], tmp_path, other)
    assert "corpus.context: 256 there, 64 now; training.k: 4 there, 5 now" in str(error.value)
    assert planned([0], tmp_path, SETTINGS.with_values(harvest={"window": 16})) == {0: "run_a"}


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1]])
def test_seeds_that_cannot_be(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="seeds"):
        planned(seeds, tmp_path)


def test_what_is_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run_a").mkdir()
    assert planned([0], tmp_path) == {0: "run_a"}  # an empty folder is in nobody's way
    (tmp_path / "run_a" / ".run.json.4711.tmp").touch()
    assert planned([0], tmp_path) == {0: "run_a"}  # nor is what a kill left behind
    (tmp_path / "run_a" / "thesis.tex").touch()
    with pytest.raises(BadInput, match="is not a run"):
        planned([0], tmp_path)
    small_study.runs_of(tmp_path, 1, study="other_a")
    shutil.copytree(tmp_path / "other_a_a", tmp_path / "new_a")
    with pytest.raises(BadInput, match="is of run 'other_a_a'; rename"):
        planned([0], tmp_path, name="new")


# --- tables and stages ------------------------------------------------------------------------------------


def test_latents_joins_what_the_stages_left(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path)
    with pytest.raises(NotFound, match=r"has no firings; run `python cli\.py harvest --sae run_a --root"):
        runs[0].latents()
    small_study.harvested(runs)
    failed_elsewhere = small_study._row(3, 99, "none", 0.0, "HTTP 500")
    small_study.scored(runs[0], small_study.explained(runs[0], [3, 5]), more=[failed_elsewhere])
    table = runs[0].latents()
    assert table["latent"].tolist() == list(range(120))  # controls add no rows
    assert table.set_index("latent")["balanced_accuracy"].dropna().index.tolist() == [3, 5]
    assert {"n_firings", "eligible", "status"} <= set(table)


def test_a_stage_knows_its_inputs(tmp_path: Path) -> None:
    (run, *_) = small_study.runs_of(tmp_path, 1)
    assert run.stage_inputs("firing") is None
    write_table(run.stage_path("firing"), pd.DataFrame({"latent": [0]}), inputs="abc")
    assert run.stage_inputs("firing") == "abc"


def test_two_commands_do_not_write_one_study(tmp_path: Path) -> None:
    with lock_study(tmp_path, "run"):
        with (
            pytest.raises(UserError, match="another command is using study 'run'"),
            lock_study(tmp_path, "run"),
        ):
            pass
        with lock_study(tmp_path, "other"):
            pass
    with lock_study(tmp_path, "run"):
        pass


def test_only_runs_of_one_study_are_compared(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path, 2) + small_study.runs_of(tmp_path, 1, study="other")
    with pytest.raises(BadInput, match="different studies"):
        align_stage.align_runs(runs, Compute("cpu"))
    with pytest.raises(BadInput, match="'run_a' alone"):
        align_stage.align_runs(runs[:1], Compute("cpu"))
    with pytest.raises(BadInput, match="only run"):
        align_stage.ensure_aligned(runs[2], Compute("cpu"))


def test_an_outdated_overlap_table_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = small_study.runs_of(tmp_path)
    small_study.harvested(runs)
    monkeypatch.setattr(align_stage, "is_harvested", lambda _: True)
    monkeypatch.setattr(align_stage, "is_aligned", lambda a, b: "run_c" not in (a.name, b.name))
    small_study.aligned(runs)
    align_stage._write_overlap(runs[0])
    assert "similarity" in read_table(runs[0].stage_path("overlap"))
    monkeypatch.setattr(align_stage, "is_aligned", lambda *_: True)  # killed between the last pair and the tables
    monkeypatch.setattr(align_stage, "_has_nulls", lambda *_: True)
    monkeypatch.setattr(align_stage, "ensure_harvested", lambda *_: None)
    monkeypatch.setattr(align_stage, "share_tokens", lambda *_: False)
    align_stage.ensure_aligned(runs[0], Compute("cpu"))
    assert {"shared_strict__run_b", "shared_strict__run_c"} <= set(read_table(runs[0].stage_path("overlap")))


def test_an_unfinished_sibling_does_not_block_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = small_study.runs_of(tmp_path)
    for name in ("sae.safetensors", "cfg.json"):
        (runs[2].folder / name).unlink()
    monkeypatch.setattr(align_stage, "ensure_harvested", lambda *_: None)
    monkeypatch.setattr(align_stage, "_align_pairs", lambda *_: None)
    monkeypatch.setattr(align_stage, "share_tokens", lambda *_: False)
    align_stage.align_runs(runs[:2], Compute("cpu"))


def test_an_unfinished_training_is_refused(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path, 2)
    (runs[1].folder / "cfg.json").unlink()
    for stage in (harvest_runs, align_stage.align_runs):
        with pytest.raises(NotFound, match="'run_b' has not finished training"):
            stage(runs, Compute("cpu"))


def test_where_to_compute() -> None:
    assert Compute("cpu").resolve() == "cpu"
    with pytest.raises(BadInput, match="--threads 0"):
        Compute("cpu", 0).resolve()
    with pytest.raises(BadInput, match="--device 'abacus'"):
        Compute("abacus").resolve()


def test_the_overlap_of_made_up_runs(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path)
    small_study.harvested(runs)
    small_study.aligned(runs)
    names = [run.name for run in runs]
    tables = read_both_ways(tmp_path / "alignments", names)
    alive = {run.name: align_stage.find_alive(run) for run in runs}
    found = measure_overlap(names, tables, alive, threshold=0.7).alive
    assert found["strict"].value.value == pytest.approx(0.4 * 120 / 114, abs=0.05)
    loose = measure_overlap(names, tables, alive, threshold=0.0).alive
    assert loose["strict"].value.value >= found["strict"].value.value
    assert align_stage.find_alive(runs[0]).sum() == np.int64(114)


def test_how_far_a_run_has_come(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path, 2)
    stages = ("trained", "harvested", "aligned", "explained", "scored")
    assert [progress_of(runs[0])[stage] for stage in stages] == [True, False, False, False, False]
    small_study.harvested(runs)
    small_study.scored(runs[0], small_study.explained(runs[0], [3]))
    assert [progress_of(runs[0])[stage] for stage in stages] == [True, True, False, True, True]
    assert [progress_of(runs[1])[stage] for stage in stages] == [True, True, False, False, False]


def test_names_of_inputs_hold_no_colon() -> None:
    assert name_studies("run", ["layers.1.mlp:in", "layers.1.mlp"]) == ["run-layers.1.mlp-in", "run-layers.1.mlp"]
    assert AXES["subject.hookpoint"].label("layers.1.mlp:in") == "layers.1.mlp-in"
