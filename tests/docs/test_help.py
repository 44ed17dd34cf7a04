"""What ``--help`` teaches: examples that are real commands and whole lines to copy, and the real defaults."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main
from doc_commands import check, ours
from typer.testing import CliRunner

import cli as program
from sae.common.amounts import parse_amount
from sae.settings import Settings

COMMANDS: dict[str, Any] = typer.main.get_command(program.app).commands  # type: ignore[attr-defined]
WITHOUT = {"demo"}
"""Commands that are an example themselves."""

FIELDS = {
    "model": "subject.model",
    "hookpoint": "subject.hookpoint",
    "dtype": "subject.dtype",
    "split": "corpus.split",
    "column": "corpus.column",
    "context": "corpus.context",
    **{
        name: f"training.{name}"
        for name in ("architecture", "precision", "num_latents", "k", "tokens", "batch_tokens", "activation_cache")
    },
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_can_be_copied(name: str) -> None:
    shown = CliRunner().invoke(program.app, [name, "--help"], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines())) <= 80
    lines = [line.strip() for line in shown.replace("\\\n", " ").splitlines()]
    examples = [line for line in lines if line.startswith("python cli.py")]
    assert bool(examples) == (name not in WITHOUT)
    for line in examples:
        arguments = ours(line)
        assert arguments is not None
        assert arguments[0] == name
        check(arguments, line)


def told(command: str, option: str) -> str:
    """The default that the help of an option names."""
    (parameter,) = (p for p in COMMANDS[command].params if p.name == option)
    found = re.search(r"Default: ([^,;]+?)(?:[,;]|\.$)", parameter.help)
    assert found is not None, f"{command} --{option} names no default: {parameter.help}"
    return found[1]


@pytest.mark.parametrize("option", FIELDS)
def test_train_names_the_defaults_of_its_settings(option: str) -> None:
    table, field = FIELDS[option].split(".")
    real = getattr(getattr(Settings(), table), field)
    said: Any = told("train", option)
    assert (parse_amount(said) if isinstance(real, int) else said) == real


def test_harvest_names_the_default_of_its_settings() -> None:
    assert parse_amount(told("harvest", "tokens")) == Settings().harvest.tokens
