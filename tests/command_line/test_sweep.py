"""A whole sweep in seconds: one stream, the weights of each point alone, going on after a stop, and what is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from tiny_study import Ran, cli, tree

import autointerp.command_line.sweeping
import autointerp.findings.sweep_table
from autointerp.findings.paper.finding import AGREES, DISAGREES, UNDECIDED
from sae.common.files import read_json, read_table, table_metadata

SEEDS = ("--seeds", 0, 1, 2)
POINTS = ["small_m32_t8k", "small_m32_t12k", "small_m48_t8k", "small_m48_t12k"]
IDS = {"shared", "bimodal", "disagree", "third-seed", "retained", "frequency", "interp", "relation"}


def write(path: Path, recipe: Path, table: str) -> Path:
    path.write_text(f"{recipe.read_text()}\n[sweep]\n{table}\n")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A sweep over two widths and two lengths, its latents explained."""
    table = 'training.num_latents = [32, 48]\ntraining.tokens = ["8k", "12k"]\nseeds = [0, 1]\n[explain]\nlatents = 8'
    return write(tmp_path_factory.mktemp("sweep") / "small.toml", tiny_recipe, table)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, small: Path) -> tuple[Path, Ran]:
    """The sweep done without a stop. To read, not to change."""
    root = tmp_path_factory.mktemp("done") / "runs"
    return root, cli("sweep", small, "--root", root, "--json").well()


def points(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What a sweep came to, without when, by which commit and under which root."""
    rows: list[dict[str, Any]] = json.loads(json.dumps(found["points"]))
    for row in rows:
        for finding in row["findings"]:
            finding["command"] = finding["command"] and finding["command"].partition(" --root ")[0]
    return rows


def test_every_point_is_a_study_with_all_stages(done: tuple[Path, Ran]) -> None:
    root, ran = done
    assert [point["name"] for point in ran.json["points"]] == POINTS
    for point in ran.json["points"]:
        assert point["runs"] == [f"{point['name']}_a", f"{point['name']}_b"]
        assert point["num_latents"] == point["values"]["training.num_latents"]
        assert 0 <= point["shared"]["strict"]["value"] <= point["shared"]["both"]["value"] <= 1
        assert point["shared"]["both"]["without"] == {}  # of two seeds neither can be left out
        assert point["scores"]["n_scored"] > 0
        assert {row["id"] for row in point["findings"]} >= IDS
        assert {row["id"] for row in point["findings"]}.isdisjoint({"width", "k", "tokens", "architecture"})
    stages = cli("runs", "--root", root, "--json").json["runs"]
    assert all(run["trained"] and run["harvested"] and run["aligned"] for run in stages)
    assert {run["name"] for run in stages if run["scored"]} >= {f"{name}_a" for name in POINTS}
    assert {row["id"] for row in ran.json["findings"]} == {"width", "tokens"}


def test_the_table_equals_each_studys_own_report(done: tuple[Path, Ran]) -> None:
    root, ran = done
    for point in ran.json["points"]:
        report = cli("report", "--sae", point["runs"][0], "--root", root, "--json").json
        assert point["shared"]["both"]["value"] == report["overlap"]["both"]["value"]
        assert point["scores"]["mean"] == report["scores"]["mean"]
        own = [row for row in report["findings"] if row["id"] not in ("width", "k", "tokens", "architecture")]
        assert own == point["findings"]
        of_sweep = {row["id"]: row for row in report["findings"]}
        assert [of_sweep[row["id"]] for row in ran.json["findings"]] == ran.json["findings"]
        assert of_sweep["k"]["verdict"] == UNDECIDED
        assert "ks.toml" in of_sweep["k"]["why"]


def test_the_weights_equal_a_point_trained_alone(done: tuple[Path, Ran], tiny_recipe: Path, tmp_path: Path) -> None:
    given = ("--num-latents", 48, "--tokens", "8k", "--seeds", 1, "--no-controls", "--recipe", tiny_recipe)
    cli("train", "--name", "alone", *given, "--root", tmp_path).well()
    alone = (tmp_path / "alone_a" / "sae.safetensors").read_bytes()
    assert (done[0] / "small_m48_t8k_b" / "sae.safetensors").read_bytes() == alone


def test_the_subject_reads_only_what_training_takes(small: Path, tmp_path: Path) -> None:
    from sae.activations.subject import Subject

    seen, real = [], Subject.activations

    def counted(self: Subject, tokens: Any, *rest: Any) -> Any:
        seen.append(tokens.size if hasattr(tokens, "size") and isinstance(tokens.size, int) else tokens.numel())
        return real(self, tokens, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Subject, "activations", counted)
        patched.setattr(autointerp.command_line.sweeping, "harvest_runs", _stop)
        with pytest.raises(RuntimeError, match="stopped"):
            cli("sweep", small, "--root", tmp_path, "--no-score")
        trained = sum(seen)
    assert 12_000 <= trained < 22_000  # whole blocks, each once: the text has 21.5k; one by one they would read 80k


def _stop(*_: Any, **__: Any) -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        pytest.param(autointerp.command_line.sweeping, "harvest_runs", 0, marks=pytest.mark.slow),
        pytest.param(autointerp.command_line.sweeping, "align_runs", 1, marks=pytest.mark.slow),
        (autointerp.command_line.sweeping, "explain_runs", 1),
        pytest.param(autointerp.command_line.sweeping, "score_runs", 2, marks=pytest.mark.slow),
        pytest.param(autointerp.findings.sweep_table, "write_record", 0, marks=pytest.mark.slow),
    ],
    ids=["before the harvest", "while aligning", "while explaining", "while scoring", "between the two tables"],
)
def test_a_sweep_stopped_between_stages_ends_equal(
    module: Any, name: str, after: int, done: tuple[Path, Ran], small: Path, tmp_path: Path
) -> None:
    real, calls = getattr(module, name), 0

    def stops(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return _stop() if calls > after else real(*given, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, name, stops)
        with pytest.raises(RuntimeError, match="stopped"):
            cli("sweep", small, "--root", tmp_path)
    assert not (tmp_path / "reports" / "small.sweep.json").exists()
    again = cli("sweep", small, "--root", tmp_path, "--json").well()
    assert points(again.json) == points(done[1].json)
    if name != "harvest_runs":
        assert "harvest" not in again.err


def test_finished_sweep_is_instant_until_seeds_are_added(done: tuple[Path, Ran], small: Path, tmp_path: Path) -> None:
    root = shutil.copytree(done[0], tmp_path / "runs")
    before = (root / "reports" / "small.sweep.json").read_bytes()
    again = cli("sweep", small, "--root", root, "--json").well()
    assert (root / "reports" / "small.sweep.json").read_bytes() == before
    assert again.json == done[1].json
    more = cli("sweep", small, "--root", root, "--json", "--no-score", *SEEDS).well()
    assert {len(point["runs"]) for point in more.json["points"]} == {3}
    assert all(set(point["shared"]["both"]["without"]) == {"0", "1", "2"} for point in more.json["points"])
    assert "jackknife" in more.json["findings"][0]["why"]


def test_both_files_carry_what_they_were_made_from(done: tuple[Path, Ran]) -> None:
    folder = done[0] / "reports"
    table, flat = read_json(folder / "small.sweep.json"), folder / "small.sweep.parquet"
    assert table_metadata(flat)["inputs"] == table["inputs"]
    rows = read_table(flat)
    assert rows["name"].tolist() == POINTS
    for row, point in zip(rows.to_dict("records"), table["points"], strict=True):
        both = point["shared"]["both"]
        assert row["shared_both"] == both["value"]
        assert [row["shared_both_low"], row["shared_both_high"]] == both["interval"]
        assert row["score"] == point["scores"]["mean"]


def test_the_page_fits_80_columns_without_colour(done: tuple[Path, Ran], small: Path) -> None:
    shown = cli("sweep", small, "--root", done[0]).well().out
    assert max(map(cell_len, shown.splitlines())) <= 80
    assert "\x1b" not in shown
    for words in (
        "The paper's findings",
        "How much is shared",
        "Overlap by width",
        "same partner",
        "ngram",
    ):
        assert words in shown
    assert "░" in shown
    assert any(verdict in shown for verdict in (AGREES, DISAGREES, UNDECIDED))


def test_a_dry_run_trains_nothing(small: Path, tmp_path: Path) -> None:
    found = cli("sweep", small, "--root", tmp_path, "--dry-run", "--json").well().json
    assert [point["name"] for point in found["points"]] == POINTS
    assert found["n_saes"] == 8
    assert (found["stream_tokens"], found["trained_tokens"]) == (12_000, 2 * 2 * 20_000)
    assert found["training_seconds"] > 0
    assert not list(tmp_path.glob("small*"))
    shown = cli("sweep", small, "--root", tmp_path, "--dry-run").well().out
    assert "4 points × 2 seeds = 8 SAEs" in shown


def test_a_dry_run_without_the_model_estimates_nothing(small: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "gone.toml"
    recipe.write_text(small.read_text().replace('model = "', 'model = "/nowhere'))
    found = cli("sweep", recipe, "--root", tmp_path, "--dry-run", "--json").well().json
    assert found["training_seconds"] is None
    assert "/nowhere" in found["no_estimate"]
    assert len(found["points"]) == 4


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "runs"
    yield root
    assert not tree(root)


@pytest.mark.parametrize(
    ("table", "flags", "words"),
    [
        ("training.widht = [1, 2]", (), ("'training.widht'", "training.num_latents")),
        ("training.k = [1]", (), ("training.k", "two values")),
        ("training.k = [1, 2]", ("--name", "a/b"), ("'a/b'",)),
        ("training.k = [1, 2]", ("--seeds", 1, 1), ("seeds 1 1",)),
        ("training.k = [1, 2]\n[explain]\nlatnets = 3", (), ("explain.latnets", "'latents'")),
        ("training.k = [1, 2]\n[explain]\nlatents = 0", (), ("explain.latents = 0",)),
        ('subject.hookpoint = ["layers.1.mlp", "layers.9.mlp"]', (), ("layers.9.mlp",)),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    table: str, flags: tuple[Any, ...], words: tuple[str, ...], tiny_recipe: Path, nothing_written: Path, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "bad.toml", tiny_recipe, table)
    cli("sweep", recipe, *flags, "--root", nothing_written).failed_in_one_line(*words)


def test_a_taken_name_is_reported_before_training(done: tuple[Path, Ran], small: Path, tmp_path: Path) -> None:
    root = shutil.copytree(done[0], tmp_path / "runs")
    other = tmp_path / "small.toml"
    other.write_text(small.read_text().replace("batch_tokens = 256", "batch_tokens = 128"))
    cli("sweep", other, "--root", root).failed_in_one_line(
        "small_m32_t8k_a", "training.batch_tokens: 256 there, 128 now"
    )


def test_train_sends_a_sweep_s_recipe_to_sweep(small: Path, tmp_path: Path) -> None:
    cli("train", "--recipe", small, "--root", tmp_path).failed_in_one_line("small.toml", "python cli.py sweep")


def test_a_damaged_table_is_told(done: tuple[Path, Ran], small: Path, tmp_path: Path) -> None:
    root = shutil.copytree(done[0], tmp_path / "runs")
    (root / "reports" / "small.sweep.json").write_text("{")
    cli("sweep", small, "--root", root).failed_in_one_line("small.sweep.json", "damaged")
    report = cli("report", "--sae", "small_m32_t8k_a", "--root", root, "--json").well()
    assert "damaged" in report.err
    assert next(row for row in report.json["findings"] if row["id"] == "width")["verdict"] == UNDECIDED
