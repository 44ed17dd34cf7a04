"""Parts that every format needs: its description, and files that are checked when they are opened.

A checkpoint may be a damaged download: its claims are compared with its contents, and errors name the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.common.errors import BadInput, NotFound
from sae.common.files import atomic, read_json
from sae.dictionaries.sae import Sae

_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"}


class Opened(NamedTuple):
    """A dictionary that was read, and the changes to its weights."""

    sae: Sae
    folded: tuple[str, ...] = ()  # left to the loader by the files and now in the weights


@dataclass(frozen=True)
class About:
    """Facts about a dictionary that some formats record besides its weights; ``None`` is unknown."""

    model: str | None = None
    hookpoint: str | None = None
    context: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Format:
    """One program's way to keep a dictionary: a file of weights and a description."""

    name: str
    weights: str
    config: str
    architectures: frozenset[str] | None  # those that it supports; ``None``: all
    read: Callable[[Path], Opened]  # from a folder; raises NotFound for a missing file, BadInput for an unusable one
    write: Callable[[Path, Sae, About], None]  # to a folder, the weights before the description
    extras: tuple[str, ...] = ()  # further files, read where they exist
    transcoders: frozenset[str] | None = frozenset()  # architectures of which it supports transcoders too

    def has(self, architecture: str, transcodes: bool = False) -> bool:
        known = self.transcoders if transcodes else self.architectures
        return known is None or architecture in known


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotFound(
            f"{str(path.parent)!r} is not an SAE checkpoint: it has no {path.name}; name a folder with {path.name}"
        )
    try:
        config = read_json(path)
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); fetch or write the checkpoint again") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path} does not describe an SAE: it holds no JSON object; fetch the checkpoint again")
    return config


def positive_int(config: Mapping[str, Any], key: str, path: Path, format_name: str) -> int:
    """Return the positive whole number under ``key``."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = f"{key} = {value!r} is not a positive whole number" if key in config else f"{key!r} is missing"
        raise BadInput(f"{path}: {said}; this is not a {format_name} checkpoint, or a damaged one")
    return value


def flag(config: Mapping[str, Any], key: str, path: Path) -> bool:
    """Return the truth value under ``key``; false without one."""
    value = config.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise BadInput(f"{path}: {key} = {value!r:.60} is neither true nor false; fetch the checkpoint again")
    return value


def target_l0(value: Any) -> int | None:
    """Round the number of latents that training aimed at; ``None`` where ``value`` is no such number."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31:
        return max(1, round(value))
    return None


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def check_k(k: int | None, num_latents: int, path: Path) -> None:
    """Raise BadInput if ``k`` exceeds the number of latents."""
    if k is not None and k > num_latents:
        raise BadInput(f"{path}: k = {k} is more than the {num_latents} latents; it must be at most that")


def check_exists(path: Path) -> None:
    """Raise NotFound if there is no file of weights at ``path``."""
    if not path.is_file():
        raise NotFound(
            f"{path.parent} is an incomplete SAE checkpoint: {path.name} is missing; fetch or train it again"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors in ``path``, in float32 in main memory."""
    check_exists(path)
    try:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if (dtype := stored.get_slice(name).get_dtype()) not in _DTYPES:
                    raise BadInput(f"{path}: {name} has dtype {dtype}, which cannot be read; convert it to F32")
            # Copied out of the mapped file: its tensors may lie at any address, and then BLAS may round differently.
            return {name: stored.get_tensor(name).to(torch.float32, copy=True) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path} is damaged or cut short ({reason}); fetch or train it again") from None


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path, config: str, format_name: str
) -> None:
    """Raise BadInput unless every tensor of ``shapes`` exists, has that shape and holds finite numbers."""
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise BadInput(
            f"{path}: {', '.join(missing)} missing (it holds {', '.join(sorted(tensors)[:6]) or 'nothing'}), which "
            f"{format_name} keeps for this architecture; fetch the checkpoint again"
        )
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise BadInput(
                f"{path}: {name} has shape {list(found)}, but {config} says {list(shape)}; "
                "the two files are not from one checkpoint"
            )
    for name in shapes:
        if not bool(torch.isfinite(tensors[name]).all()):
            raise BadInput(f"{path}: {name} holds NaN or infinite values; train it again with a lower learning rate")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    with atomic(path) as temporary:
        save_file(plain, temporary)


# Folding: products are taken in float64 and rounded once; matrices are widened some rows at a time.

_ROWS = 4096


def scale(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """Return ``tensor`` times ``factor``: one number, or one per row [rows] in float64."""
    if tensor.ndim < 2:
        return (tensor.double() * factor).to(tensor.dtype)
    each = factor if isinstance(factor, Tensor) else torch.full(tensor.shape[:1], factor, dtype=torch.float64)
    parts = zip(tensor.split(_ROWS), each.split(_ROWS), strict=True)
    return torch.cat([(rows.double() * f[:, None]).to(tensor.dtype) for rows, f in parts])


def centring_bias(W_enc: Tensor, b_dec: Tensor) -> Tensor:
    """Return b_dec W_enc^T [M] in float64; ``x W_enc^T + b`` is ``(x - b_dec) W_enc^T`` plus b and this."""
    return torch.cat([part.double() @ b_dec.double() for part in W_enc.split(_ROWS)])


def add(bias: Tensor, amount: Tensor) -> Tensor:
    return (bias.double() + amount).to(bias.dtype)


def row_lengths(W_dec: Tensor) -> Tensor:
    """Return the length of each decoder row [M], in float64."""
    return torch.cat([part.double().norm(dim=1) for part in W_dec.split(_ROWS)])


def fold_row_lengths(weights: dict[str, Tensor], biases: Iterable[str]) -> None:
    """Give decoder rows length 1, and multiply encoder rows and ``biases`` by the lengths; rows of zeros stay zero."""
    norm = row_lengths(weights["W_dec"])
    for name in ("W_enc", *biases):
        weights[name] = scale(weights[name], norm)
    weights["W_dec"] = scale(weights["W_dec"], 1 / norm.clamp_min(1e-300))


def has_unit_rows(W_dec: Tensor, tolerance: float = 1e-3) -> bool:
    return bool(((row_lengths(W_dec) - 1).abs() <= tolerance).all())
