"""End a server that this program started, however this program ends.

A killed program (``kill -9``, out of memory) cannot stop its server. So this process stands between them and holds one
end of a pipe. When the program's end closes, this process ends the server and everything it started: first by asking,
then by killing.

``PR_SET_PDEATHSIG`` reaches only the first process, can be ignored, and acts when the starting *thread* ends, so it is
only a second line in case this process is killed. ``PR_SET_CHILD_SUBREAPER`` gives the server's orphans to this
process, because the first process of a container may not reap them. The server's temporary files (mostly sockets) are
in a folder that is deleted at its end.

Run as ``python keeper.py PARENT GRACE COMMAND…`` with the pipe as standard input: the program's process id, and the
seconds between asking and killing. It exits as the server did. It imports nothing of ours.
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
    """Call Linux's ``prctl``; do nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class _Family:
    """A process that leads a process group, and its orphans."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.leader = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: _control(_PDEATHSIG, signal.SIGTERM),
        ).pid
        self.status: int | None = None

    def has_ended(self) -> bool:
        """Return whether the first process has ended, and reap all ended ones."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.leader:
                    self.status = os.waitstatus_to_exitcode(found[1])
        return self.status is not None

    def end(self, grace: float) -> None:
        """Ask all of them to end, and kill the rest after ``grace`` seconds."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            self._send(how)
            until = time.monotonic() + grace
            while time.monotonic() < until:
                self.has_ended()
                if not self._send(0):
                    return
                time.sleep(0.02)

    def _send(self, how: int) -> bool:
        try:
            os.killpg(self.leader, how)
        except (ProcessLookupError, PermissionError):  # the latter of dead ones, on macOS
            return False
        return True


def main(parent: int, grace: float, command: list[str]) -> int:
    """Run ``command`` until it ends, the pipe is closed or the parent is gone; return its exit code."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.append(1))
    _control(_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True) as scratch:
        # PyTorch's compiled code stays where it always is.
        compiled = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        family = _Family(command, {"TORCHINDUCTOR_CACHE_DIR": compiled, **os.environ, "TMPDIR": scratch})
        while not family.has_ended() and not asked and os.getppid() == parent:
            if select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
                break
        family.end(grace)
    # Ended by a signal: the code that shells use.
    status = family.status if family.status is not None else -signal.SIGKILL
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
