"""Show the stages of a command and estimate how long the rest takes.

The plan gives each stage's expected seconds on this machine. Once a stage's bar moves
(:func:`sae.common.progress.track`), its measured rate replaces its plan, and later stages are scaled by the geometric
mean of measured over expected seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sae.common import progress
from sae.common.amounts import duration
from sae.common.progress import Bar, console, say

_PRIOR_SECONDS = 1.0  # of expected work: the weight of the plan against the measured rate
_FULL_WEIGHT_SECONDS = 10.0  # of expected work, above which a stage has full weight in the mean
_MARKS = {"done": ("✓", "+"), "running": ("▸", ">"), "to come": ("·", ".")}  # with Unicode, without


class Cost(NamedTuple):
    """The seconds that a stage takes on this machine: before its bar moves, while it moves, and afterwards."""

    start: float
    work: float = 0.0
    end: float = 0.0


@dataclass
class Stage:
    """One stage of a command. ``bar`` is the start of its bar's label, ``None`` without a bar."""

    name: str
    bar: str | None
    cost: Cost
    state: Literal["to come", "running", "done"] = "to come"
    began: float = 0.0
    ended: float = 0.0
    moved: float | None = None  # time of the bar's first advance; start-up ends here
    last: float = 0.0  # time of its last advance
    first: float = 0.0  # the fraction done at the first advance
    fraction: float = 0.0  # the fraction done now
    bar_ended: float | None = None

    @property
    def measured(self) -> float:
        """Seconds in which the bar moved; without a bar, the seconds of the whole stage."""
        if self.bar is None:
            return (self.ended - self.began) if self.ended else 0.0
        return 0.0 if self.moved is None else self.last - self.moved

    @property
    def expected(self) -> float:
        """Seconds in the plan for the same work."""
        if self.bar is None:
            return self.cost.start if self.ended else 0.0
        return self.cost.work * (self.fraction - self.first)

    def actual(self) -> Cost:
        """Return the measured cost of a finished stage that did all its work in this call."""
        if self.moved is None:
            return Cost(self.ended - self.began)
        whole = self.measured / max(self.fraction - self.first, 1e-9)
        bar_ended = self.last if self.bar_ended is None else self.bar_ended
        start = max(0.0, self.moved - self.began - whole * self.first)  # the first advance is work
        return Cost(start, whole, self.ended - bar_ended)


class Overview:
    """The progress of a command's stages, in their order; an earlier call has finished those in ``done``."""

    def __init__(
        self, stages: Sequence[Stage], done: Collection[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stages, self._clock, self._began = list(stages), clock, clock()
        for stage in self.stages:
            if stage.name in done:
                stage.state = "done"

    def begin(self, name: str) -> None:
        """Start the stage ``name`` and end those before it."""
        at = next(i for i, stage in enumerate(self.stages) if stage.name == name)
        for stage in self.stages[:at]:
            self._end(stage)
        if self.stages[at].state != "done":
            self._start(self.stages[at])

    def expect(self, costs: Mapping[str, Cost]) -> None:
        """Replace the plan of some stages."""
        for stage in self.stages:
            stage.cost = costs.get(stage.name, stage.cost)

    def finish(self) -> None:
        for stage in self.stages:
            self._end(stage)

    def watch(self, bar: Bar) -> None:
        """Update the stage whose bar has started, advanced or ended."""
        running = next((i for i, stage in enumerate(self.stages) if stage.state == "running"), 0)
        stage = next((s for s in self.stages[running:] if s.bar and bar.label.startswith(s.bar)), None)
        if stage is None or not bar.total > 0:
            return
        if stage.state != "running":
            self.begin(stage.name)
            self._start(stage)  # even if an earlier call had finished it: its inputs have changed
        now = self._clock()
        if bar.has_ended:
            stage.bar_ended = now
        elif bar.done > bar.first:
            stage.last = now
            stage.fraction = min(bar.done / bar.total, 1.0)
            if stage.moved is None:
                stage.moved, stage.first = now, stage.fraction

    def _start(self, stage: Stage) -> None:
        stage.state, stage.began = "running", self._clock()

    def _end(self, stage: Stage) -> None:
        if stage.state == "running":
            stage.ended = self._clock()
            if not console.is_terminal:
                stage.state = "done"
                left = f"; about {duration(self.left())} left" if self.left() else ""
                say(f"{stage.name}: done in {duration(stage.ended - stage.began)}{left}")
        stage.state = "done"

    def elapsed(self) -> float:
        return self._clock() - self._began

    def left(self) -> float:
        return sum(self.left_of(stage) for stage in self.stages)

    def left_of(self, stage: Stage) -> float:
        if stage.state == "done":
            return 0.0
        others = [other for other in self.stages if other is not stage and min(other.expected, other.measured) > 0]
        weights = [min(other.expected, _FULL_WEIGHT_SECONDS) for other in others]
        logs = [math.log(other.measured / other.expected) for other in others]
        ratio = math.exp(sum(w * x for w, x in zip(weights, logs, strict=True)) / (_PRIOR_SECONDS + sum(weights)))
        start, work, end = (seconds * ratio for seconds in stage.cost)
        if stage.state == "to come":
            return start + work + end
        now = self._clock()
        if stage.bar_ended is not None:
            return max(0.0, end - (now - stage.bar_ended))
        if stage.moved is None:
            return max(0.0, start - (now - stage.began)) + work + end
        # Work may be uneven, so a plan that other stages have confirmed has the weight of up to half the work.
        confirmed = sum(other.expected for other in others if other.bar)
        prior = min(_PRIOR_SECONDS + confirmed, stage.cost.work / 2)
        own = (prior * ratio + stage.measured) / max(prior + stage.expected, 1e-9)
        work = own * stage.cost.work * (1 - stage.fraction)
        return max(0.0, work - (now - stage.last)) + end

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the stages while the block runs: live on a terminal, elsewhere as one line per stage."""
        progress.watcher = self.watch
        try:
            if not console.is_terminal:
                waiting = [f"{s.name} {duration(self.left_of(s))}" for s in self.stages if s.state != "done"]
                say(f"about {duration(self.left())} in all: {', '.join(waiting)}")
            with Live(get_renderable=self.render, console=console) if console.is_terminal else nullcontext():
                yield
                self.finish()
        finally:
            progress.watcher = None

    def render(self) -> Group:
        """Draw one line per stage and one for the whole command."""
        table = Table.grid(padding=(0, 1))
        for overflow in ("ellipsis", "crop", "ellipsis"):
            table.add_column(no_wrap=True, overflow=overflow)
        plain = console.options.ascii_only
        for stage in self.stages:
            style = {"done": "dim", "running": "bold", "to come": ""}[stage.state]
            table.add_row(_MARKS[stage.state][plain], stage.name, self._time_of(stage), style=style)
        left, total = self.left(), self.left() + self.elapsed()
        running = any(stage.state != "done" for stage in self.stages)
        whole = f"about {duration(left)} left of {duration(total)}" if running else f"done in {duration(total)}"
        return Group(table, Text(whole, no_wrap=True, overflow="crop"))

    def _time_of(self, stage: Stage) -> str:
        if stage.state == "to come":
            return f"about {duration(self.left_of(stage))}"
        if stage.state == "running":
            so_far = self._clock() - stage.began
            return f"{duration(so_far)} of {duration(so_far + self.left_of(stage))}"
        return duration(stage.ended - stage.began) if stage.ended else "done before"


class Speed(NamedTuple):
    """Seconds that this machine needs for a fixed Python loop and fixed matrix products."""

    python: float
    matmul: float


def measure_speed() -> Speed:
    """Time a Python loop and a few matrix products, about 0.2 s together."""
    import numpy as np

    began = time.perf_counter()
    counts: dict[tuple[int, int], int] = {}
    for i in range(200_000):
        key = i % 97, i % 89
        counts[key] = counts.get(key, 0) + 1
    python = time.perf_counter() - began
    a = np.ones((1024, 512), np.float32)
    a @ a.T  # starts the threads
    began = time.perf_counter()
    for _ in range(4):
        a @ a.T
    return Speed(python, time.perf_counter() - began)
