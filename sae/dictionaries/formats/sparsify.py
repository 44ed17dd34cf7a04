"""sparsify's format (eai-sparsify): ``sae.safetensors`` and ``cfg.json``; native for TopK.

The encoder is held as a linear layer (``encoder.weight`` [M, D], ``encoder.bias`` [M]), the decoder as rows
(``W_dec`` [M, D], ``b_dec`` [D]). ``num_latents`` is 0, or absent, where M = D * expansion_factor. ``multi_topk``
changes the training loss alone, so such a checkpoint encodes like any other. Transcoders (``transcode``) subtract no
``b_dec`` and predict another activation, with ``W_skip`` [D, D] if ``skip_connection`` is set; ``d_out`` is ours, for a
target of another width, which sparsify does not know. GroupMax is another function, and is refused, as is an
autoencoder's skip connection.
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
    transcodes, skips = (base.flag(config, key, path) for key in ("transcode", "skip_connection"))
    if skips != ("W_skip" in tensors):
        raise BadInput(
            f"{path}: skip_connection is {'not ' * (not skips)}set, but {WEIGHTS} has {'no ' * skips}W_skip; "
            "fetch the checkpoint again"
        )
    if skips and not transcodes:
        raise BadInput(f"{path}: an autoencoder with a skip connection is not supported; only transcoders may have one")
    d_in, k = base.positive_int(config, "d_in", path, NAME), base.positive_int(config, "k", path, NAME)
    if config.get("num_latents"):
        num_latents = base.positive_int(config, "num_latents", path, NAME)
    else:
        num_latents = d_in * base.positive_int(config, "expansion_factor", path, NAME)
    d_out = base.positive_int(config, "d_out", path, NAME) if "d_out" in config else d_in
    shapes = {"W_enc": (num_latents, d_in), "b_enc": (num_latents,), "W_dec": (num_latents, d_out), "b_dec": (d_out,)}
    stored = {_STORED[name]: shape for name, shape in shapes.items()}
    if skips:
        stored["W_skip"] = (d_out, d_in)
    base.check_tensors(tensors, stored, folder / WEIGHTS, CONFIG, NAME)
    base.check_k(k, num_latents, path)
    sae = TopKSae(**{name: tensors[stored] for name, stored in _STORED.items()}, k=k)
    return Opened(sae.as_transcoder(tensors.get("W_skip")) if transcodes else sae)


def write(folder: Path, sae: Sae, about: About) -> None:  # noqa: ARG001 - the format has no place for it
    """Write a TopK dictionary; ``Sae.load_from_disk`` opens it (a transcoder to another width only this program)."""
    base.write_safetensors(folder / WEIGHTS, {_STORED.get(name, name): t for name, t in sae.weights().items()})
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.num_latents // sae.d_in),
        "normalize_decoder": base.has_unit_rows(sae.W_dec),
        "num_latents": sae.num_latents,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.transcodes,
        "d_in": sae.d_in,
        **({"d_out": sae.d_out} if sae.d_out != sae.d_in else {}),
    }
    write_json(folder / CONFIG, config)


FORMAT = Format(NAME, WEIGHTS, CONFIG, frozenset({"topk"}), read, write, transcoders=frozenset({"topk"}))


def _check_architecture(config: dict[str, Any], path: Path) -> None:
    said = [f"{key} is set" for key in ("signed",) if config.get(key)]
    said += [
        f"{key} = {config[key]!r}"
        for key in ("activation", "architecture")  # the second is SAELens's, in a renamed file
        if config.get(key, "topk") != "topk"
    ]
    if said:
        raise BadInput(f"{path}: {said[0]}; only TopK dictionaries can be opened in sparsify's format")
