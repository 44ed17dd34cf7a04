"""Our own format, for what no other program has: every tensor under the name that its class gives it.

``dictionary.safetensors`` holds :meth:`sae.dictionaries.sae.Sae.weights`, ``cfg.json`` the architecture, k, and the
shape of each tensor. Opening one needs the architecture's file; the error names it where it is missing.
"""

from __future__ import annotations

from pathlib import Path

from sae.common.errors import BadInput
from sae.common.files import write_json
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.formats import base
from sae.dictionaries.formats.base import About, Format, Opened
from sae.dictionaries.sae import Sae

NAME, CONFIG, WEIGHTS = "native", "cfg.json", "dictionary.safetensors"
_SCHEMA = 1


def read(folder: Path) -> Opened:
    """Read the dictionary in ``folder``, of any architecture with a file in ``architectures/``."""
    path = folder / CONFIG
    config = base.read_config(path)
    if config.get("sae_autointerp") != _SCHEMA:
        raise BadInput(f"{path}: 'sae_autointerp' is not {_SCHEMA}; it does not describe {WEIGHTS}")
    name = str(config.get("architecture"))
    if name not in ARCHITECTURES:
        raise BadInput(
            f"{path}: architecture {name!r} has no file here; put it back as sae/dictionaries/architectures/{name}.py"
        )
    k = None if config.get("k") is None else base.positive_int(config, "k", path, NAME)
    shapes = base.as_dict(config.get("shapes"))
    if not {"W_enc", "W_dec"} <= set(shapes) or not all(isinstance(shape, list) for shape in shapes.values()):
        raise BadInput(f"{path}: 'shapes' does not say what the weights are; this is a damaged {NAME} checkpoint")
    tensors = base.read_safetensors(folder / WEIGHTS)
    base.check_tensors(tensors, {key: tuple(of) for key, of in shapes.items()}, folder / WEIGHTS, CONFIG, NAME)
    base.check_k(k, len(tensors["W_enc"]), path)
    try:
        transcodes = base.flag(config, "transcodes", path)
        return Opened(ARCHITECTURES[name].of_weights({key: tensors[key] for key in shapes}, k, transcodes))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: the weights are not those of a {name!r} dictionary ({error})") from None


def write(folder: Path, sae: Sae, about: About) -> None:
    """Write a dictionary of any architecture."""
    weights = sae.weights()
    base.write_safetensors(folder / WEIGHTS, weights)
    config = {
        "sae_autointerp": _SCHEMA,
        "architecture": sae.architecture,
        "k": sae.k,
        **({"transcodes": True} if sae.transcodes else {}),
        "shapes": {name: list(tensor.shape) for name, tensor in weights.items()},
        "about": {key: value for key, value in vars(about).items() if value is not None},
    }
    write_json(folder / CONFIG, config)


FORMAT = Format(NAME, WEIGHTS, CONFIG, None, read, write, transcoders=None)
