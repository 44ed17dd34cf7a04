"""The LLM explainer: how contexts are written out, what is sent, what is read back, and what is a failure."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error, sensible, snippets_of
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.contexts.marking import MARKS, choose_marks, mark_text
from autointerp.contexts.sampler import Context
from autointerp.explaining.explainers.base import Explainer, Explanation
from autointerp.explaining.explainers.llm import LlmExplainer, parse_explanation
from autointerp.llm import prompts
from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.exchange import Answer, AnswerFailed
from sae.common.errors import BadInput, NotFound, Unavailable


def context(tokens: Sequence[str], activations: Sequence[float], window: int = 910_273) -> Context:
    return Context(window, tuple(tokens), tuple(activations), max(activations) > 0, 4, "active")


CONTEXTS = [
    context(["the", " cat", " sat"], [0.0, 8.25, 1.0]),
    context(["a", " cat", ",", " a"], [0.0, 6.5, 6.0, 0.0]),
    context(["no", " dog"], [0.0, 3.75]),
]


def explain(server: FakeServer, contexts: Sequence[Context] = tuple(CONTEXTS), **arguments: object) -> Explanation:
    async def main() -> Explanation:
        async with LlmClient(server.url, backoff=0.001) as client:
            explainer: Explainer = LlmExplainer(client, **arguments)  # type: ignore[arg-type]
            return await explainer.explain(31_337, contexts, [])

    return asyncio.run(main())


def test_an_explanation_of_marked_contexts() -> None:
    with FakeServer() as server:
        explanation = explain(server, CONTEXTS[:1])
    assert explanation.text == 'Text that contains "cat".'
    assert explanation.failure is None
    assert explanation.usage.requests == 1
    assert snippets_of(server.requests[0].question) == ["the <<cat>> sat"]


def test_nothing_but_marked_text_reaches_the_model() -> None:
    with FakeServer() as server:
        explain(server)
    question = server.requests[0].question
    assert snippets_of(question) == ["the <<cat>> sat", "a <<cat,>> a", "no <<dog>>"]
    for number in ("31337", "910273", "8.25", "6.5", "3.75"):
        assert number not in question


def test_everything_before_the_question_is_the_same_bytes() -> None:
    with FakeServer() as server:
        explain(server)
        explain(server, [context([">>>", " x"], [0.0, 1.0])])
    first, second = (seen.body["messages"][:-1] for seen in server.requests)
    assert first == second
    assert [message["role"] for message in first] == ["system", *["user", "assistant"] * (len(first) // 2)]


# copies of the prompt

EXAMPLES = [message["content"] for message in prompts.conversation("explain").prefix if message["role"] == "assistant"]


def repeat_last_example(body: dict[str, Any]) -> str:
    return str(body["messages"][-2]["content"])


def repeat_the_last_of_all(body: dict[str, Any]) -> Reply | str:
    """Repeat the last example where it is shown, as Qwen2.5-Coder-1.5B does; else answer sensibly."""
    return EXAMPLES[-1] if repeat_last_example(body) == EXAMPLES[-1] else sensible(body)


def test_a_copy_of_an_example_is_asked_once_more_without_it() -> None:
    with FakeServer(repeat_the_last_of_all) as server:
        explanation = explain(server, CONTEXTS[:1])
    assert explanation.text == 'Text that contains "cat".'
    assert explanation.usage.requests == 2
    first, second = (seen.body["messages"] for seen in server.requests)
    assert second == [*first[:-3], first[-1]], "the last example is not shown again, and everything else is"


def test_a_second_copy_is_a_failure() -> None:
    with FakeServer(repeat_last_example) as server:
        explanation = explain(server)
    assert explanation.text is None
    assert explanation.failure is not None
    assert explanation.failure.startswith("copied from the prompt: The loop variable right after")
    assert explanation.usage.requests == len(server.requests) == 2


def test_a_text_like_an_example_that_was_not_shown_is_no_copy() -> None:
    with FakeServer(EXAMPLES[-1]) as server:
        explanation = explain(server)
    assert explanation.text == EXAMPLES[-1].removeprefix("[EXPLANATION]: ")
    assert len(server.requests) == 2


def test_a_copy_of_the_instructions_is_a_failure() -> None:
    with FakeServer("[EXPLANATION]: Be as narrow as the evidence allows and no narrower.") as server:
        explanation = explain(server)
    assert explanation.failure == "copied from the prompt: Be as narrow as the evidence allows and no narrower."
    assert len(server.requests) == 1


def test_an_unusable_second_answer_is_a_failure_with_the_cost_of_both() -> None:
    with FakeServer("Commas, I believe.") as server:
        server.script.append(Reply(EXAMPLES[2]))
        explanation = explain(server)
    assert explanation.failure is not None
    assert "no line that begins with" in explanation.failure
    assert explanation.usage.requests == len(server.requests) == 4


def test_a_copy_is_paid_for_once(tmp_path: Path) -> None:
    """Stopped between the two questions, the first is not asked again; nor is a failure that is tried again."""

    async def main(server: FakeServer) -> Explanation:
        cache = ResponseCache(tmp_path / "cache.sqlite")
        async with LlmClient(server.url, cache=cache, model="fake-model", tries=1, patience=0.0) as client:
            return await LlmExplainer(client).explain(1, CONTEXTS, [])

    with FakeServer(repeat_last_example) as server:
        server.answer = lambda _: Reply(EXAMPLES[-1]) if len(server.requests) == 1 else error(401, "stopped")
        with pytest.raises(Unavailable):
            asyncio.run(main(server))
        n_sent = len(server.requests)
        server.answer = repeat_last_example
        resumed, again = asyncio.run(main(server)), asyncio.run(main(server))
    assert n_sent == 2
    assert resumed.failure is not None
    assert (resumed.usage.requests, resumed.usage.from_cache) == (1, 1)
    assert again.failure == resumed.failure
    assert (again.usage.requests, again.usage.from_cache) == (0, 2)
    assert len(server.requests) == 3


# marks


def test_text_with_marks_of_its_own_gets_others() -> None:
    doctest = context([">>>", " area", "(", ")", "\n", "12"], [0.0, 0, 0, 0, 0, 3])
    with FakeServer() as server:
        explain(server, [doctest, CONTEXTS[0]])
    question = server.requests[0].question
    assert question.startswith("In these snippets the marks are ⟦ and ⟧, because << or >> occurs in the text itself.")
    assert snippets_of(question) == [">>> area()\n⟦12⟧", "the ⟦cat⟧ sat"]
    assert choose_marks(["a << b", "⟧"]) == MARKS[2]
    assert choose_marks(["a << b", "⟧", "⦄"]) == MARKS[-1]
    assert choose_marks(["a < b", ">"]) == MARKS[0]


@pytest.mark.parametrize(
    ("tokens", "marked", "written"),
    [
        (["a", " b", " c", "d"], "0110", "a <<b c>>d"),
        (["a", " b", " c", " d"], "0101", "a <<b>> c <<d>>"),
        (["x", "\n\n", "    ", "y"], "0110", "x<<⏎⏎␣␣␣␣>>y"),
        (["x", "\n\t", "y"], "011", "x<<\n\ty>>"),
        ([" ", "y"], "10", "<<␣>>y"),
        (["a", "", "日", "b"], "0100", "a<<日>>b"),
        (["a", "", "", "日", "b"], "01000", "a<<日>>b"),
        (["a", ""], "01", "a"),
        (["a"], "0", "a"),
        ([], "", ""),
    ],
)
def test_how_marks_are_set(tokens: list[str], marked: str, written: str) -> None:
    assert mark_text(tokens, [flag == "1" for flag in marked], "<<", ">>") == written


@given(
    st.lists(st.tuples(st.text(alphabet="ab é日\n\t(", max_size=4), st.booleans())),
    st.sampled_from(MARKS),
)
@settings(max_examples=150, deadline=None)
def test_without_marks_it_is_the_text_again(pairs: list[tuple[str, bool]], marks: tuple[str, str]) -> None:
    tokens, flags = [t for t, _ in pairs], [f for _, f in pairs]
    written = mark_text(tokens, flags, *marks)
    plain = written.replace(marks[0], "").replace(marks[1], "")
    assert plain.translate(str.maketrans("⏎⇥␣", "\n\t ")) == "".join(tokens)
    assert written.count(marks[0]) == written.count(marks[1]) <= sum(flags)
    assert f"{marks[1]}{marks[0]}" not in written, "neighbouring marked tokens are one piece"


# reading the answer


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("[EXPLANATION]: Commas.", "Commas."),
        ("The pieces are commas.\n\n[EXPLANATION]: Commas.\n", "Commas."),
        ("[EXPLANATION]:\nCommas\nin lists.", "Commas in lists."),
        ("[EXPLANATION]: First.\n[EXPLANATION]: Second.", "Second."),
        ("[EXPLANATION]: Commas.\n\nI hope this helps!", "Commas."),
        ("**[EXPLANATION]:** Commas.", "Commas."),
        ("**[Explanation]**: *Commas.*", "Commas."),
        ("Explanation: Commas.", "Commas."),
        ("<think>[EXPLANATION]: not yet</think>[EXPLANATION]: Commas.", "Commas."),
        ("[EXPLANATION]: The word <<cat>> or ⟦dog⟧.", 'The word "cat" or "dog".'),
        ('[EXPLANATION]: The word "<<cat>>" and "".', 'The word "cat" and "".'),
        ("[EXPLANATION]: The operators << and >> in C.", "The operators << and >> in C."),
        ("[EXPLANATION]: `self` as a parameter", "self` as a parameter"),
    ],
)
def test_what_is_read_out_of_an_answer(answer: str, text: str) -> None:
    assert parse_explanation(Answer(answer, "stop")) == text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Commas, I believe.", "no line that begins with"),
        ("The [EXPLANATION]: tag is missing here", "no line that begins with"),
        ("[EXPLANATION]:", "nothing after it"),
        ("[EXPLANATION]: …", "nothing after it"),
        ("<think>[EXPLANATION]: Commas.", "still thinking"),
        ("<think>hm</think>Commas.", "no line that begins with"),
        ("[EXPLANATION]: " + "comma " * 300, "1799 characters long"),
    ],
)
def test_what_is_no_explanation(answer: str, reason: str) -> None:
    with pytest.raises(AnswerFailed, match=reason):
        parse_explanation(Answer(answer, "stop"))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Reply("Commas, I believe."), "no line that begins with"),
        (Reply("[EXPLANATION]: Com", finish_reason="length"), "cut off at"),
        (Reply(content=None), "empty"),
        (error(500, "exploded"), "HTTP 500: exploded"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_invalid_answer_is_a_failure_with_cost(fault: Reply, reason: str) -> None:
    with FakeServer(fault) as server:
        explanation = explain(server)
        assert explanation.text is None
        assert explanation.failure is not None
        assert reason in explanation.failure
        assert "\n" not in explanation.failure
        assert explanation.usage.requests == len(server.requests) > 1


def test_a_poor_answer_is_asked_again() -> None:
    with FakeServer() as server:
        server.script.append(Reply("Commas, I believe."))
        explanation = explain(server)
    assert explanation.text == 'Text that contains "cat".' or explanation.text == 'Text that contains "cat,".'
    assert explanation.usage.requests == 2


def test_without_contexts_nothing_is_asked() -> None:
    with FakeServer() as server:
        assert explain(server, []).failure == "no contexts to explain from"
    assert not server.requests


def test_no_server_is_not_this_latents_failure() -> None:
    async def main() -> None:
        async with LlmClient("http://127.0.0.1:9", model="m", backoff=0.001) as client:
            await LlmExplainer(client).explain(1, CONTEXTS, [])

    with pytest.raises(Unavailable):
        asyncio.run(main())


def test_an_explanation_is_asked_once_per_draw(tmp_path: Path) -> None:
    async def main(server: FakeServer, **arguments: object) -> Explanation:
        cache = ResponseCache(tmp_path / "cache.sqlite")
        async with LlmClient(server.url, cache=cache) as client:
            return await LlmExplainer(client, **arguments).explain(1, CONTEXTS, [])  # type: ignore[arg-type]

    with FakeServer() as server:
        asyncio.run(main(server))
        assert asyncio.run(main(server)).usage.from_cache == 1
        asyncio.run(main(server, draw=1, temperature=0.7))
    assert len(server.requests) == 2
    assert "seed" not in server.requests[0].body
    assert server.requests[1].body["seed"] == 1


def test_hashes_follow_what_they_stand_for() -> None:
    client = LlmClient("http://127.0.0.1:9", model="m")
    same = LlmExplainer(client)
    assert same.settings_hash == LlmExplainer(client, draw=3).settings_hash
    assert len({same.settings_hash, *(LlmExplainer(client, temperature=t).settings_hash for t in (0.1, 0.2))}) == 3
    assert same.prompt_hash == prompts.conversation("explain").hash
    assert (same.name, same.model, same.needs_background) == ("llm", "m", 0)


# the prompt files


def test_the_prompts_examples_can_be_parsed() -> None:
    examples = tomllib.loads(prompts.load("explain_examples.toml"))["example"]
    assert len(examples) >= 3
    for example in examples:
        sentence = parse_explanation(Answer(example["answer"], "stop"))
        assert example["answer"].splitlines() == [f"[EXPLANATION]: {sentence}"]
        unmarked = [s.replace("<<", "").replace(">>", "") for s in example["snippets"]]
        assert choose_marks(unmarked) == MARKS[0] or example["opening"] == MARKS[1][0]
        for snippet in example["snippets"]:
            assert snippet.count(example["opening"]) == snippet.count(example["closing"]) > 0


def test_a_prompt_that_is_edited_has_another_hash(tmp_path: Path) -> None:
    files = [*prompts.FOLDER.glob("explain*")]
    assert len(files) == 3
    hashes = set()
    for edited in (None, *files):
        for file in files:
            text = file.read_text()
            (tmp_path / file.name).write_text(text.replace("the", "THE", 1) if file == edited else text)
        hashes.add(prompts.conversation("explain", tmp_path).hash)
    assert len(hashes) == 4
    assert prompts.conversation("explain").hash in hashes


def test_unusable_prompt_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"explain\.md' cannot be read .*install the program again"):
        prompts.conversation("explain", tmp_path)
    (tmp_path / "x.md").write_text("system")
    (tmp_path / "x_request.md").write_text("{{ question }}")
    for examples, reason in (("[[example", "not valid TOML"), ("a = 1", "needs an answer"), ("", "needs an answer")):
        (tmp_path / "x_examples.toml").write_text(examples)
        with pytest.raises(BadInput, match=reason):
            prompts.conversation("x", tmp_path)
    (tmp_path / "x_examples.toml").write_text('[[example]]\nanswer = "a"\nquestoin = "q"')
    with pytest.raises(BadInput, match="cannot be filled in: 'question' is undefined"):
        prompts.conversation("x", tmp_path)
    (tmp_path / "x.md").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8"):
        prompts.load("x.md", tmp_path)


def test_values_are_never_read_as_templates() -> None:
    messages = prompts.conversation("judge_single").messages(explanation="{{ 7 * 7 }}", snippet="{% raw %} <b>&amp;")
    assert "{{ 7 * 7 }}" in messages[-1]["content"]
    assert "{% raw %} <b>&amp;" in messages[-1]["content"]
