"""The stage through its command: several hookpoints in one pass, what stops it, and what is left on disk then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import NUM_LATENTS, cli, tree

from sae.activations.subject import Subject
from sae.common.errors import BadInput
from sae.common.files import read_json, read_table
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.checkpoint import save_sae
from sae.study.harvest import is_harvested
from sae.study.recipes import settings_from
from sae.study.run import Run, Study, make_studies
from sae.study.stage import Compute
from sae.study.train import train_studies
from sae.training.state import kept_steps

HOOKPOINTS = ("layers.0.mlp", "layers.1.input_layernorm")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The hookpoints of every forward pass."""
    found: list[tuple[str, ...]] = []
    real = Subject.activations

    def watched(self: Subject, tokens: Any, hookpoints: Sequence[str]) -> Any:
        found.append(tuple(hookpoints))
        return real(self, tokens, hookpoints)

    monkeypatch.setattr(Subject, "activations", watched)
    return found


def weights(root: Path, run: str) -> bytes:
    return (root / run / "sae.safetensors").read_bytes()


# --- what is said ---------------------------------------------------------------------------------------------


def test_progress_counts_the_tokens_that_were_asked_for(short: Path, tmp_path: Path) -> None:
    """Not those of the controls too, nor what whole steps come to; and for a resumed training what is left."""
    train = ("train", "--recipe", short, "--tokens", 4000)
    said = cli(*train, "--seeds", 0, 1, "--root", tmp_path / "one").well().err
    assert "train 2 seeds and 2 controls: 4k tokens in" in said
    said = cli(*train, "--seeds", 0, "--no-controls", "--root", tmp_path / "two").well().err
    assert "train 1 seed: 4k tokens in" in said
    said = (
        cli(*train, "--hookpoint", *HOOKPOINTS, "--seeds", 0, "--no-controls", "--root", tmp_path / "three").well().err
    )
    assert "train 2 SAEs under 2 settings: 4k tokens in" in said


# --- several studies ------------------------------------------------------------------------------------------


def test_several_hookpoints_are_studies_in_one_pass(short: Path, tmp_path: Path, passes: list[tuple[str, ...]]) -> None:
    root = tmp_path / "together"
    ran = cli(
        "train",
        "--no-controls",
        "--recipe",
        short,
        "--hookpoint",
        *HOOKPOINTS,
        "--seeds",
        0,
        1,
        "--root",
        root,
        "--json",
    ).well()
    names = [f"run-{hookpoint}_{letter}" for hookpoint in HOOKPOINTS for letter in "ab"]
    assert [run["name"] for run in ran.json["runs"]] == names
    assert [run["study"] for run in ran.json["runs"]] == [f"run-{h}" for h in HOOKPOINTS for _ in "ab"]
    assert [run["hookpoint"] for run in ran.json["runs"]] == [h for h in HOOKPOINTS for _ in "ab"]
    assert set(passes) == {HOOKPOINTS}
    together = len(passes)
    passes.clear()
    cli(
        "train",
        "--no-controls",
        "--recipe",
        short,
        "--hookpoint",
        HOOKPOINTS[0],
        "--seeds",
        0,
        1,
        "--root",
        tmp_path / "one",
    ).well()
    assert len(passes) == together
    for letter in "ab":
        alone, beside = (
            Run.open(name, where)
            for name, where in ((f"run_{letter}", tmp_path / "one"), (f"run-{HOOKPOINTS[0]}_{letter}", root))
        )
        assert weights(alone.root, alone.name) == weights(beside.root, beside.name)
        assert read_table(alone.training_log_path).equals(read_table(beside.training_log_path))

    # The harvest too: the first pass fills the caches of the others.
    passes.clear()
    cli("harvest", "--sae", names[0], "--sae", names[2], "--root", root).well()
    assert all(is_harvested(Run.open(name, root)) for name in (names[0], names[2]))
    assert len(set(passes)) <= 1
    n_blocks = Run.open(names[0], root).corpus().n_blocks
    assert together + len(passes) <= n_blocks
    caches = list(root.glob("corpora/*/activations/*"))
    assert len(caches) == 2  # for the seeds that are not harvested yet
    cli("harvest", "--sae", names[1], "--sae", names[3], "--root", root).well()
    assert not list(root.glob("corpora/*/activations/*"))


def test_a_sweep_shares_the_pass_without_changing_weights(
    short: Path, tmp_path: Path, passes: list[tuple[str, ...]]
) -> None:
    base = settings_from(short)
    swept = [
        Study("wide", base.with_values(training={"num_latents": 96}), (0,)),
        Study("few", base.with_values(training={"k": 1}), (0, 1)),
        Study("long", base.with_values(training={"tokens": 6000}), (0,)),
        Study("gated", base.with_values(training={"architecture": "gated"}), (1,)),
        Study("deep", base.with_values(subject={"hookpoint": "layers.0.mlp"}), (0,)),
        Study("large-steps", base.with_values(training={"batch_tokens": 512}), (0,)),
    ]
    runs = train_studies(swept, tmp_path / "sweep", Compute("cpu"))
    assert [[run.name for run in of_study] for of_study in runs[:2]] == [["wide_a"], ["few_a", "few_b"]]
    together = len(passes)
    passes.clear()
    for study, of_study in zip(swept, runs, strict=True):
        (alone,) = train_studies([study], tmp_path / study.name, Compute("cpu"))
        for a, b in zip(alone, of_study, strict=True):
            assert a.weights_path.read_bytes() == b.weights_path.read_bytes(), study.name
            assert a.record["batch_order"] == b.record["batch_order"]
    assert len(passes) > 3 * together
    passes.clear()
    assert train_studies(swept, tmp_path / "sweep", Compute("cpu")) == runs
    assert passes == []


def test_without_a_cache_the_weights_are_the_same(short: Path, tmp_path: Path) -> None:
    for room in (0, 3000, "8G"):
        root = tmp_path / str(room)
        cli(
            "train", "--no-controls", "--recipe", short, "--seeds", 0, "--activation-cache", room, "--root", root
        ).well()
        assert bool(list(root.glob("corpora/*/activations/*"))) == (room == "8G")
    assert weights(tmp_path / "0", "run_a") == weights(tmp_path / "8G", "run_a")
    cli(
        "train", "--no-controls", "--recipe", short, "--activation-cache", "much", "--root", tmp_path
    ).failed_in_one_line("'much'")
    # The limit is no part of what a run is.
    cli(
        "train", "--no-controls", "--recipe", short, "--seeds", 0, "--activation-cache", "1M", "--root", tmp_path / "0"
    ).well()


def test_names_of_several_hookpoints(tiny_recipe: Path) -> None:
    settings = settings_from(tiny_recipe)
    assert [s.name for s in make_studies("x", settings, ["a.b"], [0])] == ["x"]
    assert [s.name for s in make_studies("x", settings, [], [0])] == ["x"]
    assert [s.settings.subject.hookpoint for s in make_studies("x", settings, ["a.b", "c"], [0])] == ["a.b", "c"]
    with pytest.raises(BadInput, match="each name once"):
        train_studies(make_studies("x", settings, ["a", "a"], [0]), Path("nowhere"), Compute())


# --- NaN and infinity -----------------------------------------------------------------------------------------


def test_training_stops_at_nan_and_resumes_later(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, calls = tmp_path / "runs", 0
    real = Subject.activations

    def breaks(self: Subject, tokens: Any, hookpoints: Sequence[str]) -> Any:
        nonlocal calls
        calls += 1
        found = real(self, tokens, hookpoints)
        if calls == 3:
            next(iter(found.values()))[2, 1, 3] = torch.nan
        return found

    train = ("train", "--no-controls", "--recipe", short, "--seeds", 0, 1, "--activation-cache", 0, "--root")
    monkeypatch.setattr("sae.text.corpus.BLOCK_TOKENS", 512)
    with monkeypatch.context() as patched:
        patched.setattr(Subject, "activations", breaks)
        ran = cli(*train, root, "--json")
    line = ran.failed_in_one_line("NaN at layers.1.input_layernorm in block", "sequence", "step ")
    steps = kept_steps(root / "run_a" / "training-state")
    said = int(line.split("step ")[1].split()[0])
    assert not (root / "run_a" / "sae.safetensors").exists()
    assert not steps or steps[-1] < said
    cli(*train, root).well()
    cli(*train, tmp_path / "undisturbed").well()
    for run in ("run_a", "run_b"):
        assert weights(root, run) == weights(tmp_path / "undisturbed", run)


def test_an_early_failure_leaves_the_run_name_free(short: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    cli(
        "train", "--no-controls", "--recipe", short, "--seeds", 0, "--lr", "1e6", "--root", root, "--json"
    ).failed_in_one_line("diverged", "learning_rate")
    assert not (root / "run_a").exists()
    cli("train", "--no-controls", "--recipe", short, "--seeds", 0, "--root", root).well()


# --- what does not belong together ----------------------------------------------------------------------------


def test_an_sae_of_another_width_names_both(tiny_root: Path) -> None:
    run = Run.open("run_a", tiny_root)
    for name in ("cfg.json", "sae.safetensors", "weights.json"):
        (run.folder / name).unlink()
    save_sae(run.folder, TopKSae.init(24, NUM_LATENTS, 2, seed=0))
    before = tree(tiny_root, under="run_*")
    cli("harvest", "--sae", "run_a", "--tokens", "2k", "--root", tiny_root, "--json").failed_in_one_line(
        "run 'run_a' reads activations of width 24", "layers.1.input_layernorm", "has width 16"
    )
    assert tree(tiny_root, under="run_*") == before


def test_the_precision_can_be_given(short: Path, tmp_path: Path) -> None:
    cli("train", "--no-controls", "--recipe", short, "--seeds", 0, "--precision", "bfloat16", "--root", tmp_path).well()
    assert read_json(tmp_path / "run_a" / "run.json")["settings"]["training"]["precision"] == "bfloat16"
    ran = cli(
        "train",
        "--no-controls",
        "--recipe",
        short,
        "--precision",
        "float8",
        "--root",
        tmp_path,
        "--name",
        "x",
        "--json",
    )
    ran.failed_in_one_line("precision", "bfloat16")
