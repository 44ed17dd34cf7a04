"""A recipe's grid: which points it has, how they are called, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.common.errors import BadInput
from sae.study.recipes import AXES, Sweep, read_sweep

RECIPES = Path(__file__).parents[3] / "eval_runs" / "recipes"
BASE = "[training]\nnum_latents = 64\nk = 2\ntokens = 1000\n"


def sweep(folder: Path, table: str, base: str = BASE, name: str = "small") -> Sweep:
    path = folder / f"{name}.toml"
    path.write_text(f"{base}[sweep]\n{table}\n")
    return read_sweep(path)


def test_axes_are_crossed_and_nothing_else_differs(tmp_path: Path) -> None:
    found = sweep(tmp_path, 'training.k = [1, 2]\ntraining.tokens = ["1k", 1500]\nseeds = [3, 5]')
    names = ["small_k1_t1k", "small_k1_t1.5k", "small_k2_t1k", "small_k2_t1.5k"]
    assert [point.study.name for point in found.points] == names
    assert [(p.study.settings.training.k, p.study.settings.training.tokens) for p in found.points] == [
        *((1, 1000), (1, 1500)),
        *((2, 1000), (2, 1500)),
    ]
    assert {point.study.seeds for point in found.points} == {(3, 5)}
    same = {p.study.settings.with_values(training={"k": 1, "tokens": 1}).model_dump_json() for p in found.points}
    assert len(same) == 1
    assert (found.tokens, found.trained_tokens) == (1500, 2 * 2 * 2500)


def test_axes_that_advance_together_are_not_crossed(tmp_path: Path) -> None:
    together = 'together = ["training.num_latents", "training.learning_rate"]'
    found = sweep(tmp_path, f"training.num_latents = [8, 16]\ntraining.learning_rate = [2e-3, 1e-3]\n{together}")
    assert [point.study.name for point in found.points] == ["small_m8", "small_m16"]
    assert [point.study.settings.training.learning_rate for point in found.points] == [2e-3, 1e-3]


def test_hookpoints_and_architectures_are_axes_too(tmp_path: Path) -> None:
    axes = 'subject.hookpoint = ["layers.0.mlp", "layers.1.mlp"]\ntraining.architecture = ["topk", "gated"]'
    names = [point.study.name for point in sweep(tmp_path, axes).points]
    assert names[0] == "small_layers.0.mlp_topk"
    assert len(set(names)) == 4


def test_lengths_read_one_text(tmp_path: Path) -> None:
    base = f'{BASE}[corpus]\nkind = "dataset"\nsource = ["x"]\n[harvest]\ntokens = 3000\n'
    found = sweep(tmp_path, "training.tokens = [1000, 8000]", base)
    assert {point.study.settings.corpus.max_tokens for point in found.points} == {8000}


@given(st.lists(st.integers(1, 10**7), min_size=2, max_size=8, unique=True))
def test_no_two_values_share_a_name(values: list[int]) -> None:
    axis = AXES["training.tokens"]
    assert len({axis.label(value) for value in values}) == len(values)


BAD = {
    "unknown axis": ("training.widht = [1, 2]", ("'training.widht'", "training.num_latents")),
    "axis of no table": ("width = [1, 2]", ("'width'", "unknown axis")),
    "one value": ("training.k = [2]", ("training.k", "two values")),
    "no list": ("training.k = 2", ("training.k = 2", "a list")),
    "twice": ("training.k = [1, 2, 1]", ("training.k", "1 twice")),
    "nothing": ("seeds = [0, 1]", ("has no axis",)),
    "k above M": ("training.k = [1, 65]", ("training.k = 65", "training.num_latents = 64")),
    "no such architecture": ('training.architecture = ["topk", "top"]', ("training.architecture", "'top'")),
    "no amount": ('training.tokens = ["1k", "many"]', ("training.tokens", "'many'")),
    "seeds": ("training.k = [1, 2]\nseeds = [0, 0]", ("seeds", "twice")),
    "seeds in words": ('training.k = [1, 2]\nseeds = "all"', ("seeds", "'all'")),
    "together of one": ('training.k = [1, 2]\ntogether = ["training.k"]', ("together", "two axes")),
    "together of no axis": (
        'training.k = [1, 2]\ntogether = ["training.k", "training.tokens"]',
        ("'training.tokens'",),
    ),
    "together uneven": (
        'training.k = [1, 2]\ntraining.num_latents = [8, 16, 32]\ntogether = ["training.k", "training.num_latents"]',
        ("training.k 2", "training.num_latents 3"),
    ),
    "together under one name": (
        'training.k = [1, 1]\ntraining.num_latents = [8, 16]\ntogether = ["training.k", "training.num_latents"]',
        ("training.k has 1 twice",),
    ),
}


@pytest.mark.parametrize(("table", "words"), BAD.values(), ids=BAD)
def test_an_impossible_sweep_is_one_line(table: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        sweep(tmp_path, table)
    assert "\n" not in str(caught.value)
    for word in ("small.toml", *words):
        assert word in str(caught.value)


def test_a_recipe_without_a_grid_is_for_train(tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text(BASE)
    with pytest.raises(BadInput, match=r"no \[sweep\] table"):
        read_sweep(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_read(path: Path) -> None:
    if path.stem == "demo":
        with pytest.raises(BadInput, match=r"\[sweep\]"):
            read_sweep(path)
    else:
        found = read_sweep(path)
        assert len(found.points) > 1
        assert len({point.study.settings.subject.model for point in found.points}) == 1


def test_transcoders_and_saes_are_points_of_one_sweep() -> None:
    sweep = read_sweep(RECIPES / "transcoders.toml")
    names = [study.name for study in sweep.studies]
    assert names == [
        "transcoders_layers.2.mlp-in_sae",
        "transcoders_layers.2.mlp_sae",
        "transcoders_layers.2.mlp-in_to-layers.2.mlp",
        "transcoders_layers.2.mlp-in_to-layers.2.mlp_skip",
    ]
    assert [study.settings.subject.target for study in sweep.studies] == [None, None, "layers.2.mlp", "layers.2.mlp"]
