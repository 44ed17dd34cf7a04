"""Checkpoints: written ones can be read, and each error says why in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.common.errors import BadInput, NotFound, UserError
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.checkpoint import load_sae, save_sae

D, M, K = 8, 24, 3


@pytest.fixture
def sae() -> TopKSae:
    made = TopKSae.init(D, M, K, seed=5, x_sample=torch.randn(40, D) + 1)
    made.b_enc += torch.randn(M) * 0.1
    return made


@pytest.fixture
def folder(tmp_path: Path, sae: TopKSae) -> Path:
    save_sae(tmp_path / "run_a", sae)
    return tmp_path / "run_a"


def configure(folder: Path, **values: Any) -> None:
    path = folder / "cfg.json"
    kept = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value != "DROP"}))


def test_round_trip_is_exact(folder: Path, sae: TopKSae) -> None:
    read = load_sae(folder)
    assert (read.d_in, read.num_latents, read.k) == (D, M, K)
    for name, weight in sae.parameters().items():
        assert torch.equal(read.parameters()[name], weight)
    x = torch.randn(20, D)
    assert all(map(torch.equal, read.encode(x), sae.encode(x)))


def test_the_files_are_those_of_sparsify(folder: Path) -> None:
    shapes = {name: tuple(t.shape) for name, t in load_file(folder / "sae.safetensors").items()}
    assert shapes == {"encoder.weight": (M, D), "encoder.bias": (M,), "W_dec": (M, D), "b_dec": (D,)}
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["d_in"], config["num_latents"], config["k"], config["activation"]) == (D, M, K, "topk")
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae.safetensors"]


@pytest.mark.parametrize("width", [0, "DROP"])
def test_zero_width_is_the_expansion_factor_times_d(folder: Path, width: Any) -> None:
    configure(folder, num_latents=width, expansion_factor=3, from_the_future=[1, 2])
    assert load_sae(folder).num_latents == M


def test_half_precision_is_read_as_float32(folder: Path, sae: TopKSae) -> None:
    path = folder / "sae.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    read = load_sae(folder)
    assert read.dtype == torch.float32
    assert torch.equal(read.W_enc, sae.W_enc.bfloat16().float())


def stored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "sae.safetensors")
        change(tensors)
        save_file(tensors, folder / "sae.safetensors")

    return apply


def cut(folder: Path) -> None:
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[UserError], str]] = {
    "no config": (lambda f: (f / "cfg.json").unlink(), NotFound, "not an SAE checkpoint: it has no cfg.json"),
    "no weights": (
        lambda f: (f / "sae.safetensors").unlink(),
        NotFound,
        "incomplete SAE checkpoint: sae.safetensors or",
    ),
    "cut short": (cut, BadInput, "damaged or cut short"),
    "empty": (lambda f: (f / "sae.safetensors").write_bytes(b""), BadInput, "damaged or cut short"),
    "other keys": (stored(lambda t: t.update(W_enc=t.pop("encoder.weight"))), BadInput, "encoder.weight missing"),
    "wrong shape": (stored(lambda t: t.update(b_dec=torch.zeros(D + 1))), BadInput, r"b_dec has shape \[9\].*\[8\]"),
    "not a number": (stored(lambda t: t["W_dec"].fill_(torch.nan)), BadInput, "W_dec holds NaN"),
    "complex numbers": (
        stored(lambda t: t.update(b_dec=t["b_dec"].to(torch.complex64))),
        BadInput,
        "b_dec has dtype C64",
    ),
    "four bits": (
        stored(lambda t: t.update(b_dec=torch.zeros(D // 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))),
        BadInput,
        "b_dec has dtype F4",
    ),
    "skip": (stored(lambda t: t.update(W_skip=torch.zeros(D, D))), BadInput, "has W_skip"),
    "no json": (lambda f: (f / "cfg.json").write_text("{"), BadInput, "not valid JSON"),
    "binary json": (lambda f: (f / "cfg.json").write_bytes(b"\xff\xfe"), BadInput, "not valid JSON"),
    "a list": (lambda f: (f / "cfg.json").write_text("[]"), BadInput, "no JSON object"),
    "no d_in": (lambda f: configure(f, d_in="DROP"), BadInput, "'d_in' is missing"),
    "k in words": (lambda f: configure(f, k="many"), BadInput, "k = 'many'"),
    "k too large": (lambda f: configure(f, k=M + 1), BadInput, "more than the 24 latents"),
    "skip in an SAE": (lambda f: configure(f, skip_connection=True), BadInput, "has no W_skip"),
    "groupmax": (lambda f: configure(f, activation="groupmax"), BadInput, "activation = 'groupmax'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_reported_in_one_line(folder: Path, name: str) -> None:
    damage, error, match = DAMAGE[name]
    damage(folder)
    with pytest.raises(error, match=match) as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)
    assert "run_a" in str(caught.value)


def test_a_folder_above_the_checkpoint_names_those_below(folder: Path) -> None:
    with pytest.raises(NotFound, match="but holds checkpoints in run_a; name one of them"):
        load_sae(folder.parent)
    with pytest.raises(NotFound, match="does not exist"):
        load_sae(folder / "nowhere")
