"""Transcoders: the gradient against autograd, training, resuming, and the commands that read what was trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_study import cli
from torch import Tensor

from sae.alignment.alignment import align
from sae.alignment.nulls import rotate_sibling
from sae.common.errors import BadInput
from sae.common.files import read_json, write_json
from sae.common.interrupt import Terminated
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.checkpoint import load_sae, save_sae
from sae.dictionaries.formats import FORMATS
from sae.dictionaries.kernels import plain
from sae.dictionaries.kernels.cpu import weight_gradients
from sae.dictionaries.sae import AuxK, Objective, Sae, draw_transcoder, total_variance
from sae.settings import TrainingSettings
from sae.study.run import Run
from sae.training.trainer import Group, train_groups

D, D_OUT, M, K, B = 12, 7, 40, 4, 60
KINDS = ("topk", "batchtopk", "relu")


def example(kind: str, skip: bool = True, d_out: int = D_OUT) -> tuple[Sae, Tensor, Tensor]:
    """Return a transcoder in float64 with no special weight, x [B, D] and y [B, d_out]."""
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(B, width, generator=g, dtype=torch.float64) + 0.3 for width in (D, d_out))
    sae = draw_transcoder(ARCHITECTURES[kind], (D, d_out), M, K, 1, skip, y.float()).to(dtype=torch.float64)
    for weight in sae.parameters().values():
        weight += 0.1 * torch.randn(weight.shape, generator=g, dtype=torch.float64)
    return sae, x, y


def pre_activations(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ w["W_enc"].T + w["b_enc"]


def chosen(kind: str, pre: Tensor) -> Tensor:
    positive = pre.relu()
    if kind == "topk":
        return torch.where(positive >= positive.topk(K).values[:, -1:], positive, 0)
    if kind == "batchtopk":
        return torch.where(positive >= positive.flatten().topk(len(pre) * K).values[-1], positive, 0)
    return positive


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [D_OUT, D])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_autograd(kind: str, d_out: int, skip: bool) -> None:
    sae, x, y = example(kind, skip, d_out)
    dead = torch.arange(M) % 5 == 0
    auxk = None if kind == "relu" else AuxK(dead, 6, 0.4)
    loss, gradient = sae.loss_and_gradient(x, Objective(total_variance(y), B, auxk, 0.0, target=y))
    w = {name: weight.clone().requires_grad_() for name, weight in sae.parameters().items()}
    pre = pre_activations(w, x)
    residual = chosen(kind, pre) @ w["W_dec"] + w["b_dec"] - y + (x @ w["W_skip"].T if skip else 0)
    fvu = residual.square().sum() / total_variance(y)
    total = fvu
    if auxk is not None:
        values = pre.relu() * dead
        kept = torch.where(values >= values.topk(6).values[:, -1:], values, 0)
        total = fvu + 0.4 * (kept @ w["W_dec"] + residual.detach()).square().sum() / total_variance(y)
    total.backward()  # type: ignore[no-untyped-call]
    assert float(loss.fvu) == pytest.approx(float(fvu.detach()))
    assert set(gradient) == set(w)
    for name, weight in w.items():
        torch.testing.assert_close(
            gradient[name], weight.grad, rtol=1e-9, atol=1e-12, msg=partial("{}: {}".format, name)
        )
    with torch.no_grad():
        if kind == "topk":
            torch.testing.assert_close(sae.reconstruct(x), residual + y)


def test_kernels_take_two_widths() -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(B, K, generator=g)
    latents = torch.stack([torch.randperm(M, generator=g)[:K] for _ in range(B)])
    residual, centred = torch.randn(B, D_OUT, generator=g), torch.randn(B, D, generator=g)
    sources = values, values.flip(0).contiguous(), latents, residual, centred, 0.7, M
    for a, b in zip(weight_gradients(*sources), plain.weight_gradients(*sources), strict=True):
        torch.testing.assert_close(a, b)


# --- training -----------------------------------------------------------------------------------------------


class Planted:
    """Steps of x [B, D], and with ``matrix`` of y = x matrix^T."""

    def __init__(self, matrix: Tensor | None, steps: int = 300, fail_at: int | None = None) -> None:
        self.matrix, self.steps, self.fail_at = matrix, steps, fail_at
        self.fingerprint, self.hookpoint = "planted", "planted" if matrix is None else "planted-out"

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        if step == self.fail_at:
            raise Terminated
        x = torch.randn(256, D, generator=torch.Generator().manual_seed(step))
        return x if self.matrix is None else x @ self.matrix.T + 1


def train(folder: Path, skip: bool = True, steps: int = 300, fail_at: int | None = None, kind: str = "topk") -> Sae:
    matrix = torch.randn(D_OUT, D, generator=torch.Generator().manual_seed(9))
    x, y = Planted(None, steps, fail_at), Planted(matrix, steps)
    training = TrainingSettings(
        architecture=kind, num_latents=M, k=1, tokens=steps * 256, batch_tokens=256, learning_rate=0.02, skip=skip,
        checkpoint_steps=7, warmup_steps=1, precision="float32",
    )  # fmt: skip
    sae = draw_transcoder(ARCHITECTURES[kind], (D, D_OUT), M, 1, 0, skip, y[0])
    train_groups([Group(x, [sae], training, [folder / "run" / "training-state"], y)])
    return sae


def test_the_skip_connection_learns_a_linear_map(tmp_path: Path) -> None:
    sae = train(tmp_path / "skip")
    x = Planted(None)[1000]
    y = Planted(torch.randn(D_OUT, D, generator=torch.Generator().manual_seed(9)))[1000]
    fvu = float((sae.reconstruct(x) - y).square().sum()) / total_variance(y)
    plain_sae = train(tmp_path / "plain", skip=False)
    without = float((plain_sae.reconstruct(x) - y).square().sum()) / total_variance(y)
    assert fvu < 0.01
    assert without > 10 * fvu


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_resumed_training_gives_equal_weights(kind: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", steps=30, kind=kind)
    with pytest.raises(Terminated):
        train(tmp_path / "killed", steps=30, fail_at=17, kind=kind)
    resumed = train(tmp_path / "killed", steps=30, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(whole.weights().values(), resumed.weights().values(), strict=True))


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [D_OUT, D])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in sorted(ARCHITECTURES) for name in FORMATS if FORMATS[name].has(kind, True)],
)
def test_checkpoints_keep_transcoders(kind: str, name: str, d_out: int, skip: bool, tmp_path: Path) -> None:
    sae = example(kind, skip, d_out)[0].to(dtype=torch.float32)
    save_sae(tmp_path, sae, format_=FORMATS[name])
    found = load_sae(tmp_path)
    assert found.transcodes
    x = torch.randn(50, D)
    torch.testing.assert_close(found.reconstruct(x), sae.reconstruct(x))
    assert (found.W_skip is not None) == skip


def test_sparsify_files_that_disagree_are_refused(tmp_path: Path) -> None:
    save_sae(tmp_path, example("topk")[0])
    config = read_json(tmp_path / "cfg.json")
    for change, match in (
        ({"skip_connection": False}, "skip_connection is not set, but sae.safetensors has W_skip"),
        ({"transcode": False}, "an autoencoder with a skip connection"),
        ({"transcode": "yes"}, "transcode = 'yes' is neither true nor false"),
        ({"d_out": D}, "W_dec"),
    ):
        write_json(tmp_path / "cfg.json", {**config, **change})
        with pytest.raises(BadInput, match=match):
            load_sae(tmp_path)


def test_saelens_transcoders_have_only_the_usual_input(tmp_path: Path) -> None:
    save_sae(tmp_path, example("relu")[0], format_=FORMATS["SAELens"])
    config = read_json(tmp_path / "cfg.json")
    assert config["architecture"] == "skip_transcoder"
    write_json(tmp_path / "cfg.json", {**config, "normalize_activations": "layer_norm"})
    with pytest.raises(BadInput, match=r"normalize_activations = 'layer_norm' is not supported in a transcoder"):
        load_sae(tmp_path)


def test_formats_without_transcoders_refuse_them(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="transcoder cannot be written in dictionary_learning's format"):
        save_sae(tmp_path, example("topk")[0], format_=FORMATS["dictionary_learning"])


# --- alignment ----------------------------------------------------------------------------------------------


def test_alignment_takes_two_widths() -> None:
    a = example("topk")[0]
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    W_enc, W_dec = a.W_enc.numpy(), a.W_dec.numpy()
    found = align(W_enc, W_dec, W_enc[order], W_dec[order])
    assert (found.a["encoder_partner"].to_numpy() == np.argsort(order.numpy())).all()
    assert (found.a["decoder_partner"].to_numpy() == np.argsort(order.numpy())).all()
    turned = rotate_sibling((W_enc, W_dec), ("a", "b"))
    assert [t.shape for t in turned] == [W_enc.shape, W_dec.shape]
    np.testing.assert_allclose(turned[1] @ turned[1].T, W_dec @ W_dec.T, atol=1e-5)


# --- the commands -------------------------------------------------------------------------------------------


def test_the_commands_take_transcoders(short: Path, tmp_path: Path) -> None:
    flags = ("--recipe", short, "--hookpoint", "layers.1.mlp:in", "--target", "layers.1.mlp", "--root", tmp_path)
    ran = cli("train", "--name", "t", *flags, "--skip", "--seeds", 0, 1, "--no-controls").well()
    assert "layers.1.mlp:in → layers.1.mlp" in ran.err
    run = Run("t_a", tmp_path)
    assert run.record["target"] == "layers.1.mlp"
    sae = run.sae()
    assert isinstance(sae, TopKSae)
    assert sae.transcodes
    assert float(sae.W_skip.abs().max()) > 0  # type: ignore[union-attr]
    cli("align", "t_a", "t_b", "--root", tmp_path).well()
    cli("harvest", "--sae", "t_a", "--root", tmp_path).well()
    cli("export", "--sae", "t_a", "--format", "sparsify", "--to", tmp_path / "out", "--root", tmp_path).well()
    join = ("import", "--from", tmp_path / "out", "--name", "theirs", "--study", "s", *flags[:4])
    cli(*join, "--root", tmp_path).failed_in_one_line("is a transcoder; name its target (--target)")
    cli(*join, *flags[4:]).well()
    cli("harvest", "--sae", "theirs", "--root", tmp_path).well()
    plain_train = ("train", "--name", "u", "--recipe", short, "--root", tmp_path, "--skip")
    cli(*plain_train).failed_in_one_line("training.skip = true is for transcoders; give subject.target")
