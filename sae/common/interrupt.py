"""Ctrl-C and SIGTERM while a step runs: remembered, so that the step can end and what it did be written first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from sae.common import launch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAID = {
    signal.SIGINT: b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n",
    signal.SIGTERM: b"\nstopping after this step, with a checkpoint\n",
}


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


class Interrupt:
    """Handed out by :func:`deferred`; ``signal`` is the one that came, 0 while there is none."""

    def __init__(self) -> None:
        self.signal = 0
        self.before: dict[signal.Signals, Any] = {}

    def arrived(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first signal; act on a second one as if nothing had been remembered."""
        if not self.signal:
            self.signal = number
            if launch.rank() == 0:
                os.write(2, _SAID[signal.Signals(number)])  # nothing else may be called within a signal's handler
        elif not launch.launched():  # torchrun passes on to its ranks what the terminal has sent them already
            self.restore()
            signal.raise_signal(number)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """Remember Ctrl-C and SIGTERM instead of acting on them, for as long as the block lasts.

    The block looks at ``signal`` now and then and calls :func:`end_by`; what comes too late for that takes effect when
    the block ends. A second signal acts at once. Signals that the process ignores are still ignored, and outside the
    main thread, where Python allows no handlers, nothing changes.
    """
    interrupt = Interrupt()
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                interrupt.before[number] = handler
                signal.signal(number, interrupt.arrived)
    try:
        yield interrupt
    finally:
        interrupt.restore()
    if interrupt.signal:
        end_by(interrupt.signal)


def end_by(number: int) -> NoReturn:
    """Raise what stands for a signal."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
