"""The n-gram explainer and judge: the sentence loses nothing, the counts are right, planted latents are found."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.contexts.sampler import Context
from autointerp.explaining.explainers.ngram import NgramExplainer, NgramSettings, Positions, search_patterns
from autointerp.explaining.patterns import Pattern, Patterns, bound, parse_sentence, quote, round_to_written, shorten
from autointerp.scoring.judges.ngram import NgramJudge

NASTY = [
    '"',
    "\\",
    '" (chance 0.5, lift 1)',
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "\x1b[31m",
    "\x7f",
    "\u2028",
    "\u200f",
    "\u202e",
]
NASTY += ["\u200b", "\ufeff", "\u0301", "\u00a0", "👩‍👩‍👧", "é", "日本", "�", " or ", ", ", "{}", "[red]", "\ud800"]
TOKENS = st.one_of(
    st.text(min_size=1, max_size=6), st.sampled_from(NASTY), st.lists(st.sampled_from(NASTY)).map("".join)
)
CHANCES = st.floats(1e-4, 0.98).map(bound)


def context(tokens: list[str], activations: list[float] | None = None, window: int = 0) -> Context:
    values = tuple(activations or [0.0] * len(tokens))
    return Context(window, tuple(tokens), values, any(values), 0 if any(values) else None, "random")


def explained(contexts: list[Context], background: list[Context], **values: Any) -> str:
    found = asyncio.run(NgramExplainer(NgramSettings(**values)).explain(3, contexts, background))
    assert found.text is not None
    return found.text


def accuracy(sentence: str, contexts: list[Context]) -> float:
    judged = asyncio.run(NgramJudge().judge(sentence, contexts))
    truth, label = np.array([c.active for c in contexts]), np.array([j.label for j in judged])
    return float((label[truth].mean() + (~label[~truth]).mean()) / 2)


# --- the sentence ---------------------------------------------------------------------------------------------


@st.composite
def any_patterns(draw: st.DrawFn) -> Patterns:
    texts = draw(st.lists(TOKENS.filter(bool), max_size=8, unique=True))
    lifts = st.floats(0.001, 1000).map(round_to_written)
    return Patterns(tuple(Pattern(text, draw(CHANCES), draw(lifts)) for text in texts), draw(CHANCES))


@settings(max_examples=60)
@given(any_patterns())
def test_a_sentence_is_one_complete_visible_line(patterns: Patterns) -> None:
    sentence = patterns.write_sentence()
    found = parse_sentence(sentence)
    assert found is not None
    assert found.other == patterns.other
    assert sorted(found.patterns, key=str) == sorted(patterns.patterns, key=str)
    assert sentence.isprintable()
    assert sentence == sentence.strip()
    sentence.encode("utf-8")


@pytest.mark.parametrize("text", [t for t in NASTY if t])
def test_quoting_shows_what_cannot_be_seen(text: str) -> None:
    shown = quote(text)
    assert shown.isprintable()
    assert parse_sentence(
        f"Fires on {shown} (chance 0.5, lift 2), and on any other token with chance 0.01."
    ) == Patterns((Pattern(text, 0.5, 2.0),), 0.01)


@given(st.text())
def test_other_texts_are_refused(text: str) -> None:
    assert parse_sentence(text) is None


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "Fires on commas.",
        "[EXPLANATION]: Python keywords",
        'Fires on "a" (chance 0.5, lift 2).',
        'Fires on "a" (chance 1.5, lift 2), and on any other token with chance 0.01.',
        'Fires on "a" (chance 0.5, lift 2), and on any other token with chance 1.',
        'Fires on "\\q" (chance 0.5, lift 2), and on any other token with chance 0.01.',
        "Fires on any token with chance 0.1. Or not.",
        "Fires on any token with chance 0.1.\n",
    ],
)
def test_what_is_nearly_a_sentence_is_refused(sentence: str) -> None:
    assert parse_sentence(sentence) is None
    judged = asyncio.run(NgramJudge().judge(sentence, [context(["a"])] * 3))
    assert [(j.p, j.label) for j in judged] == [(None, None)] * 3
    assert all(j.failure and "\n" not in j.failure for j in judged)


def test_the_sentence_reads_as_english() -> None:
    patterns = Patterns((Pattern(" self.", 0.62, 31.0), Pattern("def", 0.4, 20.0), Pattern(",", 0.001, 0.05)), 0.0043)
    assert patterns.write_sentence() == (
        'Fires on " self." (chance 0.62, lift 31) or "def" (chance 0.4, lift 20), less on "," (chance 0.001, '
        "lift 0.05), and on any other token with chance 0.0043."
    )
    assert Patterns((), 0.1).write_sentence() == "Fires on any token with chance 0.1."


# --- the judge's rule -----------------------------------------------------------------------------------------


def test_a_brief_sentence_counts_the_rest() -> None:
    found = [Pattern(f"w{i}", 0.9 - i / 10, 9 - i) for i in range(4)]
    less = Pattern("\n  ", 0.001, 0.01)
    assert shorten(Patterns((*found, less), 0.02).write_sentence(), most=2) == (
        'Fires on "w0" (.90), "w1" (.80) or 2 more, less on "\\n␣␣" (< .01), and on any other token (.02).'
    )
    assert shorten(Patterns((found[0],), 0.001).write_sentence()) == 'Fires on "w0" (.90).'
    assert shorten(Patterns((), 0.001).write_sentence()) == "Fires on any token (< .01)."
    assert shorten("Fires on the word “the”, in prose.") == "Fires on the word “the”, in prose."


@given(any_patterns(), st.integers(1, 4))
def test_in_brief_is_one_visible_line_too(patterns: Patterns, most: int) -> None:
    said = shorten(patterns.write_sentence(), most)
    assert said.isprintable()
    assert said.endswith(".")
    assert len(said) <= len(patterns.write_sentence()) + len(" or 99 more, and on any other token (.99).")


def test_the_longest_run_of_whole_tokens_decides() -> None:
    patterns = Patterns((Pattern("b", 0.5, 1.0), Pattern("ab", 0.1, 1.0), Pattern("xab", 0.9, 1.0)), 0.01)
    for tokens, chances in (
        (["b"], [0.5]),
        (["c", "b"], [0.01, 0.5]),
        (["a", "b"], [0.01, 0.1]),
        (["x", "a", "b"], [0.01, 0.01, 0.9]),
        (["ab"], [0.1]),  # the same text as one token
        (["cb"], [0.01]),  # a pattern inside a token does not count
        (["a", "", "b"], [0.01, 0.1]),  # a token without text is part of another's character
        ([], []),
    ):
        expected = 1 - math.prod(1 - chance for chance in chances)
        assert patterns.compute_probability(tokens) == pytest.approx(expected)


def test_the_judge_sees_tokens_and_nothing_else() -> None:
    sentence = Patterns((Pattern("a", 0.9, 9.0),), 0.01).write_sentence()
    blind: Any = [SimpleNamespace(tokens=("a", "b")), SimpleNamespace(tokens=("b", "b"))]
    judged = asyncio.run(NgramJudge().judge(sentence, blind))
    assert [j.label for j in judged] == [True, False]
    assert judged[0].p == pytest.approx(1 - 0.1 * 0.99)
    assert asyncio.run(NgramJudge().judge(sentence, [])) == []


# --- the counts -----------------------------------------------------------------------------------------------


@st.composite
def small_corpus(draw: st.DrawFn) -> tuple[list[Context], list[Context]]:
    words = st.sampled_from([" a", " b", " c", " d"])
    contexts = []
    for _ in range(draw(st.integers(1, 6))):
        tokens = draw(st.lists(words, min_size=1, max_size=10))
        values = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(tokens), max_size=len(tokens)))
        values[draw(st.integers(0, len(tokens) - 1))] = 2.0
        contexts.append(context(tokens, values))
    return contexts, [context(draw(st.lists(words, max_size=10))) for _ in range(draw(st.integers(0, 6)))]


@given(small_corpus(), st.integers(1, 12))
def test_the_search_keeps_its_counts_right(corpus: tuple[list[Context], list[Context]], size: int) -> None:
    """Against counting again from the texts, with the longest chosen run at each token."""
    contexts, background = corpus
    positions = Positions.of(contexts, background)
    prior = 2.0
    (fit,) = search_patterns(positions, positions.context_weight, [size], prior, 0.01)
    assert len(set(fit.order)) == len(fit.order) <= size
    chosen = {positions.texts[c] for c in fit.order}
    times: dict[str | None, float] = dict.fromkeys([*chosen, None], 0.0)
    fired = dict(times)
    for at, piece in enumerate([*contexts, *background]):
        weight = 1.0 if at < len(contexts) else len(contexts) / len(background)
        for i, value in enumerate(piece.activations):
            runs = ["".join(piece.tokens[i - n + 1 : i + 1]) for n in (3, 2, 1) if i - n + 1 >= 0]
            holds = next((run for run in runs if run in chosen), None)
            times[holds] += weight
            fired[holds] += weight * (value > 0)
    mean = min(0.98, max(1e-4, sum(fired.values()) / sum(times.values())))
    chance: dict[str | None, float] = {None: (fired[None] + prior * mean) / (times[None] + prior)}
    for text in sorted(chosen, key=len):
        extends = max((t for t in chosen if t != text and text.endswith(t)), key=len, default=None)
        chance[text] = (fired[text] + prior * chance[extends]) / (times[text] + prior)
    assert fit.chance[-1] == pytest.approx(chance[None])
    for c in fit.order:
        assert fit.chance[c] == pytest.approx(chance[positions.texts[c]])
    # What the counts predict of a context is what the judge will say of its tokens.
    written = Patterns(
        tuple(Pattern(positions.texts[c], min(0.98, fit.chance[c]), 1.0) for c in fit.order), min(0.98, fit.chance[-1])
    )
    intensity = fit.compute_intensity(positions)
    for at, piece in enumerate([*contexts, *background]):
        assert -math.expm1(-intensity[at]) == pytest.approx(written.compute_probability(piece.tokens))


@settings(max_examples=60)
@given(small_corpus())
def test_the_first_pattern_gains_most(corpus: tuple[list[Context], list[Context]]) -> None:
    positions = Positions.of(*corpus)
    (fit,) = search_patterns(positions, positions.context_weight, [1], 1.0, 1e-9)
    weight = positions.context_weight[positions.context]
    mean = min(0.98, max(1e-4, float((weight * positions.fires).sum() / weight.sum())))
    gains = []
    for c in range(len(positions.texts)):
        here = (positions.runs == c).any(0)
        n, f = weight[here].sum(), (weight * positions.fires)[here].sum()
        then = (f + mean) / (n + 1)
        gains.append(f * math.log(then / mean) + (n - f) * math.log((1 - then) / (1 - mean)))
    if fit.order:
        assert gains[fit.order[0]] == pytest.approx(max(gains))
    else:
        assert max(gains) < 1e-6


# --- latents whose meaning is known ---------------------------------------------------------------------------

WORDS = [f" w{i}" for i in range(60)] + [" def", " the", ",", "\n", '"']


def corpus_of(fires: Any, n: int, seed: int, miss: float = 0.0) -> tuple[list[Context], list[Context]]:
    """``n`` contexts of each kind of random words; ``fires(tokens, i)`` tells where; ``miss`` of the firings lapse."""
    rng = np.random.default_rng(seed)
    active: list[Context] = []
    silent: list[Context] = []
    while min(len(active), len(silent)) < n:
        tokens = rng.choice(WORDS, 20).tolist()
        values = [float(fires(tokens, i) and rng.random() >= miss) for i in range(20)]
        (active if any(values) else silent).append(context(tokens, values, window=len(active) + len(silent)))
    return active[:n], silent[:n]


def test_token_latent_explanation_holds_on_unseen_text() -> None:
    active, silent = corpus_of(lambda tokens, i: tokens[i] == '"', 100, seed=1, miss=0.1)
    sentence = explained(active[:40], silent[:60])
    assert '"\\"" (chance' in sentence
    assert accuracy(sentence, active[40:] + silent[60:]) > 0.9
    others = [*corpus_of(lambda tokens, i: tokens[i] == " w3", 60, seed=2)]
    assert accuracy(sentence, others[0] + others[1]) < 0.6


def test_a_latent_of_two_tokens_matches_neither_alone() -> None:
    few = {" def", " the", ",", " w1", " w2"}

    def fires(tokens: list[str], i: int) -> bool:
        return i > 0 and tokens[i - 1] == " def" and tokens[i] in few

    rng = np.random.default_rng(5)
    pools: tuple[list[Context], list[Context]] = ([], [])
    while min(map(len, pools)) < 150:
        tokens = rng.choice(sorted(few), 8).tolist()
        values = [float(tokens[i] == " the" and fires(tokens, i)) for i in range(8)]
        pools[not any(values)].append(context(tokens, values))
    sentence = explained(pools[0][:40], pools[1][:100])
    found = parse_sentence(sentence)
    assert found is not None
    assert found.patterns[0].text == " def the"
    assert accuracy(sentence, pools[0][40:] + pools[1][100:]) > 0.95


def test_nearly_dense_latent_is_described_by_its_silence() -> None:
    rng = np.random.default_rng(6)

    def piece(quiet: bool) -> Context:
        tokens = rng.choice([",", "\n"] if quiet else [*WORDS[:8], ",", "\n"], 12).tolist()
        return context(tokens, [float(t not in ",\n") for t in tokens])

    pieces = [piece(quiet=i % 2 == 0) for i in range(400)]
    active, silent = [p for p in pieces if p.active], [p for p in pieces if not p.active]
    sentence = explained(active[:40], silent[:100])
    assert accuracy(sentence, active[40:] + silent[100:]) > 0.95


def test_noise_scores_near_chance() -> None:
    rng = np.random.default_rng(7)
    pieces = [rng.choice(WORDS, 20).tolist() for _ in range(700)]
    active = [context(tokens, [float(i == 4) for i in range(20)]) for tokens in pieces[:240]]
    silent = [context(tokens) for tokens in pieces[240:]]
    sentence = explained(active[:40], silent[:260])
    assert abs(accuracy(sentence, active[40:] + silent[260:]) - 0.5) < 0.1


# --- whatever it is given -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_tokens_are_explained_and_judged(data: st.DataObject) -> None:
    tokens = st.lists(st.one_of(TOKENS, st.just("")), min_size=1, max_size=8)
    contexts = []
    for piece in data.draw(st.lists(tokens, min_size=1, max_size=6)):
        at = data.draw(st.integers(0, len(piece) - 1))
        contexts.append(context(piece, [float(i == at) for i in range(len(piece))]))
    background = [context(piece) for piece in data.draw(st.lists(tokens, max_size=6))]
    found = asyncio.run(NgramExplainer().explain(0, contexts, background))
    if found.text is None:
        assert all(not t for c in contexts for t, a in zip(c.tokens, c.activations, strict=True) if a)
        return
    said = parse_sentence(found.text)
    assert said is not None
    assert all(any(p.text in c.text for c in contexts) for p in said.patterns)
    judged = asyncio.run(NgramJudge().judge(found.text, contexts + background))
    assert all(j.p is not None and 0 <= j.p <= 1 and j.label == (j.p >= 0.5) for j in judged)


def test_nothing_to_explain_is_a_failure() -> None:
    for contexts in ([], [context(["a", "b"])], [context(["", "b"], [1.0, 0.0])]):
        found = asyncio.run(NgramExplainer().explain(17, contexts, [context(["c"])]))
        assert found.text is None
        assert found.failure == "fires on no token with text in the contexts it was given"


def test_without_background_there_is_still_a_sentence() -> None:
    active, _ = corpus_of(lambda tokens, i: tokens[i] == " def", 20, seed=3)
    assert '" def" (chance' in explained(active, [])


def test_equal_contexts_give_equal_sentences() -> None:
    active, silent = corpus_of(lambda tokens, i: tokens[i] == " def", 30, seed=4)
    assert explained(active, silent) == explained(list(active), list(silent))
    assert NgramExplainer().settings_hash == NgramExplainer(NgramSettings()).settings_hash
    assert NgramExplainer().settings_hash != NgramExplainer(NgramSettings(prior=1.0)).settings_hash
    assert explained(active, silent, max_patterns=1).count("(chance") <= 1
    assert NgramExplainer(NgramSettings(background=7)).needs_background == 7
