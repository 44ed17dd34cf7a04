"""Ask a language model behind an OpenAI-compatible server, and pay for each answer once.

ask ── cached? ──► parse ──► out
 └──► slot ──► limits ──► servers ──► transport ──► (busy? wait, again) ──► parse ──► (unusable? again) ──► cache
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from autointerp.journal.usage import Usage
from autointerp.llm.additions import KEY_HEADERS
from autointerp.llm.capabilities import Capabilities
from autointerp.llm.exchange import Answer, AnswerFailed, Message, Request, Transient, explain_cut
from autointerp.llm.limits import Pace
from autointerp.llm.prompts import conversation
from autointerp.llm.replies import find_fault
from autointerp.llm.servers import Sending, Server, Servers
from autointerp.llm.transport import list_secrets, read_key
from sae.common.database import Database
from sae.common.errors import BadInput

if TYPE_CHECKING:
    from autointerp.llm.additions import Header
    from autointerp.llm.limits import Budget
    from autointerp.llm.options import LlmOptions

T = TypeVar("T")

DEFAULT_URL = "https://api.openai.com/v1"  # the server if only a model was named

_LOCAL = "http://127.0.0.1"  # stands for a server of ours until it is started, and for its capabilities on any port
_BELIEVED = timedelta(days=1)  # age of capabilities, at most: the server may be restarted with other flags
_FIRST = 3  # if this many first questions fail and none was ever answered, the settings are wrong, not the questions
_WORD_SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": ["yes"]}},
    "required": ["word"],
    "additionalProperties": False,
}


class LlmClient:
    """A model on one server or several. Nothing is sent before :meth:`check` or the first question.

    :param base_url: the server's address, with or without ``/v1``; or several, which share the load.
    :param model: the model's name; ``None`` takes the one that the servers serve.
    :param key_file: a file that holds the key; ``None`` reads the environment (see ``options.KEY_VARIABLES``).
    :param headers: of every request. With one of ``additions.KEY_HEADERS`` among them, no key is read or sent.
    :param body: merged into every request; ``None`` as a value removes a parameter.
    :param concurrency: requests in flight at once, over all servers.
    :param requests_per_second, tokens_per_minute: see :class:`autointerp.llm.limits.Pace`.
    :param answer_tries: how often a question is asked when the answers are unusable.
    :param start: starts a server of ours, which takes no key, and returns its address: called before the first question
        without a cached answer. ``model`` must be given; ``base_url`` is not used.
    :param sending: ``timeout``, ``tries``, ``backoff`` and ``patience`` of :class:`autointerp.llm.servers.Servers`.
    :raises BadInput: a URL or the key is invalid, a secret is where it would be shown, or a limit lets nothing through.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str | None = None,
        *,
        key_file: Path | None = None,
        headers: Sequence[Header] = (),
        body: Mapping[str, Any] | None = None,
        cache: ResponseCache | None = None,
        concurrency: int = 8,
        requests_per_second: float | None = None,
        tokens_per_minute: float | None = None,
        answer_tries: int = 3,
        start: Callable[[], Awaitable[str]] | None = None,
        budget: Budget | None = None,
        **sending: Any,
    ) -> None:
        if concurrency < 1 or answer_tries < 1:
            raise BadInput("concurrency and the number of tries must be at least 1")
        urls = [_LOCAL] if start is not None else [base_url] if isinstance(base_url, str) else base_url
        brings_key = any(header.name.lower() in KEY_HEADERS for header in headers)
        key = read_key(key_file) if start is None and not brings_key else None
        self.body = dict(body or {})
        places = {"address": urls, "name of the model": [model or ""], "body": [json.dumps(self.body)]}
        for secret in list_secrets(key, headers):
            place = next((name for name, texts in places.items() if any(secret.redact(t) != t for t in texts)), None)
            if place is not None:
                raise BadInput(f"the {place} holds {secret}; give it without: the value is read from there")
        self._servers = Servers(urls, key=key, headers=headers, body=self.body, **sending)
        self.capabilities = self._servers.capabilities
        self.usage = Usage()  # of all requests so far
        self._pace = Pace(requests_per_second, tokens_per_minute)
        self._start = start
        self._model = model or None
        self._cache = cache
        self._kept: dict[str, Any] = {}  # capabilities that the cache has
        self._n_asked = self._n_failed = 0
        self._slots, self._answer_tries = asyncio.Semaphore(concurrency), answer_tries
        self._budget = budget
        self._connecting, self._is_connected = asyncio.Lock(), False
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"LlmClient({self.url!r}, model={self._model!r})"

    async def __aenter__(self) -> LlmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._servers.close()

    @property
    def url(self) -> str:
        """The address, or the addresses with commas between."""
        return self._servers.names

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self._servers.all]

    @property
    def is_local(self) -> bool:
        """Whether all servers run on this machine."""
        return self._servers.are_local

    @property
    def model(self) -> str:
        """The model's name; without one given, it is known after :meth:`check`."""
        if self._model is None:
            raise RuntimeError("the model is not known before check()")
        return self._model

    @property
    def served(self) -> list[str] | None:
        """The models that the servers list; ``None`` where they list none, and before :meth:`check`."""
        return self._servers.served

    async def check(self) -> str:
        """Find the API and the model before any work is done, and return the model's name.

        Does not start a server of ours, because it may not be needed.

        :raises Unavailable: nothing answers at the address, or the key is refused.
        :raises BadInput: no API at the address, several models and none was named, or servers of different ones.
        """
        return self.model if self._start is not None else await self._connect()

    async def _connect(self) -> str:
        if self._is_connected:
            return self.model
        async with self._connecting:
            if not self._is_connected:
                if self._start is not None:
                    self._servers.all = [Server(await self._start())]
                self._model = await self._servers.find(self._model)
                self.load_capabilities()
                self._is_connected = True
        return self.model

    def load_capabilities(self) -> None:
        """Fill in the capabilities that the cache has of these servers."""
        if self._cache is not None:
            # A server of ours would have to be started to ask again, perhaps for nothing else, so any age will do.
            self._kept = self._cache.capabilities(self._cache_url, self.model, any_age=self._start is not None)
            self.capabilities.take_over(self._kept)

    async def _keep_capabilities(self) -> None:
        found = self.capabilities.as_dict()
        if self._cache is not None and found != self._kept:
            self._kept = found
            await self._cache.put_capabilities(self._cache_url, self.model, found)

    async def probe(self, anew: bool = False) -> Capabilities:
        """Find out what the servers can do before a protocol is chosen: from the cache, or by two tiny questions.

        ``anew`` asks even if the cache has an answer. The result is stored in the cache.

        The first has the form of the ``single`` protocol, because a model that thinks first gives log-probabilities,
        but not of the label. The second forces a word that no model would answer. Raises as :meth:`check`.
        """
        await self.check()
        known = self.capabilities
        if anew:
            await self._connect()
            known.forget()
        else:
            self.load_capabilities()
        if known.label_first is None:
            known.label_first = await self._gives_label_first()
        if known.json_schema is None:
            asked = Request(conversation("probe").messages(question="word"), max_tokens=200, json_schema=_WORD_SCHEMA)
            with contextlib.suppress(AnswerFailed):
                await self.ask_anew(asked, lambda answer: answer)
            known.json_schema = bool(known.json_schema)  # still unknown after a failure or an answer that was cut off
        known.thinks = bool(known.thinks)
        await self._keep_capabilities()
        return known

    async def _gives_label_first(self) -> bool:
        asked = Request(conversation("probe").messages(question="label"), max_tokens=4, logprobs=20, may_be_cut=True)
        try:
            _, answer = await self.ask_anew(asked, lambda answer: answer)
        except AnswerFailed:
            return False
        first = answer.tokens[0] if answer.tokens else answer.text[:1]
        return first.strip() in ("0", "1")

    @property
    def _cache_url(self) -> str:
        """The servers, and the body, which may change what they can do."""
        url = self.url if self._start is None else _LOCAL
        return f"{url} {json.dumps(self.body, sort_keys=True)}" if self.body else url

    @property
    def settings(self) -> dict[str, Any]:
        """The part of a method's settings, for its settings hash, that is the client's: the body, if there is one."""
        return {"body": self.body} if self.body else {}

    def key(self, request: Request) -> str:
        """Return the digest under which the answer to ``request`` is cached."""
        return request.key(self.model, self.body)

    async def complete(self, messages: Sequence[Message], max_tokens: int, **fields: Any) -> Answer:
        """Return one answer, whatever its text; ``fields`` are those of :class:`Request`. See :meth:`ask`."""
        return (await self.ask(Request(tuple(messages), max_tokens, **fields), lambda answer: answer))[1]

    async def ask(self, request: Request, parse: Callable[[Answer], T]) -> tuple[T, Answer]:
        """Ask until an answer parses, keep that answer, and return both.

        If ``parse`` rejects an answer (with :class:`AnswerFailed`), the question is asked again, ``answer_tries`` times
        in all, and with twice the tokens if the answer was cut off. Rejected answers are not kept.

        :returns: the result of ``parse``, and the answer, whose usage includes the rejected ones.
        :raises AnswerFailed: this question got no usable answer.
        :raises Unavailable: no question would: nothing answers, or the key is refused.
        :raises BadInput: the server has no such model or no such API.
        """
        if self._model is None:
            await self.check()
        if self._cache is None:
            return await self._ask_counted(request, parse)
        key = self.key(request)
        # A simultaneous equal question waits for this lock and then finds the answer in the cache.
        lock = self._asking.setdefault(key, asyncio.Lock())
        async with lock:
            kept = self._cache.get(key)
            if kept is not None:
                try:
                    return parse(kept), kept
                except AnswerFailed:
                    pass  # an earlier version of ``parse`` accepted it: ask again
            parsed, answer = await self._ask_counted(request, parse)
            await self._cache.put(key, self.model, answer)
            return parsed, answer

    async def _ask_counted(self, request: Request, parse: Callable[[Answer], T]) -> tuple[T, Answer]:
        """:meth:`ask_anew`, and stop if the first questions all fail for a reason that the settings may have."""
        is_first = self._n_asked < _FIRST
        self._n_asked += 1
        try:
            return await self.ask_anew(request, parse)
        except AnswerFailed as failed:
            self._n_failed += failed.systematic and is_first
            has_answered = self._cache is not None and self._cache.has_answer(self.model)
            if failed.systematic and self._n_failed == _FIRST and not has_answered:
                raise BadInput(
                    f"{self.url} answers none of the first questions: {failed.reason}; check --llm-url, --llm-model, "
                    "--llm-body and the server's settings, then run the same command again: finished work is kept"
                ) from None
            raise

    async def ask_anew(self, request: Request, parse: Callable[[Answer], T]) -> tuple[T, Answer]:
        """:meth:`ask` without the cache."""
        await self._connect()
        self.capabilities.check_length(request)
        spent = Usage()
        sent = self.capabilities.give_room(request)
        cut_before = ""
        for tries_left in reversed(range(self._answer_tries)):
            try:
                answer = await self._answer(sent)
                spent += answer.usage
                if answer.finish_reason == "length" and not request.may_be_cut:
                    raise explain_cut(answer, sent)
                return parse(answer), replace(answer, usage=spent)
            except AnswerFailed as failed:
                spent += failed.usage
                if not tries_left or failed.final:
                    # If the model's context is too small for twice the tokens, the refusal alone would mislead.
                    again = f"{cut_before}; asked again with more tokens: " if failed.final and cut_before else ""
                    raise AnswerFailed(again + failed.reason, spent, systematic=failed.systematic) from None
                cut_before = failed.reason if failed.cut else ""
                if failed.cut:
                    with_room = self.capabilities.give_room(request).max_tokens  # it may have begun to think
                    sent = replace(sent, max_tokens=max(2 * sent.max_tokens, with_room))
        raise AssertionError("unreachable")

    async def post(self, url: str, body: Mapping[str, Any]) -> Any:
        """Post ``body`` once to an address outside the API, and return the reply's JSON value or text.

        :raises AnswerFailed: there is no reply, or it is an error.
        """
        try:
            reply = await self._servers.connections.send(url, json.dumps(body).encode(), most_seconds=30.0)
        except Transient as error:
            raise AnswerFailed(error.reason) from None
        fault = find_fault(reply)
        if fault is not None:
            raise AnswerFailed(str(fault))
        return reply.body

    async def _answer(self, request: Request) -> Answer:
        """Return one usable reply, sent for as often as needed; its usage counts all sendings."""
        n_sent = 0
        sending = Sending()

        async def send() -> Answer:
            nonlocal n_sent
            reserved = await self._pace.wait(request.characters, self._servers.pause_left)
            n_sent += 1
            usage = Usage()
            try:
                answer = await self._servers.send(request, self.model, sending)
                usage = answer.usage
            except AnswerFailed as failed:
                usage = failed.usage
                raise
            finally:
                self._pace.settle(reserved, request.characters, usage.tokens)
            return answer

        async def send_within_budget() -> Answer:
            return await send() if self._budget is None else await self._budget.spend(request, send)

        async with self._slots:
            try:
                answer = await self._servers.retry(send_within_budget)
            except AnswerFailed as failed:
                failed.usage = replace(failed.usage, requests=n_sent)
                self.usage += failed.usage
                await self._keep_capabilities()
                raise
        await self._keep_capabilities()
        answer = replace(answer, usage=replace(answer.usage, requests=n_sent))
        self.usage += answer.usage
        return answer


_MIGRATIONS = (
    # 1: answers. Append further migrations; never edit one that has been released.
    """
    CREATE TABLE answer (
        key TEXT PRIMARY KEY,
        model TEXT NOT NULL,
        answer TEXT NOT NULL,
        created TEXT NOT NULL
    ) WITHOUT ROWID
    """,
    # 2: what servers turned out to be able to do.
    """
    CREATE TABLE capability (
        url TEXT NOT NULL,
        model TEXT NOT NULL,
        found TEXT NOT NULL,
        created TEXT NOT NULL,
        PRIMARY KEY (url, model)
    ) WITHOUT ROWID
    """,
)


_FOUND = TypeAdapter(Capabilities)


class ResponseCache:
    """Paid answers by content, in one SQLite file for all runs under a root. Threads and processes may share it.

    The key is a digest of the model, the messages, the parameters and the number of the replicate, not of the server.
    An answer is committed before it is used. Failures are not kept. Raises BadInput if the file is no such cache.
    """

    def __init__(self, path: Path, upgrade: bool = True) -> None:
        self._database = Database(path, _MIGRATIONS, "SAEc", upgrade=upgrade)

    def get(self, key: str) -> Answer | None:
        with self._database.reading() as connection:
            row = connection.execute("SELECT answer FROM answer WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer.from_json(row[0])  # a damaged row is asked for again

    def has_answer(self, model: str) -> bool:
        """Return whether there is any answer of ``model``."""
        with self._database.reading() as connection:
            return connection.execute("SELECT 1 FROM answer WHERE model = ? LIMIT 1", (model,)).fetchone() is not None

    async def put(self, key: str, model: str, answer: Answer) -> None:
        """Store ``answer``; committed when this returns, in one transaction with others of the same moment."""
        await self._insert("answer (key, model, answer, created)", (key, model, answer.to_json()))

    def capabilities(self, url: str, model: str, any_age: bool = False) -> dict[str, Any]:
        """Return the capabilities of ``url`` found in the last day, or ever; empty if there are none."""
        oldest = "" if any_age else (datetime.now(UTC) - _BELIEVED).isoformat(timespec="seconds")
        with self._database.reading() as connection:
            query = "SELECT found FROM capability WHERE url = ? AND model = ? AND created >= ?"
            row = connection.execute(query, (url, model, oldest)).fetchone()
        try:
            return {} if row is None else _FOUND.validate_json(row[0], strict=True).as_dict()
        except (ValidationError, TypeError):  # a damaged row
            return {}

    async def put_capabilities(self, url: str, model: str, found: Mapping[str, Any]) -> None:
        """Store capabilities. Their age counts from the first time in a day that some were stored."""
        if (known := self.capabilities(url, model)) != found:
            await self._insert("capability (url, model, found, created)", (url, model, json.dumps(found)), bool(known))

    async def _insert(self, into: str, row: tuple[str, str, str], keeps_age: bool = False) -> None:
        values = (*row, datetime.now(UTC).isoformat(timespec="seconds"))
        query = f"INSERT OR REPLACE INTO {into} VALUES (?, ?, ?, ?)"
        if keeps_age:
            query = f"INSERT INTO {into} VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET found = excluded.found"
        await self._database.written(lambda connection: connection.execute(query, values))

    def check(self) -> int:
        """Return the number of answers; raise BadInput if the file is damaged."""
        self._database.check()
        with self._database.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM answer").fetchone()[0])

    def close(self) -> None:
        self._database.close()


@contextlib.asynccontextmanager
async def open_client(
    options: LlmOptions, cache: Path, start: Callable[[], Awaitable[str]] | None = None
) -> AsyncIterator[LlmClient]:
    """Open the client that ``options`` describe for the block, and check it before any work is done.

    ``cache`` is the file of kept answers; for ``start`` see :class:`LlmClient`.
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
            headers=options.headers,
            body=options.body,
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
