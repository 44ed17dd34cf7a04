"""How a command ends: one JSON object or tables, one line for an error, and an exit code that a script can go by."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from sae.common import launch
from sae.common.commands import program

SOME_FAILED = 3
INTERRUPTED = 130
TERMINATED = 143
_UsageError: Any = typer.BadParameter.__base__  # typer's own copy of click's class, which has no public name
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC}


def finish(as_json: bool, command: str, to_object: Callable[[], dict[str, Any]], render: Callable[[], None]) -> None:
    """Give the result: as one JSON object on standard output, or as ``render`` shows it to people."""
    if launch.rank() != 0:
        return
    if as_json:
        print(json.dumps({"schema": 1, "command": command, **to_object()}))
    else:
        render()


def exit_if(failed: int) -> None:
    """End with exit code 3 where some latents failed."""
    if failed:
        raise typer.Exit(SOME_FAILED)


@contextmanager
def one_line_errors(as_json: bool) -> Iterator[None]:
    """Errors that are the user's to mend as one line and an exit code; others keep their traceback."""
    from sae.common.errors import UserError, make_printable

    try:
        yield
        return
    except UserError as error:
        line, code = make_printable(" ".join(str(error).split())), error.exit_code
    except _UsageError as error:
        asked = error.ctx.command_path if error.ctx is not None else program()
        line, code = f"{' '.join(error.format_message().split())} (see `{asked} --help`)", error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in _NOT_OURS or error.filename is None:
            raise
        line, code = f"{str(error.filename)!r} cannot be used: {(error.strerror or '').lower()}", 1
    if as_json:
        end(code, f"error: {line}", json.dumps({"schema": 1, "error": line}))
    end(code, f"error: {line}")


def end(code: int, line: str, result: str | None = None) -> NoReturn:
    """End with ``line`` on standard error and ``result``, if any, on standard output; of several ranks, one says it."""

    def speak() -> None:
        print(line, file=sys.stderr)
        if result is not None:
            print(result)

    if launch.launched():
        from sae.common.torchrun import end_rank

        end_rank(code, speak)
    speak()
    sys.exit(code)
