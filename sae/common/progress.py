"""Show the progress of long work on standard error: a bar on a terminal, elsewhere a line every half minute.

Each bar ends with one line: amount, rate, and the peak memory of the process so far.
"""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from sae.common import launch
from sae.common.amounts import human
from sae.common.errors import make_printable

console = Console(stderr=True, highlight=False, emoji=False, quiet=launch.rank() != 0)  # only rank 0 prints
_PLAIN_LINE_SECONDS = 30.0
_waited = 0.0  # seconds that this process has spent in `waiting`
watcher: Callable[[Bar], None] | None = None  # gets each bar that starts, advances or ends without an error


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int:
    """Return the most memory that this process has allocated on GPUs, in bytes."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def say(message: str) -> None:
    """Print one line on standard error. ``message`` is plain text, not markup."""
    console.print(escape(make_printable(message)), soft_wrap=True)


@functools.cache
def say_once(message: str) -> None:
    """Print a line the first time that this process is asked to."""
    say(message)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{human(speed)} {task.fields['unit']}/s", style="dim")


class Bar:
    """A progress bar, made by :func:`track`. ``advance`` moves it and may show a short note next to it."""

    def __init__(self, progress: Progress | None, label: str, total: float, unit: str, done: float) -> None:
        self.done = done
        self.first = done
        self.has_ended = False
        self._progress, self.label, self.total, self._unit = progress, label, total, unit
        self._started = self._last_line = time.monotonic()
        self._waited_before = _waited
        self._note = ""
        if progress:
            self._task = progress.add_task(escape(label), total=total, completed=int(done), unit=unit, note="")

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        self.notify()
        self._note = note or self._note
        if self._progress is not None:
            self._progress.update(self._task, advance=amount, note=escape(self._note))
        elif time.monotonic() - self._last_line > _PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            seconds = self._seconds(self._last_line)
            rate = (self.done - self.first) / seconds if seconds else 0
            left = (self.total - self.done) / rate if rate else float("inf")
            done = f"{human(self.done)} of {human(self.total)} {self._unit}"
            say(f"{self.label}: {done}, {left:.0f} s left {self._note}".rstrip())

    def notify(self) -> None:
        if watcher is not None:
            watcher(self)

    def _seconds(self, now: float) -> float:
        return max(0.0, now - self._started - (_waited - self._waited_before))

    def summary(self) -> str:
        seconds = self._seconds(time.monotonic())
        worked, on_gpu = self.done - self.first, peak_device_bytes()
        unit = self._unit.removesuffix("s") if worked == 1 else self._unit
        gpu = f", on the GPU {on_gpu / 2**30:.2f} GiB" if on_gpu else ""
        return (
            f"{self.label}: {human(worked)} {unit} in {seconds:.1f} s · {human(worked / seconds if seconds else 0)} "
            f"{self._unit}/s · peak memory {peak_memory_bytes() / 2**30:.2f} GiB{gpu}"
        )


@contextmanager
def track(label: str, total: float, unit: str = "steps", done: float = 0) -> Iterator[Bar]:
    """Show progress over ``total`` units, ``done`` of them before; end with amount, rate and peak memory."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="crop")),
    )
    live: AbstractContextManager[Progress | None]
    live = Progress(*columns, console=console, transient=True) if console.is_terminal else nullcontext()
    with live as progress:
        bar = Bar(progress, label, total, unit, done)
        bar.notify()
        yield bar
    bar.has_ended = True
    bar.notify()
    say(bar.summary())


@contextmanager
def waiting(label: str) -> Iterator[Callable[[str], None]]:
    """Show how long the program waits for something, such as a server; bars do not count this time in their rates.

    Yields a function that updates the note.
    """
    global _waited
    started = last_line = time.monotonic()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task(escape(make_printable(label)), total=None, note="")

    def show(note: str) -> None:
        nonlocal last_line
        progress.update(task, note=escape(make_printable(note)), refresh=True)
        if progress.disable and time.monotonic() - last_line > _PLAIN_LINE_SECONDS:
            last_line = time.monotonic()
            say(f"{label}: {last_line - started:.0f} s {note}".rstrip())

    try:
        with progress:
            yield show
    finally:
        _waited += time.monotonic() - started
