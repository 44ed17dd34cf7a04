"""Recognise explanations that do not come from the latent.

Weak models repeat a solved example, or the instructions, word for word: a failure. Short explanations and paraphrases
are no copies. Explanations that many latents share, or that quote nothing they saw, are flagged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import pandas as pd

from autointerp.explaining.patterns import parse_sentence

RUN = 4  # words in a row that the prompt has too count as copied
ENOUGH, SHARE = 8, 0.75  # copied words that make a copy, if they are this share of the text. Fewer must be all of it.
MANY = 2  # other latents with the same explanation, to be flagged

# Two or more double quotes in a row are a quotation mark of program code, and quote nothing.
_QUOTED = re.compile(r""""{2,}|"((?:[^"\\]|\\.)+)"|“([^”]+)”|`+([^`]+)`+|‘([^’]+)’|(?<!\w)'([^']+)'(?!\w)""", re.DOTALL)
_SIGNS = str.maketrans("⏎⇥␣↵", "\n\t \n")
_ESCAPES = {r"\n": "\n", r"\r": "\n", r"\t": "\t"}


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
    return " ".join(text.casefold().split()).rstrip(". ")


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


def is_quoting_unseen(text: str, contexts: Iterable[str]) -> bool:
    """Return whether an explanation quotes strings, and none of them occurs in the ``contexts`` that it is made from.

    Case and white space do not matter. The n-gram baseline quotes only what it counted.
    """
    quoted = ["".join(filter(None, found.groups())) for found in _QUOTED.finditer(text)]
    if not any(quoted) or parse_sentence(text) is not None:
        return False
    seen = "\n".join(map(_plain, contexts))
    return not any(_occurs(string, seen) for string in filter(None, quoted))


def _occurs(quoted: str, seen: str) -> bool:
    """Return whether a quoted string occurs as it is, or with its escapes read; an ellipsis stands for any text."""
    unescaped = re.sub(r"\\.", lambda found: _ESCAPES.get(found[0], found[0][1:]), quoted, flags=re.DOTALL)
    forms = ([_plain(part) for part in re.split(r"…|\.\.\.", form)] for form in (quoted, unescaped))
    # American style puts stops and commas inside the quotation marks.
    return any(all(part in seen or part.rstrip(".,") in seen for part in form) for form in forms)


def _plain(text: str) -> str:
    return " ".join(text.translate(_SIGNS).casefold().split())


def find_flags(explanations: pd.DataFrame) -> dict[int, list[str]]:
    """Return why explanations are suspicious, by their ids in the journal; ``explanations`` are rows of one run's."""
    good = explanations[explanations["status"] == "ok"]
    made_by = [good[name] for name in ("explainer", "settings_hash", "prompt_hash", "model", "draw")]
    others = good["latent"].groupby([*made_by, good["text"].map(normalise)]).transform("nunique") - 1
    flags: dict[int, list[str]] = {}
    for number, n, is_unseen in zip(good["id"], others, good["quotes_unseen"].fillna(False), strict=True):
        words = [f"same text as {n:,} others"] if n >= MANY else []
        words += ["quotes nothing it saw"] if is_unseen else []
        if words:
            flags[int(number)] = words
    return flags
