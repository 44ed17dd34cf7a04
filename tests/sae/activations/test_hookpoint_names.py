"""Names that other programs and other families of models have for a place in a model: what is suggested for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae.activations.hookpoint_names import likely_hookpoints
from sae.activations.subject import Subject
from sae.common.errors import NotFound

GPT2 = ["wte", "wpe", "drop"]
for _i in range(12):
    GPT2 += [f"h.{_i}.{name}" for name in ("ln_1", "attn.c_attn", "attn", "ln_2", "mlp.c_fc", "mlp")] + [f"h.{_i}"]
GPT2.append("ln_f")

NAMES = {  # → in the tiny GPT-NeoX, in a GPT-2
    "blocks.2.hook_resid_post": ("layers.2", "h.2"),
    "blocks.2.hook_resid_pre": ("layers.1", "h.1"),
    "blocks.0.hook_resid_pre": ("embed_in", "wte"),
    "blocks.2.hook_resid_mid": ("layers.2.attention", "h.2.attn"),
    "blocks.2.hook_mlp_out": ("layers.2.mlp", "h.2.mlp"),
    "blocks.2.mlp.hook_post": ("layers.2.mlp", "h.2.mlp"),
    "blocks.2.hook_attn_out": ("layers.2.attention", "h.2.attn"),
    "blocks.2.attn.hook_z": ("layers.2.attention", "h.2.attn"),
    "hook_embed": ("embed_in", "wte"),
    "gpt2-small-res-jb/blocks.2.hook_resid_pre": ("layers.1", "h.1"),
    "layer_2/width_16k/average_l0_71": ("layers.2", "h.2"),
    "resid_post_layer_2": ("layers.2", "h.2"),
    "mlp_out_layer_2": ("layers.2.mlp", "h.2.mlp"),
    "attn_out_layer_2": ("layers.2.attention", "h.2.attn"),
    "transformer.h.2": ("layers.2", "h.2"),
    "transformer.h.2.mlp": ("layers.2.mlp", "h.2.mlp"),
    "h.2.mlp": ("layers.2.mlp", None),
    "model.layers.2.self_attn": ("layers.2.attention", "h.2.attn"),
    "gpt_neox.layers.2.attention": (None, "h.2.attn"),
    "layers.2.mlpp": ("layers.2.mlp", "h.2.mlp"),
    "layers.2.mlp.dense_h_to_4": ("layers.2.mlp.dense_h_to_4h", "h.2.mlp"),
    "layers.99": ("layers.2", "h.11"),
}


@pytest.fixture(scope="module")
def neox(tiny_neox_dir: Path) -> Subject:
    return Subject.load(str(tiny_neox_dir))


@pytest.mark.parametrize("name", NAMES)
def test_another_programs_name_suggests_the_place(name: str, neox: Subject) -> None:
    here, there = NAMES[name]
    if here is not None:
        with pytest.raises(NotFound) as caught:
            neox.resolve(name)
        assert f"has no hookpoint {name!r}; did you mean {here!r}" in str(caught.value)
    if there is not None:
        assert likely_hookpoints(name, GPT2)[0] == there


def test_a_name_without_a_place_suggests_nothing() -> None:
    for name in ("nonsense", "", "mlp", "..", "layers"):
        assert likely_hookpoints(name, GPT2) == []
    assert likely_hookpoints("blocks.2.hook_resid_post", ["wte", "norm"]) == []
