"""`python cli.py …` that kills itself at a given moment, as `kill -9` would: no handler, no clean-up, no flush.

    python dying_cli.py MOMENT [DELAY] -- arguments of cli.py

Moments are counted in *durable steps*: a file or folder renamed or deleted, an SQL statement that writes. Just
before the MOMENT-th the process dies or, with a DELAY, that many seconds after it. MOMENT 0: it lives, and says
at its end how many there were. Counting steps and not seconds makes the moments the same on any machine.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
STEPS = {"os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITES = ("INSERT", "COMMIT", "UPDATE", "DELETE", "CREATE")
TOTAL = "durable steps:"
_connect = sqlite3.connect


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Clock:
    """Counts the durable steps of this process, and ends it at the right one."""

    def __init__(self, moment: int, delay: float, root: str) -> None:
        self.moment, self.delay, self.root, self.steps = moment, delay, root, 0

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in STEPS and any(self.root in str(argument) for argument in arguments[:2]):
            self.step()

    def connect(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = _connect(*arguments, **options)
        connection.set_trace_callback(lambda sql: self.step() if sql.lstrip().startswith(WRITES) else None)
        return connection

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.moment:
            if not self.delay:
                die()
            threading.Timer(self.delay, die).start()


def main() -> None:
    split = sys.argv.index("--")
    moment, delay = int(sys.argv[1]), float(sys.argv[2]) if split > 2 else 0.0
    arguments = sys.argv[split + 1 :]
    clock = Clock(moment, delay, arguments[arguments.index("--root") + 1])
    sys.addaudithook(clock.hook)
    sqlite3.connect = clock.connect  # type: ignore[assignment]
    sys.path.insert(0, str(REPOSITORY))
    if recipe := os.environ.get("DEMO_RECIPE"):
        import autointerp.command_line.demo

        autointerp.command_line.demo.RECIPE = Path(recipe)
    import cli

    sys.argv = ["cli.py", *arguments]
    try:
        cli.main()
    finally:
        print(TOTAL, clock.steps, file=sys.stderr)


if __name__ == "__main__":
    main()
