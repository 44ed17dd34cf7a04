"""dictionary_learning's format: ``ae.pt`` and ``config.json``, which names the class of the dictionary.

``ae.pt`` is a pickle (``torch.save``) and may hold code, so it is read with ``weights_only=True``. Folded into the
weights, so that they encode as the program's own class does after its own loader:

  JumpReluAutoEncoder, AutoEncoderNew   subtract no b_dec: their encoder's bias gains b_dec W
  AutoEncoder                           its loader divides the decoder by its rows' lengths and multiplies the encoder
  an interrupted run                    the weights lie under ``ae``, and were trained on activations divided by
                                        ``norm_factor``: biases and thresholds are multiplied by it

Refused: BatchTopK with threshold -1 (not yet measured), where every positive pre-activation fires.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.common.errors import BadInput, suggest
from sae.common.files import atomic, write_json
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.formats import base
from sae.dictionaries.formats.base import About, Format, Opened
from sae.dictionaries.sae import Sae

NAME, CONFIG, WEIGHTS = "dictionary_learning", "config.json", "ae.pt"
_TINY = torch.finfo(torch.float32).tiny

# Our names of the tensors, and theirs. Both weights of a linear layer are [out, in], so ``decoder.weight`` is [D, M].
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec.T": "decoder.weight"}
_PLAIN = {"W_enc.T": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_GATED = {"W_enc": "encoder.weight", "W_dec.T": "decoder.weight", "b_dec": "decoder_bias"}
_GATED |= {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
_CLASSES: dict[str, tuple[str, str, dict[str, str]]] = {  # architecture, trainer, tensors
    "AutoEncoderTopK": ("topk", "TopKTrainer", {**_LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", "BatchTopKTrainer", {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("batchtopk", "MatryoshkaBatchTopKTrainer", {**_PLAIN, "threshold": "threshold"}),
    "AutoEncoder": ("relu", "StandardTrainer", {**_LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": ("relu", "StandardTrainer", {**_LINEAR, "b_dec": "decoder.bias"}),
    "GatedAutoEncoder": ("gated", "GatedSAETrainer", _GATED),
    "JumpReluAutoEncoder": ("jumprelu", "JumpReluTrainer", {**_PLAIN, "threshold": "threshold"}),
}
_FIXED_SCALE = {"W_enc", "W_dec", "r_mag"}  # all others are multiplied where the activations are
_NO_CENTRE = {"JumpReluAutoEncoder", "AutoEncoderNew"}


def read(folder: Path) -> Opened:
    path, place = folder / CONFIG, folder / WEIGHTS
    trainer = base.read_config(path).get("trainer")
    if not isinstance(trainer, dict) or not isinstance(trainer.get("dict_class"), str):
        raise BadInput(f"{path}: trainer.dict_class is missing; this is not a {NAME} checkpoint, or a damaged one")
    kind = trainer["dict_class"]
    if kind not in _CLASSES:
        raise BadInput(f"{path}: dict_class {kind!r} cannot be opened; did it mean {suggest(kind, _CLASSES)}?")
    architecture, _, names = _CLASSES[kind]
    stored, factor = _read_tensors(place)
    is_transposed = "W_enc.T" in names
    encoder = "W_enc" if is_transposed else "encoder.weight"
    if encoder not in stored or stored[encoder].ndim != 2:
        raise BadInput(
            f"{place}: {encoder} is missing or not a matrix (it holds {', '.join(sorted(stored)[:6]) or 'nothing'}); "
            f"this is not a {kind}, or a damaged one"
        )
    rows, columns = stored[encoder].shape
    sizes = {"activation_dim": rows if is_transposed else columns, "dict_size": columns if is_transposed else rows}
    d_in, num_latents = (base.positive_int({**sizes, **trainer}, key, path, NAME) for key in sizes)
    base.check_tensors(stored, _shapes(kind, d_in, num_latents), place, CONFIG, NAME)
    k = _k(kind, trainer, stored, path, place)
    base.check_k(k, num_latents, path)
    weights = {
        ours.removesuffix(".T"): stored[theirs].T.contiguous() if ours.endswith(".T") else stored[theirs]
        for ours, theirs in names.items()
    }
    folded = _fold(weights, kind, factor)
    if architecture == "batchtopk" and float(weights["threshold"]) < 0:
        raise BadInput(
            f"{place}: its threshold was never measured (it is {float(weights['threshold']):g}), so the firings of one "
            "token are undefined; train it beyond threshold_start_step"
        )
    if architecture == "jumprelu":
        weights["threshold"] = weights["threshold"].clamp_min(_TINY)
    return Opened(ARCHITECTURES[architecture].of_weights(weights, k), folded)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], float]:
    """Return the tensors of ``ae.pt`` by name, in float32, and the factor that its biases still lack (mostly 1)."""
    base.check_exists(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(
            f"{path} is refused by PyTorch's weights-only reader: it holds more than weights, or is damaged, and "
            "opening it fully can run code; save its state_dict alone"
        ) from None
    except Exception as error:  # a damaged archive surfaces as whatever its reader raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise BadInput(f"{path} is damaged or not a PyTorch file ({reason}); fetch or train it again") from None
    factor = 1.0
    if isinstance(found, dict) and isinstance(found.get("ae"), dict):
        norm = found.get("norm_factor")
        norm = float(norm) if isinstance(norm, int | float) or (isinstance(norm, Tensor) and norm.numel() == 1) else 1.0
        factor = norm if 0 < norm < float("inf") else 1.0
        found = found["ae"]
    if not isinstance(found, dict) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise BadInput(f"{path} holds no tensors by name; it is not a {NAME} checkpoint")
    return {str(name): t.detach().to(torch.float32) for name, t in found.items()}, factor


def _shapes(kind: str, d_in: int, num_latents: int) -> dict[str, tuple[int, ...]]:
    def shape(ours: str) -> tuple[int, ...]:
        if ours.startswith("W_"):
            return (d_in, num_latents) if ours.endswith(".T") else (num_latents, d_in)
        if ours == "b_dec":
            return (d_in,)
        return () if ours == "threshold" and kind != "JumpReluAutoEncoder" else (num_latents,)

    return {theirs: shape(ours) for ours, theirs in _CLASSES[kind][2].items()}


def _k(kind: str, trainer: dict[str, Any], stored: dict[str, Tensor], path: Path, place: Path) -> int | None:
    if "TopK" not in kind:
        return base.target_l0(trainer.get("target_l0"))
    inside = base.target_l0(float(stored["k"])) if "k" in stored and stored["k"].numel() == 1 else None
    k = base.positive_int({"k": inside, **trainer} if inside is not None else trainer, "k", path, NAME)
    if inside is not None and inside != k:
        raise BadInput(f"{path} says k = {k}, {place.name} says {inside}; the two files are not from one checkpoint")
    return k


def _fold(weights: dict[str, Tensor], kind: str, factor: float) -> tuple[str, ...]:
    folded = []
    if factor != 1.0:
        for name in weights.keys() - _FIXED_SCALE:
            weights[name] = base.scale(weights[name], factor)
        folded.append(f"norm_factor ({factor:g})")
    if kind in _NO_CENTRE:
        weights["b_enc"] = base.add(weights["b_enc"], base.centring_bias(weights["W_enc"], weights["b_dec"]))
        folded.append("no b_dec in the encoder")
    if kind == "AutoEncoder" and not base.has_unit_rows(weights["W_dec"], 1e-5):
        base.fold_row_lengths(weights, ["b_enc"])
        folded.append("the decoder's lengths")
    return tuple(folded)


def write(folder: Path, sae: Sae, about: About) -> None:
    """Write a dictionary of any architecture; ``load_dictionary`` opens it.

    ReLU with a decoder not of unit length becomes ``AutoEncoderNew``: the other class's loader changes the scale.
    """
    kind = next(name for name, (architecture, *_) in _CLASSES.items() if architecture == sae.architecture)
    if kind == "AutoEncoder" and not base.has_unit_rows(sae.W_dec, 1e-5):
        kind = "AutoEncoderNew"
    _, trainer, names = _CLASSES[kind]
    if kind == "BatchTopKSAE" and sae.k is None:
        raise BadInput("this BatchTopK dictionary has no k, which dictionary_learning requires; use saelens")
    weights = {name: t.detach().to("cpu", torch.float32) for name, t in sae.weights().items()}
    if kind in _NO_CENTRE:
        weights["b_enc"] = base.add(weights["b_enc"], -base.centring_bias(weights["W_enc"], weights["b_dec"]))
    state = {
        theirs: (weights[ours.removesuffix(".T")].T if ours.endswith(".T") else weights[ours]).contiguous().clone()
        for ours, theirs in names.items()
    }
    if "TopK" in kind:
        state["k"] = torch.tensor(sae.k, dtype=torch.int)
        state.setdefault("threshold", torch.tensor(-1.0))
    with atomic(folder / WEIGHTS) as temporary:
        torch.save(state, temporary)
    described: dict[str, Any] = {
        "trainer_class": trainer,
        "dict_class": kind,
        "activation_dim": sae.d_in,
        "dict_size": sae.num_latents,
    }
    if sae.k is not None:
        described["k" if "TopK" in kind else "target_l0"] = sae.k
    known = {"lm_name": about.model, "submodule_name": about.hookpoint, "seed": about.seed}
    described |= {key: value for key, value in known.items() if value is not None}
    write_json(folder / CONFIG, {"trainer": described})


FORMAT = Format(NAME, WEIGHTS, CONFIG, frozenset(architecture for architecture, *_ in _CLASSES.values()), read, write)
