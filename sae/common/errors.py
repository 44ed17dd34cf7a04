"""Errors that the user can fix. Any other exception is a bug in this program and keeps its traceback.

UserError                 one line: which input, what is wrong, what to do (exit code 1)
├── BadInput              a value, file or name that cannot be used
│   └── NotFinite         a number that has become NaN or infinite
├── NotFound              a run, latent, hookpoint or file that does not exist
├── SettingsDiffer        the name is taken by work with other settings
├── NotApplicable         a quantity that is not defined for this model or hookpoint
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


class NotApplicable(UserError):
    pass


class Unavailable(UserError):
    pass


def make_printable(text: str) -> str:
    """Replace the characters that a terminal would act on, such as the escape sequences in a server's answer."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def suggest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """Return the candidates most similar to ``name`` for an error message: ``'a', 'b' or 'c'``."""
    pool = list(candidates)
    return join_or(difflib.get_close_matches(name, pool, n=n, cutoff=0.3) or pool[:n])


def join_or(names: Iterable[str]) -> str:
    """Join names for an error message: ``'a', 'b' or 'c'``."""
    quoted = [repr(name) for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)
