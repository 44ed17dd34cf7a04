"""A language model behind an OpenAI-compatible server: asked politely, believed carefully, paid once.

What is where: ``openai`` speaks the protocol, ``tenacity`` decides when to try again, ``asyncio-throttle`` keeps
to a rate. What is ours is the meaning: which failures stop everything and which are one row (``faults``), what
counts as an answer (``exchange``), which server is asked (``servers``) and when (``pacing``), how often (``retrying``)
and with what (``sending``), and that an answer is in the cache before anybody sees it (``cache``).

    ask ── cached? ──► parse ──► out
     └──► slot ──► pace ──► send ──► (busy? wait, again) ──► parse ──► (unusable? again) ──► cache ──► out
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autointerp.journal.usage import Usage
from autointerp.llm.cache import ResponseCache
from autointerp.llm.capability import Capabilities, Measure
from autointerp.llm.discovery import find
from autointerp.llm.endpoint import read_key
from autointerp.llm.exchange import Answer, AnswerFailed, Message, Request, cut_off
from autointerp.llm.faults import Transient
from autointerp.llm.pacing import Pace, check_limits
from autointerp.llm.retrying import Retrying
from autointerp.llm.sending import Sender
from autointerp.llm.servers import Server, Servers
from autointerp.llm.transport import open_api
from sae.common.errors import BadInput

if TYPE_CHECKING:
    from autointerp.llm.budget import Budget
    from autointerp.llm.options import LlmOptions

T = TypeVar("T")

DEFAULT_URL = "https://api.openai.com/v1"
"""Where a model is looked for when only its name was given."""

_OWN = "http://127.0.0.1"
"""Stands for a server of ours until it is started, and for its capabilities whatever its port."""


class LlmClient:
    """A model on one server or several. Cheap to make: nothing is sent before :meth:`check` or the first question.

    :param base_url: the server's address, with or without ``/v1``; or several, which share the load.
    :param model: the model's name; ``None`` takes the one that the servers serve.
    :param key_file: a file that holds the key; ``None`` looks in the environment (see ``endpoint.KEY_VARIABLES``).
    :param cache: where answers are kept; ``None`` keeps none.
    :param concurrency: requests under way at once, over all servers.
    :param requests_per_second: at most this many are begun in a second, spaced out; ``None`` for no limit.
    :param tokens_per_minute: at most this many, of prompts and answers, are begun in a minute; ``None`` for no limit.
    :param timeout: seconds for one answer, waiting in the server's queue included.
    :param tries: how often a request is sent when the server is busy or breaks off.
    :param answer_tries: how often a question is put when the answers cannot be used.
    :param backoff: scale of the first pause between tries, in seconds; pauses double and are randomised.
    :param patience: requests in a row that may fail after all their tries before the servers are given up.
    :param start: starts a server of ours, which takes no key, and gives its address: called before the first question
        that has no kept answer. ``model`` must be given; ``base_url`` is not used.
    :param budget: what may be spent; ``None`` for no limit.
    :raises BadInput: a URL or the key cannot be one, or a limit lets nothing through.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str | None = None,
        *,
        key_file: Path | None = None,
        cache: ResponseCache | None = None,
        concurrency: int = 8,
        requests_per_second: float | None = None,
        tokens_per_minute: float | None = None,
        timeout: float = 300.0,
        tries: int = 6,
        answer_tries: int = 3,
        backoff: float = 0.5,
        patience: int = 10,
        start: Callable[[], Awaitable[str]] | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._servers = Servers([_OWN] if start is not None else [base_url] if isinstance(base_url, str) else base_url)
        if concurrency < 1 or tries < 1 or answer_tries < 1:
            raise BadInput("concurrency and the numbers of tries must be at least 1")
        check_limits(requests_per_second, tokens_per_minute)
        self._start = start
        self._key = read_key(key_file) if start is None else None
        self._model = model or None
        self._cache = cache
        self._concurrency, self._limits = concurrency, (requests_per_second, tokens_per_minute)
        self._timeout, self._answer_tries = timeout, answer_tries
        self._budget = budget
        self._session: _Session | None = None
        self._found = False
        self._measure = Measure()
        self.capabilities = Capabilities()
        """What the servers have turned out to be able to do, so far."""
        self._retrying = Retrying(self._servers, tries, backoff, patience)
        self._sender = Sender(self._key, timeout, self.capabilities, self._retrying)
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"LlmClient({self.url!r}, model={self._model!r})"

    async def __aenter__(self) -> LlmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; the client opens new ones when it is asked again."""
        session, self._session = self._session, None
        if session is not None and session.loop is asyncio.get_running_loop():
            for server in self._servers.all:
                if server.api is not None:
                    await server.api.close()

    @property
    def url(self) -> str:
        """The address, or the addresses with commas between."""
        return self._servers.names

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self._servers.all]

    @property
    def local(self) -> bool:
        """Whether all servers run on this machine."""
        return self._servers.local

    @property
    def model(self) -> str:
        """The model's name; known from the start where one was given, else after :meth:`check`."""
        if self._model is None:
            raise RuntimeError("the model is not known before check()")
        return self._model

    async def check(self) -> str:
        """Find the API and the model before any work is done; a second call returns at once.

        A server of ours is not started by this: it may well not be needed.

        :returns: the model's name.
        :raises Unavailable: nothing answers at the address, or the key is refused.
        :raises BadInput: no such API at the address, several models and none was named, or servers of different ones.
        """
        return self.model if self._start is not None else await self._connect()

    async def _connect(self) -> str:
        if self._found:
            return self.model
        session = self._open()
        async with session.finding:
            if not self._found:
                if self._start is not None:
                    self._servers.all[0].moves_to(await self._start())
                self._model, listed = await find(self._servers, self._model, self._sender.models_at)
                for entry in listed:
                    self.capabilities.learn_length(entry)
                for server in self._servers.all:
                    assert server.api is not None
                    server.api.base_url = server.url
                self._found = True
        return self.model

    def remember_capabilities(self) -> None:
        """Fill in what was found out about these servers today and is in the cache."""
        if self._cache is not None:
            # Of a server of ours for good: to ask again it would have to be started, perhaps for nothing else.
            found = self._cache.capabilities(self._known_as, self.model, lasting=self._start is not None)
            self.capabilities.take_over(found)

    async def keep_capabilities(self) -> None:
        """Put into the cache what has been found out."""
        if self._cache is not None:
            await self._cache.put_capabilities(self._known_as, self.model, self.capabilities.as_dict())

    @property
    def _known_as(self) -> str:
        """Under what the servers' capabilities are kept: of a server of ours the model's name says all."""
        return self.url if self._start is None else _OWN

    async def complete(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        temperature: float = 0.0,
        json_schema: dict[str, Any] | None = None,
        logprobs: int = 0,
        seed: int | None = None,
        replicate: int = 0,
    ) -> Answer:
        """One answer, whatever it says. See :meth:`ask` for the errors, and for answers that must parse."""
        request = Request(tuple(messages), max_tokens, temperature, json_schema, logprobs, seed, replicate)
        return (await self.ask(request, lambda answer: answer))[1]

    async def ask(self, request: Request, parse: Callable[[Answer], T]) -> tuple[T, Answer]:
        """Put a question until an answer parses, keep that answer, and return both.

        An answer that ``parse`` rejects (with :class:`AnswerFailed`) is asked for again, ``answer_tries`` times in
        all, and with twice the room where it was cut off. Rejected answers are not kept: the next run asks anew.

        :returns: what ``parse`` made of the answer, and the answer, whose usage includes all that was spent on it.
        :raises AnswerFailed: this question got no usable answer.
        :raises Unavailable: no question would: nothing answers, or the key is refused.
        :raises BadInput: the server has no such model or no such API.
        """
        if self._model is None:
            await self.check()
        if self._cache is None:
            return await self.ask_anew(request, parse)
        key = request.key(self.model)
        # Whoever asks the same thing at the same moment waits, and then finds it in the cache.
        lock = self._asking.setdefault(key, asyncio.Lock())
        async with lock:
            kept = self._cache.get(key)
            if kept is not None:
                try:
                    return parse(kept), kept
                except AnswerFailed:
                    pass  # kept under an earlier reading of answers: ask again
            parsed, answer = await self.ask_anew(request, parse)
            await self._cache.put(key, self.model, answer)
            return parsed, answer

    async def ask_anew(self, request: Request, parse: Callable[[Answer], T]) -> tuple[T, Answer]:
        """:meth:`ask`, past the cache."""
        await self._connect()
        self._measure.check(request, self.capabilities.context_length)
        spent = Usage()
        sent = request
        cut_before = ""
        for tries_left in reversed(range(self._answer_tries)):
            try:
                answer, cost = await self._answer(sent)
                spent = cost if spent == Usage() else spent + cost
                if answer.finish_reason == "length" and not request.may_be_cut:
                    raise cut_off(answer, sent)
                return parse(answer), replace(answer, usage=spent)
            except AnswerFailed as failed:
                spent += failed.usage
                if not tries_left or failed.final:
                    # Where the model's context has no room for twice as much, the refusal alone would mislead.
                    again = f"{cut_before}; asked again with more room: " if failed.final and cut_before else ""
                    raise AnswerFailed(again + failed.reason, spent) from None
                cut_before = failed.reason if failed.cut else ""
                if failed.cut:
                    sent = replace(sent, max_tokens=2 * sent.max_tokens)
        raise AssertionError("unreachable")

    async def _answer(self, request: Request) -> tuple[Answer, Usage]:
        """One usable reply, sent for as often as the server needs to be, and what all that cost."""
        session = self._open()
        sendings = 0
        failed_at: set[Server] = set()

        async def once() -> Answer:
            if self._budget is not None:
                return await self._budget.spend(request, send)
            return await send()

        async def send() -> Answer:
            nonlocal sendings
            reserved = await session.pace.leave(request.characters, self._servers.held_back)
            sendings += 1
            server = self._servers.choose(request.affinity, failed_at)
            server.in_flight += 1
            try:
                self._open()
                answer = await self._sender.send(server, request, self.model)
            except Transient as error:
                failed_at.add(server)
                self._servers.failed(server, error.reason, at_once=error.unreachable)
                if error.wait:
                    self._servers.hold_back(server, error.wait)
                raise
            except AnswerFailed as failed:
                self._servers.answered(server)  # nothing to use, but it does answer
                session.pace.settle(reserved, request.characters, failed.usage.tokens)
                raise
            finally:
                server.in_flight -= 1
            self._servers.answered(server, answer.usage.seconds)
            self._measure.learn(request.characters, answer.usage.prompt_tokens)
            session.pace.settle(reserved, request.characters, answer.usage.tokens)
            return answer

        async with session.slots:
            try:
                answer = await self._retrying(once)
            except AnswerFailed as failed:
                raise AnswerFailed(
                    failed.reason, replace(failed.usage, requests=sendings), cut=failed.cut, final=failed.final
                ) from None
        return answer, answer.usage if sendings == 1 else replace(answer.usage, requests=sendings)

    def _open(self) -> _Session:
        """What belongs to the running event loop; a new loop (a second ``asyncio.run``) gets its own."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            self._session = _Session(loop, self._concurrency, Pace(*self._limits))
            for server in self._servers.all:
                server.api = open_api(server.url, self._key, self._timeout, self._concurrency + 1)
        return self._session


class _Session:
    """Limits of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, concurrency: int, pace: Pace) -> None:
        self.loop = loop
        self.slots = asyncio.Semaphore(concurrency)
        self.finding = asyncio.Lock()
        self.pace = pace


@asynccontextmanager
async def open_client(
    options: LlmOptions, cache: Path, start: Callable[[], Awaitable[str]] | None = None
) -> AsyncIterator[LlmClient]:
    """The client that ``options`` describe, checked, for the length of a block.

    :param cache: the file of kept answers; made if it is not there.
    :param start: see :class:`LlmClient`.
    :raises Unavailable: no server answers there; said before any work is done.
    """
    answers = ResponseCache(cache)
    collected = gc.get_threshold()
    # A request makes hundreds of small objects that die with it; searching them for cycles is a sixth of its cost.
    gc.set_threshold(20_000, 20, 50)
    try:
        async with LlmClient(
            options.urls or DEFAULT_URL,
            options.model,
            key_file=options.api_key_file,
            cache=answers,
            concurrency=options.concurrency,
            requests_per_second=options.requests_per_second,
            start=start,
            tokens_per_minute=options.tokens_per_minute,
            budget=options.budget,
        ) as client:
            await client.check()
            yield client
    finally:
        gc.set_threshold(*collected)
        answers.close()
