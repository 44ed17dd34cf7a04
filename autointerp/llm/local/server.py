"""Start a vLLM server on this machine and keep it for as long as a command needs it.

Loading a model takes minutes, so the server starts at the first question without a cached answer, not before. A keeper
process in between (see ``keeper``) ends the server with this program, however this program ends.

The port is free when it is chosen and may be taken a moment later. So the server gets the address of a secret web page,
the only one whose scripts may read its answers: a reply that names the page comes from our server, and anything else
means another port. It also keeps the pages of a browser on this machine from asking the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Literal

from autointerp.llm.local import keeper
from autointerp.llm.local.model import INSTALL, VllmModel, find_model, find_python
from autointerp.llm.options import KEY_VARIABLES, VLLM_TIMEOUT, LlmOptions
from sae.common.errors import BadInput, Unavailable
from sae.common.memory import free_host_bytes
from sae.common.progress import say, waiting

STOP_SECONDS = 20.0
_POLL_SECONDS, _ANSWER_SECONDS = 0.5, 2.0
_PORTS = 3
_LINES_SHOWN, _LONGEST_LINE = 20, 300
_TAIL_BYTES = 64 << 10
_PAGE_HEADER = "access-control-allow-origin"
_MOST_CACHE_GIB = 16

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy for this machine
_ERROR = re.compile(r"\b(\w+(Error|Exception|Exit): |error: |No module named ).+")
_LESS = "let it take less (--vllm-args '--max-model-len 4096', '--gpu-memory-utilization 0.7'), or take a smaller model"
_ADVICE = (
    (re.compile(r"No module named|cannot import name"), f"{INSTALL}, or name another with --vllm-python"),
    (re.compile(r"unrecognized arguments|invalid choice|error: argument"), "correct --vllm-args"),
    (re.compile(r"trust.remote.code"), "name a model that vLLM has a class for: a model's own code is not run"),
    (re.compile(r"out of memory|[Mm]emory on (node|device)|[Nn]o available memory|KV cache|by SIGKILL"), _LESS),
)
# Process and time of a line of the log.
_PREFIX = re.compile(r"^(\(\S+( pid=\d+)?\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (\[[^\]]*\] )?)?")
LOGS = "logs"  # the folder under the root that servers write to


# Of a server that starts; the port is lost if another process answers there, or our server could not have it.
_State = Literal["loading", "ready", "port lost"]


class VllmServer:
    """``with VllmServer(model, python, log) as server: url = await server.ready()``.

    Nothing runs before that, nor after the block, however it ends.

    :param log: the server's output. Overwritten, unless another server writes there: then the next free name is used.
    :param start_seconds: time until it must answer.
    :param stop_seconds: time to end after it is asked to, before it is killed.
    """

    def __init__(
        self,
        model: VllmModel,
        python: Path,
        log: Path,
        *,
        start_seconds: float = VLLM_TIMEOUT,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        self.model, self.python = model, python
        self.log = self._first_log = log
        self.url = ""
        self._start_seconds, self._stop_seconds = start_seconds, stop_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._page = ""
        self._failure: Unavailable | None = None

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- starting -----------------------------------------------------------------------------------------------------

    async def ready(self) -> str:
        """Start the server unless it runs, wait until it answers, and return its address.

        :raises Unavailable: it ends before it is ready, or is not ready in time; the end of its log has been shown.
        """
        if self.running:
            return self.url
        if self._failure is not None:  # one of many waiting tasks sees it first; the others must not try again
            raise self._failure
        started = time.monotonic()
        try:
            with waiting(f"vLLM is loading {self.model.name}") as note:
                for _ in range(_PORTS):
                    self._launch()
                    while (state := self._state()) == "loading":
                        if time.monotonic() - started > self._start_seconds:
                            raise self._failed(f"was not ready after {self._start_seconds:g} s", "see --vllm-timeout")
                        note(_PREFIX.sub("", "".join(self.tail(1)))[:80])
                        await asyncio.sleep(_POLL_SECONDS)
                    if state == "ready":
                        break
                    self.stop()
                else:
                    raise Unavailable(f"{_PORTS} ports in a row were taken from vLLM by others; try again")
            say(f"vLLM serves {self.model.name} after {time.monotonic() - started:.0f} s (log: {self.log})")
        except BaseException as error:
            self._failure = error if isinstance(error, Unavailable) else None
            self.stop()
            raise
        return self.url

    def _state(self) -> _State:
        if not self.running:
            if self._port_is_taken():
                return "port lost"
            raise self._failed(f"{self._describe_end()} before it was ready")
        asked = urllib.request.Request(f"{self.url}/health", headers={"Origin": self._page})
        try:
            with _open(asked, timeout=_ANSWER_SECONDS) as reply:
                return "ready" if reply.headers[_PAGE_HEADER] == self._page else "port lost"
        except OSError:  # not yet; or an answer of another process, which ends ours soon
            return "loading"
        except http.client.HTTPException:
            return "port lost"

    def _port_is_taken(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", int(self.url.rsplit(":", 1)[1]))) == 0

    def _launch(self) -> None:
        _give_back_gpu()
        port = _free_port()
        self.url, self._page = f"http://127.0.0.1:{port}", f"http://{secrets.token_hex(8)}.invalid"
        command = [
            *(str(self.python), "-m", "vllm.entrypoints.openai.api_server", *self.model.list_words()),
            *("--served-model-name", self.model.name, "--host", "127.0.0.1", "--port", str(port)),
            *("--allowed-origins", json.dumps([self._page])),
            *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
        ]
        kept = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), str(self._stop_seconds), *command]
        with self._open_log() as log:
            self._process = subprocess.Popen(
                kept,
                stdin=subprocess.PIPE,  # never written to: closing it is the signal to stop
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._make_environment(),
                start_new_session=True,
            )

    def _open_log(self) -> IO[bytes]:
        """Open the empty log. The server holds a lock on it as long as any of its processes lives."""
        first = self._first_log
        first.parent.mkdir(parents=True, exist_ok=True)
        for n in range(1, 1000):
            path = first if n == 1 else first.with_name(f"{first.stem}-{n}{first.suffix}")
            stream = path.open("ab")
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.close()
                continue
            stream.truncate(0)
            self.log = path
            return stream
        raise Unavailable(
            f"{str(first)!r} and its alternatives are all in use; stop some of the servers that write there"
        )

    def _make_environment(self) -> dict[str, str]:
        """Return our environment without keys, and with settings that let vLLM share the machine."""
        secret = {*KEY_VARIABLES, "VLLM_API_KEY"}
        values = {key: value for key, value in os.environ.items() if key not in secret}
        values.setdefault("VLLM_NO_USAGE_STATS", "1")
        values.setdefault("VLLM_CPU_KVCACHE_SPACE", str(choose_cache_gib(free_host_bytes(), self.model.weight_bytes())))
        if self.model.is_local:
            values.setdefault("HF_HUB_OFFLINE", "1")
        return values

    # --- while it runs ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raise Unavailable if the server was started and has ended by itself, after showing the end of its log."""
        if self._process is not None and not self.running:
            raise self._failed(f"{self._describe_end()} while it was being asked")

    def tail(self, lines: int = _LINES_SHOWN) -> list[str]:
        """Return the last lines of the log."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                text = stream.read().decode(errors="replace")
        except OSError:
            return []
        return [line.rstrip()[:_LONGEST_LINE] for line in text.splitlines() if line.strip()][-lines:]

    def _describe_end(self) -> str:
        code = self._process.poll() if self._process is not None else None
        if code is None or 0 <= code <= 128:
            return f"ended with code {code}"
        number = -code if code < 0 else code - 128
        return f"was ended by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"

    def _failed(self, event: str, advice: str = "") -> Unavailable:
        """Show the end of the log and return the error."""
        lines = self.tail(10**6)
        say(f"the last lines of {self.log}:")
        for line in lines[-_LINES_SHOWN:]:
            say(f"  {line}")
        text = "\n".join([event, *(line for line in lines if _ERROR.search(line))])
        advice = advice or next((words for sign, words in _ADVICE if sign.search(text)), "see its log")
        return Unavailable(f"vLLM {event}{_find_cause(lines)}; {advice} (log: {self.log})")

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the server and everything it started, if it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        # An interruption here does no harm: the keeper continues without us.
        try:
            process.wait(2 * self._stop_seconds + 10)
        except subprocess.TimeoutExpired:
            process.kill()  # the kernel then signals the server
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _give_back_gpu() -> None:
    """Return the GPU memory that PyTorch still holds after its work: vLLM takes nearly all of it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def choose_cache_gib(free: int | None, weights: int) -> int:
    """Return the GiB for vLLM's KV cache on a CPU: by default vLLM takes nearly all of the machine.

    A quarter of the ``free`` bytes (``None``: not known) that a model with ``weights`` bytes of weights leaves.
    """
    left = (free or 0) - 2 * weights  # while they are read, they may be in memory twice
    return max(1, min(_MOST_CACHE_GIB, left // 4 >> 30))


def _find_cause(lines: list[str]) -> str:
    """Return the last error in the log that says more than that there was one."""
    for line in reversed(lines):
        found = _ERROR.search(line)
        if found and "See root cause above" not in line:
            return f": {found[0][:200]}"
    return ""


# --- the server of a command ------------------------------------------------------------------------------------------


class OneServer:
    """At most one server at a time, kept while the next part of a command asks the same model.

    If explainer and judge are one model, it is loaded once. If they differ, the first is stopped before the second
    starts, because one of them may fill the machine.
    """

    def __init__(self) -> None:
        self._server: VllmServer | None = None

    def __enter__(self) -> OneServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, options: LlmOptions, root: Path) -> VllmServer:
        """Return the server that ``options`` ask for, running or not, and stop any other.

        :raises UserError: there is no such model, or no vLLM; see :mod:`autointerp.llm.local.model`.
        """
        assert options.vllm is not None
        if not options.vllm_timeout > 0:
            raise BadInput(f"--vllm-timeout {options.vllm_timeout:g}: give a number of seconds above 0")
        model = find_model(options.vllm, options.vllm_args, options.model)
        python = find_python(options.vllm_python)
        if self._server is None or (self._server.model, self._server.python) != (model, python):
            self.close()
            log = root / LOGS / f"vllm-{re.sub(r'[^A-Za-z0-9._+-]+', '-', model.name)[:100]}.log"
            self._server = VllmServer(model, python, log, start_seconds=options.vllm_timeout)
        return self._server

    def close(self) -> None:
        """Stop the server."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()


@asynccontextmanager
async def open_server(options: LlmOptions, root: Path, kept: OneServer | None = None) -> AsyncIterator[VllmServer]:
    """Yield the server that ``options`` ask for, not started. It ends with the block unless ``kept`` keeps it."""
    with OneServer() if kept is None else contextlib.nullcontext(kept) as servers:
        server = servers.get(options, root)
        try:
            yield server
        except Unavailable:
            server.check()  # if the server has ended, this error says more
            raise
