"""SAELens's format: ``sae_weights.safetensors`` beside ``cfg.json``; native for every architecture but TopK.

The encoder lies transposed, ``W_enc`` [D, M]. Until 6.0 the description was flat (``activation_fn_str``,
``activation_fn_kwargs``); since then each architecture has its own keys. What is folded into the weights:

  apply_b_dec_to_input false       x W + b is (x - b_dec) W + b', b' = b + b_dec W; for a gated one b_mag gains
                                   exp(r_mag) times as much
  rescale_acts_by_decoder_norm     pre-activations times n = ||W_dec|| before the choice, activations divided by n in
                                   decode: n goes into W_enc and b_enc, out of W_dec
  expected_average_only_in         activations times a constant s, in ``activation_scaler.json`` of a training
                                   checkpoint: W_enc s, W_dec / s, b_dec / s. Where the constant is not there, it was
                                   never folded and cannot be: refused

Normalisation by something that differs from token to token is no part of a dictionary's weights and is refused.
BatchTopK is kept as JumpReLU with one threshold for all latents, and named under ``training_architecture``. A
JumpReLU threshold of 0 or less lets every positive pre-activation through, as the smallest positive one does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.common.errors import BadInput
from sae.common.files import write_json
from sae.dictionaries.architectures.batchtopk import BatchTopKSae
from sae.dictionaries.architectures.gated import GatedSae
from sae.dictionaries.architectures.jumprelu import JumpReluSae
from sae.dictionaries.architectures.relu import ReluSae
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.formats.base import (
    About,
    Format,
    Opened,
    added,
    aim,
    check_k,
    check_tensors,
    lengths,
    number,
    read_config,
    read_safetensors,
    scaled,
    table,
    uncentred_bias,
    write_safetensors,
)
from sae.dictionaries.sae import Sae

NAME, CONFIG, WEIGHTS = "SAELens", "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"
"""the version whose description is written; its loader opens what is written here"""
_SCALER = "activation_scaler.json"
_BIASES = {"gated": ("b_gate", "b_mag")}
_VECTORS = {  # [M], beside W_enc, W_dec and b_dec
    "topk": ("b_enc",),
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "batchtopk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
_AS_BATCHTOPK = {"batchtopk", "matryoshka_batchtopk"}
_TINY = torch.finfo(torch.float32).tiny


# --- reading ----------------------------------------------------------------------------------------------


def read(folder: Path) -> Opened:
    """The dictionary in ``folder``, of SAELens 6 or older."""
    path = folder / CONFIG
    config = _modern(read_config(path))
    architecture = _architecture(config, path)
    d_in, num_latents = number(config, "d_in", path, NAME), number(config, "d_sae", path, NAME)
    k = _k(config, architecture, path)
    check_k(k, num_latents, path)
    factor = _activation_factor(config, folder)
    tensors = read_safetensors(folder / WEIGHTS)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, num_latents), "W_dec": (num_latents, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(_VECTORS[architecture], (num_latents,))
    if architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    check_tensors(tensors, shapes, folder / WEIGHTS, CONFIG, NAME)
    _check_finetuning(tensors, folder / WEIGHTS)
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    folded = _fold(tensors, config, _BIASES.get(architecture, ("b_enc",)), factor)
    return Opened(_BUILD[architecture](tensors, config, k), folded)


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A description of before 6.0 in the words of today's; today's as it is."""
    if "activation_fn_str" not in config and "activation_fn" not in config:
        return config
    renamed = {**config}
    function = config.get("activation_fn_str", config.get("activation_fn"))
    kwargs = table(config.get("activation_fn_kwargs"))
    if function == "topk":
        renamed["architecture"] = "topk"
        if kwargs.get("k") is not None:
            renamed["k"] = kwargs["k"]
    elif function not in (None, "relu"):
        renamed["architecture"] = f"{config.get('architecture', 'standard')} with {function}"
    renamed.setdefault("architecture", "standard")
    return renamed


def _architecture(config: dict[str, Any], path: Path) -> str:
    name = config.get("architecture", "standard" if "d_sae" in config else None)
    if name is None:
        raise BadInput(f"{path}: 'architecture' is missing; this is no {NAME} checkpoint, or a damaged one")
    found = "batchtopk" if isinstance(name, str) and name in _AS_BATCHTOPK else name
    if not isinstance(found, str) or found not in _VECTORS:
        raise BadInput(f"{path}: architecture {name!r} cannot be opened; those that can are {', '.join(_VECTORS)}")
    return found


def _k(config: dict[str, Any], architecture: str, path: Path) -> int | None:
    """The latents that fire, or that training aimed at (then possibly a fraction, which is rounded)."""
    if architecture == "topk":
        return number(config, "k", path, NAME)
    details = table(table(config.get("metadata")).get("training_architecture_details"))
    said = (aim(config.get("k")), aim(details.get("k")), aim(details.get("target_l0")))
    return next((k for k in said if k is not None), None)


def _activation_factor(config: dict[str, Any], folder: Path) -> float:
    """s of the activations' normalisation; 1 where there is none."""
    kind = config.get("normalize_activations")
    if kind in (None, False, "none"):
        return 1.0
    if kind not in (True, "expected_average_only_in"):
        raise BadInput(
            f"{folder / CONFIG}: normalize_activations = {kind!r} is not a constant that weights can hold; "
            "fold it with SAELens where it can, and save the SAE again"
        )
    value = read_config(folder / _SCALER).get("scaling_factor") if (folder / _SCALER).is_file() else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise BadInput(
            f"{folder / CONFIG}: normalize_activations = 'expected_average_only_in', but no {_SCALER} beside it says "
            "by how much; fold it with SAELens's fold_activation_norm_scaling_factor and save the SAE again"
        )
    return float(value)


def _check_finetuning(tensors: dict[str, Tensor], path: Path) -> None:
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not bool((tensors[name] == 1).all()):
            raise BadInput(f"{path}: {name} is not 1; a fine-tuned scale is not supported by SAELens 6 nor here")


def _fold(
    tensors: dict[str, Tensor], config: dict[str, Any], biases: tuple[str, ...], factor: float
) -> tuple[str, ...]:
    """Make the weights say what the description says; see the module's head. ``W_enc`` is [M, D] here."""
    folded = []
    if config.get("rescale_acts_by_decoder_norm"):
        norm = lengths(tensors["W_dec"])
        for name in ("W_enc", *biases):
            tensors[name] = scaled(tensors[name], norm)
        tensors["W_dec"] = scaled(tensors["W_dec"], 1 / norm.clamp_min(1e-300))  # a row of zeros stays one
        folded.append("rescale_acts_by_decoder_norm")
    if factor != 1.0:
        tensors["W_enc"] = scaled(tensors["W_enc"], factor)
        for name in ("W_dec", "b_dec"):
            tensors[name] = scaled(tensors[name], 1 / factor)
        folded.append(f"normalize_activations ({factor:g})")
    if not config.get("apply_b_dec_to_input", True):
        gained = uncentred_bias(tensors["W_enc"], tensors["b_dec"])
        for name in biases:
            more = gained * tensors["r_mag"].double().exp() if name == "b_mag" else gained
            tensors[name] = added(tensors[name], more)
        folded.append("apply_b_dec_to_input")
    return tuple(folded)


def _four(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def _topk(tensors: dict[str, Tensor], _config: dict[str, Any], k: int | None) -> Sae:
    assert k is not None
    return TopKSae(**_four(tensors), k=k)


def _relu(tensors: dict[str, Tensor], _config: dict[str, Any], k: int | None) -> Sae:
    return ReluSae(**_four(tensors), k=k)


def _gated(tensors: dict[str, Tensor], _config: dict[str, Any], k: int | None) -> Sae:
    return GatedSae(**{name: tensors[name] for name in ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec")}, k=k)


def _batchtopk(tensors: dict[str, Tensor], _config: dict[str, Any], k: int | None) -> Sae:
    return BatchTopKSae(**_four(tensors), k=k, threshold=tensors["topk_threshold"].clamp_min(0))


def _jumprelu(tensors: dict[str, Tensor], config: dict[str, Any], k: int | None) -> Sae:
    threshold = tensors["threshold"]
    trained_as = table(config.get("metadata")).get("training_architecture")
    if trained_as in list(_AS_BATCHTOPK) and bool((threshold == threshold[0]).all()):
        return BatchTopKSae(**_four(tensors), k=k, threshold=threshold[0].clone().clamp_min(0))
    return JumpReluSae(**_four(tensors), threshold=threshold.clamp_min(_TINY), k=k)


_BUILD: dict[str, Callable[[dict[str, Tensor], dict[str, Any], int | None], Sae]] = {
    "topk": _topk,
    "standard": _relu,
    "jumprelu": _jumprelu,
    "batchtopk": _batchtopk,
    "gated": _gated,
}


# --- writing ----------------------------------------------------------------------------------------------

_WRITTEN_AS = {"topk": "topk", "relu": "standard", "gated": "gated", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}


def write(folder: Path, sae: Sae, about: About) -> None:
    """Write a dictionary of any architecture; ``SAE.load_from_disk`` opens it."""
    architecture = _WRITTEN_AS[sae.architecture]
    tensors = dict(sae.weights())
    tensors["W_enc"] = tensors["W_enc"].T
    if isinstance(sae, BatchTopKSae):
        tensors["threshold"] = sae.threshold.expand(sae.num_latents)
    write_safetensors(folder / WEIGHTS, tensors)
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    known = {"model_name": about.model, "hook_name": about.hookpoint, "context_size": about.context}
    trained_as = "batchtopk" if isinstance(sae, BatchTopKSae) else architecture
    aimed = {} if sae.k is None else {"k" if trained_as in ("topk", "batchtopk") else "target_l0": sae.k}
    config["metadata"] = {
        "sae_lens_version": VERSION,
        **{key: value for key, value in known.items() if value is not None},
        "training_architecture": trained_as,
        "training_architecture_details": aimed,
    }
    write_json(folder / CONFIG, config)


FORMAT = Format(NAME, WEIGHTS, CONFIG, frozenset(_WRITTEN_AS), read, write, beside=(_SCALER,))
