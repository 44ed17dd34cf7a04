"""The cut model against the whole one, names of hookpoints, and every model that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sae.activations import subject
from sae.activations.subject import Subject, load_tokenizer
from sae.common import hub
from sae.common.errors import BadInput, NotFound, Unavailable, UserError
from sae.common.hub import find_on_hub, looks_like_path


@pytest.fixture(scope="module")
def neox(tiny_neox_dir: Path) -> Subject:
    return Subject.load(str(tiny_neox_dir), dtype="float32")


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path) -> Subject:
    return Subject.load(str(tiny_llama_dir), dtype="float32")


@pytest.fixture
def damaged(tiny_neox_dir: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_neox_dir, tmp_path / "model"))


def tokens(n: int = 3, t: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 300, size=(n, t))


# --- activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "hookpoint", "full", "front"),
    [
        ("neox", "layers.1.mlp", "gpt_neox.layers.1.mlp", []),
        ("neox", "layers.2", "gpt_neox.layers.2", []),
        ("neox", "layers.0.attention", "gpt_neox.layers.0.attention", []),
        ("llama", "layers.1.mlp", "model.layers.1.mlp", [1]),
        ("llama", "layers.0.self_attn", "model.layers.0.self_attn", [1]),
    ],
)
def test_activations_are_those_of_the_whole_model(
    which: str, hookpoint: str, full: str, front: list[int], request: pytest.FixtureRequest
) -> None:
    cut: Subject = request.getfixturevalue(which)
    assert cut.prefix == front
    whole = AutoModelForCausalLM.from_pretrained(cut.source).eval()
    seen: list[torch.Tensor] = []
    whole.get_submodule(full).register_forward_hook(
        lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    ids = tokens()
    with torch.no_grad():
        whole(torch.tensor([[*front, *row] for row in ids.tolist()]))
    found = cut.activations(ids, [hookpoint])[hookpoint]
    assert found.shape == (3, 12, 16)
    torch.testing.assert_close(found, seen[0][:, len(front) :], rtol=0, atol=0)
    torch.testing.assert_close(cut.activations(ids, [full])[full], found, rtol=0, atol=0)


def test_later_in_place_changes_are_not_seen(neox: Subject) -> None:
    """Some models (Falcon) add to the very tensor that a module has given: beside a later hookpoint it is as alone."""
    alone = neox.activations(tokens(), ["layers.0.mlp"])["layers.0.mlp"].clone()
    given: list[torch.Tensor] = []
    first, second = (neox.model.get_submodule(neox.resolve(f"layers.{i}.mlp")) for i in range(2))
    handles = [
        first.dense_4h_to_h.register_forward_hook(lambda _m, _i, output: given.append(output)),
        second.register_forward_pre_hook(lambda _m, _i: given.append(given.pop().add_(1.0))),
    ]
    try:
        beside = neox.activations(tokens(), ["layers.0.mlp", "layers.1.mlp"])["layers.0.mlp"]
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(beside, alone)


def test_the_forward_pass_stops_at_the_last_hookpoint(neox: Subject) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in neox.model.named_modules()
        if name in ("layers.0", "layers.1.mlp", "layers.1", "layers.2", "final_layer_norm")
    ]
    both = neox.activations(tokens(), ["layers.1.mlp", "layers.0.mlp"])
    for handle in handles:
        handle.remove()
    assert ran in (["layers.0"], ["layers.0", "layers.1.mlp"])
    alone = neox.activations(tokens(), ["layers.0.mlp"])["layers.0.mlp"]
    assert torch.equal(both["layers.0.mlp"], alone)
    assert not any(m._forward_hooks for m in neox.model.modules())


def test_activations_can_be_an_input_to_training(neox: Subject) -> None:
    x = neox.activations(tokens(), ["layers.1.mlp"])["layers.1.mlp"]
    weight = torch.ones(16, requires_grad=True)
    (x * weight).sum().backward()
    assert not x.requires_grad
    assert weight.grad is not None


def test_precision(tiny_neox_dir: Path, neox: Subject) -> None:
    half = Subject.load(str(tiny_neox_dir), dtype="bfloat16")
    x = half.activations(tokens(), ["layers.1.mlp"])["layers.1.mlp"]
    assert x.dtype == half.dtype == torch.bfloat16
    exact = neox.activations(tokens(), ["layers.1.mlp"])["layers.1.mlp"]
    torch.testing.assert_close(x.float(), exact, rtol=0.1, atol=0.02)
    assert half.fingerprint == neox.fingerprint


@pytest.mark.parametrize(
    ("which", "module", "front"),
    [
        ("neox", "layers.1.mlp", []),
        ("neox", "layers.2", []),
        ("neox", "layers.0.mlp.dense_4h_to_h", []),
        ("llama", "layers.1.mlp", [1]),
        ("llama", "layers.0.self_attn", [1]),  # which gets a keyword
    ],
)
def test_inputs_are_those_of_the_whole_model(
    which: str, module: str, front: list[int], request: pytest.FixtureRequest
) -> None:
    cut: Subject = request.getfixturevalue(which)
    seen: list[torch.Tensor] = []
    handle = cut.model.get_submodule(module).register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    ids = tokens()
    with torch.no_grad():
        cut.model(torch.tensor([[*front, *row] for row in ids.tolist()]))
    handle.remove()
    name = f"{module}:in"
    found = cut.activations(ids, [name, module, "layers.0"])
    torch.testing.assert_close(found[name], seen[0][:, len(front) :], rtol=0, atol=0)
    assert torch.equal(found[module], cut.activations(ids, [module])[module])
    assert cut.width(name) == found[name].shape[2]
    full = f"{cut.model.base_model_prefix}.{name}"
    assert cut.resolve(full) == name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in cut.model.modules())


def test_the_pass_ends_before_a_module_whose_input_is_asked(neox: Subject) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in neox.model.named_modules()
    ]
    neox.activations(tokens(), ["layers.1.mlp:in"])
    for handle in handles:
        handle.remove()
    assert ran[-1] == "layers.1.post_attention_layernorm"
    assert not any(name.startswith("layers.1.mlp") for name in ran)


# --- hookpoints -------------------------------------------------------------------------------------------


def test_names(neox: Subject, llama: Subject) -> None:
    assert neox.resolve("layers.2.mlp") == neox.resolve("gpt_neox.layers.2.mlp") == "layers.2.mlp"
    assert llama.resolve("layers.1.mlp") == llama.resolve("model.layers.1.mlp") == "layers.1.mlp"
    assert neox.width("layers.2.mlp") == 16
    assert neox.width("gpt_neox.layers.2.mlp.dense_h_to_4h") == 32
    listed = neox.hookpoints()
    assert listed.index("layers.0.mlp") < listed.index("layers.1.attention") < listed.index("layers.2.mlp")
    assert "rotary_emb" not in listed
    for name in listed:
        assert neox.resolve(name) == name
    assert listed.index("layers.1.mlp:in") < listed.index("layers.1.mlp")
    assert neox.width("layers.2.mlp.dense_4h_to_h:in") == 32
    assert "embed_in:in" not in listed


def test_wrong_names(neox: Subject) -> None:
    with pytest.raises(NotFound, match=r"no hookpoint 'layers\.9\.mlp'; did you mean .*'layers\.\d\.mlp'"):
        neox.resolve("layers.9.mlp")
    with pytest.raises(BadInput, match=r"'rotary_emb' .* does not give one vector per token"):
        neox.resolve("rotary_emb")
    with pytest.raises(BadInput, match=r"'embed_in:in' .* does not get one vector per token"):
        neox.resolve("embed_in:in")
    with pytest.raises(NotFound, match=r"no hookpoint 'transformer\.h\.2\.mlp:in'; did you mean 'layers\.2\.mlp:in'\?"):
        neox.resolve("transformer.h.2.mlp:in")
    with pytest.raises(NotFound):
        neox.activations(tokens(), ["nonsense"])


def test_tokens_that_do_not_fit(neox: Subject, llama: Subject) -> None:
    with pytest.raises(BadInput, match=r"64 positions, .* takes 65; lower corpus\.context to 64"):
        neox.activations(tokens(1, 65), ["layers.0.mlp"])
    with pytest.raises(BadInput, match=r"takes 65; lower corpus\.context to 63"):
        llama.check_context(64)
    with pytest.raises(BadInput, match="token 320 is not in the vocabulary"):
        neox.activations(np.full((1, 4), 320), ["layers.0.mlp"])


# --- fingerprints -----------------------------------------------------------------------------------------


def test_a_fingerprint_follows_the_weights_not_the_place(neox: Subject, damaged: Path) -> None:
    assert Subject.load(str(damaged), dtype="float32").fingerprint == neox.fingerprint
    weights = load_file(damaged / "model.safetensors")
    weights["gpt_neox.final_layer_norm.bias"][3] += 1e-3
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    assert Subject.load(str(damaged), dtype="float32").fingerprint != neox.fingerprint


def test_the_tokenizers_fingerprint(tiny_neox_dir: Path, tiny_llama_dir: Path, damaged: Path) -> None:
    tokenizer, fingerprint = load_tokenizer(str(tiny_neox_dir))
    assert len(tokenizer) == 320
    assert len(fingerprint) == 64
    read = Subject.load(str(damaged), dtype="float32").tokenizer_fingerprint
    assert load_tokenizer(str(damaged))[1] == fingerprint == read
    assert load_tokenizer(str(tiny_llama_dir))[1] != fingerprint


# --- models that cannot be used ---------------------------------------------------------------------------


def refused(call: Callable[[], object], kind: type[UserError], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert part in message


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_no_model_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    loaders: tuple[Callable[[str], object], ...] = (Subject.load, load_tokenizer)
    for load in loaders:
        refused(partial(load, str(tmp_path)), BadInput, "no config.json")
        refused(partial(load, str(tmp_path / "gone" / "model")), NotFound, "does not exist")
        refused(partial(load, str(tmp_path / "file")), BadInput, "is a file")
        refused(partial(load, ""), NotFound, "''")


def test_the_bundled_model_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BUNDLED", tmp_path)
    refused(lambda: Subject.load("bundled"), NotFound, "python -m sae.activations.bundled.build")


def test_damaged_weights(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    good = weights.read_bytes()
    load = lambda: Subject.load(str(damaged), dtype="float32")  # noqa: E731
    weights.write_bytes(good[: len(good) // 2])
    refused(load, BadInput, str(damaged), "cannot be loaded")
    weights.write_bytes(b"")
    refused(load, BadInput, "cannot be loaded")
    weights.write_bytes(good)
    tensors = load_file(weights)
    del tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(load, BadInput, "lacks 1 of its weights", "dense_4h_to_h")
    weights.unlink()
    refused(load, BadInput, str(damaged), "cannot be loaded")
    weights.write_bytes(good)
    edit_config(damaged, hidden_size=32)
    refused(load, BadInput, "cannot be loaded")


def test_damaged_configuration(damaged: Path) -> None:
    load = lambda: Subject.load(str(damaged), dtype="float32")  # noqa: E731
    edit_config(damaged, model_type="no-such-family")
    refused(load, BadInput, "config.json")
    (damaged / "config.json").write_text('{"model_type": "t5", "d_model": 8, "num_layers": 1}')
    refused(load, BadInput, "encoder-decoder")
    (damaged / "config.json").write_text("{ not json")
    refused(load, BadInput, "config.json")


def test_damaged_tokenizer(damaged: Path) -> None:
    (damaged / "tokenizer.json").write_text("{")
    refused(lambda: load_tokenizer(str(damaged)), BadInput, "tokenizer")
    (damaged / "tokenizer.json").unlink()
    refused(lambda: load_tokenizer(str(damaged)), BadInput, "tokenizer")


def test_dtype_and_device(tiny_neox_dir: Path) -> None:
    refused(lambda: Subject.load(str(tiny_neox_dir), dtype="float23"), BadInput, "'float32'")
    refused(lambda: Subject.load(str(tiny_neox_dir), device="no-device"), BadInput, "no-device")


# --- the hub ----------------------------------------------------------------------------------------------


def no_network(*_: Any, **__: Any) -> None:
    raise ConnectionError("Name or service not known\nand a paragraph of advice")


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(lambda: Subject.load("some/model"), Unavailable, "'some/model'", "cannot be reached", "Name or service")
    reference = tmp_path / "models--some--model" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("0123abcd\n")
    found = find_on_hub("some/model", "model")
    assert found == hub.OnHub("some/model", "0123abcd", offline=True)
    assert found.arguments() == {"revision": "0123abcd", "local_files_only": True}


def test_name_and_revision_are_looked_up_on_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Found:
        sha = "feed"

    def look_up(_self: Any, name: str, revision: str | None, timeout: float) -> Found:
        asked.append((name, revision, timeout > 0))
        return Found()

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", look_up)
    assert find_on_hub("some/model@step1000", "model").arguments() == {"revision": "feed", "local_files_only": False}
    assert asked == [("some/model", "step1000", True)]


def test_a_name_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*_: Any, **__: Any) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unknown)
    refused(lambda: Subject.load("some/model"), NotFound, "neither a folder here nor on the hub")
    monkeypatch.undo()
    refused(lambda: Subject.load("bad name!"), NotFound, "possible hub name")


@pytest.mark.parametrize(
    ("name", "path"), [("./x", True), ("/a/b", True), ("a/b/c", True), ("gpt2", False), ("org/name", False)]
)
def test_what_looks_like_a_path(name: str, path: bool) -> None:
    assert looks_like_path(name) is path
