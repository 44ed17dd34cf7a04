"""dictionary_learning opens what is written for it and encodes alike, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionaries import ARCHITECTURES, D, K, M, check_alike, random_sae, tokens
from torch import Tensor

from sae.dictionaries.checkpoint import load_sae, save_sae
from sae.dictionaries.formats import FORMATS, About

pytestmark = pytest.mark.peers

CLASSES = (
    *("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "AutoEncoder", "AutoEncoderNew"),
    *("GatedAutoEncoder", "JumpReluAutoEncoder"),
)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The module that has all their classes and their loader."""
    import dictionary_learning.utils

    return dictionary_learning.utils


def their_encode(dictionary: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        acts = dictionary.encode(x)
        return acts, dictionary.decode(acts)


def made(theirs: Any, kind: str) -> Any:
    """One of their dictionaries with random numbers in every weight."""
    sizes: tuple[Any, ...] = (D, M)
    if "TopK" in kind:
        sizes += (K,)
    if "Matryoshka" in kind:
        sizes += ([5, M - 5],)
    draw = torch.Generator().manual_seed(3)
    dictionary = getattr(theirs, kind)(*sizes)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            drawn = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(drawn.abs() if name == "threshold" else drawn)
        if "TopK" in kind:
            dictionary.threshold.fill_(0.6)
    return dictionary


def saved(folder: Path, kind: str, state: Any) -> None:
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": M, "k": K}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_opens_ours_and_encodes_alike(theirs: Any, tmp_path: Path, architecture: str, unit: bool) -> None:
    sae = random_sae(architecture, unit=unit)
    save_sae(tmp_path, sae, About("a/model", "layers.2.mlp", 128, 7), FORMATS["dictionary_learning"])
    dictionary, config = theirs.load_dictionary(str(tmp_path), "cpu")
    check_alike(sae, tokens(), *their_encode(dictionary, tokens()))
    said = config["trainer"]
    assert (said["lm_name"], said["submodule_name"], said["seed"]) == ("a/model", "layers.2.mlp", 7)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_it_saves_is_read_and_encodes_alike(theirs: Any, tmp_path: Path, kind: str) -> None:
    dictionary = made(theirs, kind)
    saved(tmp_path, kind, dictionary.state_dict())
    if kind != "MatryoshkaBatchTopKSAE":  # whose loader it has not finished
        dictionary, _ = theirs.load_dictionary(str(tmp_path), "cpu")
    check_alike(load_sae(tmp_path), tokens(), *their_encode(dictionary, tokens()))


# Not AutoEncoderNew, which its trainers cannot normalise for.
@pytest.mark.parametrize("kind", sorted(set(CLASSES) - {"AutoEncoderNew"}))
def test_interrupted_run_is_scaled_like_a_finished_one(theirs: Any, tmp_path: Path, kind: str) -> None:
    dictionary = made(theirs, kind)
    saved(tmp_path, kind, {"step": 3, "ae": dictionary.state_dict(), "norm_factor": 1.7})
    read = load_sae(tmp_path)
    dictionary.scale_biases(1.7)
    if kind == "AutoEncoder":
        dictionary.normalize_decoder()
    check_alike(read, tokens(), *their_encode(dictionary, tokens()))


def test_what_its_trainer_writes(theirs: Any, tmp_path: Path) -> None:
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    torch.manual_seed(0)
    config = {
        "trainer": TopKTrainer,
        "steps": 4,
        "warmup_steps": 1,
        "activation_dim": D,
        "dict_size": M,
        "k": K,
        "layer": 1,
        "lm_name": "none",
        "device": "cpu",
    }
    data = [torch.randn(64, D) for _ in range(5)]
    trainSAE(data, [config], steps=4, save_dir=str(tmp_path), device="cpu", log_steps=100)
    dictionary, _ = theirs.load_dictionary(str(tmp_path / "trainer_0"), "cpu")
    check_alike(load_sae(tmp_path / "trainer_0"), tokens(), *their_encode(dictionary, tokens()))
