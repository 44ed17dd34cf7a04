"""Text patterns with a chance each, and the one sentence that holds them: what n-gram explainer and judge share.

The sentence is the whole channel between the two. It is therefore both readable and exact: patterns stand in quotes,
with everything escaped that a terminal, a line-based file or a reader's eye would lose (quotes, line breaks, control
characters, marks that turn the writing direction), so that any text comes back as it went in; and the numbers the judge
computes with stand beside them. A sentence that is not of this form is refused, not guessed at.

Meaning: at each token the longest listed pattern that ends there (a run of whole tokens) gives the chance of a firing;
where none ends, the chance of any other token holds. Chances combine as independent causes (noisy-or):
P(active) = 1 - product over the tokens of (1 - chance).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from sae.common.amounts import decimal

LOWEST, HIGHEST = 1e-4, 0.98
"""A chance outside these is not something that a few dozen contexts can show."""

LONGEST_RUN = 3
"""Tokens in a pattern at most."""

_WORTH_SAYING = 0.01

_NUMBER = r"\d+(?:\.\d+)?"
_ITEM = rf'"(?:[^"\\]|\\.)*" \(chance {_NUMBER}, lift {_NUMBER}\)'
_LIST = rf"{_ITEM}(?:(?:, | or ){_ITEM})*"
_SENTENCE = re.compile(
    rf"Fires (?:on {_LIST}, )?(?:less on {_LIST}, )?(?:and )?on any (?:other )?token with chance (?P<other>{_NUMBER})\."
)
_PART = re.compile(rf'(?P<text>"(?:[^"\\]|\\.)*") \(chance (?P<chance>{_NUMBER}), lift (?P<lift>{_NUMBER})\)')


@dataclass(frozen=True)
class Pattern:
    """A run of whole tokens, written out as one text."""

    text: str
    chance: float
    """That the latent fires on the run's last token."""
    lift: float
    """``chance`` over the chance at an average token."""


@dataclass(frozen=True)
class Patterns:
    """What an n-gram explanation says."""

    patterns: tuple[Pattern, ...]
    """The most telling first; no text twice, none empty."""
    other: float
    """The chance of a firing at a token where no pattern ends."""

    def sentence(self) -> str:
        """The explanation: one line, which :func:`parse` reads back to the rounding of its numbers."""
        more = [_item(pattern) for pattern in self.patterns if pattern.lift >= 1]
        less = [_item(pattern) for pattern in self.patterns if pattern.lift < 1]
        parts = [f"on {_listed(more)}, "] if more else []
        parts += [f"less on {_listed(less)}, "] if less else []
        rest = "and on any other token" if parts else "on any token"
        return f"Fires {''.join(parts)}{rest} with chance {_written(self.other)}."

    def probability(
        self, tokens: Sequence[str], costs: Mapping[str, float] | None = None, marks: Sequence[bool] | None = None
    ) -> float:
        """P(active) of ``tokens [T]``, by the rule in this module's head; with ``marks [T]``, on a marked token.

        ``costs`` as of :meth:`costs`, if at hand.
        """
        table = self.costs() if costs is None else costs
        other = -math.log1p(-self.other)
        total = 0.0
        before = last = ""
        for token, counts in zip(tokens, repeat(True) if marks is None else marks, strict=marks is not None):
            if not token:  # part of a character that is shown whole elsewhere
                continue
            pair = last + token
            # Longer texts first: a run of tokens that ends here is longer the more tokens it has.
            for text in (before + pair, pair, token) if counts else ():
                if text in table:
                    total += table[text]
                    break
            else:
                total += other if counts else 0.0
            before, last = last, token
        return -math.expm1(-total)

    def costs(self) -> dict[str, float]:
        """-log(1 - chance) by text: what :meth:`probability` adds up. Worked out once for many contexts."""
        return {pattern.text: -math.log1p(-pattern.chance) for pattern in self.patterns}


def parse(sentence: str) -> Patterns | None:
    """What ``sentence`` says, or ``None`` when it is not of the form that :meth:`Patterns.sentence` writes."""
    found = _SENTENCE.fullmatch(sentence)
    if found is None:
        return None
    patterns = []
    for part in _PART.finditer(sentence):
        try:
            text = json.loads(part["text"])
        except ValueError:
            return None
        patterns.append(Pattern(text, float(part["chance"]), float(part["lift"])))
    chances = [*(pattern.chance for pattern in patterns), float(found["other"])]
    return Patterns(tuple(patterns), float(found["other"])) if all(0 <= chance < 1 for chance in chances) else None


def brief(sentence: str, most: int = 5) -> str:
    """An n-gram sentence for people: the patterns that tell most, each with its chance; any other text as it is.

    Blanks within a pattern are shown as ``␣``: they count, and no line is to be broken there.
    """
    found = parse(sentence)
    if found is None:
        return sentence
    more, less = (tuple(p for p in found.patterns if (p.lift >= 1) == above) for above in (True, False))
    parts = [f"{says}{_in_brief(kept, most)}" for says, kept in (("on ", more), ("less on ", less)) if kept]
    if not parts:
        return f"Fires on any token {_chance(found.other)}."
    if found.other >= _WORTH_SAYING:
        parts.append(f"and on any other token {_chance(found.other)}")
    return f"Fires {', '.join(parts)}."


def quoted(text: str) -> str:
    """``text`` as a JSON string in which nothing is invisible: what does not print is written as an escape."""
    return "".join(c if _plain(c) else json.dumps(c)[1:-1] for c in text).join('""')


def rounded(value: float) -> float:
    """``value`` as a sentence gives it, to three significant digits."""
    return float(_written(value))


def bounded(chance: float) -> float:
    """``chance`` within :data:`LOWEST` and :data:`HIGHEST`, and as a sentence gives it."""
    return rounded(min(HIGHEST, max(LOWEST, chance)))


def _plain(c: str) -> bool:
    # Combining marks would sit on the quote before them, so they are escaped like what has no glyph.
    return c not in '"\\' and c.isprintable() and not unicodedata.combining(c)


def _item(pattern: Pattern) -> str:
    return f"{quoted(pattern.text)} (chance {_written(pattern.chance)}, lift {_written(pattern.lift)})"


def _listed(items: list[str]) -> str:
    return " or ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def _in_brief(patterns: Sequence[Pattern], most: int) -> str:
    items = [f"{quoted(p.text).replace(' ', '␣')} {_chance(p.chance)}" for p in patterns[:most]]
    return _listed([*items, f"{len(patterns) - most} more"] if len(patterns) > most else items)


def _chance(chance: float) -> str:
    return f"({decimal(chance, 2)})" if chance >= _WORTH_SAYING else f"(< {decimal(_WORTH_SAYING, 2)})"


def _written(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
