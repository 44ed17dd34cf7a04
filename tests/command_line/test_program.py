"""Printed commands start the program as the user did, so that they can be copied and run."""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_study import cli

from sae.common import commands
from sae.common.commands import DEFAULT_ROOT, command, get_typed_command, program, replace_program_name
from sae.common.package_data import RECIPES, bundled_recipes

REPOSITORY = Path(commands.__file__).parents[2]
TORCHRUN = "torchrun --nproc-per-node 2 cli.py train"


@pytest.mark.parametrize(
    ("started", "is_checkout", "expected", "with_torchrun"),
    [
        ("cli.py", True, "python cli.py", "cli.py"),
        ("/a b/cli.py", True, "python '/a b/cli.py'", "'/a b/cli.py'"),
        ("/venv/bin/autointerp", False, "autointerp", "-m autointerp"),
        ("/venv/bin/autointerp", True, "autointerp", "-m autointerp"),
        ("/lib/autointerp/__main__.py", False, "python -m autointerp", "-m autointerp"),
        ("/lib/ipykernel_launcher.py", False, "autointerp", "-m autointerp"),
        ("/lib/ipykernel_launcher.py", True, "python cli.py", "cli.py"),
        ("/lib/pytest/__main__.py", False, "autointerp", "-m autointerp"),
    ],
)
def test_a_command_starts_as_the_user_started_it(
    started: str, is_checkout: bool, expected: str, with_torchrun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(commands, "IS_CHECKOUT", is_checkout)
    assert program() == expected
    assert command(DEFAULT_ROOT, "align", "run_a", "b c") == f"{expected} align run_a 'b c'"
    assert replace_program_name("see python cli.py runs") == f"see {expected} runs"
    assert replace_program_name(TORCHRUN) == f"torchrun --nproc-per-node 2 {with_torchrun} train"


@given(st.lists(st.text(st.characters(exclude_characters="@", exclude_categories=("Cs", "Cc"))), max_size=4))
def test_the_typed_command_runs_again(words: list[str]) -> None:
    with mock.patch.object(sys, "argv", ["./cli.py", *words]):
        assert shlex.split(get_typed_command()) == ["python", "./cli.py", *words]


@pytest.mark.parametrize("started", ["/lib/ipykernel_launcher.py", "/lib/pytest/__main__.py"])
def test_a_notebook_has_no_typed_command(started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [started, "-f", "kernel.json"])
    assert get_typed_command() == ""


def test_a_typed_command_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cli.py", "score", "--llm-url", "https://me:secret@host/v1"])
    assert get_typed_command() == "python cli.py score --llm-url https://host/v1"


@given(st.text(max_size=9), st.booleans())
@example("api-key", False)
@example("Authorization: Bearer", True)
def test_a_typed_command_shows_no_header(name: str, is_one_word: bool) -> None:
    value = f"{name}=sekret-0123"
    words = [f"--judge-header={value}"] if is_one_word else ["--llm-header", value]
    with mock.patch.object(sys, "argv", ["cli.py", "score", *words, "--sae", "run_a"]):
        typed = get_typed_command()
    assert "sekret" not in typed
    assert typed.endswith(" --sae run_a")
    variable = ("--llm-header", "Authorization=Bearer $MY_KEY", "--judge-header=api-key=${MY_KEY}")
    with mock.patch.object(sys, "argv", ["cli.py", "score", *variable]):
        assert shlex.split(get_typed_command())[3:] == list(variable)


def names_the_script(path: Path) -> Iterator[str]:
    """Each place whose text says ``cli.py`` to the user: not a docstring, and not given to ``replace_program_name``."""
    tree = ast.parse(path.read_text())
    excepted = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "replace_program_name"
        for part in ast.walk(node)
    }
    excepted |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in excepted and "cli.py" in str(node.value):
            yield f"{path.relative_to(REPOSITORY)}:{node.lineno}"


def test_only_one_module_says_how_the_program_starts() -> None:
    sources = [REPOSITORY / "cli.py", *(REPOSITORY / "sae").rglob("*.py"), *(REPOSITORY / "autointerp").rglob("*.py")]
    found = {place.split(":")[0] for path in sources for place in names_the_script(path)}
    assert found == {"sae/common/commands.py"}, "write commands with sae.common.commands.shell_command"


def test_a_root_elsewhere_is_part_of_the_command(tmp_path: Path) -> None:
    assert shlex.split(command(tmp_path / "my runs", "runs"))[-2:] == ["--root", str(tmp_path / "my runs")]
    assert "--root" not in command(DEFAULT_ROOT.absolute(), "runs")


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_module_help_shows_the_module_command(name: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "autointerp", name, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert f"Usage: python -m autointerp {name}" in ran.stdout
    assert f"\n  python -m autointerp {name} " in ran.stdout
    assert "cli.py" not in ran.stdout
    assert ("-m autointerp train …" in ran.stdout) == (name == "train")


def test_a_recipe_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ks").mkdir()  # a folder is no recipe
    assert cli("sweep", "ks", "--explainer", "nobody").failed_in_one_line("nobody", code=2)
    assert cli("train", "--recipe", "widths").failed_in_one_line("`python cli.py sweep widths`")
    (tmp_path / "widths").write_text("[training]\nwidth = 3\n")
    cli("train", "--recipe", "widths").failed_in_one_line("unknown key 'training.width'")  # a file comes first


@pytest.mark.parametrize("words", [("train", "--recipe", "nothing"), ("sweep", "eval_runs/recipes/widthes.toml")])
def test_a_missing_recipe_lists_the_bundled_ones(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli(*words).failed_in_one_line(f"recipe {words[-1]!r} does not exist; bundled recipes: ", *bundled_recipes())


def test_help_names_every_bundled_recipe() -> None:
    shown = {name: " ".join(cli(name, "--help").well().out.split()) for name in ("train", "sweep")}
    assert {path.name for path in RECIPES.iterdir()} == {f"{name}.toml" for name in bundled_recipes()}
    for name, path in bundled_recipes().items():
        assert name in shown["sweep" if "[sweep]" in path.read_text() else "train"].split("bundled one: ")[1]
