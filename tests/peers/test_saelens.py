"""SAELens opens what is written for it and encodes alike, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionaries import ARCHITECTURES, D, K, M, check_alike, random_sae, tokens
from torch import Tensor

from sae.common.errors import BadInput
from sae.dictionaries.architectures.batchtopk import BatchTopKSae
from sae.dictionaries.checkpoint import load_sae, save_sae
from sae.dictionaries.formats import FORMATS, About

pytestmark = pytest.mark.peers

SIZES = {"d_in": D, "d_sae": M}


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    import sae_lens

    return sae_lens


def shaken(module: Any, seed: int = 0) -> Any:
    """``module`` with random numbers in every parameter; thresholds above zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(drawn.abs() if "threshold" in name else drawn)
    return module


def their_encode(theirs: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        acts = theirs.encode(x)
        return acts, theirs.decode(acts)


def opened_by_them(sae_lens: Any, folder: Path) -> Any:
    return sae_lens.SAE.load_from_disk(folder, dtype="float32")


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_opens_ours_and_encodes_alike(sae_lens: Any, tmp_path: Path, architecture: str, unit: bool) -> None:
    sae = random_sae(architecture, unit=unit)
    save_sae(tmp_path, sae, About("a/model", "layers.2.mlp", 128, 0), FORMATS["SAELens"])
    theirs = opened_by_them(sae_lens, tmp_path)
    check_alike(sae, tokens(), *their_encode(theirs, tokens()))
    wanted = {"relu": "standard", "batchtopk": "jumprelu"}.get(architecture, architecture)
    assert theirs.cfg.architecture() == wanted
    said = theirs.cfg.metadata
    assert (said.model_name, said.hook_name, said.context_size) == ("a/model", "layers.2.mlp", 128)


CONFIGS: list[tuple[str, str, dict[str, Any]]] = [
    ("StandardSAE", "StandardSAEConfig", {}),
    ("StandardSAE", "StandardSAEConfig", {"apply_b_dec_to_input": False}),
    ("GatedSAE", "GatedSAEConfig", {}),
    ("GatedSAE", "GatedSAEConfig", {"apply_b_dec_to_input": False}),
    ("JumpReLUSAE", "JumpReLUSAEConfig", {}),
    ("JumpReLUSAE", "JumpReLUSAEConfig", {"apply_b_dec_to_input": False}),
    ("TopKSAE", "TopKSAEConfig", {"k": K}),
    ("TopKSAE", "TopKSAEConfig", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ("TopKSAE", "TopKSAEConfig", {"k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
]


@pytest.mark.parametrize(("kind", "config", "values"), CONFIGS)
def test_what_it_saves_is_read_and_encodes_alike(
    sae_lens: Any, tmp_path: Path, kind: str, config: str, values: dict[str, Any]
) -> None:
    made = shaken(getattr(sae_lens, kind)(getattr(sae_lens, config)(**SIZES, **values)))
    made.save_model(tmp_path)
    theirs = opened_by_them(sae_lens, tmp_path)
    check_alike(load_sae(tmp_path), tokens(), *their_encode(theirs, tokens()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_its_precisions(sae_lens: Any, tmp_path: Path, dtype: str) -> None:
    made = shaken(sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**SIZES, dtype=dtype)))
    made.save_model(tmp_path)
    theirs = opened_by_them(sae_lens, tmp_path)
    check_alike(load_sae(tmp_path), tokens(), *their_encode(theirs, tokens()))


@pytest.mark.parametrize("rescale", [True, False])
def test_a_batchtopk_it_trained(sae_lens: Any, tmp_path: Path, rescale: bool) -> None:
    config = sae_lens.BatchTopKTrainingSAEConfig(**SIZES, k=2.4, rescale_acts_by_decoder_norm=rescale)
    training = shaken(sae_lens.BatchTopKTrainingSAE(config))
    training.topk_threshold.fill_(0.9)
    training.save_model(tmp_path / "checkpoint")
    training.save_inference_model(tmp_path / "final")
    theirs = opened_by_them(sae_lens, tmp_path / "final")
    assert theirs.cfg.architecture() == "jumprelu"
    for name in ("final", "checkpoint"):
        read = load_sae(tmp_path / name)
        assert isinstance(read, BatchTopKSae)
        assert read.k == 2
        check_alike(read, tokens(), *their_encode(theirs, tokens()))


@pytest.mark.parametrize("kind", ["Standard", "JumpReLU", "Gated", "TopK"])
def test_what_its_trainers_save_for_inference(sae_lens: Any, tmp_path: Path, kind: str) -> None:
    values = {"k": K} if kind == "TopK" else {}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(**SIZES, **values)
    shaken(getattr(sae_lens, f"{kind}TrainingSAE")(config)).save_inference_model(tmp_path)
    theirs = opened_by_them(sae_lens, tmp_path)
    check_alike(load_sae(tmp_path), tokens(), *their_encode(theirs, tokens()))


@pytest.mark.parametrize("rescale", [True, False])
def test_an_activation_factor_is_folded_into_the_weights(sae_lens: Any, tmp_path: Path, rescale: bool) -> None:
    config = sae_lens.TopKTrainingSAEConfig(
        **SIZES, k=K, normalize_activations="expected_average_only_in", rescale_acts_by_decoder_norm=rescale
    )
    training = shaken(sae_lens.TopKTrainingSAE(config))
    training.save_model(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.31}))
    x = tokens()
    with torch.no_grad():
        acts = training.encode(x * 0.31)  # what it computes while it trains
        check_alike(load_sae(tmp_path / "checkpoint"), x, acts, training.decode(acts) / 0.31)
    training.save_inference_model(tmp_path / "unfolded")
    with pytest.raises(BadInput, match=r"no activation_scaler\.json gives the factor; fold it"):
        load_sae(tmp_path / "unfolded")
    training.fold_activation_norm_scaling_factor(0.31)
    training.save_inference_model(tmp_path / "folded")
    theirs = opened_by_them(sae_lens, tmp_path / "folded")
    check_alike(load_sae(tmp_path / "folded"), x, *their_encode(theirs, x))
    acts, reconstruction = their_encode(theirs, x)
    # Its own folding, where pre-activations are scaled by the decoder's lengths, gives activations another scale.
    check_alike(load_sae(tmp_path / "checkpoint"), x, acts * 0.31 if rescale else acts, reconstruction)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_what_no_weights_can_hold_is_refused(sae_lens: Any, tmp_path: Path, normalisation: str) -> None:
    config = sae_lens.StandardSAEConfig(**SIZES, normalize_activations=normalisation)
    sae_lens.StandardSAE(config).save_model(tmp_path)
    with pytest.raises(BadInput, match=normalisation):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "older",
    [
        {"architecture": "standard", "activation_fn_str": "relu"},
        {"architecture": "standard", "activation_fn_str": "relu", "apply_b_dec_to_input": False},
        {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        {"architecture": "gated", "activation_fn_str": "relu"},
        {"architecture": "jumprelu", "activation_fn_str": "relu", "apply_b_dec_to_input": False},
    ],
)
def test_files_from_before_its_version_6(sae_lens: Any, tmp_path: Path, older: dict[str, Any]) -> None:
    """The flat description, beside weights as it has always written them; its loader of today reads it."""
    name = {"standard": "Standard", "gated": "Gated", "jumprelu": "JumpReLU"}[older["architecture"]]
    made = shaken(getattr(sae_lens, f"{name}SAE")(getattr(sae_lens, f"{name}SAEConfig")(**SIZES)))
    made.save_model(tmp_path)
    flat = {
        **SIZES,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_name": "blocks.3.hook_resid_pre",
        "hook_layer": 3,
        "hook_head_index": None,
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "prepend_bos": True,
        "normalize_activations": "none",
        "context_size": 128,
        "sae_lens_training_version": "3.22.1",
        **older,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(flat))
    theirs = opened_by_them(sae_lens, tmp_path)
    check_alike(load_sae(tmp_path), tokens(), *their_encode(theirs, tokens()))


@pytest.mark.parametrize("kind", ["Temporal", "MatchingPursuit"])
def test_its_other_architectures_are_refused(sae_lens: Any, tmp_path: Path, kind: str) -> None:
    saved = {"architecture": {"Temporal": "temporal", "MatchingPursuit": "matching_pursuit"}[kind], **SIZES}
    shaken(sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**SIZES))).save_model(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(saved))
    with pytest.raises(BadInput, match="cannot be opened"):
        load_sae(tmp_path)
