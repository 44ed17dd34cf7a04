"""Files as SAELens and dictionary_learning leave them, written by hand from what is known of their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dictionaries import D, K, M
from safetensors.torch import save_file
from torch import Tensor

VECTORS = {
    "topk": ("b_enc",),
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


def saelens_tensors(architecture: str, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_dec": (D,), **dict.fromkeys(VECTORS[architecture], (M,))}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def saelens_files(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M, "dtype": "float32", **config}))
    return folder


CLASSES = (
    *("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "AutoEncoder", "AutoEncoderNew"),
    *("GatedAutoEncoder", "JumpReluAutoEncoder"),
)


def learned_tensors(kind: str, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    linear = {"encoder.weight": (M, D), "encoder.bias": (M,), "decoder.weight": (D, M)}
    plain = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,)}
    shapes: dict[str, tuple[int, ...]] = {
        "AutoEncoderTopK": {**linear, "b_dec": (D,)},
        "BatchTopKSAE": {**linear, "b_dec": (D,)},
        "MatryoshkaBatchTopKSAE": plain,
        "AutoEncoder": {**linear, "bias": (D,)},
        "AutoEncoderNew": {**linear, "decoder.bias": (D,)},
        "GatedAutoEncoder": {
            "encoder.weight": (M, D),
            "decoder.weight": (D, M),
            "decoder_bias": (D,),
            **dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (M,)),
        },
        "JumpReluAutoEncoder": {**plain, "threshold": (M,)},
    }[kind]
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    if "TopK" in kind:
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.6)}
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = state["threshold"].abs()
    return state


def learned_files(folder: Path, kind: str, state: Any, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    said = {"dict_class": kind, "activation_dim": D, "dict_size": M, **({"k": K} if "TopK" in kind else {}), **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": said, "buffer": {}}))
    return folder
