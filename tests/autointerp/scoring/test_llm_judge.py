"""The LLM judge: what it is shown, how labels and probabilities are read, and that a failure is never a "no"."""

from __future__ import annotations

import asyncio
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error, snippets_of, token
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.contexts.sampler import Context
from autointerp.journal.usage import Usage
from autointerp.llm import prompts
from autointerp.llm.client import LlmClient, ResponseCache
from autointerp.llm.exchange import Answer, AnswerFailed
from autointerp.llm.options import LlmOptions
from autointerp.scoring.judges.base import Judge, Judgement
from autointerp.scoring.judges.llm import LlmJudge, parse_batch, parse_single
from sae.common.errors import BadInput, Unavailable
from sae.common.progress import say_once

EXPLANATION = 'Text that contains "cat".'


def context(text: str, active: bool = False, window: int = 910_273) -> Context:
    tokens = tuple(text.split("|"))
    return Context(window, tokens, (7.125 * active,) * len(tokens), active, 9 if active else None, "active")


def contexts(labels: str) -> list[Context]:
    """Distinct contexts, with a cat in them where there is a 1."""
    return [context(f"text {i} |{'cat' if label == '1' else 'dog'}") for i, label in enumerate(labels)]


def judge(
    server: FakeServer, asked: Sequence[Context], protocol: str = "batch", cache: Path | None = None, **arguments: Any
) -> list[Judgement]:
    async def main() -> list[Judgement]:
        kept = None if cache is None else ResponseCache(cache)
        async with LlmClient(server.url, backoff=0.001, cache=kept) as client:
            made: Judge = LlmJudge(client, protocol, **arguments)  # type: ignore[arg-type]
            return await made.judge(EXPLANATION, asked)

    return asyncio.run(main())


def labels(judgements: Sequence[Judgement]) -> str:
    return "".join("?" if j.label is None else str(int(j.label)) for j in judgements)


@pytest.mark.parametrize("protocol", ["batch", "single"])
@pytest.mark.parametrize("wanted", ["1", "10", "01100", "0110010", "1" * 11])
def test_every_context_gets_its_own_verdict_in_order(protocol: str, wanted: str) -> None:
    with FakeServer() as server:
        judgements = judge(server, contexts(wanted), protocol)
    assert labels(judgements) == wanted
    p = 1 / (1 + math.exp(-2.3))
    assert [j.p for j in judgements] == pytest.approx([p if x == "1" else 1 - p for x in wanted])
    assert sum((j.usage for j in judgements), Usage()).requests == len(server.requests)


def test_the_last_request_is_short_and_says_so() -> None:
    with FakeServer() as server:
        judge(server, contexts("0110010"), contexts_per_request=5)
    by_size = {len(snippets_of(seen.question)): seen for seen in server.requests}
    assert by_size.keys() == {5, 2}
    for n, seen in by_size.items():
        assert f"Labels for the {n} snippets:" in seen.question
        schema = seen.body["response_format"]["json_schema"]
        assert schema["strict"] is True
        array = schema["schema"]["properties"]["labels"]
        assert (array["minItems"], array["maxItems"], array["items"]["enum"]) == (n, n, [0, 1])


@pytest.mark.parametrize("protocol", ["batch", "single"])
def test_only_text_and_explanation_reach_the_model(protocol: str) -> None:
    asked = [context("a |cat", active=True), context("a |dog")]
    twin = [context("a |cat", active=False, window=5), context("a |dog", active=True, window=6)]
    with FakeServer() as server:
        judge(server, asked, protocol)
        sent = [seen.body for seen in server.requests]
        server.requests.clear()
        judge(server, twin, protocol)
        key = json.dumps
        assert sorted(map(key, sent)) == sorted(key(seen.body) for seen in server.requests)
    for number in ("910273", "7.125"):
        assert number not in json.dumps(sent)


@pytest.mark.parametrize("protocol", ["batch", "single"])
def test_everything_before_the_question_is_the_same_bytes(protocol: str) -> None:
    with FakeServer() as server:
        judge(server, contexts("0110010"), protocol)
    prefixes = {json.dumps(seen.body["messages"][:-1]) for seen in server.requests}
    assert len(server.requests) > 1
    assert len(prefixes) == 1
    # The explanation stands before the snippets: in requests about one latent it belongs to the common part as well.
    assert all(seen.question.startswith(f"Statement: {EXPLANATION}\n") for seen in server.requests)


def test_nothing_to_judge() -> None:
    with FakeServer() as server:
        assert judge(server, []) == []
    assert not server.requests


# failures


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Reply('{"labels": [1, 0]}'), "2 labels for 5 contexts"),
        (Reply('{"labels": [1, 0, 1, 0, 1, 1]}'), "6 labels for 5 contexts"),
        (Reply('{"labels": []}'), "0 labels for 5 contexts"),
        (Reply('{"labels": [1, 0, 2, 0, 1]}'), "no list of zeros and ones"),
        (Reply('{"labels": [1, 0, null, 0, 1]}'), "no list of zeros and ones"),
        (Reply('{"labels": [1, 0'), "no list of zeros and ones"),
        (Reply('{"labels": [1, 0', finish_reason="length"), "cut off"),
        (Reply("I cannot tell."), "no list of zeros and ones"),
        (Reply("[" * 5000), "no list of zeros and ones"),
        (Reply(body={"choices": []}), "no choices"),
        (error(500, "exploded"), "HTTP 500"),
        (error(400, "context length"), "HTTP 400"),
    ],
    ids=range(12),
)
def test_a_failed_request_fails_its_own_contexts(fault: Reply, reason: str) -> None:
    def answer(body: dict[str, Any]) -> Reply | str:
        n = len(snippets_of(body["messages"][-1]["content"]))
        return fault if n == 5 else json.dumps({"labels": [1] * n})

    with FakeServer(answer) as server:
        judgements = judge(server, contexts("0" * 7))
    assert labels(judgements) == "?????11"
    for judgement in judgements[:5]:
        assert judgement.p is None
        assert judgement.failure is not None
        assert reason in judgement.failure
    assert [j.usage.requests > 0 for j in judgements] == [True, *[False] * 4, True, False]
    assert sum((j.usage for j in judgements), Usage()).requests == len(server.requests)


def test_a_poor_answer_is_reasked_and_not_kept(tmp_path: Path) -> None:
    cache = tmp_path / "cache.sqlite"
    with FakeServer() as server:
        server.script.extend([Reply('{"labels": [1]}')] * 3)
        assert labels(judge(server, contexts("01"), cache=cache)) == "??"
        server.script.append(Reply('{"labels": [1]}'))
        assert labels(judge(server, contexts("01"), cache=cache)) == "01"
        assert len(server.requests) == 5
        again = judge(server, contexts("01"), cache=cache)
        assert labels(again) == "01"
        assert len(server.requests) == 5
        assert sum((j.usage for j in again), Usage()) == Usage(from_cache=1)
        judge(server, contexts("01"), cache=cache, replicate=1)
        assert len(server.requests) == 6


def test_no_server_is_not_these_contexts_failure() -> None:
    async def main() -> None:
        async with LlmClient("http://127.0.0.1:9", model="m", backoff=0.001) as client:
            await LlmJudge(client).judge(EXPLANATION, contexts("0" * 30))

    with pytest.raises(Unavailable):
        asyncio.run(main())


def test_a_key_refused_half_way_stops_other_requests() -> None:
    with FakeServer(Reply('{"labels": [1]}', delay=0.02)) as server:
        server.script.append(error(401, "no"))

        async def main() -> None:
            async with LlmClient(server.url, concurrency=2) as client:
                await LlmJudge(client, contexts_per_request=1).judge(EXPLANATION, contexts("1" * 50))

        with pytest.raises(Unavailable, match="API key"):
            asyncio.run(main())
        assert len(server.requests) < 50


# reading answers


@pytest.mark.parametrize(
    "text",
    [
        '{"labels": [1, 0, 1]}',
        "[1,0,1]",
        "[true, false, true]",
        '["1", "0", "1"]',
        '{"answer": [1, 0, 1]}',
        '```json\n{"labels": [1, 0, 1]}\n```',
        "Snippets [1] and [3] fit, so:\n[1, 0, 1]",
        '<think>perhaps [0, 0, 0]</think>{"labels": [1, 0, 1]}',
        "Labels: [1, 0, 1] [because of the cats]",
    ],
)
def test_lists_with_and_without_words_around_them(text: str) -> None:
    assert [label for label, _ in parse_batch(Answer(text, "stop"), 3)] == [True, False, True]


def test_a_server_that_takes_neither_schema_nor_logprobs() -> None:
    with FakeServer(rejects=["response_format", "logprobs"]) as server:
        for protocol in ("batch", "single"):
            judgements = judge(server, contexts("01100"), protocol)
            assert labels(judgements) == "01100"
            assert {j.p for j in judgements} == {None}


@pytest.mark.parametrize(
    "tokens",
    [
        ['{"', "labels", '":', " [", "1", ",", " ", "0", "]}"],
        ['{"labels":', " [1", ",0", "]}"],
        ["With", " ", "1", " cat", ":", " [", "1", ",", "Ġ0", "]"],
    ],
    ids=range(3),
)
def test_probabilities_come_from_each_labels_own_token(tokens: list[str]) -> None:
    generated = [
        token(t, **({f"t{t}": -0.1, f"t{t.replace('1', '0')}": -2.4} if "1" in t else {}))
        if "0" not in t
        else token(t, **{f"t{t}": -0.2, f"t{t.replace('0', '1')}": -1.8, "tx": -5.0})
        for t in tokens
    ]
    text = "".join(tokens).replace("Ġ", " ")
    with FakeServer(Reply(text, logprobs=generated)) as server:
        judgements = judge(server, contexts("10"))
    assert labels(judgements) == "10"
    assert [j.p for j in judgements] == pytest.approx([1 / (1 + math.exp(-2.3)), 1 / (1 + math.exp(1.6))])


def test_probabilities_that_cannot_be_placed_are_left_out() -> None:
    for tokens in (["[10", "]"], ["[0", ",1", "]"], ["?"]):
        logprobs = tuple({t: -0.1} for t in tokens)
        answer = Answer("[1, 0]", "stop", tokens=tuple(tokens), top_logprobs=logprobs)
        assert parse_batch(answer, 2) == [(True, None), (False, None)]


@given(st.floats(-20, 0), st.floats(-20, 0))
@settings(max_examples=100, deadline=None)
def test_p_active_is_the_share_of_label_1(one: float, zero: float) -> None:
    answer = Answer("1", "length", tokens=("1",), top_logprobs=({"1": one, " 0": zero, "x": -1.0},))
    label, p = parse_single(answer)
    expected = math.exp(one) / (math.exp(one) + math.exp(zero))
    assert p == pytest.approx(expected)
    assert label == (expected >= 0.5)


def test_one_token_read_with_care() -> None:
    def parsed(*positions: dict[str, float], text: str = "?") -> tuple[bool, float | None]:
        tokens = tuple(next(iter(position)) for position in positions)
        return parse_single(Answer(text, "length", tokens=tokens, top_logprobs=positions))

    assert parsed({"\n": -0.1}, {"1": -0.1, "0": -3.0})[0] is True, "white space first"
    assert parsed({"1": -0.7, " 1": -2.0, "0": -0.9})[1] == pytest.approx(
        (math.exp(-0.7) + math.exp(-2)) / (math.exp(-0.7) + math.exp(-2) + math.exp(-0.9))
    )
    with pytest.raises(AnswerFailed, match="neither 0 nor 1 is among the 2 likeliest"):
        parsed({"Yes": -0.1, "No": -2.0})
    with pytest.raises(AnswerFailed, match="still thinking"):
        parsed({"<think>": -0.1}, text="<think>\nOkay")


@pytest.mark.parametrize(
    ("alternatives", "chosen", "expected"),
    [
        ({"1": 0.98, "x": 0.01, "y": 0.005}, "1", 0.98 / (0.98 + 0.005)),  # no more than what all others leave
        ({"1": 0.9, "x": 0.05, "y": 0.001}, "1", 0.9 / (0.9 + 0.001)),  # no more than the least likely
        ({"x": 0.5, "y": 0.2, "1": 0.01}, "x", 0.5),  # a guess between two tokens that mean next to nothing to it
        ({"1": 1e-6, "x": 0.5, "y": 0.1}, "1", 0.5),  # forced by a schema: nothing is known of 0
        ({"0": 0.75, " 0": 0.1, "x": 0.1, "y": 0.02}, "0", 0.02 / (0.85 + 0.02)),
        ({"1": 0.9}, "1", 0.9),
    ],
)
def test_an_unlisted_label_is_not_impossible(alternatives: dict[str, float], chosen: str, expected: float) -> None:
    logprobs = {token: math.log(p) for token, p in alternatives.items()}
    answer = Answer("?", "length", tokens=(chosen,), top_logprobs=(logprobs,))
    label, p = parse_single(answer)
    assert p == pytest.approx(expected, abs=1e-3)
    # The label that is listed is the one that counts.
    assert label == ("1" in alternatives)


@pytest.mark.parametrize(("text", "label"), [("1", True), (" 0.", False), ("**1**", True), ("0\n\nBecause", False)])
def test_a_label_without_logprobs(text: str, label: bool) -> None:
    assert parse_single(Answer(text, "stop")) == (label, None)


@pytest.mark.parametrize("text", ["10", "yes", "The answer is 1", "2", "1st"])
def test_no_label_without_logprobs(text: str) -> None:
    with pytest.raises(AnswerFailed, match="neither 0 nor 1"):
        parse_single(Answer(text, "stop"))


# what it is


def test_hashes_follow_what_they_stand_for() -> None:
    client = LlmClient("http://127.0.0.1:9", model="m")
    made = [
        LlmJudge(client),
        LlmJudge(client, "single"),
        LlmJudge(client, contexts_per_request=8),
        LlmJudge(client, temperature=0.5),
    ]
    assert len({j.settings_hash for j in made}) == 4
    assert made[0].settings_hash == LlmJudge(client, replicate=2).settings_hash
    assert made[0].prompt_hash == prompts.conversation("judge_batch").hash
    assert made[1].prompt_hash == prompts.conversation("judge_single").hash
    assert [j.contexts_per_request for j in made] == [5, 1, 8, 5]
    assert (made[0].name, made[0].model) == ("llm", "m")


def test_protocols_by_name() -> None:
    async def main(name: str) -> str:
        async with LlmClient(server.url) as client:
            return (await LlmJudge.open(client, LlmOptions(protocol=name))).protocol

    with FakeServer() as server:
        assert [asyncio.run(main(name)) for name in ("batch", "single")] == ["batch", "single"]
        assert not server.probes, "who is told the protocol need not ask"
    for wrong in ({"protocol": "both"}, {"contexts_per_request": 0}):
        with pytest.raises(BadInput):
            LlmJudge(LlmClient("http://127.0.0.1:9"), **wrong)  # type: ignore[arg-type]


def test_a_judgement_is_a_label_or_a_failure() -> None:
    for wrong in ((None, None, None), (0.5, True, "HTTP 500"), (0.0, None, "HTTP 500"), (1.5, True, None)):
        with pytest.raises(ValueError, match=r"label or a failure|no probability"):
            Judgement(*wrong)


# the prompt files


def test_the_prompts_examples_can_be_parsed() -> None:
    files = ("judge_batch_examples.toml", "judge_single_examples.toml")
    batch, single = (tomllib.loads(prompts.load(file))["example"] for file in files)
    sizes, active = set(), []
    for example in batch:
        n = len(example["snippets"])
        sizes.add(n)
        parsed = [label for label, _ in parse_batch(Answer(example["answer"], "stop"), n)]
        assert json.loads(example["answer"]) == {"labels": [int(label) for label in parsed]}
        active += parsed
    assert len(sizes) > 2, "lists of several lengths, so that the length is read off the question"
    assert 0.3 < sum(active) / len(active) < 0.7
    assert {all(json.loads(e["answer"])["labels"]) for e in batch} == {True, False}
    assert any(not any(json.loads(e["answer"])["labels"]) for e in batch)
    answers = [parse_single(Answer(example["answer"], "stop"))[0] for example in single]
    assert sum(answers) * 2 == len(answers)


def test_replicates_by_log_probabilities_are_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    client = LlmClient("http://127.0.0.1:9", model="m")
    say_once.cache_clear()
    for protocol, is_warned in (("batch", False), ("single", True)):
        again = LlmJudge(client, protocol).repeated(2, 0.7)  # type: ignore[arg-type]
        assert (again.replicate, again.temperature) == (2, 0.7)
        assert again.settings_hash != LlmJudge(client, protocol).settings_hash  # type: ignore[arg-type]
        assert ("--protocol batch samples them" in capsys.readouterr().err) == is_warned
