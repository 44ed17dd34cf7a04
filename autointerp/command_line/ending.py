"""How commands open runs and how they end: a JSON object or tables, one line per error, an exit code."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from autointerp.command_line.values import UsageError
from sae.common import launch
from sae.common.commands import program

if TYPE_CHECKING:
    from sae.study.run import Run

SOME_FAILED = 3
INTERRUPTED = 130
TERMINATED = 143
_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and run the same command again",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.EISDIR: "give a file",
    errno.EROFS: "name another place, as with --to or --root",
    errno.ENOENT: "it was removed or renamed meanwhile; run the same command again",
}


def finish(as_json: bool, command: str, to_object: Callable[[], dict[str, Any]], render: Callable[[], None]) -> None:
    """Print the result: one JSON object on standard output, or the tables of ``render``."""
    if launch.rank() != 0:
        return
    if as_json:
        print(json.dumps({"schema": 1, "command": command, **to_object()}))
    else:
        render()


def open_runs(names: Sequence[str] | None, root: Path, whole_study: bool = False) -> list[Run]:
    """Open the runs ``names``; if there are none, the newest study's first run, or all of that study's."""
    from sae.study.run import Run, newest_study

    if names:
        return [Run.open(name, root) for name in dict.fromkeys(names)]
    study = newest_study(root)
    return study if whole_study else study[:1]


@contextmanager
def reading(run: Run) -> Iterator[None]:
    """Show a line at a terminal while the study's files are read, which may take many seconds."""
    from sae.common.progress import waiting

    with waiting(f"reading the study {run.study}"):
        yield


def finish_with_runs(
    as_json: bool, command: str, found: Sequence[Run], root: Path, damaged: Mapping[str, str] | None = None
) -> None:
    """Show the progress of each run in ``found``, then end with an error if any are ``damaged`` (name → why)."""
    damaged = damaged or {}

    def progress() -> list[dict[str, Any]]:
        from sae.study.run import progress_of

        return [progress_of(run) for run in found]

    def render() -> None:
        from autointerp.report.stages import runs_page
        from autointerp.report.terminal import print_page

        print_page(runs_page(progress(), root, list(damaged)))

    said = {"damaged": list(damaged.values())} if damaged else {}
    finish(as_json, command, lambda: {"runs": progress(), **said}, render)
    if damaged:
        end(1, "\n".join(f"error: {line}" for line in damaged.values()))


def exit_if(failed: int) -> None:
    """End with exit code 3 if some latents failed."""
    if failed:
        raise typer.Exit(SOME_FAILED)


@contextmanager
def one_line_errors(as_json: bool) -> Iterator[None]:
    """Turn errors that the user can fix into one line and an exit code; others keep their traceback."""
    from sae.common.errors import BadInput, UserError, make_printable

    try:
        for stream, mode in (("stdin", "r"), ("stderr", "w")):
            if getattr(sys, stream) is None:  # closed
                setattr(sys, stream, Path(os.devnull).open(mode))  # noqa: SIM115  # until the process ends
        if sys.stdout is None:
            raise BadInput("standard output is closed; send it to a file, or to /dev/null")
        Path.cwd()  # a deleted folder ends the process inside a library
        yield
        sys.stdout.flush()
        return
    except UserError as error:
        line, code = make_printable(" ".join(str(error).split())), error.exit_code
    except UsageError as error:
        asked = error.ctx.command_path if error.ctx is not None else program()
        line, code = f"{' '.join(error.format_message().split())} (see `{asked} --help`)", error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        unnamed = "the current folder" if error.errno == errno.ENOENT else "a file or standard output"
        what = unnamed if error.filename is None else f"{str(error.filename)!r:.200}"
        advice = _ADVICE.get(error.errno or 0, "check the path and its permissions")
        line, code = make_printable(f"{what} cannot be used: {(error.strerror or str(error)).lower()}; {advice}"), 1
    if as_json:
        end(code, f"error: {line}", json.dumps({"schema": 1, "error": line}))
    end(code, f"error: {line}")


def end(code: int, line: str, result: str | None = None) -> NoReturn:
    """End with ``line`` on standard error and any ``result`` on standard output. Only one rank prints."""

    def print_end() -> None:
        print(line, file=sys.stderr)
        try:
            print(*([] if result is None else [result]), end="" if result is None else "\n", flush=True)
        except OSError:  # full or closed: drop what is left, so that Python does not try again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    if launch.launched():
        from sae.common.torchrun import end_rank

        end_rank(code, print_end)
    print_end()
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End the process of a command that has printed its result."""
    if launch.launched():
        from sae.common.torchrun import leave_rank

        leave_rank(code)
    sys.exit(code)
