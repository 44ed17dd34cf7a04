"""A language model behind an OpenAI-compatible server: asked politely, believed carefully, paid once.

What is where: ``openai`` speaks the protocol, ``tenacity`` decides when to try again, ``asyncio-throttle`` keeps
to a rate. What is ours is the meaning: which failures stop everything and which are one row (``faults``), what
counts as an answer (``exchange``), and that an answer is in the cache before anybody sees it (``cache``).

    ask ── cached? ──► parse ──► out
     └──► slot ──► rate ──► send ──► (busy? wait, again) ──► parse ──► (unusable? again, once) ──► cache ──► out
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import openai
import tenacity
from asyncio_throttle import Throttler

from autointerp.llm.cache import ResponseCache
from autointerp.llm.endpoint import candidates, is_loopback, read_key
from autointerp.llm.exchange import Answer, AnswerFailed, Message, Request, read_answer
from autointerp.llm.faults import Transient, no_server, objection, translate
from autointerp.llm.usage import Usage
from sae.errors import BadInput, nearest
from sae.progress import say

if TYPE_CHECKING:
    from autointerp.backends import LlmOptions
    from autointerp.cost import Budget

T = TypeVar("T")

DEFAULT_URL = "https://api.openai.com/v1"
"""Where a model is looked for when only its name was given."""

_BLANK = 100
"""An answer that ends in more white space than this, in characters, was not going anywhere."""
_REFUSALS = 3
"""So many refused requests before the first answer mean that the settings are wrong, not the questions."""


class LlmClient:
    """A model on a server. Cheap to make: nothing is sent before :meth:`check` or the first question.

    :param base_url: the server's address, with or without ``/v1``.
    :param model: the model's name; ``None`` takes the one that the server serves.
    :param key_file: a file that holds the key; ``None`` looks in the environment (see ``endpoint.KEY_VARIABLES``).
    :param cache: where answers are kept; ``None`` keeps none.
    :param concurrency: requests under way at once.
    :param requests_per_second: at most this many are begun in a second, evenly spaced; ``None`` for no limit.
    :param timeout: seconds for one answer, waiting in the server's queue included.
    :param tries: how often a request is sent when the server is busy or breaks off.
    :param answer_tries: how often a question is put when the answers cannot be used.
    :param backoff: scale of the first pause between tries, in seconds; pauses double and are randomised.
    :param patience: requests in a row that may fail after all their tries before the server is given up.
    :param budget: what may be spent; ``None`` for no limit.
    :raises BadInput: the URL or the key cannot be one.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        key_file: Path | None = None,
        cache: ResponseCache | None = None,
        concurrency: int = 8,
        requests_per_second: float | None = None,
        timeout: float = 300.0,
        tries: int = 6,
        answer_tries: int = 3,
        backoff: float = 0.5,
        patience: int = 10,
        budget: Budget | None = None,
    ) -> None:
        self._candidates = candidates(base_url)
        self.url = self._candidates[0]
        if concurrency < 1 or tries < 1 or answer_tries < 1:
            raise BadInput("concurrency and the numbers of tries must be at least 1")
        if requests_per_second is not None and not requests_per_second > 0:
            raise BadInput(f"requests per second = {requests_per_second}: must be above 0; leave it out for no limit")
        self._key = read_key(key_file)
        self._model = model or None
        self._cache = cache
        self._concurrency, self._rate = concurrency, requests_per_second
        self._timeout, self._tries, self._answer_tries = timeout, tries, answer_tries
        self._backoff, self._patience = backoff, patience
        self._budget = budget
        self._session: _Session | None = None
        self._found = False
        self._not_before = 0.0
        self._failed_in_a_row = self._refused_so_far = 0
        self._ever_answered = False
        self._without: set[str] = set()
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
            await session.api.close()

    @property
    def model(self) -> str:
        """The model's name; known from the start where one was given, else after :meth:`check`."""
        if self._model is None:
            raise RuntimeError("the model is not known before check()")
        return self._model

    @property
    def done_without(self) -> frozenset[str]:
        """Parameters that the server turned out not to take, and that requests now go without."""
        return frozenset(self._without)

    async def check(self) -> str:
        """Find the API and the model before any work is done; a second call returns at once.

        :returns: the model's name.
        :raises Unavailable: nothing answers at the address, or the key is refused.
        :raises BadInput: no such API at the address, or it serves several models and none was named.
        """
        if self._found:
            return self.model
        session = self._open()
        async with session.finding:
            if not self._found:
                await self._find()
                session.api.base_url = self.url
                self._found = True
        return self.model

    async def _find(self) -> None:
        for url in self._candidates:
            served = await self._served(url)
            if served is None:
                continue
            self.url = url
            if self._model is None:
                if len(served) != 1:
                    named = f"{len(served)} models ({nearest('', served, 5)})" if served else "no model"
                    raise BadInput(f"{url} serves {named}; name one with --llm-model")
                self._model = served[0]
            break
        if self._model is None:
            raise BadInput(
                f"no OpenAI-compatible API at {' or '.join(self._candidates)} (no list of models there); "
                "check the URL, or name the model with --llm-model if this server does not list them"
            )

    async def _served(self, url: str) -> list[str] | None:
        """The models listed at ``url``, or ``None`` where there is no such list."""
        api = self._open().api.with_options(base_url=url)

        async def once() -> Any:
            try:
                async with asyncio.timeout(min(self._timeout, 30.0)):
                    return (await api.models.with_raw_response.list()).text
            except TimeoutError:
                raise Transient("no answer in 30 s", unreachable=True) from None
            except openai.APIStatusError as error:
                if error.status_code in (404, 405, 501):
                    return None
                raise translate(error, url, self._key) from None
            except openai.APIError as error:
                raise translate(error, url, self._key) from None

        try:
            text = await self._with_tries(once, patient=False)
        except AnswerFailed as error:
            raise no_server(url, error.reason) from None
        try:
            return [str(entry["id"]) for entry in json.loads(text)["data"]]
        except (TypeError, ValueError, KeyError):
            return None  # a web page, or some other API

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
            return await self._ask_server(request, parse)
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
            parsed, answer = await self._ask_server(request, parse)
            self._cache.put(key, self.model, answer)
            return parsed, answer

    async def _ask_server(self, request: Request, parse: Callable[[Answer], T]) -> tuple[T, Answer]:
        await self.check()
        spent = Usage()
        sent = request
        cut_off = ""
        for tries_left in reversed(range(self._answer_tries)):
            try:
                answer, cost = await self._answer(sent)
                spent += cost
                if answer.finish_reason == "length" and not request.may_be_cut:
                    raise _cut_off(answer, sent)
                return parse(answer), replace(answer, usage=spent)
            except AnswerFailed as failed:
                spent += failed.usage
                if not tries_left or failed.final:
                    # Where the model's context has no room for twice as much, the refusal alone would mislead.
                    again = f"{cut_off}; asked again with more room: " if failed.final and cut_off else ""
                    raise AnswerFailed(again + failed.reason, spent) from None
                cut_off = failed.reason if failed.cut else ""
                if failed.cut:
                    sent = replace(sent, max_tokens=2 * sent.max_tokens)
        raise AssertionError("unreachable")

    async def _answer(self, request: Request) -> tuple[Answer, Usage]:
        """One usable reply, sent for as often as the server needs to be, and what all that cost."""
        session = self._open()
        sendings = 0

        async def once() -> Answer:
            while (pause := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            if session.throttle is not None:
                await session.throttle.acquire()
            if self._budget is not None:
                return await self._budget.spend(request, send)
            return await send()

        async def send() -> Answer:
            nonlocal sendings
            sendings += 1
            return await self._send(request)

        async with session.slots:
            try:
                answer = await self._with_tries(once)
            except AnswerFailed as failed:
                raise AnswerFailed(
                    failed.reason, replace(failed.usage, requests=sendings), cut=failed.cut, final=failed.final
                ) from None
        return answer, replace(answer.usage, requests=sendings)

    async def _with_tries(self, once: Callable[[], Awaitable[T]], patient: bool = True) -> T:
        """``once`` until it does not raise :class:`Transient`, with growing, random pauses between.

        :param patient: whether a server that cannot be reached at all is worth waiting for. Before any work it is
            not: the user had better be told at once.
        """

        def again(error: BaseException) -> bool:
            return isinstance(error, Transient) and (patient or not error.unreachable)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            asked = error.wait if isinstance(error, Transient) else 0.0
            if asked:
                # The whole client holds back, not only this request, and does not return all at once.
                self._not_before = max(self._not_before, time.monotonic() + asked)
                return asked + random.uniform(0, self._backoff)
            return grow(state)

        grow = tenacity.wait_random_exponential(multiplier=self._backoff, max=30)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(again),
            wait=pause,
            stop=tenacity.stop_after_attempt(self._tries),
            reraise=True,
        )
        try:
            result: T = await retrying(once)
        except Transient as error:
            self._failed_in_a_row += 1
            if error.unreachable or self._failed_in_a_row >= self._patience:
                raise no_server(self.url, error.reason) from None
            raise AnswerFailed(f"{error.reason} ({self._tries} tries)", final=True) from None
        self._failed_in_a_row = 0
        return result

    async def _send(self, request: Request) -> Answer:
        """Send once (and again at once where the server objects to a parameter it can be asked without)."""
        api = self._open().api
        while True:
            body = request.body(self.model, self._without)
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._timeout):
                    raw = await api.chat.completions.with_raw_response.create(**body)
            except TimeoutError:
                raise Transient(f"no answer within {self._timeout:g} s") from None
            except openai.APIStatusError as error:
                dropped = objection(error, body)
                if dropped is None:
                    raise await self._refused(error) from None
                if dropped not in self._without:
                    self._without.add(dropped)
                    if dropped != "max_tokens":
                        say(f"{self.url} does not take {dropped!r}: going on without it")
                continue
            except openai.APIError as error:
                raise translate(error, self.url, self._key) from None
            try:
                reply = json.loads(raw.text if self._key is None else self._key.hidden_in(raw.text))
            except ValueError:
                raise AnswerFailed("the server's reply is not JSON", Usage(requests=1)) from None
            self._ever_answered = True
            return read_answer(reply, time.monotonic() - started)

    async def _refused(self, error: openai.APIStatusError) -> Exception:
        """What a refusal means. One may be this question's own fault; from a server that never gave an answer,
        several are everybody's."""
        if error.status_code not in (404, 405):
            meaning = translate(error, self.url, self._key)
            if isinstance(meaning, AnswerFailed) and not self._ever_answered:
                self._refused_so_far += 1
                if self._refused_so_far >= _REFUSALS:
                    return BadInput(f"{self.url}: {meaning.reason}, and nothing else so far; check --llm-model")
            return meaning
        served = await self._served(self.url)
        where = f"{self.url} knows no model {self.model!r} (HTTP {error.status_code})"
        if served and self.model not in served:
            return BadInput(f"{where}; it serves {nearest(self.model, served)}: name one with --llm-model")
        return BadInput(f"{where}, or has no chat completions; check the URL and --llm-model")

    def _open(self) -> _Session:
        """What belongs to the running event loop; a new loop (a second ``asyncio.run``) gets its own."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            self._session = _Session(self, loop)
        return self._session


def _cut_off(answer: Answer, sent: Request) -> AnswerFailed:
    """Why an answer broke off, and whether twice the room might mend it."""
    written = answer.usage.completion_tokens or sent.max_tokens
    reason = f"the answer was cut off at {written} tokens"
    blank = len(answer.text) - len(answer.text.rstrip())
    if blank > _BLANK:
        # A JSON schema allows white space without end, and weak models write it: more room is more of the same.
        return AnswerFailed(f"{reason}, the last {blank} characters white space", final=True)
    if written < sent.max_tokens:
        return AnswerFailed(f"{reason}, where the model's context is full", final=True)
    return AnswerFailed(reason, cut=True)


class _Session:
    """Connections and limits of one event loop."""

    def __init__(self, client: LlmClient, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.slots = asyncio.Semaphore(client._concurrency)
        self.finding = asyncio.Lock()
        rate = client._rate
        self.throttle = None if rate is None else Throttler(rate_limit=1, period=1 / rate, retry_interval=0.005)
        self.api = openai.AsyncOpenAI(
            # A server without keys still gets the header that the SDK insists on.
            api_key="none" if client._key is None else client._key.value,
            base_url=client.url,
            max_retries=0,
            timeout=openai.Timeout(client._timeout, connect=10.0),
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(client.url)),
        )


@asynccontextmanager
async def open_client(options: LlmOptions, cache: Path) -> AsyncIterator[LlmClient]:
    """The client that ``options`` describe, checked, for the length of a block.

    :param cache: the file of kept answers; made if it is not there.
    :raises Unavailable: no server answers there; said before any work is done.
    """
    answers = ResponseCache(cache)
    try:
        async with LlmClient(
            options.url or DEFAULT_URL,
            options.model,
            key_file=options.api_key_file,
            cache=answers,
            concurrency=options.concurrency,
            requests_per_second=options.requests_per_second,
            budget=options.budget,
        ) as client:
            await client.check()
            yield client
    finally:
        answers.close()
