"""What the tests of the client have in common: a client on a fake server, one question, one line out of an error."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from fake_server import FakeServer

from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import Answer

T = TypeVar("T")
MESSAGES = ({"role": "user", "content": "Statement: x"},)


def client(server: FakeServer | str, **settings: Any) -> LlmClient:
    url = server if isinstance(server, str) else server.url
    return LlmClient(url, **{"backoff": 0.001, **settings})


def run(work: Callable[[LlmClient], Awaitable[T]], made: LlmClient) -> T:
    async def main() -> T:
        async with made as opened:
            return await work(opened)

    return asyncio.run(main())


def complete(made: LlmClient, **settings: Any) -> Answer:
    return run(lambda c: c.complete(MESSAGES, 20, **settings), made)


def line_of(caught: pytest.ExceptionInfo[BaseException]) -> str:
    line = str(caught.value)
    assert "\n" not in line
    return line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
