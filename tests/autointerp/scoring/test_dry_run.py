"""A dry run says what the command then asks, to the request and to the token, and asks nothing itself."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error, sensible
from hypothesis import given
from hypothesis import strategies as st
from test_score_by_llm import ITEMS, N, explain, harvested, run, score  # noqa: F401

from autointerp.contexts.selection import Choice
from autointerp.llm.capabilities import THINKING_TOKENS
from autointerp.llm.client import LlmClient, open_client
from autointerp.llm.limits import Prices
from autointerp.llm.options import LlmOptions
from autointerp.llm.tokens import (
    BLOCK,
    Tokenize,
    count_by_characters,
    count_cached,
    find_tokenizer,
    load_local_tokenizer,
)
from autointerp.report.stages import cost_page
from autointerp.report.terminal import print_page
from autointerp.scoring.adaptive import StoppingRule
from autointerp.scoring.dry_run import Forecast, forecast_explain, forecast_score
from autointerp.scoring.score import score_runs
from sae.common.errors import BadInput, Unavailable
from sae.study.run import Run

BUNDLED = Path(__file__).resolve().parents[3] / "sae" / "activations" / "bundled" / "pystdlib-4m"


def forecast(run: Run, server: FakeServer, protocol: str = "batch", **more: Any) -> Forecast:  # noqa: F811
    options = LlmOptions(url=server.url, protocol=protocol, model=more.pop("model", None))
    return forecast_score([run], run.root, ("detection",), "llm", options, more.pop("prices", None), 0, **more)


def test_explain_is_foretold_and_nothing_is_asked(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        options = LlmOptions(url=server.url)
        before = forecast_explain([run], Choice(n=N), "llm", options, None)
        assert before.requests == before.requests_at_least == N
        assert not server.requests
        assert not run.journal_path.exists()
        explain(run, server)
        assert len(server.requests) == before.requests
        sent = sum(len(m["content"]) for seen in server.requests for m in seen.body["messages"])
        assert before.prompt_tokens == pytest.approx(sent / 4, rel=0.01)
        after = forecast_explain([run], Choice(n=N), "llm", options, None)
    assert (after.requests, after.answered_before, after.prompt_tokens) == (0, N, 0)


def test_no_server_is_started_for_it(run: Run) -> None:  # noqa: F811
    options = LlmOptions(vllm="bundled")
    found = forecast_explain([run], Choice(n=N), "llm", options, None)
    assert found.requests == N
    assert found.exact, "its tokenizer is at hand"
    assert found.model.startswith("pystdlib-4m-")
    assert not (run.root / "logs").exists()


def test_the_protocol_is_what_the_command_would_choose(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        explain(run, server)
        unknown = forecast(run, server, "auto")
        before = len([s for s in server.requests if "chat" in s.path])
        score_runs([run], run.root, ("detection",), "llm", LlmOptions(url=server.url), control_latents=0)
        asked = len([s for s in server.requests if "chat" in s.path]) - before
        assert asked <= unknown.requests + 2, "the most, but for the probes of what the server can do"
        assert unknown.requests == N * ITEMS
        Path(run.journal_path).unlink()
        explain(run, server)
        known = forecast(run, server, "auto")
    assert known.from_cache == N * ITEMS, "single, which is best here, and answered before"
    assert known.protocol == "single"
    assert known.cheaper is None
    assert not known.notes


def test_thinking_is_counted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with FakeServer(thinks=True) as server:
        explain(run, server)
        plain = forecast(run, server)

        async def probe() -> None:
            async with open_client(LlmOptions(url=server.url), run.root / "cache.sqlite") as client:
                await client.probe()

        asyncio.run(probe())
        capsys.readouterr()
        found = forecast(run, server, "auto")
    assert found.protocol == "batch"
    assert found.completion_at_most == plain.completion_at_most + THINKING_TOKENS * plain.requests
    assert found.completion_tokens == found.completion_at_most
    assert any("thinks before it answers" in note for note in found.notes)
    assert capsys.readouterr().err.count("each answer may take 4,096 tokens more") == 1


@pytest.mark.parametrize("prices", [None, Prices(prompt=2.0, completion=8.0)])
def test_an_unknown_protocol_counts_both(
    run: Run,  # noqa: F811
    prices: Prices | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with FakeServer() as server:
        explain(run, server)
        unknown = forecast(run, server, "auto", prices=prices)
        single, batch = (forecast(run, server, name, prices=prices) for name in ("single", "batch"))
    assert single.requests > batch.requests
    assert single.cost > batch.cost
    found = unknown.as_dict()
    cheaper = found.pop("cheaper")
    assert found == {key: value for key, value in single.as_dict().items() if key != "cheaper"}
    assert cheaper.items() <= batch.as_dict().items()
    assert json.loads(json.dumps(cheaper))["protocol"] == "batch"
    print_page(cost_page(unknown.as_dict()))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"at most {single.requests:,} requests" in printed
    assert "for --protocol single, the more expensive one" in printed
    assert f"--protocol batch would be {batch.requests:,} requests" in printed
    assert (", about $" in printed) == (prices is not None)


@pytest.mark.parametrize(("protocol", "each"), [("batch", -(-ITEMS // 5)), ("single", ITEMS)])
def test_score_is_foretold(run: Run, protocol: str, each: int) -> None:  # noqa: F811
    with FakeServer() as server:
        explain(run, server)
        asked = len(server.requests)
        found = forecast(run, server, protocol)
        chats = [seen for seen in server.requests if seen.path.endswith("/chat/completions")]
        assert len(chats) == asked, "a dry run asks nothing"
        assert found.requests == found.requests_at_least == N * each
        assert not found.exact
        assert 0.5 * found.prompt_tokens < found.cached_tokens < found.prompt_tokens
        score(run, server, protocol)
        chats = [seen for seen in server.requests if seen.path.endswith("/chat/completions")]
        assert len(chats) - asked == found.requests
        assert found.completion_at_most == sum(seen.body["max_tokens"] for seen in chats[asked:])
        assert forecast(run, server, protocol).requests == 0


def test_a_resumed_command_costs_only_what_is_left(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        explain(run, server)
        before = len(server.requests)
        server.answer = lambda body: sensible(body) if len(server.requests) - before <= 20 else error(401)
        with pytest.raises(Unavailable):
            score(run, server, "single")
    with FakeServer() as server:
        found = forecast(run, server, "single")
        assert found.requests == N * ITEMS - 20
        assert found.answered_before + found.from_cache == 20
        score(run, server, "single")
        assert len([s for s in server.requests if "chat" in s.path]) == found.requests
        again = forecast(run, server, "batch")
    assert again.seconds is not None
    assert "as in earlier requests" in again.counted_by


def test_adaptive_scoring_is_foretold_between_bounds(run: Run) -> None:  # noqa: F811
    rule = StoppingRule(0.13, 100)
    with FakeServer() as server:
        explain(run, server)
        found = forecast(run, server, rule=rule)
        assert found.requests_at_least < found.requests
        before = len([s for s in server.requests if "chat" in s.path])
        score_runs([run], run.root, ("detection",), "llm", LlmOptions(url=server.url, protocol="batch"), 0, rule)
        asked = len([s for s in server.requests if "chat" in s.path]) - before
        assert found.requests_at_least <= asked <= found.requests
        assert forecast(run, server, rule=rule).requests == 0


def test_the_models_own_tokenizer_counts_exactly(run: Run) -> None:  # noqa: F811
    from transformers import AutoTokenizer

    name = str(BUNDLED)
    with FakeServer(models=[name]) as server:
        explain(run, server)
        found = forecast(run, server, model=name)
        assert found.exact
        score(run, server)
        tokenizer: Any = AutoTokenizer.from_pretrained(BUNDLED)
        asked = [s for s in server.requests if s.question.startswith("Statement: ")]
        counts = [
            len(
                tokenizer.apply_chat_template(s.body["messages"], add_generation_prompt=True, return_dict=True)[
                    "input_ids"
                ]
            )
            for s in asked
        ]
    assert found.prompt_tokens == sum(counts)


def test_the_price_is_of_what_is_counted(run: Run) -> None:  # noqa: F811
    prices = Prices(prompt=2.0, completion=8.0, cached=0.5)
    with FakeServer() as server:
        explain(run, server)
        found = forecast(run, server, prices=prices)
        dearer = forecast(run, server, prices=Prices(prompt=2.0, completion=8.0))
    assert found.cached_tokens > 0
    assert dearer.dollars is not None
    assert dearer.dollars > (found.dollars or 0)
    assert [any("--price-cached" in note for note in f.notes) for f in (found, dearer)] == [False, True]
    new = found.prompt_tokens - found.cached_tokens
    assert found.dollars == pytest.approx((2 * new + 0.5 * found.cached_tokens + 8 * found.completion_tokens) / 1e6)


def test_what_has_no_explanations_cannot_be_foretold(run: Run) -> None:  # noqa: F811
    with FakeServer() as server, pytest.raises(BadInput, match="run_a"):
        forecast(run, server)


def test_the_baseline_costs_nothing(run: Run) -> None:  # noqa: F811
    found = forecast_score([run], run.root, ("detection",), "ngram", LlmOptions(), None)
    assert (found.requests, found.dollars) == (0, 0.0)


def test_the_command_gives_one_object(run: Run) -> None:  # noqa: F811
    with FakeServer() as server:
        explain(run, server)
        command = [sys.executable, "cli.py", "score", "--sae", "run_a", "--llm-url", server.url, "--dry-run", "--json"]
        done = subprocess.run(
            [*command, "--root", str(run.root)], capture_output=True, text=True, cwd=BUNDLED.parents[3], timeout=1200
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["dry_run"] is True
        assert found["requests"] > 0
        assert len([s for s in server.requests if "chat" in s.path]) == N


# Tokens and blocks


@given(st.lists(st.lists(st.integers(0, 2), max_size=80), max_size=6))
def test_the_cache_counts_leading_blocks_of_earlier_prompts(prompts: list[list[int]]) -> None:
    known: set[bytes] = set()
    for i, prompt in enumerate(prompts):
        shared = 0
        for earlier in prompts[:i]:
            n = next((j for j, (a, b) in enumerate(zip(earlier, prompt, strict=False)) if a != b), None)
            common = min(len(earlier), len(prompt)) if n is None else n
            shared = max(shared, common // BLOCK * BLOCK)
        assert count_cached(prompt, known) == min(shared, max(0, len(prompt) - 1) // BLOCK * BLOCK)


def test_characters_are_cut_by_the_measured_size() -> None:
    count = count_by_characters(5.0)
    tokens = asyncio.run(count.of_messages([{"role": "user", "content": "x" * 100}]))
    assert len(tokens) == 20
    assert not count.exact


def test_a_missing_model_has_no_local_tokenizer() -> None:
    assert load_local_tokenizer("nobody/no-such-model") is None


Messages = list[dict[str, str]]


class Tokenizing(FakeServer):
    """A server with a ``/tokenize`` that answers as ``reply_to`` says; every word and every space is a token."""

    def __init__(self, reply_to: Callable[[str, dict[str, Any]], Any], **settings: Any) -> None:
        super().__init__(**settings)
        self.reply_to = reply_to

    def chat_reply(self, seen: Any) -> Reply:
        if "/chat/completions" in seen.path:
            return super().chat_reply(seen)
        found = self.reply_to(seen.path, seen.body)
        return error(404, "no such path") if found is None else found if isinstance(found, Reply) else Reply(body=found)


def words(text: str) -> list[int]:
    return [len(word) for word in re.findall(r"\S+|\s", text)]


def templated(messages: Messages) -> str:
    return "".join(f"<|{m['role']}|> {m['content']} " for m in messages) + "<|assistant|>"


def vllm(path: str, body: dict[str, Any]) -> Any:
    if path != "/tokenize" or not body.get("add_generation_prompt"):
        return None
    tokens = words(templated(body["messages"]))
    return {"tokens": tokens, "count": len(tokens), "max_model_len": 2048}


def llama_cpp(path: str, body: dict[str, Any]) -> Any:
    if path == "/apply-template":
        return {"prompt": templated(body["messages"])}
    return {"tokens": words(body.get("content", ""))} if path == "/tokenize" else None


def old_llama_cpp(path: str, body: dict[str, Any]) -> Any:
    return llama_cpp(path, body) if path == "/tokenize" else None


def thinking_template(path: str, body: dict[str, Any]) -> Any:
    """A template that thinks unless it is asked not to."""
    found = vllm(path, body)
    if found is not None and body.get("chat_template_kwargs") == {"enable_thinking": False}:
        found = {"tokens": [*found["tokens"], 7, 7, 7, 7]}
    return found


def counted(server: FakeServer, messages: Messages, **settings: Any) -> tuple[Tokenize, int]:
    async def go() -> tuple[Tokenize, int]:
        async with LlmClient(server.url, "fake-model", **settings) as client:
            tokenize = await find_tokenizer(client, LlmOptions(url=server.url))
            return tokenize, len(await tokenize.of_messages(messages))

    return asyncio.run(go())


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two three " * 50}]


def test_template_settings_of_the_body_are_counted() -> None:
    with Tokenizing(thinking_template) as server:
        plain = counted(server, TALK)[1]
        body = {"chat_template_kwargs": {"enable_thinking": False}}
        assert counted(server, TALK, body=body)[1] == plain + 4


@pytest.mark.parametrize("dialect", [vllm, llama_cpp])
def test_the_servers_own_tokens_are_counted(dialect: Callable[[str, dict[str, Any]], Any]) -> None:
    with Tokenizing(dialect) as server:
        tokenize, n = counted(server, TALK)
    assert tokenize.exact
    assert tokenize.name == f"the server's own tokenizer ({server.root}/tokenize)"
    assert n == len(words(templated(TALK)))


def test_without_apply_template_the_template_is_guessed() -> None:
    with Tokenizing(old_llama_cpp) as server:
        tokenize, n = counted(server, TALK)
    assert not tokenize.exact
    assert "the chat template guessed" in tokenize.name
    assert n == sum(len(words(m["content"])) for m in TALK) + 8


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "none": lambda _: {"tokens": []},
    "none, and said so": lambda _: {"tokens": [], "count": 0},
    "one for any text": lambda _: {"tokens": [7], "count": 1},
    "as many for any text": lambda _: {"tokens": [7] * 60, "count": 60},
    "far more than bytes": lambda _: {"tokens": [7] * 100_000},
    "a count that is another": lambda body: {"tokens": [7] * len(str(body)), "count": 5},
    "a negative count": lambda body: {"tokens": [7] * len(str(body)), "count": -len(str(body))},
    "a count that is no number": lambda body: {"tokens": [7] * len(str(body)), "count": "many"},
    "a count that is a truth": lambda _: {"tokens": [7], "count": True},
    "negative tokens": lambda body: {"tokens": [-7] * len(str(body))},
    "tokens that are text": lambda body: {"tokens": ["7"] * len(str(body))},
    "fewer for more": lambda body: {"tokens": [7] * max(1, 9000 - len(str(body)))},
    "cut off": lambda body: {"tokens": [7] * min(128, len(str(body)))},
}


@pytest.mark.parametrize("reply", WRONG.values(), ids=WRONG.keys())
def test_an_implausible_count_is_not_used(reply: Callable[[dict[str, Any]], Any]) -> None:
    with Tokenizing(lambda path, body: reply(body) if path == "/tokenize" else None) as server:
        tokenize, n = counted(server, TALK)
    assert not tokenize.exact
    assert "an estimate" in tokenize.name
    assert tokenize.note.startswith("the server's /tokenize is not believed (")
    assert n == round(sum(len(m["content"]) for m in TALK) / 4)


NO_COUNT: dict[str, Any] = {
    "no such path": None,
    "a web page": Reply(body="<html>"),
    "an error inside a 200": {"error": "no"},
    "a list": [1, 2],
    "no list of tokens": {"tokens": 5},
    "nothing": Reply(drop=True),
    "a redirect": Reply(status=307, headers={"location": "http://127.0.0.1:1/tokenize"}, body=""),
}


@pytest.mark.parametrize("reply", NO_COUNT.values(), ids=NO_COUNT.keys())
def test_a_server_without_tokenizer_is_estimated_quietly(reply: Any) -> None:
    with Tokenizing(lambda _path, _body: reply) as server:
        tokenize, _ = counted(server, TALK)
    assert not tokenize.exact
    assert not tokenize.note


def test_a_server_that_stops_counting_is_estimated(run: Run) -> None:  # noqa: F811
    left = iter(range(4))
    with Tokenizing(lambda path, body: vllm(path, body) if next(left, None) is not None else None) as server:
        found = forecast_explain([run], Choice(n=N), "llm", LlmOptions(url=server.url), None)
    with FakeServer() as plain:
        want = forecast_explain([run], Choice(n=N), "llm", LlmOptions(url=plain.url), None)
    assert not found.exact
    assert found.prompt_tokens == want.prompt_tokens > 0
    assert any("failed (HTTP 404" in note for note in found.notes)


def test_a_dry_run_reports_an_implausible_count(run: Run, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with Tokenizing(lambda _path, _body: {"tokens": []}) as server:
        found = forecast_explain([run], Choice(n=N), "llm", LlmOptions(url=server.url), None)
    print_page(cost_page(found.as_dict()))
    printed = capsys.readouterr().out
    assert f"prompt tokens {found.prompt_tokens:,} (an estimate)" in printed
    assert "not believed (0 tokens for 1 character)" in printed
    assert found.prompt_tokens > 0
