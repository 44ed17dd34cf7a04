"""Write commands in messages so that the user can copy and run them.

The program is ``python cli.py`` in a checkout, and ``autointerp`` or ``python -m autointerp`` once installed. Help
texts say ``python cli.py``; :func:`replace_program_name` fits it. Imports nothing slow, since ``--help`` needs it.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sae.common.package_data import IS_CHECKOUT

DEFAULT_ROOT = Path("eval_runs")  # the folder of all runs

_CREDENTIALS = re.compile(r"(https?://)[^/@]*@")
_NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
_REFERENCE = re.compile(r"((Bearer|Basic|Token) )?\$(\{[A-Za-z_]\w*\}|[A-Za-z_]\w*)", re.ASCII | re.IGNORECASE)
_WRITTEN = re.compile(r"(python )?\bcli\.py\b")


def program() -> str:
    """Return the shell command that started this program, or that would start it, in a notebook."""
    started = Path(sys.argv[0])
    if started.name == "cli.py":
        return shlex.join(("python", sys.argv[0]))
    if (started.parent.name, started.name) == ("autointerp", "__main__.py"):
        return "python -m autointerp"
    return "python cli.py" if IS_CHECKOUT and started.name != "autointerp" else "autointerp"


def replace_program_name(text: str) -> str:
    """Replace ``python cli.py`` in ``text``, and ``cli.py`` after torchrun, by the user's own command."""
    started = program()
    script = started.removeprefix("python ") if started.startswith("python ") else f"-m {started}"
    return _WRITTEN.sub(lambda found: started if found[1] else script, text)


def shell_command(*words: str) -> str:
    """Return a command of this program for the user to run."""
    return f"{program()} {shlex.join(words)}"


def command(root: Path, *words: str) -> str:
    """Return a command for the user to run, with ``--root`` if it is not the default."""
    elsewhere = [] if root.resolve() == DEFAULT_ROOT.resolve() else ["--root", str(root)]
    return shell_command(*words, *elsewhere)


def get_typed_command() -> str:
    """Return the command as typed, without secrets; empty in a notebook. It resumes if run again."""
    started = Path(sys.argv[0])
    is_module = (started.parent.name, started.name) == ("autointerp", "__main__.py")
    if started.name not in ("cli.py", "autointerp") and not is_module:
        return ""
    return shell_command(*(_CREDENTIALS.sub(r"\1", word) for word in hide_headers(sys.argv[1:])))


def is_secret(flag: str) -> bool:
    """Return whether the values of a flag are secrets."""
    return flag.startswith("--") and flag.endswith("-header")


def hide_header(given: str) -> str:
    """Return ``NAME=VALUE`` as it may be shown: ``NAME=…``, unless the value is a variable of the environment."""
    name, _, value = given.partition("=")
    if not _NAME.fullmatch(name) or not any(map(str.isalnum, value)):
        return "…"  # the secret alone, or in another form
    return given if _REFERENCE.fullmatch(value) else f"{name}=…"


def hide_headers(words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command with the values of header flags hidden."""
    before = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if is_secret(before):
            yield hide_header(word)
        elif equals and is_secret(flag):
            yield f"{flag}={hide_header(value)}"
        else:
            yield word
        before = word
