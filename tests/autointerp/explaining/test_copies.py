"""Copies of the prompt are recognised; short explanations and honest ones about the same things are not copies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.explaining.copies import ENOUGH, RUN, find_copied, split_words
from autointerp.explaining.explainers.llm import parse_explanation
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
        "The expected result in a Python doctest",
        "Write what to look for.",
        "The pieces on which the latent is active are marked.",
        '"Nonsense!" cried the old woman, and the letter went into the fire',
        "Be as narrow as the evidence allows: where the pieces are always one of a few strings, quote those strings.",
    ],
)
def test_parts_of_the_prompt_are_copies(text: str) -> None:
    assert find_copied(text, SOURCES) is not None


HONEST = [
    # about what the examples are about
    "Results printed in Python doctests, on the line below a >>> prompt with an expression.",
    "Numbers and lists that a Python doctest expects, directly under the line that begins with >>>.",
    'Names of exceptions after "raise", such as "ValueError" or "KeyError".',
    'The exception class that follows "raise" or "throw new" in an error path.',
    'Verbs of saying after a closing quotation mark, such as "asked" or "replied", before the name of the speaker.',
    "Words about hunger and drought: empty wells, failed harvests, rationed bread.",
    "Blank lines between the end of a Python function and the next definition at the top level.",
    # in words that the instructions use too
    "Words in the middle of a line.",
    "Line breaks, tabs and spaces in program code.",
    "The white space before a comment; not the one at the beginning of a line.",
    "Tables in markup, at the bar between two cells.",
    'Pieces of names before an underscore, such as "max" in "max_len"; not whole words.',
    # short ones
    'The word "the".',
    "Commas.",
    "Verbs of saying.",
    "Program code.",
    'Text that contains "self".',
]


@pytest.mark.parametrize("text", HONEST)
def test_an_honest_explanation_is_no_copy(text: str) -> None:
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
