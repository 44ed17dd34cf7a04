"""Explaining and scoring by a language model, killed at random moments: nothing is lost, nothing is paid for twice."""

from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer, Reply, Seen, sensible
from tiny_study import harvested_study, journal, records

from autointerp.llm.prompts import conversation
from sae.common.files import read_table

CLI = Path(__file__).parents[3] / "cli.py"
LATENTS = 16
AT_ONCE = 4
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("explain", "--latents", str(LATENTS)),
    ("score", "--protocol", "single", "--control-latents", "4"),
)


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory, tiny_neox_dir: Path) -> Path:
    """A root with one trained and harvested run."""
    root = tmp_path_factory.mktemp("harvested")
    harvested_study(root, tiny_neox_dir, num_latents=64, n_explain=10, n_active=10, n_inactive=10)
    return root


class Slow:
    """A server that takes its time, so that a kill finds requests under way; told to, it answers only so many."""

    def __init__(self, seed: int, answer: Callable[[dict[str, Any]], Reply | str] = sensible) -> None:
        self._chance, self._answer = random.Random(seed), answer
        self._lock = threading.Lock()
        self._left: float = math.inf
        self._freed = threading.Event()

    def answers(self, left: float) -> None:
        """Answer ``left`` more requests; who asks more waits, until this is called again and hangs up."""
        with self._lock:
            freed, self._freed, self._left = self._freed, threading.Event(), left
        freed.set()

    def __call__(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            self._left -= 1
            waits, freed, delay = self._left < 0, self._freed, self._chance.uniform(0.002, 0.02)
        if waits:
            freed.wait(60)
            return Reply(drop=True)
        answer = self._answer(body)
        answer = Reply(answer) if isinstance(answer, str) else answer
        return Reply(**{**vars(answer), "delay": delay})


def start(root: Path, command: tuple[str, ...], server: FakeServer) -> subprocess.Popen[str]:
    words = (*command, "--sae", "run_a", "--root", str(root), "--concurrency", str(AT_ONCE), "--llm-url", server.url)
    return subprocess.Popen(
        [sys.executable, str(CLI), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def to_the_end(root: Path, command: tuple[str, ...], server: FakeServer) -> None:
    process = start(root, command, server)
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 0, said


def killed(root: Path, command: tuple[str, ...], server: FakeServer, slow: Slow, after: int, delay: float) -> None:
    """Kill the command ``delay`` seconds after it has sent ``after`` requests, of which no more are answered.

    However late a busy machine sees that they were sent, the command cannot have come to its end by then.
    """
    before = len(server.requests)
    slow.answers(after)
    process = start(root, command, server)
    while process.poll() is None and len(server.requests) < before + after:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    _, said = process.communicate()
    assert process.returncode < 0, said
    slow.answers(math.inf)


def outcome(root: Path) -> dict[str, Any]:
    """What the commands left, without row numbers and times: the order in which answers come is the server's."""
    stored = journal(root / "run_a" / "journal.sqlite")
    text_of = {row["id"]: row["text"] for row in stored["explanation"]}
    tables = {
        name: sorted(
            (
                {k: v for k, v in row.items() if k not in ("id", "explanation_id", "created")}
                | ({"of": text_of[row["explanation_id"]]} if "explanation_id" in row else {})
                for row in stored[name]
            ),
            key=str,
        )
        for name in ("explanation", "verdict")
    }
    scores = read_table(root / "run_a" / "latents.scores.parquet").drop(columns="explanation_id")
    rows = ({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in records(scores))
    return {**tables, "scores": sorted(map(str, rows))}


@pytest.mark.parametrize(
    "kills",
    [2, pytest.param(5, marks=pytest.mark.slow), pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=lambda n: f"{n} kills",
)
def test_killed_at_random_moments(kills: int, harvested: Path, tmp_path: Path) -> None:
    root, undisturbed = (Path(shutil.copytree(harvested, tmp_path / name)) for name in ("root", "undisturbed"))
    chance = random.Random(kills)
    with FakeServer(Slow(0)) as server:
        for command in COMMANDS:
            to_the_end(undisturbed, command, server)
        needed = len(server.requests)
    assert needed > 20 * LATENTS
    slow = Slow(1)
    with FakeServer(slow) as server:
        for command, share in zip(COMMANDS, (0.2, 0.8), strict=True):
            for _ in range(round(share * kills)):
                after = chance.randint(1, max(1, 2 * needed // (3 * kills))) if command[0] == "score" else 1
                killed(root, command, server, slow, after, chance.uniform(0, 0.03))
            to_the_end(root, command, server)
        asked = len(server.requests)
    # What was under way when the process died is lost: at most one request for each slot and death.
    assert needed <= asked <= needed + kills * AT_ONCE
    assert outcome(root) == outcome(undisturbed)


def test_killed_between_the_two_questions_about_a_latent(harvested: Path, tmp_path: Path) -> None:
    """The first answer repeats an example, and is not paid for again."""
    root = Path(shutil.copytree(harvested, tmp_path / "root"))
    example = conversation("explain").prefix[-1]["content"]

    def is_second(seen: Seen) -> bool:
        return example not in [message["content"] for message in seen.body["messages"]]

    def repeat(body: dict[str, Any]) -> Reply | str:
        return example if body["messages"][-2]["content"] == example else sensible(body)

    slow = Slow(0, repeat)
    with FakeServer(slow) as server:
        slow.answers(1)
        process = start(root, COMMANDS[0], server)
        while process.poll() is None and not any(map(is_second, server.requests)):
            time.sleep(0.001)
        process.kill()
        _, said = process.communicate()
        assert process.returncode < 0, said
        slow.answers(math.inf)
        question = next(seen.question for seen in server.requests if is_second(seen))
        to_the_end(root, COMMANDS[0], server)
        asked = [is_second(seen) for seen in server.requests if seen.question == question]
    assert asked == [False, True, True]
    rows = journal(root / "run_a" / "journal.sqlite")["explanation"]
    texts = [row["text"] for row in rows if row["explainer"] == "llm"]
    assert texts
    assert all(text.startswith("Text that contains") for text in texts)
