"""A dry run says what the command then asks, to the request and to the token, and asks nothing itself."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, error, sensible
from hypothesis import given
from hypothesis import strategies as st
from test_score_by_llm import ITEMS, N, explain, harvested, run, score  # noqa: F401

from autointerp.adaptive import Precision
from autointerp.cost import Prices
from autointerp.dry_run import forecast_explain, forecast_score
from autointerp.forecast import Forecast
from autointerp.llm.options import LlmOptions
from autointerp.llm.tokens import BLOCK, block_keys, by_characters, local_tokenizer
from autointerp.score import score_runs
from autointerp.selection import Choice
from sae.errors import BadInput, Unavailable
from sae.run import Run

BUNDLED = Path(__file__).resolve().parents[2] / "sae" / "subjects" / "pystdlib-4m"


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


def test_a_server_of_our_own_is_not_started_for_it(run: Run) -> None:  # noqa: F811
    options = LlmOptions(vllm="bundled")
    found = forecast_explain([run], Choice(n=N), "llm", options, None)
    assert found.requests == N
    assert found.exact, "its tokenizer is at hand"
    assert found.model.startswith("pystdlib-4m-")
    assert not (run.root / "logs").exists()


def test_the_protocol_is_the_one_that_the_command_would_choose(run: Run) -> None:  # noqa: F811
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


@pytest.mark.parametrize("prices", [None, Prices(prompt=2.0, completion=8.0)])
def test_where_the_protocol_is_not_known_both_are_counted(
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
    unknown.render()
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert f"at most {single.requests:,} requests" in first
    assert "of --protocol single, the dearer" in second
    assert f"--protocol batch would be {batch.requests:,} requests" in second
    assert ("$" in second) == (prices is not None)


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
    rule = Precision(0.13, 100)
    with FakeServer() as server:
        explain(run, server)
        found = forecast(run, server, precision=rule)
        assert found.requests_at_least < found.requests
        before = len([s for s in server.requests if "chat" in s.path])
        score_runs([run], run.root, ("detection",), "llm", LlmOptions(url=server.url, protocol="batch"), 0, rule)
        asked = len([s for s in server.requests if "chat" in s.path]) - before
        assert found.requests_at_least <= asked <= found.requests
        assert forecast(run, server, precision=rule).requests == 0


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
            [*command, "--root", str(run.root)], capture_output=True, text=True, cwd=BUNDLED.parents[2], timeout=120
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["dry_run"] is True
        assert found["requests"] > 0
        assert len([s for s in server.requests if "chat" in s.path]) == N


# Tokens and blocks


@given(st.lists(st.lists(st.integers(0, 2), max_size=80), max_size=6))
def test_cached_are_the_leading_blocks_of_any_earlier_prompt(prompts: list[list[int]]) -> None:
    known: set[bytes] = set()
    for i, prompt in enumerate(prompts):
        shared = 0
        for earlier in prompts[:i]:
            n = next((j for j, (a, b) in enumerate(zip(earlier, prompt, strict=False)) if a != b), None)
            common = min(len(earlier), len(prompt)) if n is None else n
            shared = max(shared, common // BLOCK * BLOCK)
        assert block_keys(prompt, known) == min(shared, max(0, len(prompt) - 1) // BLOCK * BLOCK)


def test_characters_are_cut_by_the_measured_size() -> None:
    count = by_characters(5.0)
    tokens = asyncio.run(count([{"role": "user", "content": "x" * 100}]))
    assert len(tokens) == 20
    assert not count.exact


def test_a_model_that_is_not_here_has_no_local_tokenizer() -> None:
    assert local_tokenizer("nobody/no-such-model") is None


def test_a_server_that_tokenizes_is_asked() -> None:
    from autointerp.llm.client import LlmClient
    from autointerp.llm.tokens import tokenizer_of

    class Tokenizing(FakeServer):
        def chat_reply(self, seen: Any) -> Reply:
            if seen.path == "/tokenize":
                return Reply(body={"tokens": [len(m["content"]) for m in seen.body["messages"]], "count": 1})
            return super().chat_reply(seen)

    async def go(url: str) -> tuple[bool, Any]:
        async with LlmClient(url, "fake-model") as client, tokenizer_of(client, LlmOptions(url=url)) as tokenize:
            return tokenize.exact, await tokenize([{"role": "user", "content": "abc"}])

    with Tokenizing() as server:
        assert asyncio.run(go(server.url)) == (True, [3])
    with FakeServer() as plain:
        assert asyncio.run(go(plain.url))[0] is False
