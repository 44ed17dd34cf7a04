"""The overview of a command: its estimate converges, never breaks, and its lines fit terminals and pipes."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sae.common import overview as module
from sae.common import progress
from sae.common.amounts import duration
from sae.common.overview import Cost, Overview, Stage, measure_speed
from sae.common.progress import Bar, track

PLAN = {
    "read the text": (None, Cost(start=6)),
    "train": ("train", Cost(start=8, work=120)),
    "harvest": ("harvest", Cost(start=1, work=15, end=1)),
    "score": ("score", Cost(start=1, work=60, end=20)),
    "report": (None, Cost(start=10)),
}


class Machine:
    """A command that does what ``PLAN`` has, on a clock of its own; what takes a second there takes ``slower`` here."""

    def __init__(self, slower: float = 1.0, done: tuple[str, ...] = ()) -> None:
        self.now, self.slower = 100.0, slower
        stages = [Stage(name, bar, cost) for name, (bar, cost) in PLAN.items()]
        self.overview = Overview(stages, done, lambda: self.now)
        self.estimates: list[tuple[float, float, float]] = []  # elapsed, left, when training moved or 0
        self.done = done

    def wait(self, seconds: float) -> None:
        self.now += seconds * self.slower
        self.note()

    def note(self) -> None:
        moved = self.overview.stages[1].moved
        self.estimates.append(
            (self.overview.elapsed(), self.overview.left(), 0.0 if moved is None else self.now - moved)
        )

    def run(self, steps: int = 300, trained: float = 0.0) -> None:
        """All stages; training resumes where ``trained``, a fraction of it, was done by an earlier call."""
        self.note()
        for name, (label, cost) in PLAN.items():
            if name != "train":  # as in the demo: reading and training are one call, which only the bars tell apart
                self.overview.begin(name)
            if name in self.done:
                continue
            first = round(trained * steps) if name == "train" else 0
            if label is None:
                self.wait(cost.start)
                continue
            bar = Bar(None, f"{label} demo", steps, "tokens", first)
            self.overview.watch(bar)
            self.wait(cost.start)
            for _ in range(first, steps):
                self.wait(cost.work / steps)
                bar.advance()
                self.overview.watch(bar)
                self.note()
            bar.has_ended = True
            self.overview.watch(bar)
            self.wait(cost.end)
        self.overview.finish()
        self.note()


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a pipe gets; no test of this file writes to a real terminal."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, highlight=False, width=60))
    monkeypatch.setattr(module, "console", progress.console)
    return out


@given(st.floats(0.3, 3), st.floats(0, 0.8))
def test_few_seconds_of_training_make_the_estimate_right(slower: float, trained: float) -> None:
    machine = Machine(slower)
    machine.run(trained=trained)
    whole = machine.overview.elapsed()
    late = [elapsed + left for elapsed, left, moved in machine.estimates if moved > 5]
    assert late
    assert all(abs(estimate / whole - 1) < 0.3 for estimate in late)


def test_exact_plan_gives_exact_estimates() -> None:
    machine = Machine()
    machine.run()
    whole = machine.overview.elapsed()
    assert whole == pytest.approx(242, rel=0.01)
    assert all(elapsed + left == pytest.approx(whole, rel=0.01) for elapsed, left, _ in machine.estimates)


@given(
    st.lists(st.tuples(st.sampled_from([*PLAN, "other"]), st.floats(0, 50), st.integers(0, 5)), max_size=30),
    st.sets(st.sampled_from([*PLAN])),
)
def test_estimate_is_never_negative_or_nan(events: list[tuple[str, float, int]], done: set[str]) -> None:
    machine = Machine(done=tuple(done))
    over = machine.overview
    counts = []
    for name, seconds, advances in events:
        if seconds < 10 and name in PLAN:
            over.begin(name)
        bar = Bar(None, name, advances, "steps", 0)
        over.watch(bar)
        for _ in range(advances):
            machine.now += seconds
            bar.advance(1.5)  # more than the bar's total in the end
            over.watch(bar)
        assert math.isfinite(over.left())
        assert over.left() >= 0
        counts.append(sum(stage.state == "running" for stage in over.stages))
    assert all(count <= 1 for count in counts)
    over.finish()
    assert over.left() == 0
    assert all(stage.state == "done" for stage in over.stages)


def test_stages_end_in_their_order() -> None:
    machine = Machine(2)
    states = []
    original = machine.note

    def note() -> None:
        original()
        states.append([stage.state for stage in machine.overview.stages])

    machine.note = note  # type: ignore[method-assign]
    machine.run(steps=10)
    order = {"to come": 0, "running": 1, "done": 2}
    for before, after in pairwise(states):
        assert all(order[a] <= order[b] for a, b in zip(before, after, strict=True))


def test_finished_stages_cost_nothing() -> None:
    machine = Machine(done=("read the text", "train", "harvest"))
    assert machine.overview.left() == pytest.approx(81 + 10)
    machine.run()
    assert machine.overview.elapsed() == pytest.approx(91)


def test_stage_that_was_done_may_run_again() -> None:
    machine = Machine(done=tuple(PLAN))
    bar = Bar(None, "train 3 seeds", 10, "tokens", 0)
    machine.overview.watch(bar)
    assert machine.overview.stages[1].state == "running"
    assert machine.overview.left() == pytest.approx(128)


def test_compilation_does_not_slow_the_measured_rate() -> None:
    machine = Machine()
    machine.overview.begin("train")
    bar = Bar(None, "train 3 seeds", 120, "tokens", 0)
    machine.overview.watch(bar)
    machine.now += 40
    for _ in range(11):
        machine.now += 1
        bar.advance()
        machine.overview.watch(bar)
    assert machine.overview.left() == pytest.approx(109 + 108, rel=0.01)


@pytest.mark.parametrize("slower", [0.3, 1, 3])
def test_actual_costs_are_those_of_the_plan(slower: float) -> None:
    machine = Machine(slower)
    machine.run()
    for stage in machine.overview.stages:
        assert stage.actual() == pytest.approx([seconds * slower for seconds in stage.cost], abs=0.01)


def test_speed_is_measured() -> None:
    assert all(0 < seconds < 60 for seconds in measure_speed())


# --- what is shown ----------------------------------------------------------------------------------------------


def drawn(machine: Machine, width: int = 60, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, highlight=False)
    module.console = console  # put back by the fixture
    console.print(machine.overview.render())
    file.flush()
    return [line.rstrip() for line in file.buffer.getvalue().decode(encoding).splitlines()]  # type: ignore[attr-defined]


def half_way() -> Machine:
    machine = Machine(done=("read the text",))
    machine.overview.begin("train")
    with_bar = Bar(None, "train 3 seeds", 12, "tokens", 0)
    machine.now += 8
    for _ in range(6):
        machine.now += 10
        with_bar.advance()
        machine.overview.watch(with_bar)
    return machine


def test_block_has_a_line_for_each_stage() -> None:
    assert drawn(half_way()) == [
        "✓ read the text done before",
        "▸ train         1 min 08 s of 2 min 08 s",
        "· harvest       about 17 s",
        "· score         about 1 min 21 s",
        "· report        about 10 s",
        "about 2 min 48 s left of 3 min 56 s",
    ]


def test_block_is_ascii_where_the_terminal_is() -> None:
    lines = drawn(half_way(), encoding="ascii")
    assert [line[0] for line in lines] == ["+", ">", ".", ".", ".", "a"]


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_block_fits_the_terminal(width: int) -> None:
    lines = drawn(half_way(), width)
    assert len(lines) == 6
    assert all(len(line) <= width for line in lines)


def test_a_pipe_gets_one_line_per_stage(screen: io.StringIO) -> None:
    machine = Machine(done=("read the text",))
    with machine.overview.shown():
        machine.run()
    lines = screen.getvalue().splitlines()
    assert lines == [
        "about 3 min 56 s in all: train 2 min 08 s, harvest 17 s, score 1 min 21 s, report 10 s",
        "train: done in 2 min 08 s; about 1 min 48 s left",
        "harvest: done in 17 s; about 1 min 31 s left",
        "score: done in 1 min 21 s; about 10 s left",
        "report: done in 10 s",
    ]


def test_the_terminal_shows_the_stage_and_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, color_system=None, highlight=False, width=60)
    monkeypatch.setattr(progress, "console", terminal)
    monkeypatch.setattr(module, "console", terminal)
    overview = Overview([Stage("train 3 SAEs", "train", Cost(1, 5)), Stage("report", None, Cost(2))])
    with overview.shown():
        with track("train 3 seeds", 2, "tokens") as bar:
            assert overview.stages[0].state == "running"
            bar.advance()
            terminal._live_stack[0].refresh()
            bar.advance()
        overview.begin("report")
    shown = out.getvalue()
    assert "▸ train 3 SAEs" in shown
    assert "train 3 seeds" in shown[shown.index("▸ train 3 SAEs") :]
    assert "train 3 seeds: 2 tokens in" in shown
    assert shown.rindex("done in") > shown.rindex("✓ report")
    assert progress.watcher is None


def test_watcher_is_removed_when_the_command_fails() -> None:
    with pytest.raises(ValueError, match="broken"), Machine().overview.shown():
        raise ValueError("broken")
    assert progress.watcher is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text
