"""One request, sent once to one server: its refusal understood, its answer read."""

from __future__ import annotations

import json
import time

import openai

from autointerp.journal.usage import Usage
from autointerp.llm.capability import Capabilities
from autointerp.llm.discovery import Listed, models_at
from autointerp.llm.endpoint import Key
from autointerp.llm.exchange import Answer, AnswerFailed, Request, read_answer
from autointerp.llm.faults import Transient, objection, translate
from autointerp.llm.retrying import Retrying
from autointerp.llm.servers import Server
from autointerp.llm.transport import Unread, post
from sae.common.errors import BadInput, suggest
from sae.common.progress import say

_REFUSALS = 3
"""So many refused requests before the first answer mean that the settings are wrong, not the questions."""


class Sender:
    """Sends to servers whose connections are open.

    :param timeout: seconds for one answer, waiting in the server's queue included.
    :param capabilities: told what every answer shows of the servers.
    :param retrying: how often a list of models is asked for.
    """

    def __init__(self, key: Key | None, timeout: float, capabilities: Capabilities, retrying: Retrying) -> None:
        self._key, self._timeout = key, timeout
        self._capabilities, self._retrying = capabilities, retrying
        self._refused_so_far = 0
        self._ever_answered = False

    async def models_at(self, server: Server, url: str) -> Listed | None:
        """The models listed at ``url``; see :func:`autointerp.llm.discovery.models_at`. A server that cannot be reached
        is not waited for."""
        return await models_at(server, url, self._key, self._timeout, lambda once: self._retrying(once, patient=False))

    async def send(self, server: Server, request: Request, model: str) -> Answer:
        """Send once (and again at once where the server objects to a parameter it can be asked without)."""
        assert server.api is not None
        while True:
            parameters = request.parameters(model, server.without)
            started = time.monotonic()
            try:
                raw = await post(server.api, "/chat/completions", request.content(parameters), self._timeout)
            except TimeoutError:
                raise Transient(f"no answer within {self._timeout:g} s") from None
            except openai.APIStatusError as error:
                dropped = objection(error, parameters)
                if dropped is None:
                    raise await self._refused(server, error, model) from None
                if dropped not in server.without:
                    server.without.add(dropped)
                    self._capabilities.went_without(dropped)
                    if dropped != "max_tokens":
                        say(f"{server.url} does not take {dropped!r}: going on without it")
                continue
            except (openai.APIError, Unread) as error:
                raise translate(error, server.url, self._key) from None
            try:
                reply = json.loads(raw if self._key is None else self._key.hidden_in(raw.decode(errors="replace")))
                if self._key is not None and b"\\" in raw:  # an echo of the key may have been written in escapes
                    reply = json.loads(self._key.hidden_in(json.dumps(reply)))
            except (ValueError, RecursionError):
                raise AnswerFailed("the server's reply is not JSON", Usage(requests=1)) from None
            self._ever_answered = True
            answer = read_answer(reply, time.monotonic() - started, request.characters)
            self._capabilities.learn(request, reply, answer)
            return answer

    async def _refused(self, server: Server, error: openai.APIStatusError, model: str) -> Exception:
        """What a refusal means. One may be this question's own fault; from a server that never gave an answer,
        several are everybody's."""
        if error.status_code not in (404, 405):
            meaning = translate(error, server.url, self._key)
            if isinstance(meaning, AnswerFailed) and not self._ever_answered:
                self._refused_so_far += 1
                if self._refused_so_far >= _REFUSALS:
                    return BadInput(f"{server.url}: {meaning.reason}, and nothing else so far; check --llm-model")
            return meaning
        served = [str(entry["id"]) for entry in await self.models_at(server, server.url) or ()]
        where = f"{server.url} knows no model {model!r} (HTTP {error.status_code})"
        if served and model not in served:
            return BadInput(f"{where}; it serves {suggest(model, served)}: name one with --llm-model")
        return BadInput(f"{where}, or has no chat completions; check the URL and --llm-model")
