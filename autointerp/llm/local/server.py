"""A vLLM server of our own, on this machine alone, for as long as a command needs it.

It is started when the first question goes out that nobody has answered yet, not before: loading a model takes minutes,
and a command that finds everything in the journal or among the kept answers needs none. A keeper process stands between
(see ``keeper``), so that the server ends with us, however we end.

The port is free when it is chosen and may be taken a moment later. So the server is told of a web page that nobody else
can know of, the only one whose scripts it lets read its answers: what says so at the port is our server, and anything
else means another port. It also keeps the pages of a browser on this machine from asking it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
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
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO

from autointerp.llm.endpoint import KEY_VARIABLES
from autointerp.llm.local import keeper
from autointerp.llm.local.model import INSTALL, VllmModel
from autointerp.llm.options import VLLM_TIMEOUT
from sae.common.errors import Unavailable
from sae.common.memory import free_host_bytes
from sae.common.progress import say, waiting

STOP_SECONDS = 20.0
_LOOK_SECONDS, _ANSWER_SECONDS = 0.5, 2.0
_PORTS = 3
_LINES_SHOWN, _LONGEST_LINE = 20, 300
_TAIL_BYTES = 64 << 10
_PAGE_HEADER = "access-control-allow-origin"
_MOST_CACHE_GIB = 16

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy lies between us and ourselves
_ERROR = re.compile(r"\b(\w+(Error|Exception|Exit): |error: |No module named ).+")
_LESS = "let it take less (--vllm-args '--max-model-len 4096', '--gpu-memory-utilization 0.7'), or take a smaller model"
_ADVICE = (
    (re.compile(r"No module named|cannot import name"), f"{INSTALL}, or name another with --vllm-python"),
    (re.compile(r"unrecognized arguments|invalid choice|error: argument"), "mend --vllm-args"),
    (re.compile(r"trust.remote.code"), "name a model that vLLM has a class for: a model's own code is not run"),
    (re.compile(r"out of memory|[Mm]emory on (node|device)|[Nn]o available memory|KV cache|by SIGKILL"), _LESS),
)
_PREFIX = re.compile(r"^(\(\S+( pid=\d+)?\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (\[[^\]]*\] )?)?")


class _State(enum.Enum):
    LOADING = enum.auto()
    READY = enum.auto()
    PORT_LOST = enum.auto()
    """Somebody else answers at the port, or our server could not have it."""


class VllmServer:
    """``with VllmServer(model, python, log) as server: url = server.start()``; in a coroutine ``await server.ready()``.

    Nothing runs before that. However the block ends, nothing runs after it.

    :param model: what is served, and under which name.
    :param python: an interpreter that has vLLM.
    :param log: where the server writes. Overwritten, unless another server is writing there: then the next free name.
    :param start_seconds: how long it may take until it answers.
    :param stop_seconds: how long it may take to end when it is asked to, before it is killed.
    :param environment: added to what this process has.
    """

    def __init__(
        self,
        model: VllmModel,
        python: Path,
        log: Path,
        *,
        start_seconds: float = VLLM_TIMEOUT,
        stop_seconds: float = STOP_SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.python = model, python
        self.log = self._first_log = log
        self.url = ""
        self._start_seconds, self._stop_seconds = start_seconds, stop_seconds
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._page = ""
        self._failure: Unavailable | None = None

    @property
    def name(self) -> str:
        """What the model is called in requests."""
        return self.model.name

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- starting -----------------------------------------------------------------------------------------------------

    def start(self) -> str:
        """Start the server unless it runs, wait until it answers, and return its address.

        :raises Unavailable: it ends before it is ready, or is not ready in time; the end of its log has been shown.
        """
        with contextlib.closing(self._starting()) as steps:
            for _ in steps:
                time.sleep(_LOOK_SECONDS)
        return self.url

    async def ready(self) -> str:
        """As :meth:`start`, leaving others their turn meanwhile."""
        with contextlib.closing(self._starting()) as steps:
            for _ in steps:
                await asyncio.sleep(_LOOK_SECONDS)
        return self.url

    def _starting(self) -> Generator[None]:
        """Yields whenever there is nothing to do but wait; ends when the server answers."""
        if self.running:
            return
        if self._failure is not None:  # of many who wait for it, one learns first; the others must not try again
            raise self._failure
        started = time.monotonic()
        try:
            with waiting(f"vLLM is loading {self.name}") as note:
                for _ in range(_PORTS):
                    self._launch()
                    while (state := self._state()) is _State.LOADING:
                        if time.monotonic() - started > self._start_seconds:
                            raise self._failed(f"was not ready after {self._start_seconds:g} s", "see --vllm-timeout")
                        note(_message(self.tail(1)))
                        yield
                    if state is _State.READY:
                        break
                    self.stop()
                else:
                    raise Unavailable(f"{_PORTS} ports in a row were taken from vLLM by others; try again")
            say(f"vLLM serves {self.name} after {time.monotonic() - started:.0f} s (log: {self.log})")
        except BaseException as error:
            self._failure = error if isinstance(error, Unavailable) else None
            self.stop()
            raise

    def _state(self) -> _State:
        if not self.running:
            if self._somebody_listens():
                return _State.PORT_LOST
            raise self._failed(f"{self._how_it_ended()} before it was ready")
        asked = urllib.request.Request(f"{self.url}/health", headers={"Origin": self._page})
        try:
            with _open(asked, timeout=_ANSWER_SECONDS) as reply:
                return _State.READY if reply.headers[_PAGE_HEADER] == self._page else _State.PORT_LOST
        except OSError:  # not yet; or an answer of somebody else's, which ends ours soon
            return _State.LOADING
        except http.client.HTTPException:
            return _State.PORT_LOST

    def _somebody_listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", int(self.url.rsplit(":", 1)[1]))) == 0

    def _launch(self) -> None:
        _give_back_gpu()
        port = _free_port()
        self.url, self._page = f"http://127.0.0.1:{port}", f"http://{secrets.token_hex(8)}.invalid"
        command = [
            *(str(self.python), "-m", "vllm.entrypoints.openai.api_server", *self.model.words()),
            *("--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(port)),
            *("--allowed-origins", json.dumps([self._page])),
            *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
        ]
        kept = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), str(self._stop_seconds), *command]
        with self._open_log() as log:
            self._process = subprocess.Popen(
                kept,
                stdin=subprocess.PIPE,  # never written to: its closing is the sign to stop
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._its_environment(),
                start_new_session=True,
            )

    def _open_log(self) -> IO[bytes]:
        """The log, empty. The lock on it is the server's as long as any part of it lives."""
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
        raise Unavailable(f"{str(first)!r} and its like are all in use; stop some of the servers that write there")

    def _its_environment(self) -> dict[str, str]:
        """Ours without keys (it is asked without one), and what makes vLLM fit a machine that is not its own."""
        secret = {*KEY_VARIABLES, "VLLM_API_KEY"}
        found = {key: value for key, value in os.environ.items() if key not in secret}
        found.setdefault("VLLM_NO_USAGE_STATS", "1")
        found.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib(free_host_bytes(), self.model.weight_bytes())))
        if self.model.local:
            found.setdefault("HF_HUB_OFFLINE", "1")
        return found | self._environment

    # --- while it runs ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Tell a server that has ended from one that merely did not answer.

        :raises Unavailable: it was started and has ended by itself; the end of its log has been shown.
        """
        if self._process is not None and not self.running:
            raise self._failed(f"{self._how_it_ended()} while it was being asked")

    def tail(self, lines: int = _LINES_SHOWN) -> list[str]:
        """The last lines that the server wrote, as they are."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                text = stream.read().decode(errors="replace")
        except OSError:
            return []
        return [line.rstrip()[:_LONGEST_LINE] for line in text.splitlines() if line.strip()][-lines:]

    def _how_it_ended(self) -> str:
        code = self._process.poll() if self._process is not None else None
        if code is None or 0 <= code <= 128:
            return f"ended with code {code}"
        number = -code if code < 0 else code - 128
        return f"was ended by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"

    def _failed(self, what: str, advice: str = "") -> Unavailable:
        """The error, after the end of the log has been shown."""
        lines = self.tail(10**6)
        say(f"the last lines of {self.log}:")
        for line in lines[-_LINES_SHOWN:]:
            say(f"  {line}")
        said = "\n".join([what, *(line for line in lines if _ERROR.search(line))])
        advice = advice or next((found for sign, found in _ADVICE if sign.search(said)), "see its log")
        return Unavailable(f"vLLM {what}{_cause(lines)}; {advice} (log: {self.log})")

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the server and everything it started; nothing happens where none runs."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        # An interruption here is no harm: the keeper goes on without us.
        try:
            process.wait(2 * self._stop_seconds + 10)
        except subprocess.TimeoutExpired:
            process.kill()  # of which the kernel tells the server
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _give_back_gpu() -> None:
    """Hand back what PyTorch keeps of a GPU's memory after its work is done: vLLM takes nearly all that there is."""
    torch = sys.modules.get("torch")  # who has not loaded it holds nothing by it
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def cache_gib(free: int | None, weights: int) -> int:
    """GiB for vLLM's cache of keys and values where it computes on the CPU: a quarter of what the weights leave.

    Left alone, it takes nearly all of the machine.

    :param free: bytes of main memory; ``None`` where it is not known.
    :param weights: bytes of the model.
    """
    left = (free or 0) - 2 * weights  # while they are read, they may be there twice
    return max(1, min(_MOST_CACHE_GIB, left // 4 >> 30))


def _message(lines: list[str]) -> str:
    """What a line of the log says, without who says it and when."""
    return _PREFIX.sub("", lines[-1])[:80] if lines else ""


def _cause(lines: list[str]) -> str:
    """The last error that is more than the news that there was one."""
    for line in reversed(lines):
        found = _ERROR.search(line)
        if found and "See root cause above" not in line:
            return f": {found[0][:200]}"
    return ""
