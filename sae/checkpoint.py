"""Read and write a trained dictionary: ``cfg.json`` beside ``sae.safetensors``.

A TopK dictionary is stored as sparsify stores it, so that its ``Sae.load_from_disk`` opens a run's folder as
it is. What a folder claims is checked against what it holds before anything is built from it: a checkpoint
comes from a download or a copy as often as from here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.architectures import TopKSae
from sae.dictionary import Sae
from sae.errors import BadInput, NotFound
from sae.files import atomic, write_json

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
# Our names for the weights and sparsify's. It holds the encoder as a linear layer, the decoder as rows.
_STORED = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def save_sae(folder: Path, sae: Sae) -> None:
    """Write ``sae`` to ``folder``: the weights in float32, then the description that makes them a checkpoint."""
    if not isinstance(sae, TopKSae):
        raise BadInput(f"a {sae.architecture!r} dictionary cannot be written in sparsify's format, which is TopK only")
    weights = {
        _STORED[name]: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in sae.parameters().items()
    }
    with atomic(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.num_latents // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.num_latents,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    write_json(folder / CONFIG, config)


def load_sae(folder: Path) -> TopKSae:
    """The dictionary in ``folder``, in float32 in main memory.

    Raises NotFound where a file is missing, BadInput where one is damaged, describes something else than a
    TopK autoencoder, or disagrees with the other; each in one line.
    """
    config = _read_config(folder)
    tensors = _read_weights(folder / WEIGHTS)
    d_in, k = _number(config, "d_in", folder), _number(config, "k", folder)
    num_latents = _width(config, d_in, folder)
    expected = {"W_enc": (num_latents, d_in), "b_enc": (num_latents,), "W_dec": (num_latents, d_in), "b_dec": (d_in,)}
    for name, shape in expected.items():
        found = tuple(tensors[_STORED[name]].shape)
        if found != shape:
            raise BadInput(
                f"{folder / WEIGHTS}: {_STORED[name]} has shape {list(found)}, but {CONFIG} says {list(shape)}; "
                "the two files are not of one checkpoint"
            )
    if k > num_latents:
        raise BadInput(f"{folder / CONFIG}: k = {k} is more than the {num_latents} latents; it must be at most that")
    return TopKSae(**{name: tensors[stored] for name, stored in _STORED.items()}, k=k)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        below = sorted(str(p.parent.relative_to(folder)) for p in folder.glob(f"*/{CONFIG}"))
        hint = f"there are checkpoints in {', '.join(below[:5])} below it" if below else f"name a folder with {CONFIG}"
        what = f"has no {CONFIG}" if folder.is_dir() else "does not exist"
        raise NotFound(f"{str(folder)!r} is no SAE checkpoint: it {what}; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}); fetch or write the checkpoint again") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path} does not describe an SAE: it holds no JSON object; fetch the checkpoint again")
    transcoder = [key for key in ("transcode", "skip_connection") if config.get(key)]
    if config.get("activation", "topk") != "topk" or transcoder:
        said = f"{transcoder[0]} is set" if transcoder else f"activation = {config['activation']!r}"
        raise BadInput(f"{path}: {said}; only TopK autoencoders can be opened")
    return config


def _number(config: dict[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = f"{key} = {value!r} is no positive whole number" if key in config else f"{key!r} is missing"
        raise BadInput(f"{folder / CONFIG}: {said}; this is no sparsify checkpoint, or a damaged one")
    return value


def _width(config: dict[str, Any], d_in: int, folder: Path) -> int:
    """M. sparsify writes 0 (or leaves it out) where the width is a multiple of D."""
    if config.get("num_latents"):
        return _number(config, "num_latents", folder)
    return d_in * _number(config, "expansion_factor", folder)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NotFound(f"{path.parent} is no whole SAE checkpoint: {path.name} is missing; fetch or train it again")
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            missing = sorted(set(_STORED.values()) - names)
            if missing:
                raise BadInput(
                    f"{path}: {', '.join(missing)} missing (it holds {', '.join(sorted(names)[:6])}); "
                    "only sparsify's TopK format can be opened"
                )
            if "W_skip" in names:
                raise BadInput(f"{path}: a skip connection (W_skip) is not supported; only autoencoders can be opened")
            # Copied out of the mapped file: its tensors may lie at any address, and BLAS rounds differently then.
            tensors = {name: stored.get_tensor(name).to(torch.float32, copy=True) for name in _STORED.values()}
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path} is damaged or cut short ({reason}); fetch or train it again") from None
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"{path}: {name} holds NaN or infinite values; train it again with a lower learning rate")
    return tensors
