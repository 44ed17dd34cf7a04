"""An interpreter that seems to have vLLM: the fake package of ``fake_vllm/``, whose behaviour a test can set."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


class FakeVllm:
    """``FakeVllm(folder)``; ``python`` is what ``--vllm-python`` is given."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.python = folder / "python with vllm"
        self._how, self._record = folder / "how.json", folder / "record.jsonl"
        path = os.pathsep.join([str(_HERE / "fake_vllm"), str(_HERE)])
        self.python.write_text(
            f'#!/bin/sh\nPYTHONPATH={shlex.quote(path)} FAKE_VLLM="$(cat {shlex.quote(str(self._how))})" '
            f'exec {shlex.quote(sys.executable)} "$@"\n'
        )
        self.python.chmod(0o755)
        self.behave()

    def behave(self, **how: Any) -> None:
        """From the next start on: see ``fake_vllm/vllm/entrypoints/openai/api_server.py``."""
        self._how.write_text(json.dumps({"record": str(self._record), **how}))

    def starts(self) -> list[dict[str, Any]]:
        """What each start so far left: ``pids``, ``arguments``, ``environment``; ``beside``: what still ran then."""
        return [json.loads(line) for line in self._record.read_text().splitlines()] if self._record.exists() else []

    def living(self) -> list[int]:
        """The processes of all starts that are there now."""
        return [pid for start in self.starts() for pid in start["pids"] if alive(pid)]

    def wait_for_start(self, n: int = 1) -> dict[str, Any]:
        """The ``n``-th start, once it has happened."""
        end = time.monotonic() + 60
        while len(self.starts()) < n:
            assert time.monotonic() < end, "it was not started"
            time.sleep(0.05)
        return self.starts()[n - 1]

    def wait_for_end(self, seconds: float = 20) -> None:
        """Until nothing that was started is left."""
        end = time.monotonic() + seconds
        while left := self.living():
            assert time.monotonic() < end, f"processes {left} are still there"
            time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and was not yet cleared away."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def heed_interrupts() -> None:
    """For ``preexec_fn``: a command begun in a shell's background ignores Ctrl-C, and so would all that tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
