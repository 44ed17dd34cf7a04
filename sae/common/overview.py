"""Progress of a command of several stages: which stage runs, and how long the whole command takes.

The estimate starts from a plan: the seconds that each stage is expected to take on this machine. Once the bar of a
stage moves (:func:`sae.common.progress.track`), its measured rate replaces the plan of that stage. The plan of the
stages to come is scaled by the ratio of measured to expected seconds: its geometric mean over the stages so far, since
a machine may be fast at one kind of work and slow at another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sae.common import progress
from sae.common.amounts import duration
from sae.common.progress import Bar, console, say

_PRIOR_SECONDS = 1.0  # of expected work: the weight of the plan against what was measured
_FULL_WEIGHT_SECONDS = 10.0  # of expected work, from which on a stage counts fully in the mean over stages
_MARKS = {"done": ("✓", "+"), "running": ("▸", ">"), "to come": ("·", ".")}  # the second ones where there is no Unicode


class Cost(NamedTuple):
    """The seconds that a stage takes on this machine."""

    start: float
    """before its bar moves"""
    work: float = 0.0
    """while its bar moves"""
    end: float = 0.0
    """after its bar"""


@dataclass
class Stage:
    """One stage of the command. ``bar`` is how the label of its bar starts; ``None`` where it has none."""

    name: str
    bar: str | None
    cost: Cost
    state: Literal["to come", "running", "done"] = "to come"
    began: float = 0.0
    ended: float = 0.0
    moved: float | None = None  # when its bar first advanced; what came before is start-up
    last: float = 0.0  # when its bar last advanced
    first: float = 0.0  # the fraction of the bar that was done when it first advanced
    fraction: float = 0.0  # that is done by now
    bar_ended: float | None = None

    @property
    def measured(self) -> float:
        """Seconds in which the bar moved; of a stage without one, that it took."""
        if self.bar is None:
            return (self.ended - self.began) if self.ended else 0.0
        return 0.0 if self.moved is None else self.last - self.moved

    @property
    def expected(self) -> float:
        """Seconds that the plan has for the same work."""
        if self.bar is None:
            return self.cost.start if self.ended else 0.0
        return self.cost.work * (self.fraction - self.first)

    def actual(self) -> Cost:
        """What a stage that is done took. Only of use where it did all its work, none of it in an earlier call."""
        if self.moved is None:
            return Cost(self.ended - self.began)
        whole = self.measured / max(self.fraction - self.first, 1e-9)
        bar_ended = self.last if self.bar_ended is None else self.bar_ended
        start = max(0.0, self.moved - self.began - whole * self.first)  # the first advance is work too
        return Cost(start, whole, self.ended - bar_ended)


class Overview:
    """What the stages of a command have done, and an estimate of the rest.

    Args:
        stages: in the order in which they run.
        done: names of those that an earlier call has finished: they cost nothing.
        clock: seconds.
    """

    def __init__(
        self, stages: Sequence[Stage], done: Collection[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stages, self._clock, self._began = list(stages), clock, clock()
        for stage in self.stages:
            if stage.name in done:
                stage.state = "done"

    # --- what happens -----------------------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """The stage ``name`` starts; the stages before it are done."""
        at = next(i for i, stage in enumerate(self.stages) if stage.name == name)
        for stage in self.stages[:at]:
            self._end(stage)
        if self.stages[at].state != "done":
            self._start(self.stages[at])

    def expect(self, costs: Mapping[str, Cost]) -> None:
        """Replace the plan of the stages named."""
        for stage in self.stages:
            stage.cost = costs.get(stage.name, stage.cost)

    def finish(self) -> None:
        """The command is done."""
        for stage in self.stages:
            self._end(stage)

    def watch(self, bar: Bar) -> None:
        """A bar has started, advanced or ended."""
        running = next((i for i, stage in enumerate(self.stages) if stage.state == "running"), 0)
        named = (stage for stage in self.stages[running:] if stage.bar and bar.label.startswith(stage.bar))
        stage = next(named, None)
        if stage is None or not bar.total > 0:
            return
        if stage.state != "running":
            self.begin(stage.name)
            self._start(stage)  # also one that an earlier call had finished: its inputs have changed
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

    # --- the estimate -----------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds since the command started."""
        return self._clock() - self._began

    def left(self) -> float:
        """Seconds that the rest is estimated to take."""
        return sum(self.left_of(stage) for stage in self.stages)

    def left_of(self, stage: Stage) -> float:
        """Seconds that the rest of one stage is estimated to take."""
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
        # The work of a stage need not be even: where other stages have confirmed the plan, it counts for half the work.
        confirmed = sum(other.expected for other in others if other.bar)
        prior = min(_PRIOR_SECONDS + confirmed, stage.cost.work / 2)
        own = (prior * ratio + stage.measured) / max(prior + stage.expected, 1e-9)
        work = own * stage.cost.work * (1 - stage.fraction)
        return max(0.0, work - (now - stage.last)) + end

    # --- what is shown ----------------------------------------------------------------------------------------

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the stages while the block runs: at a terminal as a live block, elsewhere in a line per stage."""
        progress.watcher = self.watch
        try:
            if console.is_terminal:
                with Live(get_renderable=self.render, console=console):
                    yield
                    self.finish()
            else:
                waiting = [f"{s.name} {duration(self.left_of(s))}" for s in self.stages if s.state != "done"]
                say(f"about {duration(self.left())} in all: {', '.join(waiting)}")
                yield
                self.finish()
        finally:
            progress.watcher = None

    def render(self) -> Group:
        """A line for each stage, and one for the whole."""
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="crop")
        table.add_column(no_wrap=True)
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


# --- how fast this machine is -----------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Seconds that two small fixed pieces of work take: the lower, the faster the machine."""

    python: float
    matmul: float


def measure_speed() -> Speed:
    """Time a loop of Python and a few products of matrices; together about a fifth of a second."""
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
