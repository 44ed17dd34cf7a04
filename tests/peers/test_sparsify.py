"""sparsify opens what is written for it and encodes alike, and the other way round."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from dictionaries import ARCHITECTURES, D, K, M, check_alike, dense, random_sae, tokens
from torch import Tensor

from sae.common.errors import BadInput
from sae.dictionaries.checkpoint import load_sae, save_sae
from sae.dictionaries.formats import FORMATS

pytestmark = pytest.mark.peers
if not torch.cuda.is_available():  # where Triton is installed, sparsify takes it for granted that there is a GPU too
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


def their_encode(theirs: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [B, M] and reconstruction [B, D] of a ``sparsify.Sae``."""
    with torch.no_grad():
        encoded = theirs.encode(x)
        acts = torch.zeros(len(x), theirs.num_latents).scatter_add(1, encoded.top_indices, encoded.top_acts)
        return acts, theirs.decode(encoded.top_acts, encoded.top_indices)


@pytest.mark.parametrize("unit", [True, False])
def test_it_opens_a_run_and_encodes_alike(tmp_path: Path, unit: bool) -> None:
    import sparsify

    sae = random_sae("topk", unit=unit)
    save_sae(tmp_path, sae)
    theirs = sparsify.Sae.load_from_disk(tmp_path)
    check_alike(sae, tokens(), *their_encode(theirs, tokens()))
    assert theirs.cfg.normalize_decoder == unit


@pytest.mark.parametrize(
    "config", [{"expansion_factor": 4}, {"num_latents": 31}, {"expansion_factor": 3, "multi_topk": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_saves_is_read_and_encodes_alike(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    import sparsify

    torch.manual_seed(1)
    made = sparsify.Sae(D, sparsify.SparseCoderConfig(k=K, **config), dtype=dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    made.save_to_disk(tmp_path)
    theirs = sparsify.Sae.load_from_disk(tmp_path).float()
    check_alike(load_sae(tmp_path), tokens(), *their_encode(theirs, tokens()))
    width = json.loads((tmp_path / "cfg.json").read_text())["num_latents"]
    assert load_sae(tmp_path).num_latents == (width or D * config["expansion_factor"])


@pytest.mark.parametrize("skip", [False, True])
def test_its_transcoders_are_read_and_predict_alike(tmp_path: Path, skip: bool) -> None:
    import sparsify

    torch.manual_seed(1)
    config = sparsify.SparseCoderConfig(k=K, num_latents=24, transcode=True, skip_connection=skip)
    made = sparsify.Sae(D, config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    made.save_to_disk(tmp_path)
    theirs, ours, x = sparsify.Sae.load_from_disk(tmp_path), load_sae(tmp_path), tokens()
    assert ours.transcodes
    with torch.no_grad():
        predicted = theirs(x, torch.zeros_like(x)).sae_out
    torch.testing.assert_close(ours.reconstruct(x), predicted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"skip_connection": True}, "only transcoders may have one"),
        ({"activation": "groupmax"}, "only TopK dictionaries"),
    ],
)
def test_its_other_functions_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    import sparsify

    sparsify.Sae(D, sparsify.SparseCoderConfig(k=K, num_latents=24, **config)).save_to_disk(tmp_path)
    with pytest.raises(BadInput, match=reason):
        load_sae(tmp_path)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"topk"}))
def test_it_opens_no_run_of_another_architecture(tmp_path: Path, architecture: str) -> None:
    import sparsify

    save_sae(tmp_path, random_sae(architecture))
    with pytest.raises(FileNotFoundError, match=r"sae\.safetensors"):
        sparsify.Sae.load_from_disk(tmp_path)
    # not even where somebody renames the weights
    (tmp_path / "sae_weights.safetensors").rename(tmp_path / "sae.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key|size mismatch"):
        sparsify.Sae.load_from_disk(tmp_path)


def test_a_topk_dictionary_survives_every_format(tmp_path: Path) -> None:
    import sparsify

    sae = random_sae("topk")
    for name in ("SAELens", "dictionary_learning", "sparsify"):
        save_sae(tmp_path / name, sae, format_=FORMATS[name])
        sae = load_sae(tmp_path / name)  # type: ignore[assignment]
    theirs = sparsify.Sae.load_from_disk(tmp_path / "sparsify")
    assert theirs.num_latents == M
    check_alike(random_sae("topk"), tokens(), *their_encode(theirs, tokens()))
    assert torch.equal(dense(sae, tokens()), dense(random_sae("topk"), tokens()))
