"""Our side of ``llm_client.py``: contexts of many latents judged by the product's own path, each verdict journalled.

    python benchmarks/llm_side_ours.py ours|raw URL REQUESTS CONCURRENCY

Prints one JSON object: the seconds it took, the processor seconds that this process spent, and how many verdicts the
journal holds afterwards. Importing, opening files and connecting do not count. ``raw`` sends the same bytes with
aiohttp alone and keeps nothing: what a client in Python can reach.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))

from autointerp.contexts.sampler import Context
from autointerp.journal.journal import Journal, SetUp
from autointerp.llm.limits import run_in_flight
from autointerp.llm.options import LlmOptions
from autointerp.llm.prompts import conversation
from autointerp.scoring.judges.base import Judge
from autointerp.scoring.questions import Question, TestSets
from autointerp.scoring.score import Asking, open_judge
from autointerp.scoring.scorers.detection import DetectionScorer

PER_LATENT = 100
T = TypeVar("T")
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he")


def contexts(latent: int, n: int) -> list[Context]:
    """Made-up windows of 32 tokens, half of them active."""
    draw = random.Random(latent)
    made = []
    for i in range(n):
        tokens = tuple(f" {draw.choice(WORDS)}{draw.randrange(100)}" for _ in range(32))
        window = latent * PER_LATENT + i
        if i % 2:
            made.append(Context(window, tokens, (0.0,) * 32, False, None, "random"))
        else:
            made.append(Context(window, tokens, (1.0,) * 32, True, 0, "active"))
    return made


def explanation(latent: int) -> str:
    return f"The number {latent} at the end of a word, where the word before it is short."


def messages(requests: int) -> list[list[dict[str, str]]]:
    """What ``ours`` sends, for the others to send."""
    words = conversation("judge_single")
    latents = max(1, requests // PER_LATENT)
    return [
        list(words.messages(explanation=explanation(latent), snippet=context.text))
        for latent in range(latents)
        for context in contexts(latent, requests // latents)
    ]


class MadeContexts(TestSets):
    """Made-up test sets."""

    def __init__(self, items: dict[int, list[Context]]) -> None:
        self.scorer, self.adaptive = DetectionScorer(), None
        self._drawn = {latent: [contexts] for latent, contexts in items.items()}

    def set_up(self, judge: Judge) -> SetUp:
        return SetUp(judge.name, "detection", judge.settings_hash, judge.prompt_hash, judge.model)


async def ours(url: str, requests: int, concurrency: int, folder: Path) -> dict[str, float]:
    options = LlmOptions(url=url, concurrency=concurrency, protocol="single")
    latents = max(1, requests // PER_LATENT)
    items = {latent: contexts(latent, requests // latents) for latent in range(latents)}
    async with open_judge("llm", options, folder / "cache.sqlite") as judge:
        with Journal(folder / "journal.sqlite") as journal, journal.claim():
            rows = {
                latent: journal.add_explanation(
                    latent=latent,
                    explainer="llm",
                    settings_hash="",
                    prompt_hash="",
                    model="m",
                    contexts=(),
                    text=explanation(latent),
                )
                for latent in items
            }
            questions = [Question(x, row, explanation(x), frozenset()) for x, row in rows.items()]
            # Connections are made and code is warm before the clock starts.
            warm = Question(0, rows[0], "A word.", frozenset(), control="swap")
            await Asking(MadeContexts({0: items[0][: 2 * concurrency]}), judge, journal).ask(warm)
            asking = Asking(MadeContexts(items), judge, journal)
            clock = Clock()
            await run_in_flight(questions, asking.ask, concurrency)
            taken = clock.read()
            answered = int(journal.verdicts(control="none")["p"].notna().sum())
    return {**taken, "answered": answered}


ASKED = {"model": "m", "max_tokens": 4, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}


async def raw(url: str, requests: int, concurrency: int) -> dict[str, float]:
    import aiohttp

    bodies = [json.dumps({**ASKED, "messages": one}).encode() for one in messages(requests)]
    async with aiohttp.ClientSession() as session:

        async def send(body: bytes) -> None:
            head = {"content-type": "application/json"}
            async with session.post(f"{url}/v1/chat/completions", data=body, headers=head) as reply:
                json.loads(await reply.read())

        return await timed(send, bodies, concurrency)


async def sdk(url: str, requests: int, concurrency: int) -> dict[str, float]:
    import openai

    http_client = openai.DefaultAioHttpClient()
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0, http_client=http_client) as api:

        async def send(one: list[dict[str, str]]) -> None:
            await api.chat.completions.create(messages=one, **ASKED)  # type: ignore[call-overload]

        return await timed(send, messages(requests), concurrency)


async def timed(send: Callable[[T], Awaitable[None]], items: list[T], concurrency: int) -> dict[str, float]:
    await run_in_flight(items[: 2 * concurrency], send, concurrency)
    clock = Clock()
    await run_in_flight(items, send, concurrency)
    return {**clock.read(), "answered": len(items)}


class Clock:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._began[0], "processor": time.process_time() - self._began[1]}


if __name__ == "__main__":
    side, address, n, at_once = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if side in ("raw", "sdk"):
        print(json.dumps(asyncio.run({"raw": raw, "sdk": sdk}[side](address, n, at_once))))
    else:
        with tempfile.TemporaryDirectory() as made:
            print(json.dumps(asyncio.run(ours(address, n, at_once, Path(made)))))
