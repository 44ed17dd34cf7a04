"""SAELens's format: ``sae_weights.safetensors`` and ``cfg.json``; native for every architecture but TopK.

The encoder is transposed, ``W_enc`` [D, M]. Until 6.0 the description was flat (``activation_fn_str``,
``activation_fn_kwargs``); since then each architecture has its own keys. Folded into the weights:

  apply_b_dec_to_input false       x W + b is (x - b_dec) W + b', b' = b + b_dec W; for a gated one b_mag gains
                                   exp(r_mag) times as much
  rescale_acts_by_decoder_norm     pre-activations times n = ||W_dec|| before the choice, activations divided by n in
                                   decode: n goes into W_enc and b_enc, out of W_dec
  expected_average_only_in         activations times a constant s, in ``activation_scaler.json`` of a training
                                   checkpoint: W_enc s, W_dec / s, b_dec / s; refused where the constant is missing

Transcoders (``transcoder``, ``jumprelu_transcoder``; with ``skip_`` they have ``W_skip`` [D_out, D]) subtract no b_dec.

Normalisation that differs from token to token cannot be part of a dictionary's weights and is refused. BatchTopK is
kept as JumpReLU with one threshold for all latents, and named under ``training_architecture``. A JumpReLU threshold of
0 or less passes every positive pre-activation, as the smallest positive threshold does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.common.errors import BadInput
from sae.common.files import write_json
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.architectures.batchtopk import BatchTopKSae
from sae.dictionaries.formats import base
from sae.dictionaries.formats.base import About, Format, Opened
from sae.dictionaries.sae import Sae

NAME, CONFIG, WEIGHTS = "SAELens", "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # of the description written here; its loader opens it
_SCALER = "activation_scaler.json"
_BIASES = {"gated": ("b_gate", "b_mag")}
_VECTORS = {  # [M], besides W_enc, W_dec and b_dec
    "topk": ("b_enc",),
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "batchtopk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
_TRANSCODERS = {  # of which architecture, and whether with a skip connection
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
_AS_BATCHTOPK = ["batchtopk", "matryoshka_batchtopk"]
_TINY = torch.finfo(torch.float32).tiny


def read(folder: Path) -> Opened:
    """Read the dictionary in ``folder``, of SAELens 6 or older."""
    path = folder / CONFIG
    config = _modern(base.read_config(path))
    transcodes = str(config.get("architecture")) in _TRANSCODERS
    name, skips = _TRANSCODERS[config["architecture"]] if transcodes else (None, False)
    architecture = name or _architecture(config, path)
    d_in, num_latents = base.positive_int(config, "d_in", path, NAME), base.positive_int(config, "d_sae", path, NAME)
    k = _k(config, architecture, path)
    base.check_k(k, num_latents, path)
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config.get(key, False), bool):
            raise BadInput(f"{path}: {key} = {config[key]!r:.60} is neither true nor false; fetch the checkpoint again")
    if transcodes:
        _check_transcoder(config, path)
    d_out = base.positive_int(config, "d_out", path, NAME) if transcodes else d_in
    factor = _activation_factor(config, folder)
    tensors = base.read_safetensors(folder / WEIGHTS)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, num_latents), "W_dec": (num_latents, d_out)}
    shapes |= {"b_dec": (d_out,), **({"W_skip": (d_out, d_in)} if skips else {})}
    shapes |= dict.fromkeys(_VECTORS[architecture], (num_latents,))
    if architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    base.check_tensors(tensors, shapes, folder / WEIGHTS, CONFIG, NAME)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not bool((tensors[name] == 1).all()):
            raise BadInput(
                f"{folder / WEIGHTS}: {name} is not 1; neither SAELens 6 nor this program supports a fine-tuned scale"
            )
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    if transcodes:
        config = {**config, "apply_b_dec_to_input": True}  # no transcoder does, here or there
    folded = _fold(tensors, config, _BIASES.get(architecture, ("b_enc",)), factor)
    weights = {key: tensors[key] for key in shapes}
    name = {"standard": "relu"}.get(architecture, architecture)
    if name == "batchtopk":
        weights["threshold"] = weights.pop("topk_threshold").clamp_min(0)
    if name == "jumprelu":
        threshold = weights["threshold"]
        trained_as = base.as_dict(config.get("metadata")).get("training_architecture")
        if trained_as in _AS_BATCHTOPK and bool((threshold == threshold[0]).all()):
            name, weights["threshold"] = "batchtopk", threshold[0].clone().clamp_min(0)
        else:
            weights["threshold"] = threshold.clamp_min(_TINY)
    return Opened(ARCHITECTURES[name].of_weights(weights, k, transcodes), folded)


def _check_transcoder(config: dict[str, Any], path: Path) -> None:
    """Raise BadInput for settings under which SAELens's transcoders compute something else."""
    for key, usual in (("normalize_activations", "none"), ("rescale_acts_by_decoder_norm", False)):
        if config.get(key, usual) != usual:
            raise BadInput(f"{path}: {key} = {config[key]!r:.60} is not supported in a transcoder; save it without")


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """Return a description from before 6.0 under today's keys, and one of today's unchanged."""
    if "activation_fn_str" not in config and "activation_fn" not in config:
        return config
    renamed = {**config}
    function = config.get("activation_fn_str", config.get("activation_fn"))
    kwargs = base.as_dict(config.get("activation_fn_kwargs"))
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
        raise BadInput(f"{path}: 'architecture' is missing; this is not a {NAME} checkpoint, or a damaged one")
    found = "batchtopk" if name in _AS_BATCHTOPK else name
    if not isinstance(found, str) or found not in _VECTORS:
        raise BadInput(
            f"{path}: architecture {name!r} cannot be opened; supported are {', '.join([*_VECTORS, *_TRANSCODERS])}"
        )
    return found


def _k(config: dict[str, Any], architecture: str, path: Path) -> int | None:
    """Return how many latents fire, or how many training aimed at (rounded)."""
    if architecture == "topk":
        return base.positive_int(config, "k", path, NAME)
    details = base.as_dict(base.as_dict(config.get("metadata")).get("training_architecture_details"))
    said = (base.target_l0(config.get("k")), base.target_l0(details.get("k")), base.target_l0(details.get("target_l0")))
    return next((k for k in said if k is not None), None)


def _activation_factor(config: dict[str, Any], folder: Path) -> float:
    """Return the constant s of the activations' normalisation; 1 without one."""
    kind = config.get("normalize_activations")
    if kind in (None, False, "none"):
        return 1.0
    if kind not in (True, "expected_average_only_in"):
        raise BadInput(
            f"{folder / CONFIG}: normalize_activations = {kind!r} is not a constant that weights can hold; "
            "fold it with SAELens where possible, and save the SAE again"
        )
    value = base.read_config(folder / _SCALER).get("scaling_factor") if (folder / _SCALER).is_file() else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise BadInput(
            f"{folder / CONFIG}: normalize_activations = 'expected_average_only_in', but no {_SCALER} gives the "
            "factor; fold it with SAELens's fold_activation_norm_scaling_factor and save the SAE again"
        )
    return float(value)


def _fold(
    tensors: dict[str, Tensor], config: dict[str, Any], biases: tuple[str, ...], factor: float
) -> tuple[str, ...]:
    """Fold the description into the weights (see the head of this module). ``W_enc`` is [M, D] here."""
    folded = []
    if config.get("rescale_acts_by_decoder_norm"):
        base.fold_row_lengths(tensors, biases)
        folded.append("rescale_acts_by_decoder_norm")
    if factor != 1.0:
        tensors["W_enc"] = base.scale(tensors["W_enc"], factor)
        for name in ("W_dec", "b_dec"):
            tensors[name] = base.scale(tensors[name], 1 / factor)
        folded.append(f"normalize_activations ({factor:g})")
    if not config.get("apply_b_dec_to_input", True):
        gained = base.centring_bias(tensors["W_enc"], tensors["b_dec"])
        for name in biases:
            more = gained * tensors["r_mag"].double().exp() if name == "b_mag" else gained
            tensors[name] = base.add(tensors[name], more)
        folded.append("apply_b_dec_to_input")
    return tuple(folded)


# --- writing ----------------------------------------------------------------------------------------------

_WRITTEN_AS = {"topk": "topk", "relu": "standard", "gated": "gated", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}

_WRITTEN_TRANSCODERS = frozenset({"relu", "jumprelu", "batchtopk"})


def write(folder: Path, sae: Sae, about: About) -> None:
    """Write a dictionary of any architecture; ``SAE.load_from_disk`` opens it."""
    architecture = _WRITTEN_AS[sae.architecture]
    tensors = dict(sae.weights())
    tensors["W_enc"] = tensors["W_enc"].T
    if isinstance(sae, BatchTopKSae):
        tensors["threshold"] = sae.threshold.expand(sae.num_latents)
    if sae.transcodes:
        kinds = {of: name for name, of in _TRANSCODERS.items()}
        architecture = kinds[architecture, sae.W_skip is not None]
    base.write_safetensors(folder / WEIGHTS, tensors)
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not sae.transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.transcodes:
        config["d_out"] = sae.d_out
    known = {"model_name": about.model, "hook_name": about.hookpoint, "context_size": about.context}
    trained_as = "batchtopk" if isinstance(sae, BatchTopKSae) else _WRITTEN_AS[sae.architecture]
    aimed = {} if sae.k is None else {"k" if trained_as in ("topk", "batchtopk") else "target_l0": sae.k}
    config["metadata"] = {
        "sae_lens_version": VERSION,
        **{key: value for key, value in known.items() if value is not None},
        "training_architecture": trained_as,
        "training_architecture_details": aimed,
    }
    write_json(folder / CONFIG, config)


FORMAT = Format(NAME, WEIGHTS, CONFIG, frozenset(_WRITTEN_AS), read, write, (_SCALER,), _WRITTEN_TRANSCODERS)
