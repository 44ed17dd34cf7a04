"""Read and write trained dictionaries: the front door to ``sae.dictionaries.formats``.

A run's dictionary is kept in a format that another program opens: sparsify's for TopK, SAELens's for the architectures
that it supports, else ``sae.dictionaries.formats.native``. File names identify the format; sparsify finds no weights of
its own in SAELens's files, so no architecture is taken for another.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from sae.common.errors import BadInput, NotFound
from sae.dictionaries.formats import FORMATS, About, Format, Opened
from sae.dictionaries.sae import Sae

_DEPTH = 3  # levels of folders below a given one that are searched for checkpoints
_LARGEST = 1e17  # of a weight: the squares of a row of larger ones overflow float32, as do products


def native_format(architecture: str, transcodes: bool = False) -> Format:
    """Return the format in which a run keeps a dictionary (or a transcoder) of ``architecture``."""
    names = ("sparsify", "native") if transcodes else ("sparsify", "SAELens", "native")
    return next(FORMATS[name] for name in names if FORMATS[name].has(architecture, transcodes))


def format_named(name: str) -> Format:
    """Return the format called ``name``, in upper or lower case."""
    for known, format_ in FORMATS.items():
        if known.lower() == name.lower():
            return format_
    raise BadInput(f"format {name!r} is not known; choose {', '.join(known.lower() for known in FORMATS)}")


def save_sae(folder: Path, sae: Sae, about: About | None = None, format_: Format | None = None) -> None:
    """Write ``sae`` to ``folder`` in float32, in its native format by default; BadInput if the format lacks it."""
    format_ = format_ or native_format(sae.architecture, sae.transcodes)
    if sae.transcodes and not format_.has(sae.architecture, transcodes=True):
        able = [name.lower() for name, other in FORMATS.items() if other.has(sae.architecture, transcodes=True)]
        raise BadInput(
            f"a {sae.architecture!r} transcoder cannot be written in {format_.name}'s format; "
            f"choose {' or '.join(able)}"
        )
    written = sae if format_.has(sae.architecture) else sae.as_known()
    if written is None or not format_.has(written.architecture):
        kinds = [sae.architecture] if written is None else [sae.architecture, written.architecture]
        able = [name.lower() for name, other in FORMATS.items() if any(map(other.has, kinds))]
        raise BadInput(
            f"a {sae.architecture!r} dictionary cannot be written in {format_.name}'s format, which supports only "
            f"{', '.join(sorted(format_.architectures or ()))}; choose {' or '.join(able)}"
        )
    format_.write(folder, written, about or About())


def load_sae(folder: Path) -> Sae:
    """Read the dictionary in ``folder``, in float32 in main memory; see :func:`open_sae`."""
    return open_sae(folder)[0].sae


def open_sae(folder: Path) -> tuple[Opened, Format]:
    """Read the dictionary in ``folder``, with a list of everything folded into its weights, and its format.

    Raises NotFound for a missing file; BadInput for one that is damaged, not supported, or disagrees with another.
    """
    format_ = detect_format(folder)
    opened = format_.read(folder)
    for name, weight in opened.sae.weights().items():
        largest = float(torch.linalg.vector_norm(weight, ord=math.inf))
        if not largest <= _LARGEST:
            raise BadInput(
                f"{folder / format_.weights}: {name} holds numbers of size {largest:.3g}, whose products overflow "
                "float32; fetch the checkpoint again, or train it again with a lower learning rate"
            )
    return opened, format_


def detect_format(folder: Path) -> Format:
    """Return the format of the checkpoint in ``folder``, identified by the names of its files."""
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise NotFound(f"{str(folder)!r} is not an SAE checkpoint: it {state}; name the folder that holds the weights")
    found = [format_ for format_ in FORMATS.values() if (folder / format_.weights).is_file()]
    if len(found) > 1:
        names = " and ".join(format_.weights for format_ in found)
        raise BadInput(f"{str(folder)!r} holds {names}, weights in two formats; remove one of them")
    if found:
        return found[0]
    below = sorted(
        {
            str(path.parent.relative_to(folder))
            for depth in range(1, _DEPTH + 1)
            for format_ in FORMATS.values()
            for path in folder.glob("/".join(["*"] * depth + [format_.weights]))
        }
    )
    if below:
        listed = ", ".join(below[:8]) + (f" and {len(below) - 8} more" if len(below) > 8 else "")
        raise NotFound(f"{str(folder)!r} is not an SAE checkpoint, but holds checkpoints in {listed}; name one of them")
    described = [format_ for format_ in FORMATS.values() if (folder / format_.config).is_file()]
    if described:
        missing = " or ".join(format_.weights for format_ in described)
        raise NotFound(
            f"{str(folder)!r} is an incomplete SAE checkpoint: {missing} is missing; fetch or train it again"
        )
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    state = f"holds {', '.join(held[:4])}{', …' if len(held) > 4 else ''}" if held else "is empty"
    known = "; ".join(f"{name}: {format_.config}, {format_.weights}" for name, format_ in FORMATS.items())
    raise NotFound(f"{str(folder)!r} is not an SAE checkpoint in a known format: it {state} (known are {known})")
