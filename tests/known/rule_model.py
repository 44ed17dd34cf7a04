"""What a language model would answer that finds the rule behind marked texts, and follows a rule to the letter.

Handed to :class:`fake_server.FakeServer`, it is asked by the program's own prompts over HTTP. As an explainer it sees
the marked texts and nothing else; as a judge the statement and the plain texts and nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from fake_server import Reply, labelled, snippets_of

NO_PATTERN = "No pattern that the text shows."
ANY_DIGIT = "Any digit."
MOST = 0.9  # of the marked words that must fit before a narrower rule is believed
ENOUGH = 0.25  # of the marked words that one word must make up before it is named at all

_WORD = re.compile(r'^The word "([^"]+)"\.$')
_PAIR = re.compile(r'^The word "([^"]+)" right after "([^"]+)"\.$')


def follows_rules(body: dict[str, Any]) -> Reply | str:
    """An answer to a request to explain or to judge, under either protocol."""
    question = str(body["messages"][-1]["content"])
    snippets = snippets_of(question)
    if not question.startswith("Statement: "):
        return f"[EXPLANATION]: {rule_of(snippets)}"
    statement = question.split("\n", 1)[0].removeprefix("Statement: ")
    return labelled(body, [int(fits(statement, snippet)) for snippet in snippets])


def rule_of(snippets: Sequence[str]) -> str:
    """The narrowest rule that most of the marked words of ``snippets`` share."""
    marked: list[tuple[str | None, str]] = []
    for snippet in snippets:
        before, inside = None, False
        for piece in re.findall(r"<<|>>|[^\s<>]+", snippet):
            if piece in ("<<", ">>"):
                inside = piece == "<<"
                continue
            if inside:
                marked.append((before, piece))
            before = piece
    words = Counter(word for _, word in marked)
    if not words:
        return NO_PATTERN
    word, n = words.most_common(1)[0]
    if n >= MOST * len(marked):
        # What stands before the first word of a snippet is not shown.
        earlier = Counter(before for before, found in marked if found == word and before is not None)
        previous, n_previous = earlier.most_common(1)[0] if earlier else ("", 0)
        if n_previous >= MOST * max(1, sum(earlier.values())):
            return f'The word "{word}" right after "{previous}".'
        return f'The word "{word}".'
    if sum(count for found, count in words.items() if found.isdigit()) >= MOST * len(marked):
        return ANY_DIGIT
    return f'The word "{word}".' if n >= ENOUGH * len(marked) else NO_PATTERN


def fits(statement: str, snippet: str) -> bool:
    """Whether ``snippet`` has what ``statement`` names. Told that there is no pattern, it can only guess."""
    words = snippet.split()
    if statement == ANY_DIGIT:
        return any(word.isdigit() for word in words)
    if pair := _PAIR.match(statement):
        return any(b == pair[1] and a == pair[2] for a, b in pairwise(words))
    if one := _WORD.match(statement):
        return one[1] in words
    return coin(snippet)


def coin(snippet: str) -> bool:
    """Heads or tails by a hash of the text: fair, and the same however often and in whatever order it is asked."""
    return hashlib.sha256(snippet.encode()).digest()[0] % 2 == 1


def judge_that(says: Callable[[str], bool]) -> Callable[[dict[str, Any]], Reply]:
    """A judge that answers each snippet by ``says``, whatever the statement."""

    def answer(body: dict[str, Any]) -> Reply:
        snippets = snippets_of(str(body["messages"][-1]["content"]))
        return labelled(body, [int(says(snippet)) for snippet in snippets])

    return answer
