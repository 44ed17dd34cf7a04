"""Text with some of its tokens marked, as explainers and judges are shown it.

Marks need care in corpora of code, where ``<<`` and ``>>`` are operators and ``>>>`` is a prompt: where the text
has such characters of its own, other marks are used and the request says so. White space cannot be seen between
marks, so a marked piece that is nothing else is spelled out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

MARKS = (("<<", ">>"), ("⟦", "⟧"), ("⦃", "⦄"))
"""Pairs of marks, the first that the text itself does not contain is used."""
_SIGNS = str.maketrans({"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "␣"})


def choose_marks(texts: Sequence[str]) -> tuple[str, str]:
    """The first pair of marks of which neither occurs in any text; the last pair when all of them do."""
    free = (pair for pair in MARKS if not any(mark in text for mark in pair for text in texts))
    return next(free, MARKS[-1])


def marked_text(tokens: Sequence[str], marked: Sequence[bool], opening: str, closing: str) -> str:
    """The tokens joined, neighbouring marked ones as one piece between marks.

    Leading blanks stay outside the marks. A piece of nothing but white space is written in signs (⏎ ⇥ ␣).
    Without marks (and signs read back) it is the text again.
    """
    # A token without text of its own is the beginning of a character that a later token completes: hand the mark on.
    visible: list[tuple[str, bool]] = []
    handed_on = False
    for token, flag in zip(tokens, marked, strict=True):
        handed_on = handed_on or flag
        if token:
            visible.append((token, handed_on))
            handed_on = False
    parts = []
    for flag, group in itertools.groupby(visible, key=lambda pair: pair[1]):
        piece = "".join(token for token, _ in group)
        if not flag:
            parts.append(piece)
        elif piece.isspace():
            parts.append(f"{opening}{piece.translate(_SIGNS)}{closing}")
        else:
            core = piece.lstrip(" ")
            parts.append(f"{piece[: len(piece) - len(core)]}{opening}{core}{closing}")
    return "".join(parts)
