"""What must be quick is quick: no command imports what it does not need."""

from __future__ import annotations

import json
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
OF_TYPER = {"annotated_doc", "shellingham", "typer"}
OF_PYDANTIC = {"annotated_types", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection"}
OF_RICH = {"rich", "pygments", "markdown_it", "mdurl"}

RUN = """
import json, sys
from cli import main
sys.argv = ["cli.py", *sys.argv[1:]]
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules_of(*arguments: object) -> set[str]:
    """All modules that a command has imported when it ends."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stderr.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    """The packages of others among the modules."""
    others = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    return {name for name in others if not name.startswith("_") and name not in ("autointerp", "cli", "sae")}


def test_help_imports_typer_alone() -> None:
    assert packages(modules_of("--help")) <= OF_TYPER


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    assert packages(modules_of(command, "--help")) <= OF_TYPER | OF_PYDANTIC  # pydantic by typer itself


def test_runs_imports_no_library_of_numbers(root: Path) -> None:
    assert packages(modules_of("runs", "--root", root)) <= OF_TYPER | OF_PYDANTIC | OF_RICH


@pytest.mark.parametrize(
    "words",
    ["report", "report --json", "show --latent 3", "compare run_a run_b"],
)
def test_reading_a_study_imports_no_solver(root: Path, words: str) -> None:
    modules = modules_of(*words.split(), "--root", root)
    heavy = {"datasets", "httpx", "jinja2", "openai", "plotly", "torch", "transformers"}
    heavy |= {"scipy.optimize", "scipy.sparse", "scipy.stats"}
    assert not heavy & modules


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
