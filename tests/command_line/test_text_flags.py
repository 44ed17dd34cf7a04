"""Flags and recipes name the same corpora: several datasets, their columns and weights, shuffling and end tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_study import cli

from sae.study.run import Run


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("".join(json.dumps({"body": f"the quick dog {n} " * 9}) + "\n" for n in range(200)))
    two.write_text("".join(json.dumps({"text": f"a lazy cat {n} " * 9}) + "\n" for n in range(200)))
    return [one, two]


def record_of(*arguments: Any, root: Path) -> dict[str, Any]:
    cli("train", "--name", "new", "--seeds", 0, "--no-controls", *arguments, "--root", root, "--json").well()
    return dict(Run.open("new_a", root).record)


def test_flags_and_recipe_make_one_corpus(files: list[Path], short: Path, tmp_path: Path) -> None:
    by_flags = record_of(
        *("--recipe", short, "--dataset", *files, "--column", "body", "text", "--weights", 1, 3),
        *("--shuffle-buffer", 20, "--shuffle-seed", 4, "--no-end-token"),
        root=tmp_path / "flags",
    )
    of_text = {
        "kind": "dataset",
        "source": [str(file.resolve()) for file in files],
        "columns": ["body", "text"],
        "weights": [1, 3],
        "shuffle_buffer": 20,
        "shuffle_seed": 4,
        "end_token": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in of_text.items()]
    before, after = short.read_text().split("[corpus]")
    kept = after.split("\n", 3)[3]  # without the kind and source of the recipe
    recipe = tmp_path / "mixture.toml"
    recipe.write_text("\n".join([f"{before}[corpus]", *lines, kept]))
    by_recipe = record_of("--recipe", recipe, root=tmp_path / "recipe")
    assert by_flags["corpus"] == by_recipe["corpus"]
    corpus = by_flags["corpus"]
    assert (corpus["weights"], corpus["end_token"]) == ([1.0, 3.0], False)
    assert [each["shuffle_seed"] for each in corpus["datasets"]] == [4, 4]
    assert by_flags["settings"]["corpus"]["columns"] == ["body", "text"]


def test_a_second_train_keeps_the_mixture(files: list[Path], short: Path, tmp_path: Path) -> None:
    first = record_of("--recipe", short, "--dataset", *files, "--column", "body", "text", root=tmp_path)
    cli("train", "--name", "new", "--seeds", 0, 1, "--no-controls", "--root", tmp_path, "--json").well()
    assert Run.open("new_b", tmp_path).record["corpus"] == first["corpus"]
    ran = cli("train", "--name", "new", "--weights", 1, 2, "--root", tmp_path)
    ran.failed_in_one_line("'new_a' exists with other settings", "corpus.weights: not set there, [1.0, 2.0] now")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--weights", "1", "2"), "corpus.weights"),
        (("--shuffle-buffer", "9"), "corpus.shuffle_buffer = 9 needs corpus.kind = 'dataset'"),
        (("--weights", "0"), "corpus.weights"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: tuple[str, ...], said: str, short: Path, tmp_path: Path) -> None:
    cli("train", "--recipe", short, *flags, "--root", tmp_path / "root").failed_in_one_line(said)
