"""SAEs of somebody else's as runs: what is done with them comes out as it would have for runs of our own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from dictionaries import dense
from safetensors.torch import load_file, save_file
from tiny_study import HOOKPOINT, NUM_LATENTS, K, Ran, cli, journal, tree, write_texts

from sae.common.files import read_json, read_table, write_json
from sae.dictionaries.architectures.batchtopk import BatchTopKSae
from sae.dictionaries.architectures.gated import GatedSae
from sae.dictionaries.architectures.jumprelu import JumpReluSae
from sae.dictionaries.architectures.relu import ReluSae
from sae.dictionaries.checkpoint import load_sae, save_sae
from sae.dictionaries.formats import FORMATS
from sae.dictionaries.sae import Sae
from sae.study.run import Run

D = 16  # of the tiny subject
FORMAT_NAMES = ("sparsify", "saelens", "dictionary_learning")


@pytest.fixture(scope="module")
def elsewhere(tiny_done: tuple[Path, dict[str, Ran]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs of the finished study in every format: ``saelens/run_a`` and so on."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in FORMAT_NAMES:
        for run in ("run_a", "run_b"):
            ran = cli(
                *("export", "--sae", run, "--format", name, "--to", folder / name / run),
                *("--root", tiny_done[0], "--json"),
            )
            assert ran.well().json["format"] == name
    return folder


def take_in(source: object, name: str, root: Path, *more: object, study: str = "run") -> Ran:
    return cli("import", "--from", source, "--name", name, "--study", study, "--root", root, *more)


def a_gated(seed: int = 0, d: int = D, k: int | None = None) -> Sae:
    draw = torch.Generator().manual_seed(seed)
    w, b = torch.randn(24, d, generator=draw), torch.randn(24, generator=draw) - 2
    unit = torch.nn.functional.normalize(w, dim=1)
    return GatedSae(W_enc=w, b_gate=b, r_mag=0 * b, b_mag=b + 0.1, W_dec=unit, b_dec=torch.zeros(d), k=k)


# --- the whole way --------------------------------------------------------------------------------------------


def test_results_equal_those_of_the_original_runs(
    tiny_done: tuple[Path, dict[str, Ran]], tiny_recipe: Path, elsewhere: Path, tmp_path: Path
) -> None:
    original, said = tiny_done
    root = tmp_path / "runs"
    take_in(elsewhere / "saelens" / "run_a", "run_a", root, "--recipe", tiny_recipe).well()
    take_in(elsewhere / "dictionary_learning" / "run_b", "run_b", root).well()  # model and text are the study's
    steps: dict[str, tuple[object, ...]] = {
        "align": ("run_a", "run_b"),
        "explain": ("--sae", "run_a", "--unshared-only", "--definition", "lenient", "--latents", 6),
        "score": (),
        "report": (),
        "show": ("--latent", 3),
    }
    again = {name: cli(name, *options, "--root", root, "--json").well().json for name, options in steps.items()}

    theirs, ours = tree(original), tree(root)
    not_made = ("training.parquet", "latents.logits.parquet")  # by an import, and by a harvest that `align` begins
    assert set(theirs) - set(ours) == {f"{run}/{name}" for run in ("run_a", "run_b") for name in not_made}
    scores = "run_a/latents.scores.parquet"  # its footer says when the verdicts were made
    changed = {path for path in ours if ours[path] != theirs[path]}
    own = {"run.json", "weights.json", "firings/store.json"}  # these name the run and its origin
    assert changed - {scores} == {f"{run}/{name}" for run in ("run_a", "run_b") for name in own}
    pd.testing.assert_frame_equal(read_table(root / scores), read_table(original / scores))
    assert journal(root / "run_a" / "journal.sqlite") == journal(original / "run_a" / "journal.sqlite")
    before = said["report"].json
    for part in ("overlap", "similarity", "membership", "scores", "relation", "firing", "interesting"):
        mine, was = again["report"][part], before[part]
        if part == "scores":  # how controls are had is another thing for what was imported
            mine, was = ({**of, "lacking_controls": None} for of in (mine, was))
        assert mine == was, part
    assert [run["seed"] for run in again["report"]["runs"]] == [None, None]
    assert again["score"]["n_done"] == said["score"].json["n_done"] > 0
    pd.testing.assert_frame_equal(Run.open("run_a", root).latents(), Run.open("run_a", original).latents())


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_no_bit_is_lost_on_the_way(
    tiny_done: tuple[Path, dict[str, Ran]], tiny_recipe: Path, elsewhere: Path, tmp_path: Path, name: str
) -> None:
    ran = take_in(elsewhere / name / "run_a", "x", tmp_path, "--recipe", tiny_recipe, "--json", study="s")
    (told,) = ran.well().json["runs"]
    assert (told["name"], told["study"], told["seed"], told["tokens"]) == ("x", "s", None, None)
    assert (told["num_latents"], told["k"], told["trained"], told["harvested"]) == (NUM_LATENTS, K, True, False)
    run, original = Run.open("x", tmp_path), Run.open("run_a", tiny_done[0])
    assert run.weights_digest == original.weights_digest
    record = read_json(tmp_path / "x" / "run.json")
    assert record["imported"]["from"] == str(elsewhere / name / "run_a")
    assert record["imported"]["format"].lower() == name
    assert {len(value) for value in record["imported"]["files"].values()} == {64}
    assert (record["imported"]["architecture"], record["imported"]["k"]) == ("topk", K)
    for what in ("subject", "hookpoint", "corpus"):
        assert record[what] == original.record[what], what


@pytest.mark.parametrize("size", [1e38, -3e38, 1e20])
def test_weights_whose_products_overflow_are_one_line(
    tiny_recipe: Path, elsewhere: Path, tmp_path: Path, size: float
) -> None:
    """In ``import``, and in what reads a run whose weights have become so."""
    folder = Path(shutil.copytree(elsewhere / "sparsify" / "run_a", tmp_path / "huge"))
    weights = load_file(folder / "sae.safetensors")
    weights["encoder.weight"][5:] = size
    save_file(weights, folder / "sae.safetensors")
    root = tmp_path / "runs"
    words = (f"W_enc holds numbers of size {abs(size):.3g}", "overflow float32")
    take_in(folder, "x", root, "--recipe", tiny_recipe, study="s").failed_in_one_line(*words)
    for letter in "ab":
        take_in(
            elsewhere / "sparsify" / f"run_{letter}", f"x_{letter}", root, "--recipe", tiny_recipe, study="s"
        ).well()
    shutil.copy(folder / "sae.safetensors", root / "x_a" / "sae.safetensors")
    cli("harvest", "--root", root).failed_in_one_line("x_a", "does not match its digest")
    (root / "x_a" / "weights.json").unlink()
    for command in ("harvest", "align"):
        cli(command, "--root", root).failed_in_one_line("x_a", *words)


def test_the_report_says_imported(tiny_recipe: Path, elsewhere: Path, tmp_path: Path) -> None:
    take_in(elsewhere / "sparsify" / "run_a", "x", tmp_path, "--recipe", tiny_recipe, study="s").well()
    alone = cli("report", "--full", "--root", tmp_path).well().out
    assert "1 SAE, imported" in " ".join(alone.split())
    assert "python cli.py import --from DIR --name NAME --study s" in " ".join(alone.split())
    cli("explain", "--unshared-only", "--root", tmp_path).failed_in_one_line("only run", "import")
    take_in(elsewhere / "sparsify" / "run_b", "y", tmp_path, study="s").well()
    told = cli("align", "--root", tmp_path).well().out
    assert "between the SAEs" in told
    shown = " ".join(cli("report", "--full", "--root", tmp_path).well().out.split())
    assert "2 SAEs, 2 imported · 64 latents, k 2" in shown
    assert "x (imported)" in shown
    assert "seed" not in shown.partition("The paper's findings")[0]
    listed = cli("runs", "--root", tmp_path).well().out
    assert listed.count("imported") == 2


def test_a_seed_can_be_trained_beside_an_import(tiny_recipe: Path, elsewhere: Path, tmp_path: Path) -> None:
    take_in(elsewhere / "saelens" / "run_a", "s_a", tmp_path, "--recipe", tiny_recipe, study="s").well()
    ran = cli(
        "train", "--no-controls", "--name", "s", "--seeds", 1, "--recipe", tiny_recipe, "--root", tmp_path, "--json"
    ).well()
    assert [(run["name"], run["seed"]) for run in ran.json["runs"]] == [("s_b", 1)]
    assert (tmp_path / "s_b" / "sae.safetensors").read_bytes() == (
        elsewhere / "sparsify" / "run_b" / "sae.safetensors"
    ).read_bytes()
    found = cli("align", "--root", tmp_path, "--json").well().json
    assert [run["seed"] for run in found["runs"]] == [None, 1]
    assert cli("report", "--full", "--root", tmp_path).well().out.count("imported")


# --- other architectures --------------------------------------------------------------------------------------


def test_gated_saes_are_aligned_explained_and_scored(tiny_recipe: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("x", "y")):
        source = tmp_path / "theirs" / name
        save_sae(source, a_gated(number), format_=FORMATS["dictionary_learning" if number else "SAELens"])
        ran = take_in(source, name, tmp_path / "runs", *(() if number else ("--recipe", tiny_recipe)), study="s")
        assert "gated" in ran.well().err
    root = tmp_path / "runs"
    run = Run.open("x", root)
    assert run.weights_path.name == "sae_weights.safetensors"
    assert not (run.folder / "sae.safetensors").exists()
    assert run.k is None
    cli("align", "--root", root).well()
    cli("explain", "--sae", "x", "--latents", 8, "--root", root).well()
    assert cli("score", "--root", root, "--json").well().json["n_done"] > 0
    assert "gated, 24 latents" in " ".join(cli("report", "--full", "--root", root).well().out.split())
    cli("show", "--sae", "x", "--latent", 3, "--root", root).well()
    refused = cli("export", "--sae", "x", "--format", "sparsify", "--to", tmp_path / "out", "--root", root)
    refused.failed_in_one_line("'gated'", "sparsify's format", "supports only topk", "saelens")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["relu", "batchtopk", "jumprelu"])
def test_every_architecture_comes_in_and_goes_out(tiny_recipe: Path, tmp_path: Path, kind: str) -> None:
    draw = torch.Generator().manual_seed(1)
    w = torch.randn(24, D, generator=draw)
    four = {"W_enc": w, "b_enc": w[:, 0] - 1, "W_dec": w / w.norm(dim=1, keepdim=True), "b_dec": w[0]}
    made: dict[str, Sae] = {
        "relu": ReluSae(**four, k=4),
        "batchtopk": BatchTopKSae(**four, k=4, threshold=torch.tensor(0.5)),
        "jumprelu": JumpReluSae(**four, k=4, threshold=torch.full((24,), 0.5)),
    }
    save_sae(tmp_path / "in", made[kind], format_=FORMATS["dictionary_learning"])
    take_in(tmp_path / "in", "x", tmp_path / "runs", "--recipe", tiny_recipe, study="s").well()
    run = Run.open("x", tmp_path / "runs")
    assert (run.settings.training.architecture, run.k) == (kind, 4)
    x = torch.randn(30, D, generator=draw)
    torch.testing.assert_close(dense(run.sae(), x), dense(made[kind], x), rtol=1e-4, atol=1e-5)
    for name in ("saelens", "dictionary_learning"):
        to = tmp_path / "out" / name
        cli("export", "--sae", "x", "--format", name, "--to", to, "--root", tmp_path / "runs").well()
        torch.testing.assert_close(dense(load_sae(to), x), dense(made[kind], x), rtol=1e-4, atol=1e-5)
    said = read_json(tmp_path / "out" / "saelens" / "cfg.json")["metadata"]
    assert said["hook_name"] == HOOKPOINT


# --- again, and otherwise -------------------------------------------------------------------------------------


@pytest.fixture
def imported(tiny_recipe: Path, elsewhere: Path, tmp_path: Path) -> Path:
    """A root with run ``x`` of study ``s``, imported from SAELens's format."""
    root = tmp_path / "runs"
    take_in(elsewhere / "saelens" / "run_a", "x", root, "--recipe", tiny_recipe, study="s").well()
    return root


def test_the_same_import_again_changes_nothing(imported: Path, elsewhere: Path, tmp_path: Path) -> None:
    before = tree(imported)
    ran = take_in(elsewhere / "saelens" / "run_a", "x", imported, study="s").well()
    assert "already imported" in ran.err
    moved = Path(shutil.copytree(elsewhere / "saelens" / "run_a", tmp_path / "moved"))
    assert "already imported" in take_in(moved, "x", imported, study="s").well().err
    assert tree(imported) == before


def test_what_differs_is_named(imported: Path, elsewhere: Path, tmp_path: Path, tiny_recipe: Path) -> None:
    before = tree(imported)
    theirs = elsewhere / "saelens" / "run_a"
    other = take_in(elsewhere / "saelens" / "run_b", "x", imported, study="s")
    line = other.failed_in_one_line("'x' exists", "import.files.sae_weights.safetensors", "choose another --name")
    assert len(line) < 700
    take_in(theirs, "x", imported, study="t").failed_in_one_line("'x' exists", "study: 's' there, 't' now")
    texts = write_texts(tmp_path / "other", 20)
    given = take_in(theirs, "x", imported, "--text", texts, study="s")
    given.failed_in_one_line("'x' exists", "corpus.source")
    beside = take_in(theirs, "y", imported, "--text", texts, study="s")
    beside.failed_in_one_line("study 's' has another model, hookpoint or text", "corpus.source")
    (imported / "notes").mkdir()
    (imported / "notes" / "a.txt").touch()
    take_in(theirs, "notes", imported, study="s").failed_in_one_line("'", "exists and is not a run")
    take_in(theirs, "alignments", imported, study="s").failed_in_one_line("reserved")
    trained = cli(
        "train",
        "--no-controls",
        "--name",
        "s",
        "--seeds",
        0,
        "--recipe",
        tiny_recipe,
        "--hookpoint",
        "layers.0",
        "--root",
        imported,
    )
    trained.failed_in_one_line("'x' exists with other settings", "subject.hookpoint")
    (imported / "notes" / "a.txt").unlink()
    assert tree(imported) == before


def test_a_run_trained_here_is_not_overwritten(untouched: Path, elsewhere: Path, tiny_recipe: Path) -> None:
    ran = take_in(elsewhere / "saelens" / "run_b", "run_a", untouched, "--recipe", tiny_recipe)
    ran.failed_in_one_line("'run_a' exists and was trained here")


def test_an_import_that_was_killed_goes_on(imported: Path, elsewhere: Path) -> None:
    whole = tree(imported)
    (imported / "x" / "cfg.json").unlink()  # the last file that an import writes
    assert not Run.open("x", imported).is_trained
    cli("harvest", "--root", imported).failed_in_one_line("has not finished import", "`import` command")
    waiting = " ".join(cli("report", "--full", "--root", imported).well().out.split())
    assert "Not imported to the end: x" in waiting
    assert "python cli.py import --from" in waiting
    take_in(elsewhere / "saelens" / "run_a", "x", imported, study="s").well()
    assert tree(imported) == whole


# --- what does not fit ----------------------------------------------------------------------------------------


def test_widths_that_do_not_fit_are_named(tiny_recipe: Path, tmp_path: Path) -> None:
    for d, words in (
        (32, ("width 32", f"'{HOOKPOINT}'", "gives 16", "hookpoints of width 32 are", "layers.0.mlp")),
        (7, ("width 7", "gives 16", "no hookpoint of that model has width 7", "own model")),
    ):
        save_sae(tmp_path / f"of{d}", a_gated(d=d))
        ran = take_in(tmp_path / f"of{d}", "x", tmp_path / "runs", "--recipe", tiny_recipe, study="s")
        ran.failed_in_one_line(f"of{d}", *words)
    assert not (tmp_path / "runs" / "x").exists()


def test_sources_that_cannot_be_used(tiny_recipe: Path, elsewhere: Path, tmp_path: Path) -> None:
    def refused(source: object, *words: object, options: tuple[object, ...] = ("--recipe", tiny_recipe)) -> None:
        take_in(source, "x", tmp_path / "runs", *options, study="s").failed_in_one_line(*words)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "not an SAE checkpoint in a known format: it is empty")
    refused(tmp_path / "nowhere", "does not exist; give the folder of an SAE, or its name on the hub")
    refused(elsewhere, "holds checkpoints in dictionary_learning/run_a, dictionary_learning/run_b, saelens/run_a")
    broken = Path(shutil.copytree(elsewhere / "saelens" / "run_a", tmp_path / "broken"))
    (broken / "sae_weights.safetensors").write_bytes((broken / "sae_weights.safetensors").read_bytes()[:-9])
    refused(broken, "broken", "damaged or cut short")
    config = read_json(elsewhere / "saelens" / "run_b" / "cfg.json")
    write_json(broken / "cfg.json", {**config, "architecture": "temporal"})
    refused(broken, "architecture 'temporal' cannot be opened")
    good = elsewhere / "saelens" / "run_a"
    refused(good, "no hookpoint 'layers.9'", options=("--recipe", tiny_recipe, "--hookpoint", "layers.9"))
    refused(good, "--text and --dataset", options=("--text", tmp_path, "--dataset", "d"))
    assert not (tmp_path / "runs" / "x").exists()
    missing = cli("import", "--name", "x", "--root", tmp_path)
    assert missing.code == 2


def test_export_keeps_what_is_there(untouched: Path, tmp_path: Path) -> None:
    def to(folder: Path, sae: str = "run_a", name: str = "dictionary_learning") -> Ran:
        return cli("export", "--sae", sae, "--format", name, "--to", folder, "--root", untouched)

    assert "run_a is in" in to(tmp_path / "a").well().err
    assert to(tmp_path / "a").well().err.count("already in")
    to(tmp_path / "a", "run_b").failed_in_one_line("another SAE", "empty folder")
    to(tmp_path / "a", name="sparsify").failed_in_one_line("another SAE", "empty folder")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["ae.pt", "config.json"]
    (tmp_path / "a" / "config.json").unlink()  # killed between the two files
    to(tmp_path / "a", "run_b").failed_in_one_line("another SAE", "empty folder")
    assert "after an unfinished export" in to(tmp_path / "a").well().err
    assert to(tmp_path / "a").well().err.count("already in")
    to(tmp_path / "b", "run_x").failed_in_one_line("'run_x' does not exist")
    assert to(tmp_path / "b", name="onnx").code == 2
    (tmp_path / "file").touch()
    assert to(tmp_path / "file").code == 1


# --- the hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub on which ``some/saes`` holds the folder ``elsewhere``; what is asked of it."""
    asked: dict[str, Any] = {}
    files = [str(path.relative_to(elsewhere)) for path in elsewhere.rglob("*") if path.is_file()]

    def look_up(_api: Any, name: str, **more: Any) -> Any:
        asked["look_up"] = (name, more["revision"])
        return SimpleNamespace(sha="feed")

    def fetch(name: str, **more: Any) -> str:
        asked["fetched"] = (name, more["revision"], more.get("allow_patterns"))
        return str(elsewhere)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", look_up)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: [*files, "README.md"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return asked


def test_an_sae_of_the_hub(hub: dict[str, Any], tiny_recipe: Path, tmp_path: Path) -> None:
    take_in("some/saes@v1/saelens/run_a", "x", tmp_path, "--recipe", tiny_recipe, study="s").well()
    assert hub["look_up"] == ("some/saes", "v1")
    name, revision, patterns = hub["fetched"]
    assert (name, revision) == ("some/saes", "feed")
    assert {"saelens/run_a/cfg.json", "saelens/run_a/sae_weights.safetensors"} <= set(patterns)
    assert Run.open("x", tmp_path).record["imported"]["from"] == "some/saes@feed/saelens/run_a"


def test_folders_of_the_hub_are_listed(
    hub: dict[str, Any], tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: str, *words: object) -> None:
        take_in(source, "x", tmp_path, "--recipe", tiny_recipe, study="s").failed_in_one_line(*words)

    refused("some/saes", "has several SAEs; name one of some/saes/dictionary_learning/run_a, some/saes/")
    refused("some/saes/layers.9", "has no SAE in 'layers.9'", "some/saes/sparsify/run_b")
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["model.bin"])
    refused("some/saes", "'some/saes' has no SAE in a known format")

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", broken)
    refused("some/saes", "cannot be fetched (no route); try again")
    assert "fetched" not in hub
    assert json.dumps(hub)
