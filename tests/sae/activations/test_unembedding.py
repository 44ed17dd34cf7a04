"""The map from the residual stream to the logits, in models of several families, and models without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sae.activations.subject import Subject
from sae.activations.unembedding import Unembedding
from sae.common.errors import NotApplicable

V, D = 320, 16
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 1}


def make(family: str, **values: Any) -> Any:
    """Make a model of a family with random weights, norms included."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**values)
    model = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 0.0 if "bias" in name else 1.0, 0.3)
    return model.eval().requires_grad_(False)


class Tokenizer:
    """As much of a tokenizer as a subject needs."""

    def __call__(self, _: str, add_special_tokens: bool = True) -> dict[str, list[int]]:  # noqa: ARG002
        return {"input_ids": [1, 2]}


def subject_of(model: Any) -> Subject:
    subject = Subject("made", model.base_model, Tokenizer(), "", "")
    subject.whole = model
    return subject


FAMILIES: dict[str, tuple[dict[str, Any], str, dict[str, bool]]] = {
    # settings, the norm, and whether each hookpoint writes into the residual stream
    "GPT2": (
        {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0},
        "ln_f",
        {"h.0": True, "h.0.mlp": True, "h.1.attn": True, "h.0.ln_2": False, "h.0.mlp.act": False, "wte": True},
    ),
    "GPTNeoX": (
        SIZES,
        "final_layer_norm",
        {"layers.0": True, "layers.1.mlp": True, "layers.0.attention": True, "layers.0.input_layernorm": False},
    ),
    "Llama": (
        LLAMA_LIKE,
        "norm",
        {
            "layers.0": True,
            "layers.1": True,
            "layers.0.mlp": True,
            "layers.0.self_attn": True,
            "layers.0.self_attn.o_proj": True,
            "layers.0.self_attn.v_proj": False,
            "norm": False,
        },
    ),
    "Gemma2": (  # norms after the MLP and the attention, gains of 1 + w, a scaled embedding and soft-capped logits
        {**LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8},
        "norm",
        {
            "layers.1": True,
            "layers.0.mlp": False,
            "layers.0.self_attn": False,
            "layers.0.post_feedforward_layernorm": True,
            "embed_tokens": True,
        },
    ),
    "Cohere": (LLAMA_LIKE, "norm", {"layers.0.mlp": True}),  # logits times a constant, a LayerNorm without bias
    "OPT": (
        {
            "vocab_size": V,
            "hidden_size": D,
            "word_embed_proj_dim": D,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        "decoder.final_layer_norm",
        {"decoder.layers.0": True, "decoder.layers.0.self_attn": True, "decoder.layers.1.self_attn_layer_norm": False},
    ),
    "Phi": (SIZES, "final_layernorm", {"layers.0.mlp": True}),  # an unembedding with a bias
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_is_that_of_the_norm_and_the_unembedding(family: str) -> None:
    values, name, hookpoints = FAMILIES[family]
    model = make(family, **values)
    subject = subject_of(model)
    found = Unembedding(subject)
    assert found.rows.shape == (V, D)
    stream = torch.randn(D, dtype=torch.float64)
    stream = (stream - stream.mean()) / stream.std(correction=0)
    norm, head = model.base_model.get_submodule(name).double(), model.get_output_embeddings().double()
    x = 1e-4 * torch.randn(D, dtype=torch.float64)

    def logits(h: torch.Tensor) -> torch.Tensor:
        return head(norm(h.reshape(1, 1, -1))).flatten()

    # With x at right angles to the stream, the norm's scale does not change to first order.
    x -= (x @ stream) / D * stream
    expected = logits(stream + x) - logits(stream)
    torch.testing.assert_close(found.rows.double() @ x, expected, rtol=2e-3, atol=2e-3 * float(expected.std()))
    model.float()
    for hookpoint, writes in hookpoints.items():
        if writes:
            found.check_writes(hookpoint)
        else:
            with pytest.raises(NotApplicable, match=f"{hookpoint} of model 'made' does not write into the residual"):
                found.check_writes(hookpoint)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_only_inputs_from_the_stream_write_into_it(family: str) -> None:
    found = Unembedding(subject_of(make(family, **FAMILIES[family][0])))
    block = "layers.1" if family == "Llama" else "h.1"
    found.check_writes(f"{block}:in")
    with pytest.raises(NotApplicable, match=f"{block}.mlp:in of model 'made' does not write into the residual"):
        found.check_writes(f"{block}.mlp:in")


def test_low_precision_passes_the_checks() -> None:
    subject = subject_of(make("Llama", **LLAMA_LIKE).bfloat16())
    Unembedding(subject).check_writes("layers.0.mlp")


def test_a_norm_after_each_block_leaves_no_stream() -> None:
    sizes = {**FAMILIES["OPT"][0], "do_layer_norm_before": False}
    with pytest.raises(NotApplicable, match="does not write into the residual stream"):
        Unembedding(subject_of(make("OPT", **sizes))).check_writes("decoder.layers.0")


def test_a_model_without_final_norm_is_refused() -> None:
    model = make("Llama", **LLAMA_LIKE)
    model.model.norm = torch.nn.Identity()
    with pytest.raises(NotApplicable, match="has no final norm before its unembedding"):
        Unembedding(subject_of(model))


class Tanh(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(3 * x)


def test_another_norm_is_refused() -> None:
    model = make("Llama", **LLAMA_LIKE)
    model.model.norm = Tanh()
    with pytest.raises(NotApplicable, match="the last module of model 'made' is neither a LayerNorm nor an RMSNorm"):
        Unembedding(subject_of(model))


def test_other_logits_are_refused() -> None:
    model = make("Llama", **LLAMA_LIKE)
    model.lm_head.register_forward_hook(lambda _m, _i, output: -output)
    with pytest.raises(NotApplicable, match="the logits of model 'made' are not those of its unembedding"):
        Unembedding(subject_of(model))


def test_a_model_is_loaded_with_its_unembedding(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole = Subject.load(str(tiny_llama_dir), dtype="float32", with_unembedding=True)
    trunk = Subject.load(str(tiny_llama_dir), dtype="float32")
    assert whole.hookpoints() == trunk.hookpoints()
    assert whole.fingerprint == trunk.fingerprint
    assert trunk.whole is None
    assert Unembedding(whole).rows.shape == (400, D)
    trunk.model.save_pretrained(tmp_path)
    trunk.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NotApplicable, match=r"have no unembedding \(lm_head.weight\)"):
        Subject.load(str(tmp_path), dtype="float32", with_unembedding=True)


def test_a_model_that_predicts_no_tokens_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(hidden_size=D, num_hidden_layers=1, num_attention_heads=2)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path)
    with pytest.raises(NotApplicable, match="predicts no tokens"):
        Subject.load(str(tmp_path), dtype="float32", with_unembedding=True)
