"""Errors that are the user's to mend. Everything else is a defect of ours and keeps its traceback.

UserError                 one line: which input, what is wrong, what to do (exit code 1)
├── BadInput              a value, file or name that cannot be used
│   └── NotFinite         a number that has become NaN or infinite
├── NotFound              a run, latent, hookpoint or file that is not there
├── SettingsDiffer        the name is taken by work done under other settings
└── Unavailable           something outside this program did not answer (an LLM endpoint, a hub)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Shown to the user as one line, without a traceback; the command exits with ``exit_code``."""

    exit_code = 1


class BadInput(UserError):
    pass


class NotFinite(BadInput):
    pass


class NotFound(UserError):
    pass


class SettingsDiffer(UserError):
    pass


class Unavailable(UserError):
    pass


def make_printable(text: str) -> str:
    """``text`` for a terminal: what acts instead of showing (escape sequences of a server's answer) is replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def find_similar(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Those of the candidates that ``name`` may have been meant to be, the likest first."""
    return difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.6)


def suggest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """The candidates most like ``name``, as words for an error message: ``'a', 'b' or 'c'``."""
    pool = list(candidates)
    return join_or(difflib.get_close_matches(name, pool, n=n, cutoff=0.3) or pool[:n])


def join_or(names: Iterable[str]) -> str:
    """Names as words for an error message: ``'a', 'b' or 'c'``."""
    quoted = [repr(name) for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)
