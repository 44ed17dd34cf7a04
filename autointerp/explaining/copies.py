"""Recognise explanations that do not come from the latent: copies of the prompt.

Weak models repeat a solved example, or the instructions, word for word. Short explanations and paraphrases are no
copies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

RUN = 4  # words in a row that the prompt has too count as copied
ENOUGH, SHARE = 8, 0.75  # copied words that make a copy, if they are this share of the text. Fewer must be all of it.


def find_copied(text: str, sources: Sequence[str]) -> int | None:
    """Return the index of the first of ``sources`` that ``text`` repeats; ``None`` if it repeats none."""
    words = split_words(text)
    for number, source in enumerate(sources):
        n = _count_copied(words, split_words(source))
        if n and (n == len(words) or n >= max(ENOUGH, SHARE * len(words))):
            return number
    return None


def normalise(text: str) -> str:
    """Return ``text`` without case, extra white space and final stop. Equal results mean the same explanation."""
    return " ".join(text.casefold().split()).rstrip(".")


def split_words(text: str) -> list[str]:
    """Return the words of ``text`` without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def _count_copied(words: Sequence[str], source: Sequence[str]) -> int:
    """Count the ``words`` that are part of a run of ``RUN`` words of ``source``."""
    known = set(_list_runs(source))
    copied = {start + i for start, run in enumerate(_list_runs(words)) if run in known for i in range(RUN)}
    return len(copied)


def _list_runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(RUN)), strict=False))
