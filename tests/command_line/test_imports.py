"""What must be quick is quick: no command imports what it does not need."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_study import cli

import cli as program

REPOSITORY = Path(program.__file__).parent
COMMANDS = (
    *("demo", "train", "harvest", "align", "import", "export", "explain", "score", "report", "show", "compare", "runs"),
)

HELP = """
import sys
from cli import main
sys.argv = ["cli.py", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "pandas", "transformers", "numpy", "openai"} & set(sys.modules)
    assert not heavy, heavy
"""


def seconds_used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_imports_nothing_heavy(command: str) -> None:
    before = seconds_used()  # of computing, which other work on the machine does not lengthen as it does the clock
    arguments = [sys.executable, "-c", HELP, *command.split(), "--help"]
    ran = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "--help" in ran.stdout
    assert seconds_used() - before < 0.5


def test_look_ups_never_import_torch(root: Path) -> None:
    code = """
import sys
from tiny_study import cli
root = sys.argv[1]
table = ["export", "--table", "pairs", "--format", "csv", "--to", root + ".csv"]
lines = ["export", "--format", "neuronpedia", "--to", root + ".jsonl"]
compare = ["compare", "--sae", "run_a", "--sae", "run_b"]
show = ["show", "--latent", "3"]
for command in (["explain", "--latents", "8"], ["score"], ["report"], show, ["runs"], compare, table, lines):
    cli(*command, "--root", root).well()
    assert "torch" not in sys.modules, command
"""
    places = [str(REPOSITORY), str(REPOSITORY / "tests")]
    start = f"import sys; sys.path[:0] = {places!r}\n"
    ran = subprocess.run([sys.executable, "-c", start + code, str(root)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_no_command_at_all_is_the_help() -> None:
    assert "train" in cli().well().out
