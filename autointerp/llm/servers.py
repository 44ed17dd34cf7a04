"""Several servers of one model as one: their APIs, which gets the next request, and when to give up.

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
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import tenacity

from autointerp.llm.additions import KEY_HEADERS, Header
from autointerp.llm.capabilities import Capabilities
from autointerp.llm.exchange import Answer, AnswerFailed, Request, Transient
from autointerp.llm.replies import Fault, NoSuchModel, Refused, explain_fault, find_fault, read_answer
from autointerp.llm.transport import Connections, Key, Reply, at, is_local, list_candidates, list_secrets
from sae.common.errors import BadInput, Unavailable, suggest
from sae.common.progress import say

T = TypeVar("T")
ModelList = dict[str, Mapping[str, Any]]  # the entries of a server's list of models by id

OVERFLOW = 2.0
TOLERATED = 3
REST = 10.0
LONGEST_REST = 300.0
_MEMORY = 0.1  # weight of the latest answer in the mean time of an answer
_LIST_SECONDS = 30.0
_LONGEST_NAME = 500  # characters of a model's name
_SLOW = 15.0  # seconds until the first answer; a longer wait is reported
_LOADING_PAUSE = 5.0  # seconds between tries meanwhile, at most
_LONGEST_LOADING = 1200.0  # seconds that a server may take to load its model
_SUSPECTS = {1: "response_format", 4: "logprobs"}  # after this many breakdowns of a request, it is tried without
_NOT_AVAILABLE = (503, 529)  # the server is busy or loading, whatever the request is


@dataclass(eq=False)
class Server:
    """One address, and its record so far."""

    given: str
    url: str = ""  # the base URL of the API; the likeliest one before that is known
    in_flight: int = 0
    answers: int = 0
    seconds: float = 0.0  # mean time of an answer, the latest weighing most
    failed_in_a_row: int = 0
    rests: int = 0
    rests_until: float = 0.0
    not_before: float = 0.0  # the end of the pause it asked for

    def __post_init__(self) -> None:
        self.candidates = list_candidates(self.given)
        self.url = self.candidates[0]


@dataclass
class Sending:
    """A request on its way, and what its earlier tries showed."""

    failed_at: set[Server] = field(default_factory=set)
    without: set[str] = field(default_factory=set)  # parameters that were refused
    most_logprobs: int | None = None
    n_breakdowns: int = 0
    suspect: str = ""  # a parameter that may have caused the last one: the next try leaves it away
    failed_from: float = 0.0  # start of the try that failed

    def note_breakdown(self, parameters: Mapping[str, Any], started: float) -> None:
        self.n_breakdowns += 1
        name = _SUSPECTS.get(self.n_breakdowns, "")
        self.suspect = name if name in parameters else ""
        self.failed_from = started


class NoServer(Unavailable):
    """Nothing answers at an address; another may."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"no LLM server answers at {url} ({reason}); start it or correct the URL, then run the same command "
            "again: finished work is kept"
        )


class Servers:
    """The servers of one client.

    :param key, headers: sent to all of them.
    :param body: merged into every request; see :meth:`autointerp.llm.exchange.Request.parameters`.
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
        headers: Sequence[Header] = (),
        body: Mapping[str, Any] | None = None,
        timeout: float = 300.0,
        tries: int = 6,
        backoff: float = 0.5,
        patience: int = 10,
    ) -> None:
        if tries < 1:
            raise BadInput("the number of tries must be at least 1")
        if not urls:
            raise BadInput("no address of an LLM server is given")
        self.all = [Server(url) for url in urls]
        twice = next((s.url for i, s in enumerate(self.all) if s.url in [x.url for x in self.all[:i]]), None)
        if twice is not None:
            raise BadInput(f"LLM URL {twice!r} is given twice; give every server once")
        self._clock = clock
        self._key, self._timeout = key, timeout
        self._headers, self._body = headers, body or {}
        self._has_key = key is not None or any(header.name.lower() in KEY_HEADERS for header in headers)
        self._connections: Connections | None = None
        self._tries, self._backoff, self._patience = tries, backoff, patience
        self.capabilities = Capabilities()
        self.served: list[str] | None = None  # the models that they list, once found
        self._failed_in_a_row = 0
        self._has_answered = False
        self._said: set[str] = set()
        self._suspicions: dict[str, float] = {}  # when a request succeeded without a parameter, having failed with it

    @property
    def names(self) -> str:
        return ", ".join(server.url for server in self.all)

    @property
    def are_local(self) -> bool:
        """Whether all of them run on this machine."""
        return all(is_local(server.url) for server in self.all)

    @property
    def connections(self) -> Connections:
        """Those of the running event loop; a second ``asyncio.run`` opens new ones."""
        if self._connections is None or self._connections.loop is not asyncio.get_running_loop():
            self._connections = Connections(self._key, self._timeout, self._headers)
        return self._connections

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        if self._connections is not None and self._connections.loop is asyncio.get_running_loop():
            await self._connections.close()
        self._connections = None

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

        :param waits: for a server that cannot be reached at all. Before any work that is reported at once.
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
        n_loading = 0

        def has_tried_enough(state: tenacity.RetryCallState) -> bool:
            nonlocal n_loading
            if state.outcome and getattr(state.outcome.exception(), "is_loading", False):
                n_loading += 1
                self._say_once("the server is loading the model: waiting")
                return (state.seconds_since_start or 0.0) > _LONGEST_LOADING
            return state.attempt_number - n_loading >= self._tries

        def pause(state: tenacity.RetryCallState) -> float:
            # A pause that a server asked for is kept before sending; here requests must not all return at once.
            seconds = random.uniform(0, self._backoff) if self.pause_left() > 0 else grow(state)
            return min(seconds, _LOADING_PAUSE) if n_loading else seconds

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, Transient) and (waits or not e.is_unreachable)),
            wait=pause,
            stop=has_tried_enough,
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

    async def send(self, request: Request, model: str, sending: Sending) -> Answer:
        """Send ``request`` once, to the best server, and keep that server's record.

        :param sending: what earlier tries of this request showed; grows.
        """
        server = self.choose(request.affinity, sending.failed_at)
        server.in_flight += 1
        try:
            answer = await self._send_to(server, request, model, sending)
        except Transient as error:
            sending.failed_at.add(server)
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

    async def _send_to(self, server: Server, request: Request, model: str, sending: Sending) -> Answer:
        """Send once (and again at once where the server refuses a parameter that is optional)."""
        while True:
            without = {*self.capabilities.without, *sending.without, *filter(None, [sending.suspect])}
            most = min(filter(None, (self.capabilities.most_logprobs, sending.most_logprobs)), default=request.logprobs)
            sent = request if most >= request.logprobs else replace(request, logprobs=most)
            has_system = sent.messages[0]["role"] == "system" and len(sent.messages) > 1
            if has_system and "system" in without:
                sent, has_system = sent.without_system(), False
            parameters = sent.parameters(model, without, self._body)
            started = time.monotonic()
            reply = await self._post(server, sent.content(parameters))
            fault = find_fault(reply)
            if fault is None:
                self._learn(server, sending, parameters)
                return self._read(reply, time.monotonic() - started, sent, model)
            optional = {name: value for name, value in parameters.items() if name not in self._body}
            if has_system:
                optional["system"] = True
            meaning = self._explain(fault, optional, server.url)
            if isinstance(meaning, NoSuchModel):
                raise await self._explain_unknown(server, model, fault.status)
            if isinstance(meaning, Transient) and fault.status >= 500 and fault.status not in _NOT_AVAILABLE:
                sending.note_breakdown(parameters, started)
            if not isinstance(meaning, Refused):
                raise meaning
            if meaning.most:
                sending.most_logprobs = meaning.most
            else:
                sending.without.add(meaning.parameter)

    def _explain(self, fault: Fault, optional: Mapping[str, Any], url: str) -> Exception:
        return explain_fault(fault, optional, url, self._has_key, list_secrets(self._key, self._headers))

    async def _post(self, server: Server, content: bytes) -> Reply:
        """Post a question, and say so if the first answer takes long."""
        url = at(server.url, "/chat/completions")
        if self._has_answered:
            return await self.connections.send(url, content)
        words = f"{server.url} has not answered yet: it may be loading the model; waiting up to {self._timeout:g} s"
        timer = asyncio.get_running_loop().call_later(_SLOW, self._say_once, words)
        try:
            reply = await self.connections.send(url, content)
        finally:
            timer.cancel()
        self._has_answered = True
        return reply

    def _say_once(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            say(words)

    def _read(self, reply: Reply, seconds: float, sent: Request, model: str) -> Answer:
        try:
            answer = read_answer(reply.body, seconds, sent)
        except AnswerFailed as failed:
            if failed.thought:
                self.capabilities.note_thinking()
            raise
        self.capabilities.learn(sent, answer)
        self.capabilities.learn_model(model, reply.body.get("model"))
        return answer

    def _learn(self, server: Server, sending: Sending, parameters: Mapping[str, Any]) -> None:
        """Remember what a success shows about the parameters that it did without.

        A server that broke down may have recovered by chance. A parameter is the cause if this happened twice in a row,
        one after the other, and no request with the parameter succeeded in between.
        """
        for name in _SUSPECTS.values():
            if name in parameters:
                self._suspicions.pop(name, None)
        if sending.suspect and sending.failed_from > self._suspicions.setdefault(sending.suspect, time.monotonic()):
            sending.without.add(sending.suspect)
        for name in sorted(sending.without.difference(self.capabilities.without)):
            self.capabilities.note_refusal(name)
            if name != "max_tokens":
                say(f"{server.url} does not take {name!r}: continuing without it")
        if sending.most_logprobs and sending.most_logprobs != self.capabilities.most_logprobs:
            self.capabilities.most_logprobs = sending.most_logprobs
            say(f"{server.url} gives the log-probabilities of at most {sending.most_logprobs} tokens: asking for those")

    async def _explain_unknown(self, server: Server, model: str, status: int) -> BadInput:
        served = list(await self._list_models(server.url) or ())
        where = f"{server.url} knows no model {model!r} (HTTP {status})"
        if served and model not in served:
            return BadInput(f"{where}; it serves {suggest(model, served)}: name one with --llm-model")
        return BadInput(f"{where}, or has no chat completions; check the URL and --llm-model")

    # --- finding the API and the model --------------------------------------------------------------------------------

    async def find(self, model: str | None) -> str:
        """Find every server's API, set its ``url``, and return the model, given or the one that all of them serve.

        Of several servers, those that do not answer rest; they may return.

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
        listed = [name for entries in lists.values() for name in entries or ()]
        self.served = list(dict.fromkeys(listed)) if any(of is not None for of in lists.values()) else None
        for entries in lists.values():
            self.capabilities.learn_length((entries or {}).get(chosen, {}))
        return chosen

    def _choose_model(self, model: str | None, lists: Mapping[str, ModelList | None]) -> str:
        names = {url: list(entries) for url, entries in lists.items() if entries is not None}
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
            entries = await self._list_models(url)
            if entries is not None:
                if url in others:
                    raise BadInput(f"LLM URL {url!r} is given twice; give every server once")
                server.url = url
                return entries
        return None

    async def _list_models(self, url: str) -> ModelList | None:
        """Return the models listed at ``url``, or ``None`` where there is no such list. Raises as :meth:`find`."""

        async def once() -> Any:
            reply = await self.connections.send(at(url, "/models"), most_seconds=_LIST_SECONDS)
            fault = None if reply.status in (404, 405, 501) else find_fault(reply)
            if fault is not None:
                raise self._explain(fault, {}, url)
            return reply.body

        try:
            listed = await self.retry(once, waits=False)
        except AnswerFailed as error:
            raise NoServer(url, error.reason) from None
        entries = listed.get("data") if isinstance(listed, Mapping) else None
        if not isinstance(entries, list):
            return None  # a web page, or some other API
        return {entry["id"]: entry for entry in entries if isinstance(entry, Mapping) and _is_name(entry.get("id"))}


def _is_name(given: Any) -> bool:
    return isinstance(given, str) and 0 < len(given.strip()) <= _LONGEST_NAME and given.isprintable()
