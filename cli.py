"""The program: its commands, which lie in :mod:`autointerp.command_line`, and how each of them ends."""

from __future__ import annotations

import sys

try:
    import sae  # noqa: F401  # refuses a system that the program does not run on
except ImportError as error:
    sys.exit(f"error: {error}")

import typer

from autointerp.command_line import dictionaries, explaining, reading
from autointerp.command_line.ending import INTERRUPTED, TERMINATED, end, one_line_errors
from autointerp.command_line.values import spread_lists
from sae.common import launch
from sae.common.commands import program, shell_command
from sae.common.errors import BadInput
from sae.common.interrupt import Terminated

app = typer.Typer(
    name="autointerp",
    help=(
        "Which latents of a sparse autoencoder come back when it is trained again, and can anyone say what they mean?"
        "\n\n"
        "Begin with `demo`. On your own model: `train`, then `explain`, `score`, `report`; a command that needs an "
        "earlier stage runs it and says so. Every command can be killed and run again: it goes on where it stopped.\n\n"
        "Exit codes: 0 done; 1 error, said in one line; 2 no such command, flag or choice; 3 finished, but some "
        "latents failed (the report says which)."
    ),
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
app.command()(reading.demo)
app.command()(dictionaries.train)
app.command()(dictionaries.harvest)
app.command()(dictionaries.align)
app.command()(dictionaries.sweep)
app.command("import")(dictionaries.import_)
app.command()(dictionaries.export)
app.command()(explaining.explain)
app.command()(explaining.score)
app.command()(reading.report)
app.command()(reading.show)
app.command()(reading.compare)
app.command()(reading.runs)


def main() -> None:
    arguments = sys.argv[1:] or ["--help"]
    with one_line_errors("--json" in arguments):
        if launch.launched() and arguments[0] not in ("train", "harvest"):
            raise BadInput(f"torchrun is for `train` and `harvest`; run `{shell_command(arguments[0])}` without it")
        try:
            code = app(args=spread_lists(arguments), prog_name=program(), standalone_mode=False)
        except Terminated:
            code = TERMINATED
    if code in (INTERRUPTED, TERMINATED):
        what = "interrupted" if code == INTERRUPTED else "terminated"
        end(code, f"\n{what}; what is finished is kept, and the same command resumes from there")
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
