"""A vLLM server of its own on a free port of this machine, for the length of a ``with`` block."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-vllm" / "bin" / "python"
START_SECONDS = 600
_LINES_SHOWN = 40

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy lies between us and ourselves


def _end_with_parent() -> None:
    """Have Linux end this process when its parent is killed, which then cannot do it itself."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


class VllmServer:
    """``with VllmServer(model_folder, log_file) as server: … server.url …``

    The server runs in a process group of its own, which is stopped as a whole however the block ends.

    :raises RuntimeError: it is not installed, or ends or hangs before it is ready; with the last lines of its log.
    """

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        # The prompt's cached tokens are reported for the usage table; all else is as a user would start it, but that
        # nothing is compiled: that takes longer than these tests.
        self._command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", model.name, "--host", "127.0.0.1", "--port", str(port)),
            *("--enable-prompt-tokens-details", "--enforce-eager"),
        ]
        self._environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CACHE_ROOT": str(log.parent / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def __enter__(self) -> VllmServer:
        if not PYTHON.exists():
            raise RuntimeError(f"{PYTHON} does not exist: vLLM is not installed; `make test-integration` does that")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self._log.parent,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"vLLM ended with code {self._process.returncode}; its log ends\n{self.tail()}")
            try:
                with _open(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"vLLM was not ready after {START_SECONDS} s; its log ends\n{self.tail()}")

    def tail(self) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LINES_SHOWN:])

    def metric(self, name: str) -> float:
        """One of the server's counters, summed over its labels."""
        with _open(f"{self.url}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{", 1)[0].split(" ", 1)[0] == name]
        assert found, f"the server has no metric {name}"
        return sum(found)

    def stop(self) -> None:
        """End the server and everything it started; once is enough."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, how)
            except ProcessLookupError:
                break
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
