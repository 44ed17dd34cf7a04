"""The process between this program and a server that it started: it sees to it that the server does not outlive us.

A program that is killed outright (``kill -9``, out of memory) cannot stop anything any more. So somebody else has to:
this process holds one end of a pipe whose other end is held by the program alone. When that end is closed, on purpose
or because the program is gone, the server and all that it started are ended: asked first, then killed.

Linux alone has a simpler way (``PR_SET_PDEATHSIG``), but that reaches only the first process, can be ignored, and
strikes already when the *thread* ends that started the server. It is used here as a second line: should this process
be killed, the kernel tells the server. So is ``PR_SET_CHILD_SUBREAPER``, which hands what the server leaves behind to
this process and not to the system's first one, which in a container may clear nothing away.

The server's temporary files (sockets, mostly) are in a folder of their own, which goes when it has ended.

Run as ``python keeper.py PARENT GRACE COMMAND…``, standard input the pipe: the process id of the program, and how many
seconds the server has between being asked and being killed. It exits as the server did. It imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

_PDEATHSIG, _CHILD_SUBREAPER = 1, 36
_LOOK_SECONDS = 0.2


def _control(option: int, value: int) -> None:
    """Linux's ``prctl``; nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class _Family:
    """A process that leads a group of its own, and whatever it leaves behind."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.leader = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: _control(_PDEATHSIG, signal.SIGTERM),
        ).pid
        self.status: int | None = None

    def ended(self) -> bool:
        """Whether the first process has ended; those that have are cleared away."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.leader:
                    self.status = os.waitstatus_to_exitcode(found[1])
        return self.status is not None

    def end(self, grace: float) -> None:
        """Ask all of them to end, and kill those that have not after ``grace`` seconds."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            self._tell(how)
            until = time.monotonic() + grace
            while time.monotonic() < until:
                self.ended()
                if not self._tell(0):
                    return
                time.sleep(0.02)

    def _tell(self, how: int) -> bool:
        try:
            os.killpg(self.leader, how)
        except (ProcessLookupError, PermissionError):  # the latter of dead ones, on macOS
            return False
        return True


def _with_scratch(folder: str) -> dict[str, str]:
    """Our environment, with temporary files in ``folder``. What PyTorch compiles stays where later servers find it."""
    compiled = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    return {"TORCHINDUCTOR_CACHE_DIR": compiled, **os.environ, "TMPDIR": folder}


def main(parent: int, grace: float, command: list[str]) -> int:
    """Keep ``command`` until it ends, the pipe is closed or the parent is gone. Returns its exit code."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.append(1))
    _control(_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True) as scratch:
        family = _Family(command, _with_scratch(scratch))
        while not family.ended() and not asked and os.getppid() == parent:
            if select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
                break
        family.end(grace)
    # By a signal: as shells say it.
    status = family.status if family.status is not None else -signal.SIGKILL
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
