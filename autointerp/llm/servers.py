"""Several servers of one model as one: which of them gets the next request, and which had better rest.

The cost of a server is the time that its answers take, times the requests it would then have under way ("peak EWMA"
without its peaks): a server that is fast, or has little to do, is cheap. Requests of one affinity (about one
explanation, say) go to the same server, chosen by rendezvous hashing, because it has read their beginning before and
need not do so again; once that server is more than ``OVERFLOW`` times as dear as the cheapest, they go there.

A server that fails ``TOLERATED`` times in a row rests, at first for ``REST`` seconds, each time twice as long, and is
then tried by a single request. When all of them rest, the one that is the first to return goes on working.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import openai

from autointerp.llm.endpoint import candidates, is_loopback
from sae.common.errors import BadInput
from sae.common.progress import say

OVERFLOW = 2.0
TOLERATED = 3
REST = 10.0
LONGEST_REST = 300.0
_MEMORY = 0.1
"""How much the latest answer weighs in the mean time of an answer."""


@dataclass(eq=False)
class Server:
    """One address, and how it has done so far."""

    given: str
    url: str = ""
    """Where the API turned out to be; the likeliest place before that is known."""
    api: openai.AsyncOpenAI | None = None
    in_flight: int = 0
    answers: int = 0
    seconds: float = 0.0
    """A mean of the time that answers take, the latest weighing most."""
    failed_in_a_row: int = 0
    rests: int = 0
    rests_until: float = 0.0
    not_before: float = 0.0
    """It asked for a pause until then."""
    without: set[str] = field(default_factory=set)
    """Parameters that it turned out not to take."""

    def __post_init__(self) -> None:
        self.moves_to(self.given)

    def moves_to(self, address: str) -> None:
        """Take ``address`` for the server's own, before anything is sent there."""
        self.given = address
        self.candidates = candidates(address)
        self.url = self.candidates[0]


class Servers:
    """The servers of one client.

    :raises BadInput: no address, one that cannot be one, or one given twice.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        if not urls:
            raise BadInput("no address of an LLM server is given")
        self.all = [Server(url) for url in urls]
        twice = next((s.url for i, s in enumerate(self.all) if s.url in [x.url for x in self.all[:i]]), None)
        if twice is not None:
            raise BadInput(f"LLM URL {twice!r} is given twice; give every server once")
        self._clock = clock

    def __len__(self) -> int:
        return len(self.all)

    @property
    def names(self) -> str:
        return ", ".join(server.url for server in self.all)

    def choose(self, affinity: str, but: Collection[Server] = ()) -> Server:
        """The server for the next request.

        :param affinity: requests of equal affinity go together where load allows; empty for none.
        :param but: servers that this request has just failed at: taken only where there is no other.
        """
        if len(self.all) == 1:
            return self.all[0]
        now = self._clock()
        able = [s for s in self.all if s.rests_until <= now and not (s.rests and s.failed_in_a_row and s.in_flight)]
        if not able:
            return min(self.all, key=lambda server: server.rests_until)
        able = [s for s in able if s not in but] or able
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

    @property
    def local(self) -> bool:
        """Whether all of them run on this machine."""
        return all(is_loopback(server.url) for server in self.all)

    def any_left(self) -> bool:
        """Whether one is not resting: for a single server, which never rests, there is none beside it."""
        return len(self.all) > 1 and any(server.rests_until <= self._clock() for server in self.all)

    def held_back(self) -> float:
        """Seconds until some server takes requests again; 0 where one does now."""
        if len(self.all) == 1:
            return max(0.0, self.all[0].not_before - self._clock())
        now = self._clock()
        return max(0.0, min(max(server.not_before, server.rests_until) - now for server in self.all))

    def answered(self, server: Server, seconds: float | None = None) -> None:
        """``server`` gave some answer, in so many seconds where it is one to go by."""
        if server.rests and len(self.all) > 1:
            say(f"{server.url} answers again")
        server.failed_in_a_row = server.rests = 0
        server.rests_until = 0.0
        if seconds is not None:
            server.seconds += (seconds - server.seconds) * (_MEMORY if server.answers else 1.0)
            server.answers += 1

    def failed(self, server: Server, reason: str, at_once: bool = False) -> None:
        """Count a failure, and let the server rest after too many.

        :param at_once: one is too many: nothing answers there.
        """
        server.failed_in_a_row += 1
        if len(self.all) == 1 or (server.failed_in_a_row < TOLERATED and not server.rests and not at_once):
            return
        if server.rests_until > self._clock():
            return  # one of several requests that were under way when it was sent to rest
        pause = min(REST * 2**server.rests, LONGEST_REST)
        server.rests += 1
        server.rests_until = self._clock() + pause
        others = sum(s.rests_until <= self._clock() for s in self.all)
        say(f"{server.url} fails ({reason}): tried again in {pause:g} s; {others} of {len(self.all)} servers go on")

    def hold_back(self, server: Server, seconds: float) -> None:
        """A server asked for a pause: nobody sends it anything before that is over."""
        server.not_before = max(server.not_before, self._clock() + seconds)
