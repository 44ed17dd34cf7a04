"""Several servers of one model as one: their APIs, what they can do, which gets the next request, and when to give up.

The cost of a server is its mean time for an answer, times the requests it would then have in flight ("peak EWMA"
without its peaks). Requests of one affinity (about one explanation, say) go to the same server, chosen by rendezvous
hashing, because it has the beginning of their prompt in its cache; if that server costs more than ``OVERFLOW`` times
the cheapest, they go to the cheapest.

A server that fails ``TOLERATED`` times in a row rests, at first for ``REST`` seconds, each time twice as long, and is
then tried by a single request. When all of them rest, the first to return continues to work.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import openai
import tenacity

from autointerp.journal.usage import Usage
from autointerp.llm.exchange import Answer, AnswerFailed, Request, read_answer
from autointerp.llm.transport import (
    Key,
    NoServer,
    Transient,
    Unread,
    find_unsupported,
    is_loopback,
    list_candidates,
    open_api,
    post,
    translate,
)
from sae.common.errors import BadInput, suggest
from sae.common.progress import say

T = TypeVar("T")
ModelList = list[Mapping[str, Any]]
"""The entries of a server's list of models; each has an ``id``."""

OVERFLOW = 2.0
TOLERATED = 3
REST = 10.0
LONGEST_REST = 300.0
_MEMORY = 0.1
"""Weight of the latest answer in the mean time of an answer."""
_LIST_SECONDS = 30.0
_REFUSALS = 3
"""This many refused requests before the first answer mean that the settings are wrong, not the questions."""


@dataclass
class Capabilities:
    """What all servers of a model can do, read off every answer; ``None`` is not known yet.

    A missing capability is done without (lists are parsed out of plain text, labels stand in for probabilities),
    reported in a command's closing lines and stored with the scores.
    """

    json_schema: bool | None = None
    """Answers are held to a JSON schema."""
    logprobs: int | None = None
    """Alternatives that come back for a token; 0 where there are no log-probabilities."""
    cached_tokens: bool | None = None
    """The server reports how many tokens of a prompt it had cached."""
    label_first: bool | None = None
    """Asked for a label, the model gives it as its first token, without thinking before it."""
    context_length: int | None = None
    """Tokens of prompt and answer together."""

    def take_over(self, known: Mapping[str, Any]) -> None:
        """Fill in unknown fields from an earlier :meth:`as_dict`."""
        for name in ("json_schema", "logprobs", "cached_tokens", "label_first"):
            if getattr(self, name) is None:
                setattr(self, name, known.get(name))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def list_missing(self) -> list[str]:
        """Return the missing capabilities, each with its substitute: a sentence each."""
        missing = []
        if self.json_schema is False:
            missing.append("the server does not hold answers to a JSON schema: they are read as plain text")
        if self.logprobs == 0:
            missing.append("the server gives no log-probabilities: labels stand in for P(active)")
        if self.cached_tokens is False:
            missing.append("the server does not report how many prompt tokens it had cached: they count as not cached")
        return missing

    def note_refusal(self, parameter: str) -> None:
        if parameter == "response_format":
            self.json_schema = False
        if parameter == "logprobs":
            self.logprobs = 0

    def learn(self, request: Request, reply: Mapping[str, Any], answer: Answer) -> None:
        """Read off an answer which parts of the request the server honoured."""
        usage = reply.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
        is_counted = isinstance(details, Mapping) and details.get("cached_tokens") is not None
        self.cached_tokens = is_counted and self.cached_tokens is not False
        if request.logprobs:
            n = 0 if answer.top_logprobs is None else max(map(len, answer.top_logprobs), default=0)
            self.logprobs = n if self.logprobs is None else min(self.logprobs, n)
        if request.json_schema is not None and answer.finish_reason == "stop":
            self.json_schema = _fits(answer.text, request.json_schema) and self.json_schema is not False

    def learn_length(self, entry: Mapping[str, Any]) -> None:
        """Read the context length off a list of models: ``max_model_len`` of vLLM, or another server's name for it."""
        for name in ("max_model_len", "context_length", "context_window"):
            length = entry.get(name)
            if isinstance(length, int) and length > 0:
                self.context_length = length if self.context_length is None else min(self.context_length, length)
                return


def _fits(text: str, schema: Mapping[str, Any]) -> bool:
    """Return whether ``text`` is an object with the schema's fields, which shows a server that honours schemas."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(schema.get("required", ())) <= set(value)


@dataclass(eq=False)
class Server:
    """One address, and its record so far."""

    given: str
    url: str = ""
    """The base URL of the API; the likeliest one before that is known."""
    api: openai.AsyncOpenAI | None = None
    in_flight: int = 0
    answers: int = 0
    seconds: float = 0.0
    """Mean time of an answer, the latest weighing most."""
    failed_in_a_row: int = 0
    rests: int = 0
    rests_until: float = 0.0
    not_before: float = 0.0
    """The end of the pause it asked for."""
    without: set[str] = field(default_factory=set)
    """Parameters that it does not take."""

    def __post_init__(self) -> None:
        self.move_to(self.given)

    def move_to(self, address: str) -> None:
        """Change the server's address, before anything is sent there."""
        self.given = address
        self.candidates = list_candidates(address)
        self.url = self.candidates[0]


class Servers:
    """The servers of one client.

    :param key: sent to all of them.
    :param timeout: seconds for one answer, including the time in the server's queue.
    :param tries: how often one request is sent.
    :param backoff: scale of the first pause between tries, in seconds; pauses double and are randomised.
    :param patience: requests in a row that may fail after all their tries before the servers are given up.
    :raises BadInput: there is no address, an invalid one, or one given twice.
    """

    def __init__(
        self,
        urls: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
        *,
        key: Key | None = None,
        timeout: float = 300.0,
        tries: int = 6,
        backoff: float = 0.5,
        patience: int = 10,
    ) -> None:
        if not urls:
            raise BadInput("no address of an LLM server is given")
        self.all = [Server(url) for url in urls]
        twice = next((s.url for i, s in enumerate(self.all) if s.url in [x.url for x in self.all[:i]]), None)
        if twice is not None:
            raise BadInput(f"LLM URL {twice!r} is given twice; give every server once")
        self._clock = clock
        self._key, self._timeout = key, timeout
        self._tries, self._backoff, self._patience = tries, backoff, patience
        self.capabilities = Capabilities()
        self._failed_in_a_row = 0
        self._refused_so_far = 0
        self._has_answered = False

    @property
    def names(self) -> str:
        return ", ".join(server.url for server in self.all)

    @property
    def are_local(self) -> bool:
        """Whether all of them run on this machine."""
        return all(is_loopback(server.url) for server in self.all)

    def open(self, connections: int) -> None:
        """Open connections to all servers, in the running event loop."""
        for server in self.all:
            server.api = open_api(server.url, self._key, self._timeout, connections)

    async def close(self) -> None:
        for server in self.all:
            if server.api is not None:
                await server.api.close()

    # --- choosing -----------------------------------------------------------------------------------------------------

    def choose(self, affinity: str, avoid: Collection[Server] = ()) -> Server:
        """Return the server for the next request.

        :param affinity: requests of equal affinity go together where load allows; empty for none.
        :param avoid: servers where this request has just failed: taken only if there is no other.
        """
        if len(self.all) == 1:
            return self.all[0]
        now = self._clock()
        able = [s for s in self.all if s.rests_until <= now and not (s.rests and s.failed_in_a_row and s.in_flight)]
        if not able:
            return min(self.all, key=lambda server: server.rests_until)
        able = [s for s in able if s not in avoid] or able
        able = [s for s in able if s.not_before <= now] or able
        known = [s.seconds for s in able if s.answers]
        usual = sum(known) / len(known) if known else 1.0

        def cost(server: Server) -> float:
            return (server.seconds if server.answers else usual) * (server.in_flight + 1)

        cheapest = min(able, key=cost)
        if not affinity:
            return cheapest
        home = max(able, key=lambda server: hashlib.sha256(f"{server.url}\n{affinity}".encode()).digest())
        return home if cost(home) <= OVERFLOW * cost(cheapest) else cheapest

    def pause_left(self) -> float:
        """Return the seconds until some server takes requests again; 0 where one does now."""
        now = self._clock()
        if len(self.all) == 1:
            return max(0.0, self.all[0].not_before - now)
        return max(0.0, min(max(server.not_before, server.rests_until) - now for server in self.all))

    def any_is_left(self) -> bool:
        """Return whether another server is not resting. A single server never rests and has no other."""
        return len(self.all) > 1 and any(server.rests_until <= self._clock() for server in self.all)

    def note_answer(self, server: Server, seconds: float | None = None) -> None:
        """Record that ``server`` answered, in ``seconds`` where the time is representative."""
        if server.rests and len(self.all) > 1:
            say(f"{server.url} answers again")
        server.failed_in_a_row = server.rests = 0
        server.rests_until = 0.0
        if seconds is not None:
            server.seconds += (seconds - server.seconds) * (_MEMORY if server.answers else 1.0)
            server.answers += 1

    def note_failure(self, server: Server, reason: str, at_once: bool = False) -> None:
        """Record a failure, and let the server rest after too many; after the first one where ``at_once``."""
        server.failed_in_a_row += 1
        if len(self.all) == 1 or (server.failed_in_a_row < TOLERATED and not server.rests and not at_once):
            return
        if server.rests_until > self._clock():
            return  # one of several requests that were in flight when it began to rest
        pause = min(REST * 2**server.rests, LONGEST_REST)
        server.rests += 1
        server.rests_until = self._clock() + pause
        n = sum(s.rests_until <= self._clock() for s in self.all)
        say(f"{server.url} fails ({reason}): tried again in {pause:g} s; {n} of {len(self.all)} servers continue")

    # --- sending ------------------------------------------------------------------------------------------------------

    async def retry(self, once: Callable[[], Awaitable[T]], waits: bool = True) -> T:
        """Call ``once`` until it does not raise :class:`Transient`, with growing, random pauses.

        :param waits: whether to wait for a server that cannot be reached at all. Before any work it is better to
            report that at once.
        :raises AnswerFailed: this call failed every time.
        :raises NoServer: too many calls in a row failed, or nothing can be reached any more.
        """
        try:
            result = await once()  # nearly always enough: tenacity costs as much as sending
            self._failed_in_a_row = 0
            return result
        except Transient as error:
            first: list[Transient] = [error]

        async def next_try() -> T:
            if first:
                raise first.pop()  # the first try, as tenacity counts
            return await once()

        grow = tenacity.wait_random_exponential(multiplier=self._backoff, max=30)

        def pause(state: tenacity.RetryCallState) -> float:
            # A pause that a server asked for is kept before sending; here requests must not all return at once.
            return random.uniform(0, self._backoff) if self.pause_left() > 0 else grow(state)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, Transient) and (waits or not e.is_unreachable)),
            wait=pause,
            stop=tenacity.stop_after_attempt(self._tries),
            reraise=True,
        )
        try:
            result = await retrying(next_try)
        except Transient as error:
            self._failed_in_a_row += 1
            if (error.is_unreachable and not self.any_is_left()) or self._failed_in_a_row >= self._patience:
                raise NoServer(self.names, error.reason) from None
            raise AnswerFailed(f"{error.reason} ({self._tries} tries)", final=True) from None
        self._failed_in_a_row = 0
        return result

    async def send(self, request: Request, model: str, failed_at: set[Server]) -> Answer:
        """Send ``request`` once, to the best server, and keep that server's record.

        :param failed_at: servers where this request failed before; grows.
        """
        server = self.choose(request.affinity, failed_at)
        server.in_flight += 1
        try:
            answer = await self._send_to(server, request, model)
        except Transient as error:
            failed_at.add(server)
            self.note_failure(server, error.reason, at_once=error.is_unreachable)
            if error.wait:
                server.not_before = max(server.not_before, self._clock() + error.wait)
            raise
        except AnswerFailed:
            self.note_answer(server)
            raise
        finally:
            server.in_flight -= 1
        self.note_answer(server, answer.usage.seconds)
        return answer

    async def _send_to(self, server: Server, request: Request, model: str) -> Answer:
        """Send once (and again at once where the server refuses a parameter that is optional)."""
        assert server.api is not None
        while True:
            parameters = request.parameters(model, server.without)
            started = time.monotonic()
            try:
                raw = await post(server.api, "/chat/completions", request.content(parameters), self._timeout)
            except TimeoutError:
                raise Transient(f"no answer within {self._timeout:g} s") from None
            except openai.APIStatusError as error:
                refused = find_unsupported(error, parameters)
                if refused is None:
                    raise await self._explain_refusal(server, error, model) from None
                if refused not in server.without:
                    server.without.add(refused)
                    self.capabilities.note_refusal(refused)
                    if refused != "max_tokens":
                        say(f"{server.url} does not take {refused!r}: continuing without it")
                continue
            except (openai.APIError, Unread) as error:
                raise translate(error, server.url, self._key) from None
            try:
                reply = json.loads(raw if self._key is None else self._key.redact(raw.decode(errors="replace")))
                if self._key is not None and b"\\" in raw:  # an echo of the key may have been written in escapes
                    reply = json.loads(self._key.redact(json.dumps(reply)))
            except (ValueError, RecursionError):
                raise AnswerFailed("the server's reply is not JSON", Usage(requests=1)) from None
            self._has_answered = True
            answer = read_answer(reply, time.monotonic() - started, request.characters)
            self.capabilities.learn(request, reply, answer)
            return answer

    async def _explain_refusal(self, server: Server, error: openai.APIStatusError, model: str) -> Exception:
        """Return the meaning of a refusal. One may be this question's fault; several from a server that never gave an
        answer come from the settings."""
        if error.status_code not in (404, 405):
            meaning = translate(error, server.url, self._key)
            if isinstance(meaning, AnswerFailed) and not self._has_answered:
                self._refused_so_far += 1
                if self._refused_so_far >= _REFUSALS:
                    return BadInput(f"{server.url}: {meaning.reason}, and nothing else so far; check --llm-model")
            return meaning
        served = [str(entry["id"]) for entry in await self._list_models(server, server.url) or ()]
        where = f"{server.url} knows no model {model!r} (HTTP {error.status_code})"
        if served and model not in served:
            return BadInput(f"{where}; it serves {suggest(model, served)}: name one with --llm-model")
        return BadInput(f"{where}, or has no chat completions; check the URL and --llm-model")

    # --- finding the API and the model --------------------------------------------------------------------------------

    async def find(self, model: str | None) -> str:
        """Find every server's API and the one model that all of them serve; set each server's ``url``.

        Of several servers, those that do not answer rest; they may return.

        :param model: the model's name; ``None`` takes the served one.
        :returns: the model.
        :raises Unavailable: nothing answers at any address, or a key is refused.
        :raises BadInput: no API at an address, several models and none was named, or servers of different models.
        """
        lists: dict[str, ModelList | None] = {}
        absent: NoServer | None = None
        for server in self.all:
            try:
                lists[server.url] = await self._find_one(server, lists)
            except NoServer as error:
                absent = error
                self.note_failure(server, "nothing answers there", at_once=True)
        if not lists and absent is not None:
            raise absent
        chosen = self._choose_model(model, lists)
        for entries in lists.values():
            for entry in entries or ():
                if entry["id"] == chosen:
                    self.capabilities.learn_length(entry)
        for server in self.all:
            assert server.api is not None
            server.api.base_url = server.url
        return chosen

    def _choose_model(self, model: str | None, lists: Mapping[str, ModelList | None]) -> str:
        names = {url: [str(entry["id"]) for entry in entries] for url, entries in lists.items() if entries is not None}
        served = "; ".join(f"{url} serves {suggest('', of, 3) if of else 'none'}" for url, of in names.items())
        if model is not None:
            # A single server may know the model by a name that it does not list.
            if len(self.all) > 1 and any(model not in of for of in names.values()):
                raise BadInput(f"not all servers serve {model!r}: {served}; give only those that do")
            return model
        for server in self.all:
            if server.url in lists and lists[server.url] is None:
                raise BadInput(
                    f"no OpenAI-compatible API at {' or '.join(server.candidates)} (no list of models there); "
                    "check the URL, or name the model with --llm-model if this server does not list them"
                )
        for url, of in names.items():
            if len(of) != 1:
                models = f"{len(of)} models ({suggest('', of, 5)})" if of else "no model"
                raise BadInput(f"{url} serves {models}; name one with --llm-model")
        if len({of[0] for of in names.values()}) > 1:
            raise BadInput(
                f"the servers serve different models: {served}; give only those of one model, or name it with "
                "--llm-model"
            )
        return next(iter(names.values()))[0]

    async def _find_one(self, server: Server, others: Collection[str]) -> ModelList | None:
        for url in server.candidates:
            entries = await self._list_models(server, url)
            if entries is not None:
                if url in others:
                    raise BadInput(f"LLM URL {url!r} is given twice; give every server once")
                server.url = url
                return entries
        return None

    async def _list_models(self, server: Server, url: str) -> ModelList | None:
        """Return the models listed at ``url``, or ``None`` where there is no such list.

        :raises NoServer: nothing answers there.
        :raises Unavailable: the key is refused.
        """
        assert server.api is not None
        api = server.api.with_options(base_url=url)
        seconds = min(self._timeout, _LIST_SECONDS)

        async def once() -> Any:
            try:
                async with asyncio.timeout(seconds):
                    return (await api.models.with_raw_response.list()).text
            except TimeoutError:
                raise Transient(f"no answer in {seconds:g} s", is_unreachable=True) from None
            except openai.APIStatusError as error:
                if error.status_code in (404, 405, 501):
                    return None
                raise translate(error, url, self._key) from None
            except (openai.APIError, Unread) as error:
                raise translate(error, url, self._key) from None

        try:
            text = await self.retry(once, waits=False)
        except AnswerFailed as error:
            raise NoServer(url, error.reason) from None
        try:
            return [entry for entry in json.loads(text)["data"] if str(entry["id"])]
        except (TypeError, ValueError, KeyError):
            return None  # a web page, or some other API
