"""Mark some tokens of a text, for prompts.

If the text itself has ``<<`` or ``>>`` (operators in code), other marks are used and the request says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

MARKS = (("<<", ">>"), ("⟦", "⟧"), ("⦃", "⦄"))
"""Pairs of marks; the first that does not occur in the text is used."""
_SIGNS = str.maketrans({"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "␣"})


def choose_marks(texts: Sequence[str]) -> tuple[str, str]:
    """Return the first pair of marks that occurs in no text; the last pair if all do."""
    free = (pair for pair in MARKS if not any(mark in text for mark in pair for text in texts))
    return next(free, MARKS[-1])


def mark_text(tokens: Sequence[str], marked: Sequence[bool], opening: str, closing: str) -> str:
    """Join the tokens, with neighbouring marked ones as one piece between marks.

    Leading blanks stay outside the marks. A piece of white space is written in signs (⏎ ⇥ ␣). Removing the marks and
    signs gives the text again.
    """
    # A token without text begins a character that a later token completes: pass the mark on.
    visible: list[tuple[str, bool]] = []
    is_pending = False
    for token, flag in zip(tokens, marked, strict=True):
        is_pending = is_pending or flag
        if token:
            visible.append((token, is_pending))
            is_pending = False
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
