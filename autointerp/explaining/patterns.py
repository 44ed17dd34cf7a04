"""Text patterns with a chance each, and the sentence that holds them, shared by n-gram explainer and judge.

The sentence is all that the judge gets, so it is readable and exact: patterns are quoted and escaped, next to the
numbers that the judge computes with. A sentence of another form is refused.

Meaning: at each token the longest listed pattern that ends there (a run of whole tokens) gives the chance of a firing,
or else the chance of any other token. Chances combine as independent causes (noisy-or): P(active) = 1 - product over
the tokens of (1 - chance).
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

LOWEST, HIGHEST = 1e-4, 0.98  # a few dozen contexts cannot show a chance outside these

LONGEST_RUN = 3  # most tokens in a pattern

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
    chance: float  # probability that the latent fires on the run's last token
    lift: float  # ``chance`` over the chance at an average token


@dataclass(frozen=True)
class Patterns:
    """The content of an n-gram explanation."""

    patterns: tuple[Pattern, ...]  # the most informative first; no text twice, none empty
    other: float  # chance of a firing at a token where no pattern ends

    def write_sentence(self) -> str:
        """Write the explanation: one line, which :func:`parse_sentence` reads back."""
        more = [_write_item(pattern) for pattern in self.patterns if pattern.lift >= 1]
        less = [_write_item(pattern) for pattern in self.patterns if pattern.lift < 1]
        parts = [f"on {_join(more)}, "] if more else []
        parts += [f"less on {_join(less)}, "] if less else []
        rest = "and on any other token" if parts else "on any token"
        return f"Fires {''.join(parts)}{rest} with chance {_write_number(self.other)}."

    def compute_probability(
        self, tokens: Sequence[str], costs: Mapping[str, float] | None = None, marks: Sequence[bool] | None = None
    ) -> float:
        """Return P(active) of ``tokens`` [T], or with ``marks`` [T], of a marked token; see the module's docstring.

        ``costs`` are those of :meth:`compute_costs`, if available.
        """
        table = self.compute_costs() if costs is None else costs
        other = -math.log1p(-self.other)
        total = 0.0
        before = last = ""
        for token, counts in zip(tokens, repeat(True) if marks is None else marks, strict=marks is not None):
            if not token:  # part of a character that another token shows
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

    def compute_costs(self) -> dict[str, float]:
        """Return -log(1 - chance) by text, for :meth:`compute_probability` of many contexts."""
        return {pattern.text: -math.log1p(-pattern.chance) for pattern in self.patterns}


def parse_sentence(sentence: str) -> Patterns | None:
    """Read a sentence of :meth:`Patterns.write_sentence`; ``None`` for any other."""
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


def shorten(sentence: str, most: int = 5) -> str:
    """Shorten an n-gram sentence for display to its first patterns, each with its chance; keep any other text.

    Blanks within a pattern are shown as ``␣``.
    """
    found = parse_sentence(sentence)
    if found is None:
        return sentence
    more, less = (tuple(p for p in found.patterns if (p.lift >= 1) == above) for above in (True, False))
    parts = [f"{word}{_write_short(kept, most)}" for word, kept in (("on ", more), ("less on ", less)) if kept]
    if not parts:
        return f"Fires on any token {_write_chance(found.other)}."
    if found.other >= _WORTH_SAYING:
        parts.append(f"and on any other token {_write_chance(found.other)}")
    return f"Fires {', '.join(parts)}."


def quote(text: str) -> str:
    """Return ``text`` as a JSON string with every invisible character escaped."""
    return "".join(c if _is_plain(c) else json.dumps(c)[1:-1] for c in text).join('""')


def round_to_written(value: float) -> float:
    """Round ``value`` to three significant digits, as in a sentence."""
    return float(_write_number(value))


def bound(chance: float) -> float:
    """Clip ``chance`` to :data:`LOWEST` and :data:`HIGHEST`, and round it."""
    return round_to_written(min(HIGHEST, max(LOWEST, chance)))


def _is_plain(c: str) -> bool:
    # Combining marks would combine with the quote before them, so they are escaped too.
    return c not in '"\\' and c.isprintable() and not unicodedata.combining(c)


def _write_item(pattern: Pattern) -> str:
    return f"{quote(pattern.text)} (chance {_write_number(pattern.chance)}, lift {_write_number(pattern.lift)})"


def _join(items: list[str]) -> str:
    return " or ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def _write_short(patterns: Sequence[Pattern], most: int) -> str:
    items = [f"{quote(p.text).replace(' ', '␣')} {_write_chance(p.chance)}" for p in patterns[:most]]
    return _join([*items, f"{len(patterns) - most} more"] if len(patterns) > most else items)


def _write_chance(chance: float) -> str:
    return f"({decimal(chance, 2)})" if chance >= _WORTH_SAYING else f"(< {decimal(_WORTH_SAYING, 2)})"


def _write_number(value: float) -> str:
    """Write three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
