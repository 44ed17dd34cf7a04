"""Controls of a study: they differ from a seed in what is not trained and in nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_study import write_recipe

from sae.dictionaries.architectures import ARCHITECTURES
from sae.settings import Settings
from sae.study.controls import find_controls
from sae.study.harvest import harvest_runs
from sae.study.recipes import settings_from
from sae.study.run import Run, Study, newest_study
from sae.study.stage import Compute
from sae.study.train import train_studies

CPU = Compute("cpu", 1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, tiny_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    return write_recipe(folder / "short.toml", tiny_llama_dir, tiny_recipe.parent / "texts", tokens=4096)


@pytest.fixture(scope="module")
def root(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    train_studies([Study("run", settings_from(recipe), (3, 4))], root, CPU, controls=True)
    return root


def weights(name: str, root: Path) -> dict[str, torch.Tensor]:
    return Run.open(name, root).sae().weights()


def test_the_studys_own_runs_are_untouched_by_them(recipe: Path, root: Path, tmp_path: Path) -> None:
    found = train_studies([Study("run", settings_from(recipe), (3, 4))], tmp_path, CPU)
    assert [run.name for run in found[0]] == ["run_a", "run_b"]
    for name in ("run_a", "run_b"):
        assert all(map(torch.equal, weights(name, tmp_path).values(), weights(name, root).values()))
    assert [run.name for run in newest_study(root)] == ["run_a", "run_b"]
    assert [run.name for run in Run.open("run_a", root).siblings()] == ["run_b"]
    assert not Run.open("run_a", root).is_control
    assert find_controls(Run.open("run_a", tmp_path)) == {}


def test_what_is_frozen_stays_as_it_was_drawn(root: Path) -> None:
    controls = find_controls(Run.open("run_b", root))
    assert {kind: run.name for kind, run in controls.items()} == {
        "frozen": "run-frozen_a",
        "untrained": "run-untrained_a",
    }
    assert all(run.is_control and run.seed == 3 and not run.siblings() for run in controls.values())
    trained, frozen, untrained = (weights(name, root) for name in ("run_a", "run-frozen_a", "run-untrained_a"))
    # Drawn from the same seed: the decoder is what both began with.
    assert torch.equal(frozen["W_dec"], untrained["W_dec"])
    assert not torch.equal(frozen["W_dec"], trained["W_dec"])
    for name in ("W_enc", "b_enc", "b_dec"):
        assert not torch.equal(frozen[name], untrained[name]), name
    torch.testing.assert_close(untrained["W_dec"], torch.nn.functional.normalize(untrained["W_enc"], dim=1))
    assert (untrained["b_enc"] == 0).all()
    fvu = {name: Run.open(name, root).record["settings"]["training"]["frozen"] for name in ("run_a", "run-frozen_a")}
    assert fvu == {"run_a": "nothing", "run-frozen_a": "decoder"}


def test_they_are_harvested_like_any_run(root: Path) -> None:
    runs = [Run.open("run_a", root), *find_controls(Run.open("run_a", root)).values()]
    harvest_runs(runs, CPU)
    stores = [run.store() for run in runs]
    assert len({store.record["provenance"]["order"] for store in stores}) == 1
    assert all(store.n_firings > 0 for store in stores)


def test_a_second_call_trains_nothing_new(recipe: Path, root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.glob("run*/sae.safetensors")}
    train_studies([Study("run", settings_from(recipe), (3, 4))], root, CPU, controls=True)
    assert {path: path.stat().st_mtime_ns for path in root.glob("run*/sae.safetensors")} == before
    train_studies([Study("run", settings_from(recipe), (5,))], root, CPU, controls=True)
    assert {path.parent.name for path in root.glob("run*/sae.safetensors") if path not in before} == {"run_c"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_frozen(architecture: str, recipe: Path, tmp_path: Path) -> None:
    settings: Settings = settings_from(recipe, training={"architecture": architecture, "tokens": 1024})
    train_studies([Study("run", settings, (0,))], tmp_path, CPU, controls=True)
    frozen, untrained = (weights(f"run-{kind}_a", tmp_path) for kind in ("frozen", "untrained"))
    assert torch.equal(frozen["W_dec"], untrained["W_dec"])
    assert not torch.equal(frozen["W_enc"], untrained["W_enc"])
