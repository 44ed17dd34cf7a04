"""Options that go together are one parameter of a command and single flags on its command line."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

import cli
from autointerp.command_line.options import takes_groups


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--width", help="How wide.")] = 3
    names: Annotated[list[str] | None, typer.Option("--name", help="What of.")] = None


def test_option_group_expands_in_place_and_arrives_whole() -> None:
    seen: list[object] = []
    app = typer.Typer()

    @app.command()
    @takes_groups
    def measure(
        *,
        first: Annotated[str, typer.Option("--first")],
        size: Size,
        last: Annotated[bool, typer.Option("--last")] = False,
    ) -> None:
        """Measure."""
        seen.extend((first, size, last))

    result = CliRunner().invoke(app, ["--first", "a", "--name", "x", "--name", "y"])
    assert result.exit_code == 0, result.output
    assert seen == ["a", Size(3, ["x", "y"]), False]
    assert list(inspect.signature(measure).parameters) == ["first", "width", "names", "last"]
    shown = CliRunner().invoke(app, ["--help"]).output
    assert shown.index("--first") < shown.index("--width") < shown.index("--last")
    assert CliRunner().invoke(app, ["--first", "a", "--width", "wide"]).exit_code == 2


def test_every_flag_has_one_meaning_and_a_help() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        flags = [flag for parameter in command.params for flag in parameter.opts]
        assert len(flags) == len(set(flags)), name
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or getattr(parameter, "help", None), (name, parameter.name)
        assert {"--root", "--json"} <= set(flags), name
