"""The command line program: registers the commands of :mod:`autointerp.command_line` and runs one."""

from __future__ import annotations

import sys

try:
    import sae  # noqa: F401  # refuses a system that the program does not run on
except ImportError as error:
    sys.exit(f"error: {error}")

import typer

from autointerp.command_line import dictionaries, doctor, explaining, probing, reading
from autointerp.command_line.ending import INTERRUPTED, TERMINATED, end, leave, one_line_errors
from autointerp.command_line.options import Command
from autointerp.command_line.values import spread_lists
from sae.common import launch
from sae.common.commands import program, shell_command
from sae.common.errors import BadInput
from sae.common.interrupt import Terminated

app = typer.Typer(
    name="autointerp",
    help=(
        "Find out which latents of a sparse autoencoder come back when it is trained again, and whether anyone can "
        "say what they mean.\n\n"
        "Start with `demo`. On your own model: `train`, then `explain`, `score`, `report`; a command that needs an "
        "earlier stage runs it and says so. Every command can be interrupted; run it again to resume.\n\n"
        "Exit codes: 0 done; 1 error; 2 unknown command, flag or choice; 3 finished, but some latents failed (the "
        "report lists them)."
    ),
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
for command in (
    reading.demo,
    *(dictionaries.train, dictionaries.harvest, dictionaries.align, dictionaries.sweep),
    *(dictionaries.import_, dictionaries.export),
    *(probing.llm, explaining.explain, explaining.score),
    *(reading.report, reading.show, reading.compare, reading.runs, doctor.doctor),
):
    app.command(command.__name__.rstrip("_"), cls=Command)(command)


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
        signal = "interrupted" if code == INTERRUPTED else "terminated"
        end(code, f"\n{signal}; finished work is kept, run the same command to resume")
    leave(code or 0)


if __name__ == "__main__":
    main()
