"""The table of promoted and suppressed tokens, against a dense computation; made once, and only where it applies."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny_study import cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp import Run
from sae.common.errors import NotApplicable, NotFound
from sae.common.files import read_table, table_metadata
from sae.settings import Settings
from sae.study import logits
from sae.study.logits import LogitTable, ensure_logits
from sae.study.run import Study
from sae.study.stage import Compute
from sae.study.train import train_studies

COMPUTE = Compute("cpu", 1)
M = 64


def trained(root: Path, model: Path, texts: Path, hookpoint: str, name: str = "run") -> Run:
    settings = Settings().with_values(
        subject={"model": str(model), "hookpoint": hookpoint, "dtype": "float32"},
        corpus={"kind": "text", "source": (str(texts),), "context": 32},
        training={"num_latents": M, "k": 4, "tokens": 2_048, "batch_tokens": 256},
    )
    ((run, *_),) = train_studies([Study(name, settings, (0,))], root, COMPUTE, controls=False)
    return Run(run.name, root)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n".join(lines * 40))
    return path


@pytest.fixture(scope="module", params=["neox", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: Path) -> tuple[Run, Any]:
    """A run on a tiny model with norms of random gains, and the model."""
    source: Path = request.getfixturevalue(f"tiny_{request.param}_dir")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    torch.manual_seed(1)
    norm = model.base_model.get_submodule("norm" if request.param == "llama" else "final_layer_norm")
    for weight in norm.parameters():
        torch.nn.init.normal_(weight, 1.0, 0.4)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    hookpoint = "layers.1.mlp"
    return trained(tmp_path_factory.mktemp("runs"), folder, texts, hookpoint), model


def test_the_table_is_that_of_a_dense_computation(made: tuple[Run, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = made
    monkeypatch.setattr(logits, "_ENTRIES", 1000)  # a few latents at a time
    run.stage_path("logits").unlink(missing_ok=True)
    ensure_logits([run], COMPUTE)
    is_layer_norm = model.config.model_type == "gpt_neox"
    norm = model.base_model.get_submodule("final_layer_norm" if is_layer_norm else "norm")
    tokenizer = AutoTokenizer.from_pretrained(run.settings.subject.model)
    decoder = run.read_decoder().astype(np.float64)
    if is_layer_norm:
        decoder -= decoder.mean(axis=1, keepdims=True)
    head = model.get_output_embeddings().weight.detach().double().numpy()[: len(tokenizer)]
    dense = (decoder * norm.weight.detach().double().numpy()) @ head.T
    table = read_table(run.stage_path("logits"))
    assert table["latent"].tolist() == list(range(M))
    for latent, row in enumerate(table.to_dict("records")):
        order = dense[latent].argsort()
        for side, expected in (("promoted", order[::-1]), ("suppressed", order)):
            np.testing.assert_allclose(row[f"{side}_logits"], dense[latent, expected[:10]], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(dense[latent, row[f"{side}_ids"]], row[f"{side}_logits"], rtol=1e-4, atol=1e-5)
    for name, values in (
        ("mean", dense.mean(1)),
        ("std", dense.std(1)),
        ("skewness", stats.skew(dense, axis=1)),
        ("kurtosis", stats.kurtosis(dense, axis=1, fisher=False)),
    ):
        np.testing.assert_allclose(table[f"logit_{name}"], values, rtol=1e-3, atol=1e-4)
    found = run.logits(17)
    row = table.iloc[17].to_dict()
    assert [of.token for of in found.promoted] == list(row["promoted"])
    assert [of.logit for of in found.suppressed] == pytest.approx(list(row["suppressed_logits"]))
    assert (found.mean, found.kurtosis) == pytest.approx((row["logit_mean"], row["logit_kurtosis"]))
    for token, i in zip(row["promoted"], row["promoted_ids"], strict=True):
        text = tokenizer.decode([int(i)])
        assert token.strip() == text.strip() or "\ufffd" in text


def test_a_latent_that_writes_a_tokens_row_promotes_it(tmp_path: Path, tiny_neox_dir: Path, texts: Path) -> None:
    """Where all rows of the unembedding are equally long and the gain is one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_neox_dir, dtype="float32")
    rows = model.get_output_embeddings().weight.data
    rows -= rows.mean(dim=1, keepdim=True)
    rows /= rows.norm(dim=1, keepdim=True)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_neox_dir).save_pretrained(tmp_path / "model")
    run = trained(tmp_path / "runs", tmp_path / "model", texts, "layers.2")
    tokens = torch.arange(M) * 4 + 33
    weights = load_file(run.weights_path)
    save_file({**weights, "W_dec": rows[tokens].clone()}, run.weights_path)
    run.seal()
    ensure_logits([Run(run.name, run.root)], COMPUTE)
    promoted = read_table(run.stage_path("logits"))["promoted_ids"]
    assert [int(ids[0]) for ids in promoted] == tokens.tolist()


def test_it_is_computed_once_per_weights(
    tmp_path: Path, tiny_llama_dir: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path, tiny_llama_dir, texts, "layers.1")
    with pytest.raises(NotFound, match=r"has no promoted and suppressed tokens; run `.*harvest --sae run_a"):
        LogitTable(run)
    opened = mock.Mock(side_effect=Compute.load_subject)
    monkeypatch.setattr(Compute, "load_subject", lambda *a, **b: opened(*a, **b))
    first = run.logits(3)
    assert run.logits(3) == first
    assert opened.call_count == 1
    with pytest.raises(NotFound, match=f"latent {M} does not exist in run 'run_a'"):
        run.logits(M)
    weights = load_file(run.weights_path)
    weights["W_dec"] = weights["W_dec"].flip(0).contiguous()
    save_file(weights, run.weights_path)
    run.seal()
    assert Run("run_a", tmp_path).logits(M - 4).promoted[0].token == first.promoted[0].token
    assert opened.call_count == 2


def test_other_hookpoints_say_why_not(tmp_path: Path, tiny_llama_dir: Path, texts: Path) -> None:
    run = trained(tmp_path, tiny_llama_dir, texts, "layers.1.input_layernorm")
    for _ in range(2):  # computed, then read
        with pytest.raises(NotApplicable, match="does not write into the residual stream"):
            run.logits(3)
    assert "promote no tokens" in table_metadata(run.stage_path("logits"))["not_applicable"]
    shown = cli("show", "--latent", 3, "--sae", "run_a", "--root", tmp_path).well().out
    assert "does not write into the residual" in " ".join(shown.split())


def test_harvest_records_it_and_show_prints_it(tmp_path: Path, tiny_llama_dir: Path, texts: Path) -> None:
    run = trained(tmp_path, tiny_llama_dir, texts, "layers.1.mlp")
    before = cli("show", "--latent", 3, "--sae", "run_a", "--root", tmp_path, "--json").well().json
    assert before["logits"] is None
    assert "harvest" in before["no_logits"]
    cli("harvest", "--sae", "run_a", "--root", tmp_path).well()
    found = LogitTable(run)[3]
    shown = cli("show", "--latent", 3, "--sae", "run_a", "--root", tmp_path).well().out
    after = cli("show", "--latent", 3, "--sae", "run_a", "--root", tmp_path, "--json").well().json
    assert [of["token"] for of in after["logits"]["promoted"]] == [of.token for of in found.promoted]
    assert "promotes" in shown
    assert "suppresses" in shown
    assert found.promoted[0].token.strip() in shown
    words = (
        "export",
        "--sae",
        "run_a",
        "--table",
        "logits",
        "--format",
        "parquet",
        "--to",
        tmp_path / "logits.parquet",
    )
    assert cli(*words, "--root", tmp_path, "--json").well().json["rows"] == M
    exported = pd.read_parquet(tmp_path / "logits.parquet")
    assert list(exported["promoted"][3]) == [of.token for of in found.promoted]
