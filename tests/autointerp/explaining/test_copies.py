"""Explanations that do not come from the latent: copies of the prompt, texts of many latents, quotes of nothing seen.

Short explanations, and honest ones about the same things as the prompt's examples, are not copies.
"""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.explaining.copies import ENOUGH, RUN, find_copied, find_flags, is_quoting_unseen, normalise, split_words
from autointerp.explaining.explainers.llm import parse_explanation
from autointerp.explaining.patterns import Pattern, Patterns
from autointerp.llm.exchange import Answer
from autointerp.llm.prompts import conversation

PROMPT = conversation("explain")
SOURCES = [*PROMPT.examples, PROMPT.instructions]
ANSWERS = [parse_explanation(Answer(example, "stop")) for example in PROMPT.examples]


@pytest.mark.parametrize(("number", "answer"), list(enumerate(ANSWERS)))
def test_every_example_is_recognised(number: int, answer: str) -> None:
    words = answer.split()
    assert find_copied(answer, SOURCES) == number
    assert find_copied(answer.upper().replace(",", " -"), SOURCES) == number
    assert find_copied(" ".join(words[:10]), SOURCES) == number, "cut short"
    assert find_copied(" ".join([*words[:7], "purple", *words[8:]]), SOURCES) == number, "one word replaced"
    assert find_copied(f"Text with this: {answer}", SOURCES) == number, "words before it"


@pytest.mark.parametrize(
    "text",
    [
        "The number of the day where it follows the name of a month",
        "Write what to look for.",
        "The pieces on which the latent is active are marked.",
        "Simmer the barley in a litre of stock, skimming",
        "Be as narrow as the evidence allows: where the pieces are always one of a few strings, quote those strings.",
    ],
)
def test_parts_of_the_prompt_are_copies(text: str) -> None:
    assert find_copied(text, SOURCES) is not None


NO_COPIES = [
    # about what the examples are about
    'Amounts in recipes: "grams", "spoon" and other units that stand behind a number.',
    "Cups, spoons and other kitchen measures.",
    'Names of loop variables after "for", in Python and JavaScript.',
    "The variable that a for loop assigns, before the word in.",
    "Days of a month, in dates written in words, such as May 3.",
    "Numbers after the names of months.",
    # answers of Qwen2.5-Coder-1.5B to this prompt
    'The name of a function or method, as in "newlines", "recreate_cm", "GCM".',
    'The name of a file, as in "fname".',
    'The name of a programming language or a programming language feature, as in "Unix", "Python", "Java".',
    "The name of a variable or function after the name of a class or function, in any programming language.",
    # in words that the instructions use too
    "Words in the middle of a line.",
    "Line breaks, tabs and spaces in program code.",
    "The white space before a comment; not the one at the beginning of a line.",
    "Tables in markup, at the bar between two cells.",
    'Pieces of names before an underscore, such as "max" in "max_len"; not whole words.',
    # short ones
    'The word "the".',
    "Commas.",
    "Program code.",
    'Text that contains "self".',
]


@pytest.mark.parametrize("text", NO_COPIES)
def test_texts_in_other_words_are_no_copies(text: str) -> None:
    assert find_copied(text, SOURCES) is None


@given(st.lists(st.sampled_from(sorted({word for text in SOURCES for word in split_words(text)})), max_size=40))
def test_words_of_the_prompt_in_another_order_are_no_copy(words: list[str]) -> None:
    runs = {tuple(of[i : i + RUN]) for of in map(split_words, SOURCES) for i in range(len(of))}
    if not any(tuple(words[i : i + RUN]) in runs for i in range(len(words) - RUN + 1)):
        assert find_copied(" ".join(words), SOURCES) is None


@given(st.data())
def test_a_run_of_the_prompt_with_little_else_is_a_copy(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(SOURCES) - 1))
    words = split_words(SOURCES[number])
    start = data.draw(st.integers(0, len(words) - ENOUGH))
    run = words[start : start + data.draw(st.integers(ENOUGH, 30))]
    foreign = ["ananas"] * data.draw(st.integers(0, len(run) // 3))
    text = " ".join([*run, *foreign])
    assert find_copied(text, [SOURCES[number]]) == 0
    assert find_copied(" ".join([text, *["ananas"] * len(run)]), [SOURCES[number]]) is None, "half of it is its own"


def test_texts_without_words_are_no_copies() -> None:
    assert find_copied("", SOURCES) is None
    assert find_copied("⏎⏎ — …", SOURCES) is None
    assert find_copied("anything", ["", "…"]) is None


# quotes

SEEN = ["    if not self.items:\n        raise IndexError('empty')\n", 'print("It\'s  done", "\\n")\n', "<b>Größe</b>"]


@pytest.mark.parametrize(
    "text",
    [
        'The word "print".',
        "The word “PRINT” or ‘items’.",
        "The call `self.items`, or the name 'IndexError' after it.",
        'The name "foo", "bar" or "items".',  # one is enough
        'The statement "if not self.items: raise IndexError".',  # white space does not matter
        'The line "if not … raise IndexError(...)".',
        'Words such as "done," or "items."',
        'The string "It\'s done".',
        'The escape "\\n" in a string.',
        'A line break, written as "⏎" or as "\\n".',
        'A double quotation mark ("\\"") before "it\'s".',
        "The word 'größe' in bold.",
        'The quotation marks """ of a docstring.',
        "No quotes, only the driver's and the authors' apostrophes.",
        'An inch: 5" wide.',
        "",
    ],
)
def test_quotes_that_were_seen(text: str) -> None:
    assert not is_quoting_unseen(text, SEEN)


@pytest.mark.parametrize(
    "text",
    [
        'The word "drought".',
        "The words “said” and ‘told’.",
        "The call `foo()`, or the name 'bar'.",
        'The line "if … drought".',
        'The string "prin t".',
        'The quotation marks """ before "drought".',
    ],
)
def test_quotes_of_nothing_seen(text: str) -> None:
    assert is_quoting_unseen(text, SEEN)
    assert is_quoting_unseen(text, [])


@given(st.lists(st.text(min_size=1, max_size=20).filter(lambda text: not set(text) & set('"\\')), min_size=1))
def test_a_quoted_piece_of_a_context_was_seen(pieces: list[str]) -> None:
    text = " or ".join(f'"{piece}"' for piece in pieces)
    assert not is_quoting_unseen(text, ["x", *(f"a {piece} b" for piece in pieces)])


@given(st.text(alphabet="\"'`“”‘’\\ ab…", max_size=80))
def test_any_text_can_be_searched_for_quotes(text: str) -> None:
    assert is_quoting_unseen(text, [text]) in (True, False)


def test_the_baseline_is_not_searched_for_quotes() -> None:
    """Its patterns are counted, those of silent contexts too."""
    sentence = Patterns((Pattern("drought", 0.5, 8.0), Pattern("x", 0.01, 0.2)), 0.1).write_sentence()
    assert not is_quoting_unseen(sentence, SEEN)


# flags


def rows(*texts: str | None, **columns: object) -> pd.DataFrame:
    made_by = {"explainer": "llm", "settings_hash": "s", "prompt_hash": "p", "model": "m", "draw": 0}
    table = [
        {"id": i, "latent": i, "text": text, "status": "failed" if text is None else "ok", "quotes_unseen": False}
        for i, text in enumerate(texts, 1)
    ]
    return pd.DataFrame([{**row, **made_by, **columns} for row in table]).astype({"quotes_unseen": "boolean"})


def test_the_same_text_for_many_latents_is_flagged() -> None:
    texts = ("Commas.", "Stops.", "commas", "  Commas. ", "Stops", 'The token ",".', 'The token ".".', None)
    assert find_flags(rows(*texts)) == {i: ["same text as 2 others"] for i in (1, 3, 4)}


def test_one_latent_or_two_explainers_may_repeat_a_text() -> None:
    assert find_flags(rows("Commas.", "Commas.", "Commas.", latent=5)) == {}
    apart = pd.concat([rows("Commas."), rows("Commas.", "Commas.", model="other")])
    assert find_flags(apart.assign(id=range(3), latent=range(3))) == {}


def test_quotes_of_nothing_are_flagged_where_known() -> None:
    unseen = "quotes nothing it saw"
    assert find_flags(rows("a", "b", quotes_unseen=True)) == {1: [unseen], 2: [unseen]}
    assert find_flags(rows("a", "b", quotes_unseen=None)) == {}
    assert find_flags(rows("a", "a", "a", quotes_unseen=True))[2] == ["same text as 2 others", unseen]
    assert find_flags(rows("a").iloc[:0]) == {}


@given(st.text(max_size=30))
def test_equal_texts_stay_equal(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text) == normalise(f"  {text} \n.")
