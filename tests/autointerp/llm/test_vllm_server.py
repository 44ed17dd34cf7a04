"""A server of our own is there when it is asked, says why when it is not, and never stays behind."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply
from fake_vllm_python import FakeVllm, alive, heed_interrupts
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from autointerp.llm.client import LlmClient
from autointerp.llm.local import server as vllm_server
from autointerp.llm.local.model import VllmModel
from autointerp.llm.local.server import VllmServer, choose_cache_gib
from sae.common import progress
from sae.common.errors import Unavailable

REPOSITORY = Path(vllm_server.__file__).parents[3]
MESSAGES = [{"role": "user", "content": "Statement: x"}]


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[FakeVllm]:
    fake = FakeVllm(tmp_path / "fake")
    yield fake
    left = fake.living()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is said on standard error, as on no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, width=200))
    return stream


def server(vllm: FakeVllm, folder: Path, **settings: Any) -> VllmServer:
    model = VllmModel("/models/some model", "its-name", arguments=("--max-model-len", "64"))
    return VllmServer(model, vllm.python, folder / "logs" / "vllm.log", **settings)


def start(own: VllmServer) -> str:
    return asyncio.run(own.ready())


# --- as it should be --------------------------------------------------------------------------------------------


def test_the_server_runs_until_the_block_ends(vllm: FakeVllm, tmp_path: Path) -> None:
    with server(vllm, tmp_path) as own:
        assert not vllm.starts()
        url = start(own)
        assert start(own) == url
        (begun,) = vllm.starts()
        assert all(alive(pid) for pid in begun["pids"])
        assert url.startswith("http://127.0.0.1:")
        words = begun["arguments"]
        assert words[:4] == ["--max-model-len", "64", "--model", "/models/some model"]
        assert words[words.index("--served-model-name") + 1] == "its-name"
        assert words[words.index("--host") + 1] == "127.0.0.1"
        scratch = Path(begun["environment"]["TMPDIR"])
        (scratch / "socket").touch()
        with urllib.request.urlopen(f"{url}/v1/models") as reply:
            assert [entry["id"] for entry in json.load(reply)["data"]] == ["its-name"]
    assert not vllm.living()
    assert not scratch.exists()
    with own:
        assert start(own) != ""
        assert len(vllm.starts()) == 2


def test_a_client_starts_it_with_its_first_question(vllm: FakeVllm, tmp_path: Path) -> None:
    vllm.behave(delay=0.5)

    async def work() -> list[str]:
        with server(vllm, tmp_path) as own:
            async with LlmClient("unused", own.model.name, start=own.ready) as client:
                assert await client.check() == "its-name"
                assert not vllm.starts()
                answers = await asyncio.gather(*(client.complete(MESSAGES, 20, seed=n) for n in range(5)))
                return [answer.text for answer in answers]

    assert len(asyncio.run(work())) == 5
    assert len(vllm.starts()) == 1


def test_the_child_gets_no_keys_and_bounded_memory(
    vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "AUTOINTERP_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "sk-secret-of-mine-0123456789")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with server(vllm, tmp_path) as own:
        start(own)
        assert "secret" not in own.log.read_text()
    (begun,) = vllm.starts()
    assert "sk-secret" not in str(begun)
    assert int(begun["environment"]["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    assert begun["environment"]["VLLM_NO_USAGE_STATS"] == "1"
    assert begun["environment"]["HF_HUB_OFFLINE"] == "0", "what the user has set stays"


@given(st.none() | st.integers(0, 1 << 50), st.integers(0, 1 << 45))
def test_the_cache_leaves_most_of_the_memory(free: int | None, weights: int) -> None:
    found = choose_cache_gib(free, weights)
    assert 1 <= found <= 16
    if found > 1:
        assert free is not None
        assert (found << 30) * 4 + 2 * weights <= free


def test_only_an_unused_log_is_replaced(vllm: FakeVllm, tmp_path: Path) -> None:
    first, second = server(vllm, tmp_path), server(vllm, tmp_path)
    with first:
        start(first)
        with second:
            start(second)
            assert first.log != second.log
            assert first.tail()[0].count("loading") == second.tail()[0].count("loading") == 1
    with server(vllm, tmp_path) as third:
        start(third)
        assert third.log == first.log
        assert len(third.log.read_text().splitlines()) == 1


# --- why it is not there ----------------------------------------------------------------------------------------


def test_one_that_dies_says_its_last_words(vllm: FakeVllm, tmp_path: Path, said: io.StringIO) -> None:
    words = ["first", "ValueError: the [red]cause[/red] \x1b[31m", "RuntimeError: failed. See root cause above."]
    vllm.behave(die="\n".join(words), code=7)
    with (
        server(vllm, tmp_path) as own,
        pytest.raises(
            Unavailable, match=r"ended with code 7 before it was ready: ValueError: the \[red\]cause"
        ) as error,
    ):
        start(own)
    assert str(own.log) in str(error.value)
    assert "the [red]cause[/red] \N{REPLACEMENT CHARACTER}[31m" in said.getvalue()
    assert "loading /models/some model" in said.getvalue()
    assert len(vllm.starts()) == 1


def test_a_dying_server_is_not_restarted_by_waiters(vllm: FakeVllm, tmp_path: Path) -> None:
    vllm.behave(die="RuntimeError: no", delay=1)

    async def work(own: VllmServer) -> None:
        async with LlmClient("unused", own.model.name, start=own.ready) as client, asyncio.TaskGroup() as group:
            for n in range(5):
                group.create_task(client.complete(MESSAGES, 20, seed=n))

    with server(vllm, tmp_path) as own:
        with pytest.raises(ExceptionGroup) as error:
            asyncio.run(work(own))
        assert error.group_contains(Unavailable, match="RuntimeError: no")
        assert "RuntimeError: no" in own.log.read_text(), "what it said is still there to be read"
    assert len(vllm.starts()) == 1


@pytest.mark.parametrize(
    ("last", "advice"),
    [
        ("/usr/bin/python: No module named vllm", "make vllm"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "--max-model-len"),
        ("api_server.py: error: unrecognized arguments: --max-len", "correct --vllm-args"),
        ("ValueError: bad luck\nINFO GPU KV cache size: 10 tokens", "see its log"),
    ],
)
def test_what_to_do_about_it(vllm: FakeVllm, tmp_path: Path, last: str, advice: str) -> None:
    vllm.behave(die=last)
    with server(vllm, tmp_path) as own, pytest.raises(Unavailable) as error:
        start(own)
    assert advice in str(error.value)


def test_one_that_is_never_ready_is_stopped(vllm: FakeVllm, tmp_path: Path) -> None:
    vllm.behave(never=True)
    with server(vllm, tmp_path, start_seconds=2) as own:
        with pytest.raises(Unavailable, match="not ready after 2 s; see --vllm-timeout"):
            start(own)
        assert vllm.starts()
        assert not vllm.living()


def test_one_that_ends_while_it_is_asked(vllm: FakeVllm, tmp_path: Path) -> None:
    vllm.behave(ends_after=2)

    async def work(own: VllmServer) -> None:
        async with LlmClient("unused", own.model.name, start=own.ready, tries=2, backoff=0.01) as client:
            for n in range(3):
                await client.complete(MESSAGES, 20, seed=n)

    with server(vllm, tmp_path) as own:
        own.check()
        with pytest.raises(Unavailable, match="no LLM server answers"):
            asyncio.run(work(own))
        end = time.monotonic() + 10
        while own.running and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(Unavailable, match="ended with code 3 while it was being asked: RuntimeError: the engine"):
            own.check()


# --- the port ---------------------------------------------------------------------------------------------------


def test_a_port_of_another_vllm_is_given_up(vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers as ours would, and long before ours could."""
    found = vllm_server._free_port
    with Stranger() as stranger:
        ports = iter([stranger.port])
        monkeypatch.setattr(vllm_server, "_free_port", lambda: next(ports, None) or found())
        with server(vllm, tmp_path) as own:
            assert start(own) != stranger.root
            assert vllm.living()


def test_a_port_in_use_is_given_up(vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has it says nothing."""
    found = vllm_server._free_port
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ports = iter([silent.getsockname()[1]])
        monkeypatch.setattr(vllm_server, "_free_port", lambda: next(ports, None) or found())
        with server(vllm, tmp_path) as own:
            start(own)
            first, second = vllm.starts()
            assert not any(alive(pid) for pid in first["pids"])
            assert all(alive(pid) for pid in second["pids"])


def test_not_one_port_stays_free(vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stranger() as stranger:
        tried = [stranger.port] * 4
        monkeypatch.setattr(vllm_server, "_free_port", tried.pop)
        with server(vllm, tmp_path) as own, pytest.raises(Unavailable, match="3 ports in a row were taken"):
            start(own)
    assert len(tried) == 1


class Stranger(FakeServer):
    """Another vLLM, which serves a model of the same name."""

    def __init__(self) -> None:
        super().__init__(models=["its-name"])
        self.port = int(self.root.rsplit(":", 1)[1])

    def models_reply(self, headers: dict[str, str], path: str) -> Reply:
        anyone = {"access-control-allow-origin": "*"}
        return Reply(body={}, headers=anyone) if path == "/health" else super().models_reply(headers, path)


# --- the end ----------------------------------------------------------------------------------------------------


def test_a_deaf_server_is_killed_with_its_children(vllm: FakeVllm, tmp_path: Path) -> None:
    vllm.behave(deaf=True)
    with server(vllm, tmp_path, stop_seconds=0.5) as own:
        start(own)
        assert len(vllm.living()) == 2
        started = time.monotonic()
    assert time.monotonic() - started >= 0.5
    assert not vllm.living()


def test_what_a_dead_server_leaves_behind_is_ended(vllm: FakeVllm, tmp_path: Path) -> None:
    with server(vllm, tmp_path, stop_seconds=0.5) as own:
        start(own)
        leader, child = vllm.starts()[0]["pids"]
        os.kill(leader, signal.SIGKILL)
        vllm.wait_for_end()
        assert not alive(child)


PARENT = """
import asyncio, sys, time
from pathlib import Path
from autointerp.llm.local.model import VllmModel
from autointerp.llm.local.server import VllmServer
import threading

python, log, where = sys.argv[1:]
server = VllmServer(VllmModel("m", "n"), Path(python), Path(log), stop_seconds=0.5)

def work():
    asyncio.run(server.ready())

with server:
    if where == "thread":  # which is gone when the server has started
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    print("ready", flush=True)
    time.sleep(600)
"""


def parent(vllm: FakeVllm, folder: Path, where: str = "main") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, vllm.python, folder / "vllm.log", where],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        preexec_fn=heed_interrupts,
    )


@pytest.mark.parametrize(
    ("how", "deaf", "loading"),
    [
        (signal.SIGKILL, True, False),
        (signal.SIGKILL, False, True),
        (signal.SIGTERM, True, True),
        (signal.SIGINT, False, False),
        (signal.SIGINT, True, True),
    ],
)
def test_it_does_not_outlive_us(how: signal.Signals, deaf: bool, loading: bool, vllm: FakeVllm, tmp_path: Path) -> None:
    vllm.behave(deaf=deaf, never=loading)
    with parent(vllm, tmp_path) as process:
        assert process.stdout is not None
        if not loading:
            assert process.stdout.readline() == "ready\n"
        vllm.wait_for_start()
        process.send_signal(how)
        process.wait(30)
        vllm.wait_for_end()
    scratch = Path(vllm.starts()[0]["environment"]["TMPDIR"])
    end = time.monotonic() + 20
    while scratch.exists():
        assert time.monotonic() < end, "its temporary files are still there"
        time.sleep(0.05)


def test_it_outlives_the_thread_that_started_it(vllm: FakeVllm, tmp_path: Path) -> None:
    with parent(vllm, tmp_path, "thread") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        assert len(vllm.living()) == 2
        process.kill()
        vllm.wait_for_end()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a server that its keeper was killed")
def test_a_keeper_that_is_killed_takes_it_along(vllm: FakeVllm, tmp_path: Path) -> None:
    with server(vllm, tmp_path) as own:
        start(own)
        assert own._process is not None
        leader = vllm.starts()[0]["pids"][0]
        own._process.kill()
        end = time.monotonic() + 10
        while alive(leader):
            assert time.monotonic() < end
            time.sleep(0.05)
    os.kill(vllm.starts()[0]["pids"][1], signal.SIGKILL)  # the server's child hears nothing of it
    vllm.wait_for_end()


def test_an_interrupted_wait_stops_it(vllm: FakeVllm, tmp_path: Path) -> None:
    vllm.behave(never=True)

    async def work(own: VllmServer) -> None:
        waiting = asyncio.create_task(own.ready())
        while not vllm.starts():
            await asyncio.sleep(0.05)
        waiting.cancel()
        await waiting

    own = server(vllm, tmp_path)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work(own))
    assert not vllm.living()


def test_the_address_is_this_machine_alone(vllm: FakeVllm, tmp_path: Path) -> None:
    with server(vllm, tmp_path) as own:
        port = int(start(own).rsplit(":", 1)[1])
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, number = local.split(":")
            if state == "0A" and int(number, 16) == port:
                assert socket.inet_ntoa(bytes.fromhex(address)[::-1]) == "127.0.0.1"
                break
        else:
            raise AssertionError("nothing listens")
