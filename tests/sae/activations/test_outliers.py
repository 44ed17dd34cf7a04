"""Tokens with enormous activations: how they are measured, and what a training says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_study import cli, write_recipe
from transformers import GPT2Config, GPT2Model

from sae.activations.outliers import Compared, find_outliers
from sae.common.files import read_json, table_metadata
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.sae import total_variance


def sample(n: int, outlying: int, times: float) -> torch.Tensor:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    x[:outlying] = times * x[:outlying] / x[:outlying].norm(dim=1, keepdim=True) * x.norm(dim=1).median()
    return x


def test_few_tokens_that_hold_most_are_found() -> None:
    found = find_outliers(sample(1000, 20, 100.0))
    assert found.fraction == 0.02
    assert found.variance_share > 0.99
    assert found.dominate
    assert found.describe().startswith("2.00% of the tokens have over 10 times the median norm and hold")


@pytest.mark.parametrize(("outlying", "times"), [(0, 1.0), (20, 9.9), (1, 11.0), (150, 100.0)])
def test_an_ordinary_sample_is_none(outlying: int, times: float) -> None:
    """No long ones, not long enough, too few to matter, too many to be called a few."""
    assert not find_outliers(sample(1000, outlying, times)).dominate
    assert not find_outliers(torch.zeros(5, 3)).dominate


def test_quality_without_outliers_is_that_of_the_others() -> None:
    x = sample(400, 8, 100.0)
    sae = TopKSae.init(8, 20, 3, 0, x)
    found, others = Compared.without_outliers(x).measure(sae), x[8:]
    error = float((sae.reconstruct(others) - others).square().sum())
    assert found.fvu_without == pytest.approx(error / total_variance(others), rel=1e-5)
    assert found.fvu == pytest.approx(float((sae.reconstruct(x) - x).square().sum()) / total_variance(x), rel=1e-5)
    assert found.fvu_without != pytest.approx(found.fvu, rel=0.1)
    assert 0 < found.l0_without <= 3


@pytest.fixture(scope="module")
def sink(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose position 0 has an enormous embedding, as trained models make one of it."""
    folder = Path(shutil.copytree(tiny_neox_dir, tmp_path_factory.mktemp("sink") / "model"))
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    model.wpe.weight.data[0] *= 2000
    model.save_pretrained(folder)
    return folder


def test_a_sink_at_position_0_is_warned_about(sink: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "sink.toml", sink, tiny_recipe.parent / "texts", tokens=4096)
    root = tmp_path / "runs"
    ran = cli("train", "--recipe", recipe, "--hookpoint", "h.0", "--seeds", 0, "--root", root).well()
    recorded = read_json(root / "run_a/run.json")["outlier_tokens"]
    assert recorded["fraction"] == pytest.approx(1 / 32, abs=0.002)
    assert recorded["variance_share"] > 0.9
    assert 200 < recorded["tokens"] <= 256
    (warning,) = [line for line in ran.err.splitlines() if "warning" in line]
    words = f"{recorded['fraction']:.2%} of the tokens have over 10 times the median norm and hold"
    assert f"at h.0 {words} {recorded['variance_share']:.0%} of the variance" in warning
    (closing,) = [line for line in ran.err.splitlines() if "without the outlier tokens" in line]
    quality = table_metadata(root / "run_a/training.parquet")["quality"]
    assert f"FVU {quality['fvu']:.3f}, without the outlier tokens {quality['fvu_without']:.3f}" in closing
    assert abs(quality["fvu_without"] - quality["fvu"]) > 0.05
    report = cli("report", "--full", "--sae", "run_a", "--root", root).well()
    assert f"{quality['fvu_without']:.3f}"[1:] in report.out
    assert "outlier tokens" in " ".join(report.out.split())
    shown = json.loads(cli("report", "--sae", "run_a", "--root", root, "--json").well().out)
    assert shown["training"]["quality"]["run_a"] == quality


def test_an_ordinary_model_is_measured_without_a_warning(short: Path, tmp_path: Path) -> None:
    ran = cli("train", "--recipe", short, "--seeds", 0, "--no-controls", "--root", tmp_path).well()
    assert "outlier" not in ran.err
    assert read_json(tmp_path / "run_a/run.json")["outlier_tokens"]["fraction"] == 0
    assert "quality" not in table_metadata(tmp_path / "run_a/training.parquet")
