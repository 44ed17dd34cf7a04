"""Finish the current training step on Ctrl-C or SIGTERM, so that a checkpoint can be written before stopping."""

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
    """Raised for SIGTERM, as KeyboardInterrupt is for SIGINT."""


class Interrupt:
    """``signal`` is the first signal that arrived, or 0. Made by :func:`defer_interrupts`."""

    def __init__(self) -> None:
        self.signal = 0
        self.before: dict[signal.Signals, Any] = {}

    def arrived(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first signal; act on a second one at once."""
        if not self.signal:
            self.signal = number
            if launch.rank() == 0:
                os.write(2, _SAID[signal.Signals(number)])  # print is not safe in a signal handler
        elif not launch.launched():  # torchrun repeats to its ranks a signal that the terminal has already sent them
            self.restore()
            signal.raise_signal(number)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


@contextmanager
def defer_interrupts() -> Iterator[Interrupt]:
    """Remember Ctrl-C and SIGTERM while the block runs, instead of acting on them.

    The block checks ``signal`` and calls :func:`raise_signal`; a later signal takes effect when the block ends, a
    second one at once. Ignored signals stay ignored. Does nothing outside the main thread.
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
        raise_signal(interrupt.signal)


def raise_signal(number: int) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
