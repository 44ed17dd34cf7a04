"""The formats: files written by hand, with what they mean worked out in float64 by the formulas of their programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionaries import ARCHITECTURES, D, K, M, check_alike, dense, random_sae, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from their_files import CLASSES, VECTORS, learned_files, learned_tensors, saelens_files, saelens_tensors
from torch import Tensor

from sae.common.errors import BadInput
from sae.dictionaries.architectures.batchtopk import BatchTopKSae
from sae.dictionaries.architectures.jumprelu import JumpReluSae
from sae.dictionaries.checkpoint import detect_format, format_named, load_sae, native_format, open_sae, save_sae
from sae.dictionaries.formats import FORMATS, About
from sae.dictionaries.sae import Sae

PAIRS = [(a, f) for f, kind in FORMATS.items() for a in ARCHITECTURES if kind.has(a)]


def opened(folder: Path) -> Sae:
    """The dictionary in ``folder``, computing in float64."""
    return load_sae(folder).to(dtype=torch.float64)


def x64() -> Tensor:
    return tokens().double()


# --- all formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "name"), PAIRS)
@pytest.mark.parametrize("unit", [True, False])
def test_every_format_round_trip_keeps_the_function(tmp_path: Path, architecture: str, name: str, unit: bool) -> None:
    sae = random_sae(architecture, unit=unit)
    save_sae(tmp_path / "out", sae, About("a/model", "layers.1.mlp", 128, 3), FORMATS[name])
    found, kind = open_sae(tmp_path / "out")
    assert kind.name == name
    assert (found.sae.architecture, found.sae.k, found.sae.num_latents, found.sae.d_in) == (architecture, K, M, D)
    x = tokens()
    check_alike(found.sae, x, dense(sae, x), sae.reconstruct(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_native_format_keeps_every_bit(tmp_path: Path, architecture: str) -> None:
    sae = random_sae(architecture, unit=False)
    save_sae(tmp_path, sae)
    assert detect_format(tmp_path).name == ("sparsify" if architecture == "topk" else "SAELens")
    read = load_sae(tmp_path)
    assert read.weights().keys() == sae.weights().keys()
    for name, weight in sae.weights().items():
        assert torch.equal(read.weights()[name], weight), name


@pytest.mark.parametrize("name", list(FORMATS))
def test_topk_keeps_every_bit_in_every_format(tmp_path: Path, name: str) -> None:
    sae = random_sae("topk", unit=False)
    save_sae(tmp_path, sae, format_=FORMATS[name])
    read = load_sae(tmp_path)
    assert all(torch.equal(read.weights()[n], w) for n, w in sae.weights().items())


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
@pytest.mark.parametrize("name", ["SAELens", "dictionary_learning"])
def test_an_unknown_k_stays_unknown(tmp_path: Path, architecture: str, name: str) -> None:
    save_sae(tmp_path, random_sae(architecture, k=None), format_=FORMATS[name])
    assert load_sae(tmp_path).k is None


def test_sparsify_has_topk_alone(tmp_path: Path) -> None:
    for architecture in sorted(set(ARCHITECTURES) - {"topk"}):
        assert native_format(architecture).name == "SAELens"
        with pytest.raises(
            BadInput, match=r"cannot be written in sparsify's format, which supports only topk; choose saelens or"
        ):
            save_sae(tmp_path, random_sae(architecture), format_=FORMATS["sparsify"])
    assert not list(tmp_path.iterdir())
    assert format_named("saelens").name == format_named("SAELens").name == "SAELens"
    with pytest.raises(BadInput, match="'onnx' is not known; choose sparsify, saelens, dictionary_learning"):
        format_named("onnx")


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"topk"}))
def test_another_architecture_is_never_read_as_topk(tmp_path: Path, architecture: str) -> None:
    save_sae(tmp_path, random_sae(architecture))
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "sae.safetensors")
    with pytest.raises(BadInput, match=r"architecture = .*only TopK") as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value)


# --- SAELens ----------------------------------------------------------------------------------------------


def saelens_formula(
    tensors: dict[str, Tensor], x: Tensor, architecture: str, *, centre: bool, rescale: bool, factor: float, k: int
) -> tuple[Tensor, Tensor]:
    """Activations [B, M] and reconstruction [B, D] as SAELens defines them, in float64."""
    w = {name: t.double() for name, t in tensors.items()}
    length = w["W_dec"].norm(dim=1) if rescale else torch.ones(M, dtype=torch.float64)
    x = x * factor - (w["b_dec"] if centre else 0)
    if architecture == "gated":
        gate = x @ w["W_enc"] + w["b_gate"] > 0
        acts = gate * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    else:
        pre = (x @ w["W_enc"] + w["b_enc"]) * length
        acts = pre.relu()
        if architecture == "jumprelu":
            acts = acts * (pre > w["threshold"])
        if architecture == "topk":
            values, chosen = acts.topk(k, dim=1)
            acts = torch.zeros_like(acts).scatter(1, chosen, values)
    return acts, ((acts / length) @ w["W_dec"] + w["b_dec"]) / factor


@pytest.mark.parametrize("architecture", VECTORS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_saelens_6(tmp_path: Path, architecture: str, data: st.DataObject) -> None:
    centre = data.draw(st.booleans())
    rescale = architecture == "topk" and data.draw(st.booleans())
    factor = data.draw(st.sampled_from([1.0, 0.25, 3.7]))
    tensors = saelens_tensors(architecture, data.draw(st.integers(0, 99)))
    folder = saelens_files(
        tmp_path,
        tensors,
        architecture=architecture,
        apply_b_dec_to_input=centre,
        normalize_activations="none" if factor == 1.0 else "expected_average_only_in",
        metadata={"sae_lens_version": "6.20.0"},
        **({"k": K, "rescale_acts_by_decoder_norm": rescale} if architecture == "topk" else {}),
    )
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    x = x64()
    expected = saelens_formula(tensors, x, architecture, centre=centre, rescale=rescale, factor=factor, k=K)
    check_alike(opened(folder), x, *expected)
    folded = " ".join(open_sae(folder)[0].folded)
    assert ("apply_b_dec_to_input" in folded) == (not centre)
    assert ("rescale" in folded) == rescale
    assert ("normalize_activations" in folded) == (factor != 1.0)


@pytest.mark.parametrize(
    ("architecture", "older"),
    [
        ("standard", {"activation_fn_str": "relu", "architecture": "standard"}),
        ("standard", {"activation_fn_str": "relu"}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}),
        ("gated", {"activation_fn_str": "relu", "architecture": "gated", "activation_fn_kwargs": {}}),
        ("jumprelu", {"activation_fn_str": "relu", "architecture": "jumprelu", "finetuning_scaling_factor": False}),
    ],
)
@pytest.mark.parametrize("centre", [True, False])
def test_saelens_before_6(tmp_path: Path, architecture: str, older: dict[str, Any], centre: bool) -> None:
    tensors = saelens_tensors(architecture, 4)
    flat = {"hook_point": "blocks.1.hook_resid_pre", "model_name": "gpt2-small", "apply_b_dec_to_input": centre}
    folder = saelens_files(tmp_path, {**tensors, "scaling_factor": torch.ones(M)}, **flat, **older)
    expected = saelens_formula(tensors, x64(), architecture, centre=centre, rescale=False, factor=1.0, k=K)
    check_alike(opened(folder), x64(), *expected)


def test_saelens_subtracts_b_dec_by_default(tmp_path: Path) -> None:
    tensors = saelens_tensors("standard", 1)
    expected = saelens_formula(tensors, x64(), "standard", centre=True, rescale=False, factor=1.0, k=K)
    check_alike(opened(saelens_files(tmp_path, tensors, architecture="standard")), x64(), *expected)


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in saelens_tensors("standard", 1).items()}
    read = load_sae(saelens_files(tmp_path, tensors, architecture="standard", dtype="bfloat16"))
    assert read.dtype == torch.float32
    assert torch.equal(read.W_enc, tensors["W_enc"].T.float())


def test_a_decoder_row_of_zeros_never_fires(tmp_path: Path) -> None:
    tensors = saelens_tensors("topk", 2)
    tensors["W_dec"][5] = 0
    config: dict[str, Any] = {"architecture": "topk", "k": M, "rescale_acts_by_decoder_norm": True}
    sae = load_sae(saelens_files(tmp_path, tensors, **config))
    assert (dense(sae, tokens())[:, 5] == 0).all()
    assert torch.isfinite(sae.reconstruct(tokens())).all()


def test_batchtopk_is_stored_as_jumprelu_with_one_threshold(tmp_path: Path) -> None:
    tensors = {**saelens_tensors("jumprelu", 3), "threshold": torch.full((M,), 0.8)}
    trained = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 2.6}}
    read = load_sae(saelens_files(tmp_path / "a", tensors, architecture="jumprelu", metadata=trained))
    assert isinstance(read, BatchTopKSae)
    assert (read.k, float(read.threshold)) == (3, pytest.approx(0.8))
    plain = load_sae(saelens_files(tmp_path / "b", tensors, architecture="jumprelu"))
    assert isinstance(plain, JumpReluSae)
    assert torch.equal(dense(plain, tokens()), dense(read, tokens()))


def test_a_batchtopk_training_checkpoint(tmp_path: Path) -> None:
    tensors = saelens_tensors("standard", 3)
    stored = {**tensors, "topk_threshold": torch.tensor(0.8, dtype=torch.float64)}
    config: dict[str, Any] = {"architecture": "batchtopk", "k": 2, "rescale_acts_by_decoder_norm": True}
    folder = saelens_files(tmp_path, stored, **config)
    threshold = {**tensors, "threshold": torch.full((M,), 0.8)}
    expected = saelens_formula(threshold, x64(), "jumprelu", centre=True, rescale=True, factor=1.0, k=K)
    check_alike(opened(folder), x64(), *expected)


def test_threshold_of_zero_or_less_is_plain_relu(tmp_path: Path) -> None:
    tensors = {**saelens_tensors("jumprelu", 3), "threshold": torch.linspace(-1, 0, M)}
    expected = saelens_formula(tensors, x64(), "standard", centre=True, rescale=False, factor=1.0, k=K)
    check_alike(opened(saelens_files(tmp_path, tensors, architecture="jumprelu")), x64(), *expected)


# --- dictionary_learning ----------------------------------------------------------------------------------


def learned_formula(kind: str, state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction as dictionary_learning's class defines them after its loader, in float64."""
    w = {name: t.double() for name, t in state.items()}
    encoder = w["W_enc"] if "W_enc" in w else w["encoder.weight"].T
    decoder = w["W_dec"] if "W_dec" in w else w["decoder.weight"].T
    centre = next(w[name] for name in ("b_dec", "bias", "decoder.bias", "decoder_bias") if name in w)
    bias = next((w[name] for name in ("b_enc", "encoder.bias") if name in w), torch.zeros(M, dtype=torch.float64))
    if kind == "AutoEncoder":
        length = decoder.norm(dim=1)
        encoder, bias, decoder = encoder * length, bias * length, decoder / length[:, None]
    subtracted = 0 if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else centre
    pre = (x - subtracted) @ encoder + bias
    if kind == "GatedAutoEncoder":
        acts = (pre + w["gate_bias"] > 0) * (w["r_mag"].exp() * pre + w["mag_bias"]).relu()
    elif kind == "AutoEncoderTopK":
        values, chosen = pre.relu().topk(K, dim=1)
        acts = torch.zeros_like(pre).scatter(1, chosen, values)
    else:
        acts = pre.relu() * (pre > w["threshold"] if "threshold" in w else 1)
    return acts, acts @ decoder + centre


@pytest.mark.parametrize("kind", CLASSES)
def test_dictionary_learning(tmp_path: Path, kind: str) -> None:
    state = learned_tensors(kind)
    check_alike(opened(learned_files(tmp_path, kind, state)), x64(), *learned_formula(kind, state, x64()))


@pytest.mark.parametrize("kind", sorted(set(CLASSES) - {"AutoEncoderTopK"}))
def test_an_interrupted_run_is_multiplied_by_its_factor(tmp_path: Path, kind: str) -> None:
    state, factor = learned_tensors(kind), 2.5
    interrupted = {"step": 7, "ae": state, "norm_factor": factor, "config": {"k": K}, "optimizer": {}}
    activations, reconstruction = learned_formula(kind, state, x64() / factor)
    sae = opened(learned_files(tmp_path, kind, interrupted))
    check_alike(sae, x64(), activations * factor, reconstruction * factor)


def test_an_interrupted_run_without_a_factor(tmp_path: Path) -> None:
    state = learned_tensors("AutoEncoderTopK")
    folder = learned_files(tmp_path, "AutoEncoderTopK", {"ae": state, "norm_factor": None})
    check_alike(opened(folder), x64(), *learned_formula("AutoEncoderTopK", state, x64()))


def test_sizes_may_be_left_to_the_weights(tmp_path: Path) -> None:
    folder = learned_files(tmp_path, "AutoEncoderTopK", learned_tensors("AutoEncoderTopK"))
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"}}))
    assert (load_sae(folder).num_latents, load_sae(folder).k) == (M, K)


def test_no_reader_changes_what_it_reads(tmp_path: Path) -> None:
    for name, kind in FORMATS.items():
        save_sae(tmp_path / name, random_sae("topk"), format_=kind)
        before = {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        load_sae(tmp_path / name)
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == before
    assert load_file(tmp_path / "SAELens" / "sae_weights.safetensors")["W_enc"].shape == (D, M)
