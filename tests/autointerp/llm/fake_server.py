"""A language model server for tests: real HTTP on a real port, the OpenAI protocol, and faults on demand.

Without a script it answers sensibly: it explains a latent by the piece of text that is marked most often, and
judges a snippet active where it contains what the statement quotes. Faults are put on ``script`` and are served,
one for each chat request, before any sensible answer.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from autointerp.llm.prompts import conversation

PROBE = conversation("probe").prefix[0]["content"]


@dataclass(frozen=True)
class Reply:
    """What the server does with one chat request."""

    content: str | None = "ok"
    finish_reason: str = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    """Sent in place of a chat completion: any JSON value, or a ``str`` as it is."""
    message: dict[str, Any] = field(default_factory=dict)
    """Further fields of the message (``refusal``, ``reasoning_content``)."""
    logprobs: list[dict[str, Any]] | None = None
    completion_tokens: int | None = None
    delay: float = 0.0
    drop: bool = False
    """Close the connection without an answer."""
    reset: bool = False
    """Break the connection off hard (RST)."""
    raw: bytes | None = None
    """Sent as it is, head and all; then the connection is closed."""
    stall: float = 0.0
    """Send the head and one byte of the body, and the rest so many seconds later."""


def error(status: int, message: str = "", **fields: Any) -> Reply:
    """An error reply as OpenAI sends it. ``headers`` among the fields are the reply's."""
    headers = fields.pop("headers", {})
    return Reply(status=status, headers=headers, body={"error": {"message": message, **fields}})


def token(text: str, **alternatives: float) -> dict[str, Any]:
    """A generated token with the log-probabilities of its alternatives, keyed by ``t`` + text (``t1=-0.1``)."""
    top = [{"token": name[1:], "logprob": value, "bytes": None} for name, value in alternatives.items()]
    own = alternatives.get(f"t{text}", -0.01)
    return {"token": text, "logprob": own, "bytes": None, "top_logprobs": top}


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def question(self) -> str:
        return str(self.body["messages"][-1]["content"])


class FakeServer:
    """``with FakeServer() as server: … server.url …``

    :param answer: a reply, or what turns a request's body into one; the default is :func:`sensible`.
    :param models: what ``/models`` lists; ``None`` for a server without that list.
    :param prefix: where the API lives.
    :param key: refuse requests with another key, in ``key_header``.
    :param query: of every path.
    :param rejects: parameters answered by HTTP 400.
    :param port: where to listen; 0 for any.
    :param gives_logprobs, holds_schemas, counts_cached: what it does of what it is asked for, taking no notice of the
        rest.
    :param thinks: begin answers with thinking.
    :param context_length: told in the list of models.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Reply | str] | Reply | str | None = None,
        *,
        models: Sequence[str] | None = ("fake-model",),
        prefix: str = "/v1",
        query: str = "",
        key: str | None = None,
        key_header: str = "authorization",
        rejects: Sequence[str] = (),
        port: int = 0,
        gives_logprobs: bool = True,
        holds_schemas: bool = True,
        counts_cached: bool = True,
        thinks: bool = False,
        context_length: int | None = None,
    ) -> None:
        self.gives_logprobs, self.holds_schemas, self.thinks = gives_logprobs, holds_schemas, thinks
        self.counts_cached, self.context_length = counts_cached, context_length
        self.answer: Callable[[dict[str, Any]], Reply | str]
        if answer is None or callable(answer):
            self.answer = answer or sensible
        else:
            self.answer = lambda _: answer
        self.models, self.prefix, self.key, self.rejects = models, prefix, key, tuple(rejects)
        self.key_header, self._query = key_header, f"?{query}" if query else ""
        self.script: deque[Reply] = deque()
        self.raw_models: bytes | None = None
        """Sent as it is to who asks for the models."""
        self.requests: list[Seen] = []
        self.probes: list[Seen] = []
        """Questions about the server itself, which are no part of any work: kept apart, and served no faults."""
        self.gets = 0
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", port), _handler(self))
        self.root = f"http://127.0.0.1:{self._http.server_address[1]}"
        self.url = self.root + prefix

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening and hang up on everyone; once is enough."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._http.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def models_reply(self, headers: dict[str, str], path: str) -> Reply:
        self.gets += 1
        if self.raw_models is not None:
            return Reply(raw=self.raw_models)
        if path != f"{self.prefix}/models{self._query}" or self.models is None:
            return error(404, "no such path")
        if not self._key_fits(headers):
            return error(401, f"Incorrect API key provided: {headers.get(self.key_header)}")
        told = {} if self.context_length is None else {"max_model_len": self.context_length}
        return Reply(body={"object": "list", "data": [{"id": name, "object": "model", **told} for name in self.models]})

    def chat_reply(self, seen: Seen) -> Reply:
        if seen.path != f"{self.prefix}/chat/completions{self._query}":
            return error(404, "no such path")
        if seen.body["messages"][0]["content"] == PROBE:
            return self._probe_reply(seen)
        with self._lock:
            self.requests.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            scripted = self.script.popleft() if self.script else None
        try:
            if not self._key_fits(seen.headers):
                return error(401, f"Incorrect API key provided: {seen.headers.get(self.key_header)}")
            if scripted is not None:
                time.sleep(scripted.delay)
                return scripted
            for name in self.rejects:
                if name in seen.body:
                    return error(400, f"Unsupported parameter: '{name}' is not supported", param=name)
            if self.models is not None and seen.body["model"] not in self.models:
                return error(404, f"The model `{seen.body['model']}` does not exist")
            reply = self.answer(seen.body)
            reply = Reply(reply) if isinstance(reply, str) else reply
            time.sleep(reply.delay)
            return reply
        finally:
            with self._lock:
                self._at_once -= 1

    def _probe_reply(self, seen: Seen) -> Reply:
        self.probes.append(seen)
        if not self._key_fits(seen.headers):
            return error(401, f"Incorrect API key provided: {seen.headers.get(self.key_header)}")
        for name in self.rejects:
            if name in seen.body:
                return error(400, f"Unsupported parameter: '{name}' is not supported", param=name)
        if "maybe" in seen.question:
            return Reply('{"word": "yes"}' if self.holds_schemas and "response_format" in seen.body else "maybe")
        if self.thinks:
            return Reply("<think>Is 2", finish_reason="length", logprobs=[token("<think>")])
        return Reply("1", logprobs=[_label_token(1)] if seen.body.get("logprobs") and self.gives_logprobs else None)

    def _key_fits(self, headers: dict[str, str]) -> bool:
        return self.key is None or headers.get(self.key_header, "").removeprefix("Bearer ") == self.key


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the tests."""


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(server.models_reply({k.lower(): v for k, v in self.headers.items()}, self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {k.lower(): v for k, v in self.headers.items()}
            room = body.get("max_tokens") or body.get("max_completion_tokens") or 10
            self._send(server.chat_reply(Seen(self.path, headers, body, time.monotonic())), room)

        def _send(self, reply: Reply, room: int = 10) -> None:
            if reply.drop:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if reply.reset:
                # Closing with unread data or a zero linger sends RST instead of FIN.
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.wfile.close()
                self.connection.close()
                return
            if reply.raw is not None:
                self.close_connection = True
                self.connection.sendall(reply.raw)
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            payload = completion(reply, room) if reply.body is None else reply.body
            if not server.counts_cached and reply.body is None:
                del payload["usage"]["prompt_tokens_details"]
            if not server.gives_logprobs and reply.body is None:
                payload["choices"][0]["logprobs"] = None
            data = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
            self.send_response(reply.status)
            self.send_header("content-type", "text/html" if isinstance(payload, str) else "application/json")
            self.send_header("content-length", str(len(data)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if reply.stall:
                self.wfile.write(data[:1])
                time.sleep(reply.stall)
                data = data[1:]
            self.wfile.write(data)

    return Handler


def completion(reply: Reply, room: int) -> dict[str, Any]:
    """A chat completion with made-up token counts: 10 were written, or all of ``room`` where the answer was cut off."""
    message = {"role": "assistant", "content": reply.content, **reply.message}
    logprobs = None if reply.logprobs is None else {"content": reply.logprobs}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "fake-model",
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": logprobs}],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": reply.completion_tokens or (room if reply.finish_reason == "length" else 10),
            "prompt_tokens_details": {"cached_tokens": 60},
        },
    }


def snippets_of(question: str) -> list[str]:
    """The snippets in a request, as the model finds them."""
    parts = re.split(r"^### Snippet(?: \d+)?\n", question, flags=re.MULTILINE)[1:]
    return [
        re.sub(r"\n+(Labels for the .*:|(?:Active|Marked rightly) \(1\) or not \(0\)\?)\s*\Z", "", part).rstrip("\n")
        for part in parts
    ]


def sensible(body: dict[str, Any]) -> Reply | str:
    """An answer to each kind of request this program sends, log-probabilities included where asked for."""
    question = str(body["messages"][-1]["content"])
    snippets = snippets_of(question)
    if not question.startswith("Statement: "):
        found = Counter(piece for snippet in snippets for piece in re.findall(r"<<(.+?)>>|⟦(.+?)⟧", snippet))
        piece = "".join(found.most_common(1)[0][0]) if found else "?"
        return f'[EXPLANATION]: Text that contains "{piece}".'
    quoted = re.search(r'"(.+)"', question.split("\n", 1)[0])
    marked = "marked" in str(body["messages"][0]["content"]).split("Label", 1)[0]
    pieces = [" ".join(re.findall(r"<<.+?>>|⟦.+?⟧", snippet)) if marked else snippet for snippet in snippets]
    return labelled(body, [int(quoted is not None and quoted[1] in piece) for piece in pieces])


def labelled(body: dict[str, Any], labels: Sequence[int]) -> Reply:
    """A judge's answer to a request, under either protocol: a label for each snippet."""
    if "(1) or not (0)?" in str(body["messages"][-1]["content"]):
        text, tokens = str(labels[0]), [_label_token(labels[0])]
    else:
        text = json.dumps({"labels": list(labels)})
        tokens = [token('{"labels"'), token(": [")]
        for label in labels:
            tokens += [_label_token(label), token(", ")]
        tokens[-1] = token("]}")
    return Reply(text, logprobs=tokens if body.get("logprobs") else None)


def _label_token(label: int) -> dict[str, Any]:
    return token("1", t1=-0.1, t0=-2.4) if label else token("0", t0=-0.1, t1=-2.4)
