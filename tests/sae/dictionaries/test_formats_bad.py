"""Checkpoints that cannot be read: each error is one line that names it, and no code in it runs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionaries import ARCHITECTURES, D, M, random_sae
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from their_files import CLASSES, learned_files, learned_tensors, saelens_files, saelens_tensors
from torch import Tensor

from sae.common.errors import BadInput, NotFound, UserError
from sae.dictionaries.checkpoint import load_sae, save_sae
from sae.dictionaries.formats import FORMATS


class Malicious:
    """What a pickle can do: call anything while it is opened."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Malicious, "ran", True)


def saelens_bad(folder: Path, change: dict[str, Any] | None = None, **tensors: Tensor | None) -> None:
    stored: dict[str, Tensor | None] = {**saelens_tensors("standard", 0), **tensors}
    config = {"architecture": "standard", **(change or {})}
    saelens_files(folder, {n: t for n, t in stored.items() if t is not None}, **config)


def learned_bad(folder: Path, kind: str = "AutoEncoderTopK", trainer: Any = None, **tensors: Any) -> None:
    state = {**learned_tensors("AutoEncoderTopK"), **tensors}
    learned_files(folder, kind, {n: v for n, v in state.items() if v is not None}, **(trainer or {}))


def replaced(folder: Path, name: str, content: bytes) -> None:
    (saelens_bad if name.startswith("sae_") else learned_bad)(folder)
    (folder / name).write_bytes(content)


def cut(folder: Path, name: str) -> None:
    (saelens_bad if name.startswith("sae_") else learned_bad)(folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-50])


def evil(folder: Path) -> None:
    learned_bad(folder, decoder=Malicious())


def old_evil(folder: Path) -> None:
    replaced(folder, "ae.pt", pickle.dumps({"b_dec": Malicious()}))


def unknown(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.bin").touch()


def several(folder: Path) -> None:
    saelens_bad(folder / "layer_1")
    learned_bad(folder / "x" / "trainer_0")


def without(folder: Path, name: str) -> None:
    learned_bad(folder)
    (folder / name).unlink()


def learned_nan(folder: Path) -> None:
    changed: dict[str, Any] = {"encoder.bias": NAN}
    learned_bad(folder, **changed)


def both(folder: Path) -> None:
    saelens_bad(folder)
    learned_bad(folder)


NAN = torch.full((M,), float("nan"))
TOPK = {"architecture": "topk"}
BAD: dict[str, tuple[Callable[[Path], object], type[UserError], str]] = {
    "nothing there": (lambda _: None, NotFound, "does not exist"),
    "empty": (lambda f: f.mkdir(), NotFound, r"it is empty \(known are sparsify: cfg.json, sae.safetensors; SAELens"),
    "unknown": (unknown, NotFound, "known format: it holds model.bin"),
    "a file": (lambda f: f.touch(), NotFound, "it is a file"),
    "several": (
        several,
        NotFound,
        "but holds checkpoints in layer_1, x/trainer_0; name one of them",
    ),
    "two formats": (both, BadInput, "sae_weights.safetensors and ae.pt, weights in two formats"),
    "another architecture": (lambda f: saelens_bad(f, {"architecture": "temporal"}), BadInput, "'temporal' cannot be"),
    "a transcoder": (lambda f: saelens_bad(f, {"architecture": "transcoder"}), BadInput, "'d_out' is missing"),
    "tanh": (lambda f: saelens_bad(f, {"activation_fn_str": "tanh-relu"}), BadInput, "standard with tanh-relu"),
    "no k": (lambda f: saelens_bad(f, TOPK), BadInput, "'k' is missing"),
    "k > M": (lambda f: saelens_bad(f, {**TOPK, "k": M + 1}), BadInput, "k = 21 is more than the 20 latents"),
    "no d_sae": (lambda f: saelens_bad(f, {"d_sae": None}), BadInput, "d_sae = None is not a positive"),
    "layer norm": (lambda f: saelens_bad(f, {"normalize_activations": "layer_norm"}), BadInput, "'layer_norm' is not"),
    "whitening": (
        lambda f: saelens_bad(f, {"normalize_activations": "covariance_whitening"}),
        BadInput,
        "is not a constant that weights can hold",
    ),
    "an unknown factor": (
        lambda f: saelens_bad(f, {"normalize_activations": "expected_average_only_in"}),
        BadInput,
        "no activation_scaler.json gives the factor",
    ),
    "fine-tuned": (lambda f: saelens_bad(f, scaling_factor=torch.rand(M)), BadInput, "scaling_factor is not 1"),
    "missing keys": (lambda f: saelens_bad(f, b_enc=None), BadInput, r"b_enc missing \(it holds W_dec, W_enc, b_dec\)"),
    "wrong shapes": (lambda f: saelens_bad(f, {"d_sae": M + 2}), BadInput, r"W_enc has shape \[6, 20\].*\[6, 22\]"),
    "not transposed": (lambda f: saelens_bad(f, W_enc=torch.zeros(M, D)), BadInput, r"W_enc has shape \[20, 6\]"),
    "NaN": (lambda f: saelens_bad(f, b_enc=NAN), BadInput, "b_enc holds NaN"),
    "cut short": (lambda f: cut(f, "sae_weights.safetensors"), BadInput, "damaged or cut short"),
    "no tensors": (lambda f: replaced(f, "sae_weights.safetensors", b"??"), BadInput, "damaged or cut short"),
    "malicious": (evil, BadInput, "refused by PyTorch's weights-only reader.*can run code"),
    "malicious, older": (old_evil, BadInput, "refused by PyTorch's weights-only reader.*can run code"),
    "no pickle": (lambda f: replaced(f, "ae.pt", b"<!DOCTYPE html>"), BadInput, "weights-only reader"),
    "an empty pickle": (lambda f: replaced(f, "ae.pt", b""), BadInput, "is damaged or not a PyTorch file"),
    "half a pickle": (lambda f: cut(f, "ae.pt"), BadInput, "is damaged or not a PyTorch file"),
    "a list of tensors": (lambda f: learned_files(f, CLASSES[0], [NAN]), BadInput, "no tensors by name"),
    "an unknown class": (lambda f: learned_bad(f, "CrossCoder"), BadInput, "dict_class 'CrossCoder' cannot be opened"),
    "no class": (lambda f: learned_bad(f, trainer={"dict_class": None}), BadInput, "trainer.dict_class is missing"),
    "another class": (lambda f: learned_bad(f, "JumpReluAutoEncoder"), BadInput, "W_enc is missing or not a matrix"),
    "too few tensors": (lambda f: learned_bad(f, b_dec=None), BadInput, "b_dec missing"),
    "two widths": (
        lambda f: learned_bad(f, trainer={"dict_size": 7}),
        BadInput,
        r"\[20, 6\], but config.json says \[7",
    ),
    "two k": (lambda f: learned_bad(f, trainer={"k": 5}), BadInput, "says k = 5, ae.pt says 3"),
    "learned k > M": (
        lambda f: learned_bad(f, trainer={"k": 50}, k=torch.tensor(50)),
        BadInput,
        "k = 50 is more than the 20 latents",
    ),
    "learned NaN": (learned_nan, BadInput, "encoder.bias holds NaN"),
    "no threshold yet": (
        lambda f: learned_bad(f, "BatchTopKSAE", threshold=torch.tensor(-1.0)),
        BadInput,
        "its threshold was never measured",
    ),
    "a flag that is a number": (
        lambda f: saelens_bad(f, {"apply_b_dec_to_input": -1}),
        BadInput,
        "apply_b_dec_to_input = -1 is neither true nor false",
    ),
    "no description": (lambda f: without(f, "config.json"), NotFound, "it has no config.json"),
    "no weights": (lambda f: without(f, "ae.pt"), NotFound, "ae.pt is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_reported_in_one_line(tmp_path: Path, name: str) -> None:
    make, error, match = BAD[name]
    make(tmp_path / "theirs")
    with pytest.raises(error, match=match) as caught:
        load_sae(tmp_path / "theirs")
    assert "\n" not in str(caught.value)
    assert "theirs" in str(caught.value)
    assert not Malicious.ran


KEYS: dict[str, tuple[str, ...]] = {
    "sparsify": ("d_in", "k", "num_latents", "activation", "transcode", "architecture", "expansion_factor"),
    "SAELens": (
        *("architecture", "d_in", "d_sae", "k", "metadata", "apply_b_dec_to_input", "normalize_activations"),
        *("rescale_acts_by_decoder_norm", "activation_fn_str", "activation_fn", "activation_fn_kwargs", "dtype"),
    ),
    "dictionary_learning": ("dict_class", "k", "activation_dim", "dict_size", "target_l0", "trainer"),
    "native": ("sae_autointerp", "architecture", "k", "shapes"),
}
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(ARCHITECTURES),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["k", "target_l0", "training_architecture"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), architecture=st.sampled_from(ARCHITECTURES))
def test_any_description_is_read_or_refused(tmp_path: Path, data: st.DataObject, architecture: str) -> None:
    kinds = [name for name, kind in FORMATS.items() if kind.has(architecture)]
    name = data.draw(st.sampled_from(kinds))
    folder = tmp_path / name / architecture
    save_sae(folder, random_sae(architecture), format_=FORMATS[name])
    path = folder / FORMATS[name].config
    config = json.loads(path.read_text())
    changed = data.draw(st.dictionaries(st.sampled_from(KEYS[name]), ANYTHING, min_size=1, max_size=2))
    if name == "dictionary_learning" and "trainer" not in changed:
        changed = {"trainer": {**config["trainer"], **changed}}
    path.write_text(json.dumps({**config, **changed}))
    try:
        read = load_sae(folder)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert (read.num_latents, read.d_in) == (M, D)
    assert "\n" not in message
