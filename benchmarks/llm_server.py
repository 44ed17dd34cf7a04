"""A language model server that costs next to nothing: it gives every chat request the same answer, at once or late.

    python benchmarks/llm_server.py [--latency 0.05]

Prints its port on the first line and serves until its standard input ends. It reads no more of a request than its
length, so that what is measured against it is the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys


def reply_to_chat() -> bytes:
    """One token, ``1``, with twenty alternatives, as vLLM gives them: what the ``single`` protocol asks for."""
    top = [{"token": "1", "logprob": -0.1, "bytes": [49]}, {"token": "0", "logprob": -2.4, "bytes": [48]}]
    top += [{"token": f" t{i}", "logprob": -6.0 - i, "bytes": [32, 116]} for i in range(18)]
    content = [{**top[0], "top_logprobs": top}]
    message = {"role": "assistant", "content": "1"}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": {"content": content}}
    usage = {"prompt_tokens": 900, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 850}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return http(body)


def http(body: object) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data)


CHAT = reply_to_chat()
MODELS = http({"object": "list", "data": [{"id": "m", "object": "model"}]})


class Connection(asyncio.Protocol):
    """HTTP/1.1 with connections kept open; requests on one connection are answered in turn."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.received[:end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.received) < end + 4 + length:
                return
            del self.received[: end + 4 + length]
            if head.startswith(b"get"):
                self.transport.write(MODELS)
            elif self.latency:
                asyncio.get_running_loop().call_later(self.latency, self.transport.write, CHAT)
            else:
                self.transport.write(CHAT)


async def serve(latency: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(latency), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    asyncio.run(serve(parser.parse_args().latency))
