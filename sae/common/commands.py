"""How a message writes a command, so that the user can copy it and run it.

The program is started as ``python cli.py`` in a checkout, and as ``autointerp`` or ``python -m autointerp`` once
installed. Help texts and docstrings say ``python cli.py``; :func:`replace_program_name` turns that into what the user
typed. Imports nothing slow, since ``--help`` needs it.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from sae.common.package_data import IS_CHECKOUT

DEFAULT_ROOT = Path("eval_runs")
"""The folder of all runs, below the current folder."""

_CREDENTIALS = re.compile(r"(https?://)[^/@]*@")
_WRITTEN = re.compile(r"(python )?\bcli\.py\b")


def program() -> str:
    """Return how this program was started, as words for a shell.

    A notebook or another program gets the command of the installation: ``python cli.py`` in a checkout, else
    ``autointerp``.
    """
    started = Path(sys.argv[0])
    if started.name == "cli.py":
        return shlex.join(("python", sys.argv[0]))
    if (started.parent.name, started.name) == ("autointerp", "__main__.py"):
        return "python -m autointerp"
    return "python cli.py" if IS_CHECKOUT and started.name != "autointerp" else "autointerp"


def replace_program_name(text: str) -> str:
    """Return ``text`` with the user's own command in place of ``python cli.py``, and of ``cli.py`` after torchrun."""
    started = program()
    script = started.removeprefix("python ") if started.startswith("python ") else f"-m {started}"
    return _WRITTEN.sub(lambda found: started if found[1] else script, text)


def shell_command(*words: str) -> str:
    """Return a command of this program for the user to run."""
    return f"{program()} {shlex.join(words)}"


def command(root: Path, *words: str) -> str:
    """Return a command for the user to run, with ``--root`` where it is not the default."""
    elsewhere = [] if root.resolve() == DEFAULT_ROOT.resolve() else ["--root", str(root)]
    return shell_command(*words, *elsewhere)


def get_typed_command() -> str:
    """Return the command that this program was started with, for a message; empty in a notebook or another program.

    Every command resumes, so this is also the command that finishes what was interrupted or failed. Passwords in
    addresses are left out.
    """
    started = Path(sys.argv[0])
    if started.name not in ("cli.py", "autointerp") and (started.parent.name, started.name) != (
        "autointerp",
        "__main__.py",
    ):
        return ""
    return shell_command(*(_CREDENTIALS.sub(r"\1", word) for word in sys.argv[1:]))
