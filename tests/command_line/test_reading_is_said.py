"""Commands that read a whole study before they show anything say so at a terminal, and nowhere else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_study import cli

from sae.common import progress

COMMANDS = {
    "report": "report --sae run_a",
    "report --html": "report --sae run_a --html",
    "show": "show --sae run_a --latent 3",
    "compare": "compare run_a run_b",
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("at_a_terminal", [True, False], ids=["terminal", "piped"])
def test_it_is_said_that_the_study_is_read(
    root: Path, words: str, at_a_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=at_a_terminal, width=80))
    ran = cli(*words.split(), "--root", root, "--json").well()
    assert ("reading the study run" in screen.getvalue()) == at_a_terminal
    assert json.loads(ran.out)["command"] == words.split()[0]
