"""Servers that do everything wrong: each fault by itself, and a third of all answers at once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from asking import client, complete
from asking import run as run_client
from fake_server import FakeServer, Reply, error, snippets_of, token

from autointerp.contexts.sampler import Context
from autointerp.journal.journal import Journal, PlannedContext, Verdict
from autointerp.journal.usage import Usage
from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import AnswerFailed
from autointerp.llm.limits import run_in_flight
from autointerp.scoring.judges.llm import LlmJudge, Protocol
from autointerp.scoring.score_table import score_table

BODY = json.dumps({"choices": [{"index": 0, "message": {"content": "1"}, "finish_reason": "stop"}]})
LONG = 10 * 2**20


def http(body: str, length: int | None = None, head: str = "") -> bytes:
    size = len(body) if length is None else length
    head += "content-type: application/json\r\nconnection: close\r\n"
    return f"HTTP/1.1 200 OK\r\n{head}content-length: {size}\r\n\r\n{body}".encode()


PASSING = {
    "429": error(429, "slow down"),
    "429 with Retry-After": error(429, "slow down", headers={"retry-after": "0.01"}),
    "500": error(500, "exploded"),
    "503": error(503, "overloaded"),
    "HTML error page": Reply(status=502, body="<!DOCTYPE html><html><h1>Bad gateway</h1></html>"),
    "large error page": Reply(status=503, body="<html>" + "x" * LONG),
    "hung up": Reply(drop=True),
    "reset": Reply(reset=True),
    "stalled": Reply(stall=6.0),
    "silent": Reply(delay=6.0),
    "cut off in the middle": Reply(raw=http(BODY[:20], len(BODY))),
    "no HTTP": Reply(raw=b"SSH-2.0-OpenSSH_9.6\r\n"),
    "garbage": Reply(raw=bytes(range(256)) * 4),
    "a head without end": Reply(raw=b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000),
    "compressed, and it is not": Reply(raw=http(BODY, head="content-encoding: gzip\r\n")),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_faults_of_the_connection_are_waited_out(fault: Reply) -> None:
    with FakeServer("fine") as server:
        server.script.append(fault)
        # Long enough for a busy machine, also to list its models.
        answer = complete(client(server, timeout=1.5 if fault.stall or fault.delay else 30.0))
    assert (answer.text, answer.usage.requests) == ("fine", 2)


UNUSABLE: dict[str, tuple[Reply, str]] = {
    "truncated JSON": (Reply(body=BODY[:30]), "not JSON"),
    "HTML page": (Reply(body="<html>Sign in</html>"), "not JSON"),
    "no text at all": (Reply(raw=http("")), "not JSON"),
    "nested without end": (Reply(body="[" * 200_000), "not JSON"),
    "empty choices": (Reply(body={"choices": []}), "no choices"),
    "another kind of object": (Reply(body={"choices": {"a": 1}}), "no choices"),
    "choices of another kind": (Reply(body={"choices": ["text"]}), "no choices"),
    "a message of another kind": (Reply(body={"choices": [{"message": "1"}]}), "cannot be read|empty"),
    "log-probabilities of another kind": (
        Reply(body={"choices": [{"message": {"content": "1"}, "logprobs": {"content": [{"token": "1"}]}}]}),
        "cannot be right: 0.logprob: Field required",
    ),
    "log-probabilities that are no numbers": (
        Reply("1", logprobs=[{"token": "1", "logprob": float("nan"), "top_logprobs": []}]),
        "cannot be right",
    ),
    "refused": (Reply(content=None, message={"refusal": "I cannot"}), "refused: I cannot"),
    "filtered": (Reply(finish_reason="content_filter"), "content filter"),
    "too large": (Reply(body=json.dumps({"choices": [{"message": {"content": "1" * LONG}}]})), "larger than 8 MiB"),
    "white space": (Reply(content="{" + " " * 5000, finish_reason="length"), "white space"),
}


@pytest.mark.parametrize(("fault", "reason"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_invalid_replies_are_failures_with_reasons(fault: Reply, reason: str) -> None:
    with FakeServer(fault) as server:
        with pytest.raises(AnswerFailed, match=reason) as caught:
            complete(client(server))
        assert "\n" not in caught.value.reason
        assert len(caught.value.reason) < 300
        assert caught.value.usage.requests == len(server.requests)


@pytest.mark.parametrize(
    "count", [0, -1, -(10**30), True, "many", "7", 2.5, 1e300, float("nan"), 10**400, 10**12, None, [], {"a": 1}, 1]
)
@pytest.mark.parametrize("which", ["prompt_tokens", "completion_tokens", "both"])
def test_an_answer_is_kept_whatever_its_token_counts(count: object, which: str) -> None:
    counts = {"prompt_tokens": 100, "completion_tokens": 100} | {
        name: count for name in ("prompt_tokens", "completion_tokens") if which in (name, "both")
    }
    body = {"choices": [{"message": {"content": "x" * 1000}}], "usage": counts}
    with FakeServer(Reply(body=body)) as server:
        answer = run_client(lambda c: c.complete([{"role": "user", "content": "y" * 1000}], 2000), client(server))
    found = answer.usage
    assert answer.text == "x" * 1000
    assert found.prompt_tokens == (0 if which != "completion_tokens" else 100)
    assert found.completion_tokens == (0 if which != "prompt_tokens" else 100)


@pytest.mark.parametrize("cached", [101, -5, 10**15, "all", True])
def test_cached_tokens_never_exceed_the_prompt(cached: object) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": cached}}
    with FakeServer(Reply(body={"choices": [{"message": {"content": "x"}}], "usage": usage})) as server:
        assert complete(client(server)).usage.cached_tokens == 0


def test_half_a_surrogate_pair_is_no_text() -> None:
    with FakeServer(Reply("a \ud800 b")) as server:
        assert complete(client(server)).text == "a ? b"


LARGE_REPLY = """
import asyncio, resource, sys
from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import AnswerFailed

async def main():
    async with LlmClient(sys.argv[1], answer_tries=1) as client:
        await client.check()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            await client.complete([{"role": "user", "content": "x"}], 10)
        except AnswerFailed as failed:
            print(failed.reason)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)

asyncio.run(main())
"""


@pytest.mark.parametrize("compressed", [False, True])
def test_a_reply_without_end_takes_bounded_memory(compressed: bool) -> None:
    """200 MB, and a megabyte that unpacks to a gigabyte."""
    import gzip

    if compressed:
        packed = gzip.compress(b"0" * 2**20, 1) * 1000
        head = b"content-encoding: gzip\r\ncontent-length: %d\r\n" % len(packed)
        raw = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + packed
    else:
        raw = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200 * 2**20
    with FakeServer(Reply(raw=raw)) as server:
        ran = subprocess.run(
            [sys.executable, "-c", LARGE_REPLY, server.url], capture_output=True, text=True, timeout=1200, check=True
        )
    reason, grown = ran.stdout.splitlines()
    assert "larger than" in reason
    assert int(grown) < 120, "MiB"


# a third of all answers


def hashed(*parts: object) -> float:
    """In [0, 1), the same every time."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6]) / 2**48


LATENTS, CONTEXTS = 12, 40
SAME = {"judge": "llm", "scorer": "detection", "settings_hash": "s", "prompt_hash": "p", "model": "fake-model"}


def contexts(latent: int) -> list[Context]:
    """Half of them active; each is named in its text, so that the server knows what it is asked about."""
    return [
        Context(
            latent * CONTEXTS + i,
            (f"context {latent}-{i}", " of active" if i % 2 else " of silent"),
            (float(i % 2),) * 2,
            bool(i % 2),
            0 if i % 2 else None,
            "active" if i % 2 else "random",
        )
        for i in range(CONTEXTS)
    ]


def verdict_on(snippet: str) -> int:
    """What the server's model says: wrong of a quarter of the active and of a tenth of the silent contexts."""
    active = "of active" in snippet
    return int(active != (hashed("wrong", snippet) < (0.25 if active else 0.1)))


def honest(body: dict[str, Any]) -> Reply:
    snippets = snippets_of(str(body["messages"][-1]["content"]))
    labels = [verdict_on(snippet) for snippet in snippets]
    tokens = [token("1", t1=-0.1, t0=-2.4) if label else token("0", t0=-0.1, t1=-2.4) for label in labels]
    if "json_schema" not in str(body.get("response_format")):
        return Reply(str(labels[0]), logprobs=tokens)
    return Reply(json.dumps({"labels": labels}), logprobs=[token('{"labels": ['), *tokens, token("]}")])


def wrong_labels(body: dict[str, Any]) -> Reply:
    n = len(snippets_of(str(body["messages"][-1]["content"])))
    return Reply(json.dumps({"labels": [2] * n}) if n > 1 else "maybe", logprobs=[token("maybe", t2=-0.1, t3=-3.0)])


def wrong_length(body: dict[str, Any]) -> Reply:
    n = len(snippets_of(str(body["messages"][-1]["content"])))
    return Reply(json.dumps({"labels": [0] * (n + 1)}), logprobs=[token("[", tx=-0.1)])


FAULTS: list[Callable[[dict[str, Any]], Reply]] = [
    *(lambda _, fault=fault: fault for name, fault in PASSING.items() if name not in ("stalled", "silent")),
    *(lambda _, fault=fault: fault for fault, _ in UNUSABLE.values()),
    lambda _: error(400, "no"),
    wrong_labels,
    wrong_length,
]


class Faulty:
    """Three in ten answers are a fault: at random, so that asking again helps, or by the question, so that it does
    not; and a third of one latent's questions never get an answer."""

    def __init__(self) -> None:
        self.asked = Counter[str]()
        self.faults = 0

    def __call__(self, body: dict[str, Any]) -> Reply:
        question = str(body["messages"][-1]["content"])
        self.asked[question] += 1
        n = self.asked[question]
        lasting = hashed("lasting", question)
        if lasting < 0.03 or ("context 5-" in question and lasting < 0.4) or hashed("now", question, n) < 0.27:
            self.faults += 1
            return FAULTS[int(hashed("which", question, n) * len(FAULTS))](body)
        return honest(body)


def scored(
    answer: Callable[[dict[str, Any]], Reply], protocol: Protocol, folder: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The score table and the verdicts of all latents, judged by a server that answers so."""
    items = {latent: contexts(latent) for latent in range(LATENTS)}

    async def main(journal: Journal, rows: dict[int, int]) -> None:
        made = LlmClient(server.url, backoff=0.001, timeout=2.0, concurrency=8, patience=10_000)
        async with made as opened:
            judge = LlmJudge(opened, protocol)

            async def one(part: tuple[int, Sequence[Context]]) -> None:
                latent, asked = part
                found = await judge.judge(f'The word "{latent}".', asked)
                verdicts = [
                    Verdict(
                        latent=latent,
                        explanation_id=rows[latent],
                        context=context.window,
                        truth=context.active,
                        negative_kind=None if context.active else "random",
                        p=judged.p,
                        label=judged.label,
                        failure=judged.failure,
                        **SAME,  # type: ignore[arg-type]
                    )
                    for context, judged in zip(asked, found, strict=True)
                ]
                spent = sum((judged.usage for judged in found), Usage())
                await journal.record(verdicts, "score", "fake-model", spent, latent)

            size = judge.contexts_per_request
            parts = [(x, of[i : i + size]) for x, of in items.items() for i in range(0, CONTEXTS, size)]
            await run_in_flight(parts, one, 16)

    with FakeServer(answer) as server, Journal(folder / "journal.sqlite") as journal:
        rows = {
            latent: journal.add_explanation(
                latent=latent,
                explainer="llm",
                settings_hash="s",
                prompt_hash="p",
                model="m",
                contexts=(),
                text=f'The word "{latent}".',
            )
            for latent in items
        }
        asyncio.run(main(journal, rows))
        sent = int(journal.usage()["requests"].sum())
        # All that were sent are on record; some were sent on a connection that the server was just closing.
        assert 0 <= sent - len(server.requests) < 0.02 * sent
        for latent, of in items.items():
            planned = [PlannedContext(c.window, c.truth, c.kind, c.stratum) for c in of]
            journal.add_test_set("detection", "s", latent, [planned])
        return score_table(journal), journal.verdicts()


@pytest.mark.parametrize("protocol", ["single", "batch"])
def test_faulty_answers_cost_answers_not_truth(protocol: Protocol, tmp_path: Path) -> None:
    (tmp_path / "well").mkdir()
    (tmp_path / "ill").mkdir()
    well, told_well = scored(honest, protocol, tmp_path / "well")
    server = Faulty()
    ill, told_ill = scored(server, protocol, tmp_path / "ill")
    assert 0.25 < server.faults / server.asked.total() < 0.45

    # No fault became a verdict: what was judged was judged as the model judges it, everything else failed.
    judged = told_ill[told_ill["failure"].isna()].set_index("context")
    expected = told_well.set_index("context").loc[judged.index]
    pd.testing.assert_series_equal(judged["label"], expected["label"])
    pd.testing.assert_series_equal(judged["p"], expected["p"])
    failed = told_ill[told_ill["failure"].notna()]
    assert len(told_ill) == LATENTS * CONTEXTS
    assert 0 < len(failed) < 0.25 * len(told_ill)
    assert failed[["p", "label"]].isna().all(axis=None)
    assert failed["failure"].str.len().between(5, 300).all()

    # Every latent is scored or failed; the one whose questions mostly failed is a failure and not a low score.
    well, ill = well.set_index("latent"), ill.set_index("latent")
    assert (well["status"] == "ok").all()
    assert len(ill) == LATENTS
    done = ill["status"] == "ok"
    assert not done[5]
    assert ill.loc[~done, "status"].str.startswith("failed: ").all()
    assert ill.loc[~done, "balanced_accuracy"].isna().all()
    assert done.sum() >= LATENTS - 4
    counted = ill["n_active"] + ill["n_inactive"] + ill["n_failed"]
    assert (counted == CONTEXTS).all()

    # Unbiased: the failures are chance, so the scores differ by no more than the chance of leaving those out.
    difference = (ill["balanced_accuracy"] - well["balanced_accuracy"])[done].to_numpy(dtype=float)
    error_of_mean = max(difference.std(ddof=1) / np.sqrt(len(difference)), 0.004)
    assert abs(difference.mean()) < 3 * error_of_mean
    assert np.abs(difference).max() < 0.12
