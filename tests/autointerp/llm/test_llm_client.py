"""The client against a real server on a real port: retries, refusals, limits, the cache, and the key's silence."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from asking import MESSAGES, client, complete, free_port, line_of, run
from fake_server import FakeServer, Reply, error, token

from autointerp.llm.additions import read_headers
from autointerp.llm.client import LlmClient, ResponseCache, open_client
from autointerp.llm.exchange import Answer, AnswerFailed, Request, one_line
from autointerp.llm.options import LlmOptions
from autointerp.llm.transport import is_local, list_candidates, read_key
from sae.common.errors import BadInput, NotFound, Unavailable, UserError

SECRET = "sk-secret-0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTOINTERP_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_a_plain_answer() -> None:
    with FakeServer("yes") as server:
        answer = complete(client(server), seed=3, temperature=0.5)
    assert (answer.text, answer.finish_reason, answer.usage.from_cache) == ("yes", "stop", 0)
    usage = answer.usage
    assert (usage.requests, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (1, 100, 60, 10)
    assert usage.seconds > 0
    assert server.requests[0].body == {
        "model": "fake-model",
        "messages": list(MESSAGES),
        "max_tokens": 20,
        "temperature": 0.5,
        "seed": 3,
    }


# addresses


@pytest.mark.parametrize("given", ["{root}", "{root}/", "{root}/v1", "{root}/v1/", "{root}/v1/chat/completions"])
def test_the_address_works_with_and_without_v1(given: str) -> None:
    with FakeServer() as server:
        made = client(given.format(root=server.root))
        complete(made)
    assert made.url == server.url
    assert made.model == "fake-model"


@pytest.mark.parametrize("prefix", ["", "/openai", "/api/v3", "/v1beta/openai"])
def test_other_places_for_the_api_are_found(prefix: str) -> None:
    with FakeServer(prefix=prefix) as server:
        made = client(server.root + prefix)
        complete(made)
    assert made.url == server.url


def test_addresses_that_cannot_be_one() -> None:
    for url in ("", "ftp://host", "http://", "http://host:port", "http://ho st/v1", "http://h:0/v1"):
        with pytest.raises(BadInput, match="not an http address"):
            list_candidates(url)
    for url in (f"http://me:{SECRET}@host/v1", f"http://host/v1#{SECRET}"):
        with pytest.raises(BadInput) as caught:
            list_candidates(url)
        assert SECRET not in line_of(caught)


LOOPBACK = ("127.0.0.1:8000", "localhost", "LOCALHOST.", "0.0.0.0", "127.1", "2130706433", "0x7f.1", "0", "127.0.0.2.")


@pytest.mark.parametrize("host", [*LOOPBACK, "[::1]:80", "[::]", "[::ffff:127.0.0.1]", socket.gethostname()])
def test_this_machine_is_known_however_written(host: str) -> None:
    assert is_local(f"http://{host}/v1")


def test_other_machines_are_known() -> None:
    hosts = ("10.0.0.1", "api.openai.invalid", "a..b", "b" * 300)
    assert not any(is_local(f"http://{host}/v1") for host in hosts)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost.", "0.0.0.0", "[::ffff:127.0.0.1]", "llm.invalid"])
def test_a_proxy_is_used_for_other_machines_only(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer() as server, FakeServer() as proxy:
        monkeypatch.setenv("http_proxy", proxy.root)
        with suppress(UserError):  # the proxy knows no such path, and some hosts are no address for aiohttp
            complete(client(f"http://{host}:{server.root.rsplit(':')[-1]}/v1"))
        assert (proxy.gets > 0) == (host == "llm.invalid")


@pytest.mark.parametrize(
    ("variable", "written", "no_proxy", "is_used"),
    [
        ("all_proxy", "http://{}", "", True),
        ("all_proxy", "{}", "", True),
        ("http_proxy", "{}", "elsewhere.invalid", True),
        ("http_proxy", "http://{}", "elsewhere.invalid,llm.invalid", False),
        ("https_proxy", "http://{}", "", False),
    ],
)
def test_the_environment_names_the_proxy(
    variable: str, written: str, no_proxy: str, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeServer() as proxy:
        monkeypatch.setenv(variable, written.format(proxy.root.removeprefix("http://")))
        monkeypatch.setenv("no_proxy", no_proxy)
        with suppress(UserError):
            complete(client("http://llm.invalid/v1", tries=1))
    assert (proxy.gets > 0) == is_used


def test_account_of_openai_reaches_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-of-mine")
    with FakeServer() as server:
        complete(client(server))
        assert not any("of-mine" in value for value in server.requests[-1].headers.values())


def test_refused_connection_is_named() -> None:
    with FakeServer() as server:
        url = server.url
    with pytest.raises(UserError, match=r"the connection failed: Connection refused\)"):
        complete(client(url, tries=1))


@pytest.mark.parametrize("proxy", ["ftp://x", "http://[::1", "http://x:port", f"ftp://u:{SECRET}@x"])
def test_an_invalid_proxy_is_one_line(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(BadInput, match="cannot be asked; correct that address, or the proxy") as caught:
        complete(client("http://llm.invalid/v1"))
    assert SECRET not in line_of(caught)


def test_no_server_is_one_line_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"no LLM server answers at http://127\.0\.0\.1:\d+/v1 \(.*\); start it") as e:
        run(lambda c: c.check(), client(f"http://127.0.0.1:{free_port()}", backoff=60))
    line_of(e)
    assert time.monotonic() - started < 5


def test_something_else_at_the_address() -> None:
    with FakeServer(models=None) as server:
        with pytest.raises(BadInput, match=r"no OpenAI-compatible API at .* --llm-model"):
            run(lambda c: c.check(), client(server.root))
        assert run(lambda c: c.check(), client(server.root, model="named")) == "named"


def test_the_model_is_served_or_must_be_named() -> None:
    with FakeServer(models=["small", "large"]) as server:
        with pytest.raises(BadInput, match=r"serves 2 models .*'small' or 'large'.*--llm-model"):
            run(lambda c: c.check(), client(server))
        assert complete(client(server, model="large")).text
        with pytest.raises(BadInput, match=r"knows no model 'larg' \(HTTP 404\); it serves 'large'"):
            complete(client(server, model="larg"))


def test_one_client_serves_several_event_loops() -> None:
    with FakeServer() as server:
        made = client(server)

        async def once() -> str:
            return (await made.complete(MESSAGES, 20)).text

        assert asyncio.run(once()) == asyncio.run(once())
        assert server.gets == 1


def test_logprobs_come_back_by_token() -> None:
    with FakeServer(Reply("1", logprobs=[token("1", t1=-0.2, t0=-1.7), token("!")])) as server:
        answer = complete(client(server), logprobs=2)
    assert answer.tokens == ("1", "!")
    assert answer.top_logprobs == ({"1": -0.2, "0": -1.7}, {"!": -0.01})
    assert server.requests[0].body["logprobs"] is True
    assert server.requests[0].body["top_logprobs"] == 2


# the cache


def test_the_same_question_is_sent_once(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with FakeServer(Reply("1", logprobs=[token("1", t1=-0.2)])) as server:
        first = complete(client(server, cache=ResponseCache(path)), logprobs=2)
        made = client(server, cache=ResponseCache(path))
        again = complete(made, logprobs=2)
        assert len(server.requests) == 1
        for change in ({"seed": 1}, {"replicate": 1}, {"temperature": 1.0}, {"json_schema": {"type": "object"}}):
            complete(client(server, cache=ResponseCache(path)), logprobs=2, **change)
        assert len(server.requests) == 5
    assert again == first
    assert (again.usage.requests, again.usage.prompt_tokens, again.usage.from_cache) == (0, 0, 1)


def test_kept_answers_need_no_server(tmp_path: Path) -> None:
    with FakeServer() as server:
        complete(client(server, cache=ResponseCache(tmp_path / "c.sqlite")))
    made = client(server, cache=ResponseCache(tmp_path / "c.sqlite"), model="fake-model")
    assert complete(made).usage.from_cache


def test_concurrent_equal_questions_are_sent_once(tmp_path: Path) -> None:
    with FakeServer(Reply("yes", delay=0.05)) as server:
        made = client(server, cache=ResponseCache(tmp_path / "cache.sqlite"))

        async def work(c: LlmClient) -> list[Answer]:
            return await asyncio.gather(*(c.complete(MESSAGES, 20) for _ in range(10)))

        assert sum(answer.usage.requests for answer in run(work, made)) == 1
        assert len(server.requests) == 1


def test_cached_answer_that_no_longer_parses_is_reasked(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "cache.sqlite")
    with FakeServer("new") as server:
        request = Request(MESSAGES, 20)
        asyncio.run(cache.put(request.key("fake-model"), "fake-model", Answer("old", "stop")))

        def parse(answer: Answer) -> str:
            if answer.text == "old":
                raise AnswerFailed("old")
            return answer.text

        assert run(lambda c: c.ask(request, parse), client(server, cache=cache))[0] == "new"
        assert complete(client(server, cache=cache)).text == "new"
        assert len(server.requests) == 1


_ASKER = """
import asyncio, sys
from pathlib import Path
from autointerp.llm.client import ResponseCache
from autointerp.llm.client import LlmClient

async def main():
    client = LlmClient(sys.argv[1], cache=ResponseCache(Path(sys.argv[2])), concurrency=4)
    async def ask(n):
        answer = await client.complete([{"role": "user", "content": str(n)}], 20)
        print(n, answer.usage.requests, flush=True)
    await asyncio.gather(*(ask(n) for n in range(int(sys.argv[3]))))

asyncio.run(main())
"""


def test_answers_before_a_kill_are_not_paid_twice(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    arguments = [sys.executable, "-c", _ASKER]
    with FakeServer(Reply("yes", delay=0.01)) as server:
        rest = [server.url, str(tmp_path / "cache.sqlite"), "40"]
        used = set()
        with subprocess.Popen([*arguments, *rest], stdout=subprocess.PIPE, text=True, cwd=root) as asker:
            assert asker.stdout is not None
            for line in asker.stdout:
                used.add(line.split()[0])
                if len(used) == 12:
                    os.kill(asker.pid, signal.SIGKILL)
                    break
        done = subprocess.run([*arguments, *rest], capture_output=True, text=True, cwd=root, check=True)
        again = {n for n, requests in (line.split() for line in done.stdout.splitlines()) if requests != "0"}
    assert not used & again
    assert len(server.requests) <= 40 + 4, "only what was under way at the kill may be asked twice"


# limits


def test_no_more_requests_at_once_than_allowed() -> None:
    with FakeServer(Reply("yes", delay=0.03)) as server:

        async def work(c: LlmClient) -> None:
            await asyncio.gather(*(c.complete(MESSAGES, 20 + n) for n in range(12)))

        run(work, client(server, concurrency=3))
    assert server.most_at_once == 3


def test_the_rate_is_kept() -> None:
    with FakeServer() as server:

        async def work(c: LlmClient) -> None:
            await asyncio.gather(*(c.complete(MESSAGES, 20 + n) for n in range(11)))

        run(work, client(server, concurrency=11, requests_per_second=20))
    begun = sorted(seen.at for seen in server.requests)
    assert begun[-1] - begun[0] >= 10 / 20 - 0.05


@pytest.mark.parametrize("wrong", [{"requests_per_second": 0}, {"concurrency": 0}, {"requests_per_second": -1.0}])
def test_limits_that_allow_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        client("http://localhost:1", **wrong)


# keys


by_key_or_header = pytest.mark.parametrize("name", ["authorization", "api-key"])


def give_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the secret where a key is read, or where a header named otherwise is; return the client's arguments."""
    if name == "authorization":
        monkeypatch.setenv("AUTOINTERP_API_KEY", SECRET)
        return {}
    monkeypatch.setenv("AUTOINTERP_API_KEY", "another-key-0123456789")
    monkeypatch.setenv("SECRET_OF_MINE", SECRET)
    return {"headers": read_headers("--llm-header", [f"{name}=$SECRET_OF_MINE"], os.environ)}


def test_where_a_key_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    both = {"OPENAI_API_KEY": "theirs", "AUTOINTERP_API_KEY": "ours"}
    for key, value in (
        (read_key(file, both), "from-file"),
        (read_key(None, both), "ours"),
        (read_key(None, {"OPENAI_API_KEY": " theirs\n", "AUTOINTERP_API_KEY": ""}), "theirs"),
    ):
        assert key is not None
        assert key.value == value
        assert value not in repr(key) + str(key)
    assert read_key(None, {}) is None
    with pytest.raises(NotFound, match="cannot be read"):
        read_key(tmp_path / "absent")
    for bad in (f"{SECRET} {SECRET}", f"{SECRET}é", f"{SECRET}\n{SECRET}"):
        file.write_text(bad)
        with pytest.raises(BadInput, match="not a key") as caught:
            read_key(file)
        assert "secret" not in line_of(caught)
    file.write_text("")
    with pytest.raises(BadInput, match="not a key"):
        read_key(file)


@by_key_or_header
def test_the_key_is_sent_and_shown_nowhere(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = give_secret(name, monkeypatch)
    caplog.set_level(logging.DEBUG)
    shown = []

    def told(server: FakeServer, **settings: Any) -> None:
        made = client(server, **given, **settings)
        shown.append(repr(made))
        try:
            shown.append(repr(complete(made)))
        except (UserError, AnswerFailed) as problem:
            shown.append("".join(traceback.format_exception(problem)))

    cache = ResponseCache(tmp_path / "cache.sqlite")
    with FakeServer(f"echo {SECRET}", key=SECRET, key_header=name) as server:
        told(server, cache=cache)
        assert server.requests[0].headers[name].endswith(SECRET)
        assert set(server.requests[0].headers) & {"authorization", "api-key"} == {name}
        server.script.append(error(400, f"bad request with {SECRET} in it"))
        told(server)
        server.script.append(Reply(body={"error": {"message": f"key {SECRET}"}}))
        told(server, answer_tries=1)
    with FakeServer(key="another", key_header=name) as server:
        told(server)
    cache.close()
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    out, err = capfd.readouterr()
    for place in (*shown, caplog.text, out, err, on_disk.decode(errors="replace")):
        assert SECRET not in place
        assert SECRET[:12] not in place
    assert any("refused the API key (HTTP 401: Incorrect API key provided: " in text for text in shown)


@by_key_or_header
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(name: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = give_secret(name, monkeypatch)
    with FakeServer() as server, FakeServer() as other:
        server.script.append(Reply(status=status, headers={"location": f"{other.url}/{SECRET}"}, body=""))
        with pytest.raises(BadInput, match=rf"redirects to {other.url}/\[key\]; if that is the right"):
            complete(client(server, **given))
        assert not other.requests
        assert not other.gets


def test_server_messages_are_one_bounded_line_without_keys() -> None:
    said = one_line(f"Incorrect key\n provided: sk-abcd****wxyz \x1b[31m{'x' * 500}")
    assert len(said) <= 200
    assert "abcd" not in said
    assert said.isprintable()


def test_a_key_alone_configures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from autointerp.explaining.explainers import EXPLAINERS
    from autointerp.llm.opening import resolve_name

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert resolve_name(EXPLAINERS, "auto", LlmOptions()) == "ngram"
    with pytest.raises(BadInput, match="not an http address"):
        LlmClient("")


def test_open_client_checks_before_any_work(tmp_path: Path) -> None:
    async def opened(url: str) -> str:
        async with open_client(LlmOptions(url=url), tmp_path / "cache.sqlite") as c:
            return (await c.complete(MESSAGES, 20)).text

    with FakeServer("yes") as server:
        assert asyncio.run(opened(server.root)) == "yes"
    with pytest.raises(Unavailable, match="no LLM server answers"):
        asyncio.run(opened(server.root))


def test_cached_answers_are_json(tmp_path: Path) -> None:
    answer = Answer("日本\x00語", "stop", tokens=("a",), top_logprobs=({"a": -0.5},))
    assert Answer.from_json(answer.to_json()) == answer
    assert json.loads(answer.to_json())["text"] == answer.text
    cache = ResponseCache(tmp_path / "c.sqlite")
    asyncio.run(cache.put("k", "m", answer))
    assert cache.get("k") == answer
    assert cache.get("other") is None
