"""sparsify's format (eai-sparsify): ``sae.safetensors`` and ``cfg.json``; native for TopK.

The encoder is held as a linear layer (``encoder.weight`` [M, D], ``encoder.bias`` [M]), the decoder as rows
(``W_dec`` [M, D], ``b_dec`` [D]). ``num_latents`` is 0, or absent, where M = D * expansion_factor. ``multi_topk``
changes the training loss alone, so such a checkpoint encodes like any other. Transcoders (which subtract no ``b_dec``
and predict another activation), skip connections and GroupMax are other functions, and are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae.common.errors import BadInput
from sae.common.files import write_json
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.formats import base
from sae.dictionaries.formats.base import About, Format, Opened
from sae.dictionaries.sae import Sae

NAME, CONFIG, WEIGHTS = "sparsify", "cfg.json", "sae.safetensors"
_STORED = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def read(folder: Path) -> Opened:
    """Read the TopK dictionary in ``folder``."""
    path = folder / CONFIG
    config = base.read_config(path)
    _check_architecture(config, path)
    tensors = base.read_safetensors(folder / WEIGHTS)
    if "W_skip" in tensors:
        raise BadInput(
            f"{folder / WEIGHTS}: a skip connection (W_skip) is not supported; only autoencoders can be opened"
        )
    d_in, k = base.positive_int(config, "d_in", path, NAME), base.positive_int(config, "k", path, NAME)
    if config.get("num_latents"):
        num_latents = base.positive_int(config, "num_latents", path, NAME)
    else:
        num_latents = d_in * base.positive_int(config, "expansion_factor", path, NAME)
    shapes = {"W_enc": (num_latents, d_in), "b_enc": (num_latents,), "W_dec": (num_latents, d_in), "b_dec": (d_in,)}
    stored = {_STORED[name]: shape for name, shape in shapes.items()}
    base.check_tensors(tensors, stored, folder / WEIGHTS, CONFIG, NAME)
    base.check_k(k, num_latents, path)
    return Opened(TopKSae(**{name: tensors[stored] for name, stored in _STORED.items()}, k=k))


def write(folder: Path, sae: Sae, about: About) -> None:  # noqa: ARG001 - the format has no place for it
    """Write a TopK dictionary; ``Sae.load_from_disk`` opens it."""
    base.write_safetensors(folder / WEIGHTS, {_STORED[name]: tensor for name, tensor in sae.weights().items()})
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.num_latents // sae.d_in),
        "normalize_decoder": base.has_unit_rows(sae.W_dec),
        "num_latents": sae.num_latents,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    write_json(folder / CONFIG, config)


FORMAT = Format(NAME, WEIGHTS, CONFIG, frozenset({"topk"}), read, write)


def _check_architecture(config: dict[str, Any], path: Path) -> None:
    said = [f"{key} is set" for key in ("transcode", "skip_connection", "signed") if config.get(key)]
    said += [
        f"{key} = {config[key]!r}"
        for key in ("activation", "architecture")  # the second is SAELens's, in a renamed file
        if config.get(key, "topk") != "topk"
    ]
    if said:
        raise BadInput(f"{path}: {said[0]}; only TopK autoencoders can be opened in sparsify's format")
