"""Which server of ours a command's options ask for, and how long it stays."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autointerp.llm.local.model import find_model, find_python
from autointerp.llm.local.server import VllmServer
from sae.common.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from autointerp.llm.options import LlmOptions

LOGS = "logs"
"""The folder under the root in which servers write."""


class OneServer:
    """At most one server at a time, kept while the next part of a command asks the same model.

    Where explainer and judge are one model, it is loaded once; where they are two, the first is stopped before the
    second is started, because one of them may well fill the machine.
    """

    def __init__(self) -> None:
        self._server: VllmServer | None = None

    def __enter__(self) -> OneServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, options: LlmOptions, root: Path) -> VllmServer:
        """The server that ``options`` ask for, running or not. Any other is stopped.

        :raises UserError: there is no such model, or no vLLM; see :mod:`autointerp.llm.local.model`.
        """
        wanted = server_for(options, root)
        kept = self._server
        if kept is None or (kept.model, kept.python) != (wanted.model, wanted.python):
            self.close()
            self._server = kept = wanted
        return kept

    def close(self) -> None:
        """Stop the server."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()


def server_for(options: LlmOptions, root: Path) -> VllmServer:
    """The server that ``options`` ask for, not started; what can be wrong with them is told here."""
    assert options.vllm is not None
    if not options.vllm_timeout > 0:
        raise BadInput(f"--vllm-timeout {options.vllm_timeout:g}: give a number of seconds above 0")
    model = find_model(options.vllm, options.vllm_args, options.model)
    python = find_python(options.vllm_python)
    log = root / LOGS / f"vllm-{re.sub(r'[^A-Za-z0-9._+-]+', '-', model.name)[:100]}.log"
    return VllmServer(model, python, log, start_seconds=options.vllm_timeout)


@asynccontextmanager
async def serving(options: LlmOptions, root: Path, kept: OneServer | None = None) -> AsyncIterator[VllmServer]:
    """Yield the server that ``options`` ask for, not started. It ends with the block unless ``kept`` keeps it."""
    servers = OneServer() if kept is None else kept
    try:
        server = servers.of(options, root)
        try:
            yield server
        except Unavailable:
            server.check()  # the end of a server says more than that it could not be reached
            raise
    finally:
        if kept is None:
            servers.close()
