"""``--help`` shows examples that are real commands and lines to copy, and the real defaults."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main
from doc_commands import check, ours
from typer.testing import CliRunner

import cli as program
from autointerp.contexts.selection import Choice
from autointerp.llm.options import LlmOptions
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


def shown_default(command: str, option: str) -> str:
    """Return the default that the help of an option shows."""
    output = CliRunner().invoke(program.app, [command, "--help"], env={"COLUMNS": "200"}).output
    help_ = " ".join(output.split("Options:")[1].split())
    (parameter,) = (p for p in COMMANDS[command].params if p.name == option)
    found = re.search(rf" {parameter.opts[0]} .*?Default: ([^,;]+?)(?:[,;]|\. )", help_)
    assert found is not None, f"{command} --{option} names no default"
    return found[1]


@pytest.mark.parametrize("option", FIELDS)
def test_train_names_the_defaults_of_its_settings(option: str) -> None:
    table, field = FIELDS[option].split(".")
    real = getattr(getattr(Settings(), table), field)
    shown: Any = shown_default("train", option)
    assert (parse_amount(shown) if isinstance(real, int) else shown) == real


def test_harvest_names_the_default_of_its_settings() -> None:
    assert parse_amount(shown_default("harvest", "tokens")) == Settings().harvest.tokens


@pytest.mark.parametrize("name", COMMANDS)
def test_flag_helps_have_at_most_two_sentences(name: str) -> None:
    for parameter in COMMANDS[name].params:
        text = getattr(parameter, "help", None) or "None."
        text = text.split(" Default: ")[0]
        assert len(re.findall(r"\. (?=[A-Z])", text)) <= 1, text


def test_defaults_of_flags_are_those_of_the_dataclasses() -> None:
    by_flag = {f: p.default for command in COMMANDS.values() for p in command.params for f in p.opts}
    explain = {p.name: p.default for p in COMMANDS["explain"].params}
    assert explain["latents"] == Choice().n
    assert explain["threshold"] == Choice().threshold
    assert explain["definition"] == Choice().definition
    assert by_flag["--concurrency"] == LlmOptions().concurrency
    assert by_flag["--vllm-timeout"] == LlmOptions().vllm_timeout
