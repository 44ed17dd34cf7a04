"""Read and write a trained dictionary, whichever program made it: the front door to ``sae.dictionaries.formats``.

A run's own dictionary is kept in a format that another program opens as it is: sparsify's for TopK, SAELens's for
the other architectures that it has, which sparsify has not: it finds no weights of its own there, so no dictionary can
be taken for one of another architecture. An architecture that neither has is kept in
``sae.dictionaries.formats.native``. What is read is known by the names of its files.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from sae.common.errors import BadInput, NotFound
from sae.dictionaries.formats import FORMATS, About, Format, Opened
from sae.dictionaries.sae import Sae

_DEPTH = 3
"""folders below a named one that are looked into for checkpoints"""
_LARGEST = 1e17
"""of a weight: the squares of a row of larger ones overflow float32, and so do products with any activations"""


def native_format(architecture: str) -> Format:
    """The format in which a run keeps a dictionary of ``architecture``."""
    return next(FORMATS[name] for name in ("sparsify", "SAELens", "native") if FORMATS[name].has(architecture))


def format_named(name: str) -> Format:
    """The format called ``name``, in upper or lower case."""
    for known, found in FORMATS.items():
        if known.lower() == name.lower():
            return found
    raise BadInput(f"format {name!r} is not known; choose {', '.join(known.lower() for known in FORMATS)}")


def save_sae(folder: Path, sae: Sae, about: About | None = None, format_: Format | None = None) -> None:
    """Write ``sae`` to ``folder``, in its native format if no other is given: the weights in float32, then what
    makes them a checkpoint. Raises BadInput for an architecture that the format does not have."""
    format_ = format_ or native_format(sae.architecture)
    written = sae if format_.has(sae.architecture) else sae.as_known()
    if written is None or not format_.has(written.architecture):
        kinds = [sae.architecture] if written is None else [sae.architecture, written.architecture]
        able = [name.lower() for name, other in FORMATS.items() if any(map(other.has, kinds))]
        raise BadInput(
            f"a {sae.architecture!r} dictionary cannot be written in {format_.name}'s format, which is "
            f"{', '.join(sorted(format_.architectures or ()))} only; choose {' or '.join(able)}"
        )
    format_.write(folder, written, about or About())


def load_sae(folder: Path) -> Sae:
    """The dictionary in ``folder``, in float32 in main memory; see :func:`open_sae`."""
    return open_sae(folder)[0].sae


def open_sae(folder: Path) -> tuple[Opened, Format]:
    """The dictionary in ``folder``, what was folded into its weights, and the format it was in.

    Raises NotFound where a file is missing, BadInput where one is damaged, describes something that cannot be
    opened, or disagrees with the other; each in one line.
    """
    format_ = detect(folder)
    opened = format_.read(folder)
    for name, weight in opened.sae.weights().items():
        largest = float(torch.linalg.vector_norm(weight, ord=math.inf))
        if not largest <= _LARGEST:
            raise BadInput(
                f"{folder / format_.weights}: {name} holds numbers of size {largest:.3g}, whose products overflow "
                "float32; fetch the checkpoint again, or train it again with a lower learning rate"
            )
    return opened, format_


def detect(folder: Path) -> Format:
    """The format of the checkpoint in ``folder``, by the names of its files."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise NotFound(f"{str(folder)!r} is no SAE checkpoint: it {what}; name the folder that holds the weights")
    found = [format_ for format_ in FORMATS.values() if (folder / format_.weights).is_file()]
    if len(found) > 1:
        names = " and ".join(format_.weights for format_ in found)
        raise BadInput(f"{str(folder)!r} holds {names}, weights in two formats; leave the one that is meant")
    if found:
        return found[0]
    below = checkpoints_below(folder)
    if below:
        listed = ", ".join(below[:8]) + (f" and {len(below) - 8} more" if len(below) > 8 else "")
        raise NotFound(
            f"{str(folder)!r} is no SAE checkpoint, but there are checkpoints in {listed} below it; name one"
        )
    described = [format_ for format_ in FORMATS.values() if (folder / format_.config).is_file()]
    if described:
        missing = " or ".join(format_.weights for format_ in described)
        raise NotFound(f"{str(folder)!r} is no whole SAE checkpoint: {missing} is missing; fetch or train it again")
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    what = f"holds {', '.join(held[:4])}{', …' if len(held) > 4 else ''}" if held else "is empty"
    wanted = "; ".join(f"{name}: {format_.config}, {format_.weights}" for name, format_ in FORMATS.items())
    raise NotFound(f"{str(folder)!r} is no SAE checkpoint in a known format: it {what} (known are {wanted})")


def checkpoints_below(folder: Path) -> list[str]:
    """Folders under ``folder`` that hold a checkpoint's weights, by their path from it."""
    found = {
        str(path.parent.relative_to(folder))
        for depth in range(1, _DEPTH + 1)
        for format_ in FORMATS.values()
        for path in folder.glob("/".join(["*"] * depth + [format_.weights]))
    }
    return sorted(found)
