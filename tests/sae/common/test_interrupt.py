"""Ctrl-C, SIGTERM and the clock: what a training writes before it ends, and that none of it changes what comes out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_trainer import Batches, folders, fresh, same, settings, train
from tiny_study import cli

from sae.activations.stream import TrainingBatches
from sae.common.interrupt import Terminated, defer_interrupts
from sae.training import learner, trainer
from sae.training.state import State, kept_steps
from sae.training.trainer import Group, train_groups

KINDS = pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["Ctrl-C", "SIGTERM"]
)


class Signalled(Batches):
    """Batches during one of which a signal comes, as often as is said."""

    def __init__(self, steps: int, at: int, number: int, times: int = 1) -> None:
        super().__init__(steps)
        self.at, self.number, self.times = at, number, times

    def __getitem__(self, step: int) -> torch.Tensor:  # type: ignore[override]
        if step == self.at:
            for _ in range(self.times):
                signal.raise_signal(self.number)
        return super().__getitem__(step)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Python's own, which what runs the tests may have turned off; none of ours is left behind."""
    given = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    signal.signal(signal.SIGINT, given)


@KINDS
def test_a_signal_ends_the_step_and_writes_it(number: int, error: type[BaseException], tmp_path: Path) -> None:
    straight, places = fresh(0, 1), folders(tmp_path / "broken", 2)
    values = settings(tokens=20 * 64, checkpoint_steps=1000)
    expected = train(Batches(20), straight, values, folders(tmp_path / "straight", 2))
    with pytest.raises(error):
        train(Signalled(20, 6, number), fresh(0, 1), values, places)
    assert [kept_steps(place) for place in places] == [[7], [7]]
    resumed = fresh(0, 1)
    logs = train(Batches(20), resumed, values, places)
    assert [log.resumed_from for log in logs] == [7, 7]
    assert all(map(same, straight, resumed))
    assert [log.rows for log in logs] == [log.rows for log in expected]


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    (place,) = folders(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        train(Signalled(20, 6, signal.SIGINT, times=2), fresh(0), settings(checkpoint_steps=1000), [place])
    assert kept_steps(place) == []


def test_a_signal_in_the_last_step_is_kept(tmp_path: Path) -> None:
    (place,) = folders(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        train(Signalled(8, 7, signal.SIGINT), fresh(0), settings(), [place])
    assert kept_steps(place)[-1] == 8
    with pytest.raises(Terminated), defer_interrupts():
        signal.raise_signal(signal.SIGTERM)


def test_all_groups_are_written(tmp_path: Path) -> None:
    places = folders(tmp_path, 2)
    groups = [
        Group(Signalled(steps, 6, signal.SIGINT), fresh(0), settings(checkpoint_steps=1000), [place])
        for steps, place in zip((20, 30), places, strict=True)
    ]
    groups[1].batches.at = -1  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        train_groups(groups)
    assert [kept_steps(place) for place in places] == [[7], [7]]


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(Signalled(8, 3, signal.SIGINT), fresh(0), settings(), folders(tmp_path, 1))
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_trains_outside_the_main_thread(tmp_path: Path) -> None:
    sae = fresh(0)
    thread = threading.Thread(target=lambda: train(Batches(8), sae, settings(), folders(tmp_path / "thread", 1)))
    thread.start()
    thread.join()
    straight = fresh(0)
    train(Batches(8), straight, settings(), folders(tmp_path / "straight", 1))
    assert same(sae[0], straight[0])


# --- by time --------------------------------------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps after which states were written."""
    steps: list[int] = []
    write = learner.write_state

    def record(folder: Path, step: int, state: State) -> None:
        steps.append(step)
        write(folder, step, state)

    monkeypatch.setattr(learner, "write_state", record)
    return steps


def test_checkpoints_by_time_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[int]
) -> None:
    values = settings(tokens=20 * 64, dead_tokens=3 * 64, checkpoint_steps=1000)
    straight, timed = fresh(0), fresh(0)
    expected = train(Batches(20), straight, values, folders(tmp_path / "straight", 1))
    assert written == [20]
    written.clear()
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "_MOST_WRITING", 1e9)
    logs = train(Batches(20), timed, values, folders(tmp_path / "timed", 1))
    assert written == [*range(1, 21)]
    assert same(straight[0], timed[0])
    assert logs[0].rows == expected[0].rows


def test_slow_writing_stretches_the_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[int]
) -> None:
    """A clock that runs a second a step, and writing that takes two: at 5 % that is once in 40 seconds."""
    now = [0.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now[0])

    class Ticking(Batches):
        def __getitem__(self, step: int) -> torch.Tensor:  # type: ignore[override]
            now[0] += 1.0
            return super().__getitem__(step)

    slow = learner.write_state
    monkeypatch.setattr(learner, "write_state", lambda *of: (now.__setitem__(0, now[0] + 2.0), slow(*of)))
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 10.0)
    train(Ticking(100), fresh(0), settings(checkpoint_steps=1000), folders(tmp_path, 1))
    assert written == [10, 50, 90, 100]


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_the_command_says_what_is_true(
    number: int, code: int, word: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study of fewer steps than there are between two checkpoints."""
    recipe = short.with_name("long.toml")
    recipe.write_text(short.read_text().replace("checkpoint_steps = 4", "checkpoint_steps = 500"))
    train = ("train", "--recipe", recipe, "--seeds", 0, "--no-controls", "--root", tmp_path / "runs")
    steps = TrainingBatches.sequences

    def signalled(self: TrainingBatches, step: int) -> object:
        if step == 9:
            signal.raise_signal(number)
        return steps(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "sequences", signalled)
        ran = cli(*train)
    assert ran.code == code
    assert ran.err.splitlines()[-1] == f"{word}; finished work is kept, run the same command to resume"
    assert kept_steps(tmp_path / "runs/run_a/training-state") == [10]
    again = cli(*train).well()
    assert "train 1 seed: 1.54k tokens" in again.err  # 6 of the 16 steps of 256 tokens
    cli(*train[:-1], tmp_path / "straight").well()
    one, other = (tmp_path / root / "run_a/sae.safetensors" for root in ("runs", "straight"))
    assert one.read_bytes() == other.read_bytes()
