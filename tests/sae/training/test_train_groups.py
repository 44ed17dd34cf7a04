"""Settings side by side: each ends as it would alone, whenever it was stopped; no bad number reaches the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import B, Batches, D, folders, settings, train

from sae.common.errors import NotFinite
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.kernels import cpu
from sae.dictionaries.sae import Sae
from sae.settings import TrainingSettings
from sae.training.learner import LogRow, TrainLog
from sae.training.state import kept_steps
from sae.training.trainer import Group, train_groups


class Elsewhere(Batches):
    """The same steps at another hookpoint: twice as wide, turned and shifted."""

    fingerprint = "elsewhere"

    def __getitem__(self, step: int) -> torch.Tensor:  # type: ignore[override]
        x = super().__getitem__(step)
        return torch.cat([x.flip(1) * 3, x - 0.25], dim=1)


def same(a: Sae, b: Sae) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.weights().values(), b.weights().values(), strict=True))


#: Groups that differ in everything that a sweep may vary: (batches, settings, seeds).
SWEEP: list[tuple[type[Batches], int, dict[str, Any], tuple[int, ...]]] = [
    (Batches, 20, {}, (0, 1)),
    (Batches, 20, {"num_latents": 24, "learning_rate": 0.02}, (0,)),
    (Batches, 31, {"k": 2, "checkpoint_steps": 5}, (1,)),
    (Elsewhere, 20, {"checkpoint_steps": 3}, (0,)),
    (Elsewhere, 12, {"architecture": "relu"}, (0, 5)),
]


def group(root: Path, number: int, fail_at: int | None = None) -> Group:
    kind, steps, values, seeds = SWEEP[number]
    batches = kind(steps, fail_at)
    training = settings(tokens=steps * B, dead_tokens=3 * B, **values)
    architecture, sample = ARCHITECTURES[training.architecture], kind(1)[0]
    saes = [
        architecture.init(sample.shape[1], training.num_latents, training.k, seed=seed, x_sample=sample)
        for seed in seeds
    ]
    places = [root / f"group{number}_{seed}" / "training-state" for seed in seeds]
    return Group(batches, saes, training, places)


def alone(root: Path) -> list[tuple[Sequence[Sae], list[TrainLog]]]:
    found = []
    for number in range(len(SWEEP)):
        one = group(root / "alone", number)
        found.append((one.saes, train(one.batches, one.saes, one.settings, one.state_folders)))
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Sequence[Sae], list[TrainLog]]]:
    return alone(tmp_path_factory.mktemp("straight"))


class Recorder:
    """Records the rows and ends of a training."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.rows: dict[str, list[LogRow]] = {}

    def row(self, run: str, row: LogRow) -> None:
        self.rows.setdefault(run, []).append(row)

    def end(self, group: int, logs: list[TrainLog]) -> None:
        assert all(log.rows for log in logs)
        self.ended.append(group)


def check(groups: Sequence[Group], logs: Sequence[list[TrainLog]], straight: Any) -> None:
    for one, of_one, (saes, expected) in zip(groups, logs, straight, strict=True):
        assert all(map(same, one.saes, saes))
        assert [log.rows for log in of_one] == [log.rows for log in expected]


def test_each_group_ends_as_it_would_alone(tmp_path: Path, straight: Any) -> None:
    groups, recorder = [group(tmp_path, i) for i in range(len(SWEEP))], Recorder()
    logs = train_groups(groups, watch=recorder)
    check(groups, logs, straight)
    assert recorder.ended == [4, 0, 1, 3, 2]  # the shorter first
    assert recorder.rows["group2_1"] == logs[2][0].rows


def test_batches_are_read_once_for_all_groups(tmp_path: Path) -> None:
    groups = [group(tmp_path, i) for i in range(len(SWEEP))]
    asked: list[tuple[int, int]] = []

    def read(batches: Sequence[Sequence[torch.Tensor]], step: int) -> list[torch.Tensor]:
        asked.append((step, len(batches)))
        return [of_one[step] for of_one in batches]

    train_groups(groups, read=read)
    assert asked == [(step, 5 if step < 12 else 4 if step < 20 else 1) for step in range(31)]


@pytest.mark.parametrize("stops", [(7,), (4, 13, 24), (1, 2, 11, 19, 30)])
def test_stopped_at_uneven_steps_they_end_the_same(tmp_path: Path, straight: Any, stops: tuple[int, ...]) -> None:
    """Every time they are stopped some groups, with their own checkpoint intervals, are further than others."""
    for number, stop in enumerate(stops):
        fail_at = [stop if i != (0, 3, 4, 1, 0)[number] else None for i in range(len(SWEEP))]
        with pytest.raises(KeyboardInterrupt):
            train_groups([group(tmp_path, i, fail_at[i]) for i in range(len(SWEEP))])
    states = {i: [kept_steps(folder) for folder in group(tmp_path, i).state_folders] for i in range(len(SWEEP))}
    begun = {i: min(max(steps, default=0) for steps in of_group) for i, of_group in states.items()}
    assert len(set(begun.values())) > 1
    groups = [group(tmp_path, i) for i in range(len(SWEEP))]
    taken: list[int] = []

    def read(batches: Sequence[Sequence[torch.Tensor]], step: int) -> list[torch.Tensor]:
        taken.append(step)
        return [of_one[step] for of_one in batches]

    logs = train_groups(groups, read=read)
    check(groups, logs, straight)
    assert taken == sorted({step for i, first in begun.items() for step in range(first, SWEEP[i][1])})


def test_a_seed_behind_catches_up_alone(tmp_path: Path, straight: Any) -> None:
    first = group(tmp_path, 3, fail_at=14)
    with pytest.raises(KeyboardInterrupt):
        train(first.batches, first.saes, first.settings, first.state_folders)
    assert kept_steps(first.state_folders[0])[-1] == 12
    groups, together = [group(tmp_path, i) for i in range(len(SWEEP))], []

    def read(batches: Sequence[Sequence[torch.Tensor]], step: int) -> list[torch.Tensor]:
        together.append(len(batches))
        return [of_one[step] for of_one in batches]

    check(groups, train_groups(groups, read=read), straight)
    assert together[:12] == [4] * 12
    assert together[12] == 4  # it has joined, and the shortest is done


# --- what must not reach the disk -----------------------------------------------------------------------------


class Spoilt(Batches):
    """Batches of which one has a bad number; knows where its rows come from."""

    def __init__(self, steps: int, at: int, value: float) -> None:
        super().__init__(steps)
        self.at, self.value = at, value

    def __getitem__(self, step: int) -> torch.Tensor:  # type: ignore[override]
        x = super().__getitem__(step)
        if step == self.at:
            x[5, 3] = self.value
        return x

    def describe(self, step: int, row: int | None = None) -> str:
        return f"step {step}, row {row}"


def one(seed: int, values: TrainingSettings) -> Sae:
    return ARCHITECTURES["topk"].init(D, values.num_latents, values.k, seed=seed, x_sample=Batches(1)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_nonfinite_activations_keep_the_last_good_state(tmp_path: Path, value: float) -> None:
    values, places = settings(tokens=20 * B), folders(tmp_path / "bad", 1)
    straight = one(0, values)
    train(Batches(20), [straight], values, folders(tmp_path / "good", 1))
    with pytest.raises(NotFinite, match=r"step 15 hold NaN .*\(step 14, row 5\)") as caught:
        train(Spoilt(20, 14, value), [one(0, values)], values, places)
    assert "\n" not in str(caught.value)
    assert kept_steps(places[0]) == [8, 12]
    fixed = one(0, values)
    (log,) = train(Batches(20), [fixed], values, places)
    assert log.resumed_from == 12
    assert same(fixed, straight)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("at", [9, 11])  # in the middle, and in the step after which a state is due
def test_nonfinite_weights_never_replace_a_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    values, places = settings(tokens=20 * B), folders(tmp_path / "bad", 2)
    straight = [one(0, values), one(1, values)]
    train(Batches(20), straight, values, folders(tmp_path / "good", 2))
    real = cpu.adam
    saes = [one(0, values), one(1, values)]

    def breaks(weight: torch.Tensor, *rest: Any, step: int, **named: Any) -> None:
        real(weight, *rest, step=step, **named)
        if step == at + 1 and weight is getattr(saes[1], name):
            weight.view(-1)[3] = torch.nan

    with monkeypatch.context() as patched:
        patched.setattr(cpu, "adam", breaks)
        with pytest.raises(NotFinite, match=f"run_b: .*{name} holds NaN after step {at + 1} of 20") as caught:
            train(Spoilt(20, -1, 0.0), saes, values, places)
    assert "\n" not in str(caught.value)
    assert "the same command resumes from its checkpoint of step 8" in str(caught.value)
    assert kept_steps(places[1]) == [4, 8]
    assert kept_steps(places[0])[-1] == (12 if at == 11 else 8)  # the other seed had done its step
    fixed = [one(0, values), one(1, values)]
    train(Batches(20), fixed, values, places)
    assert all(map(same, fixed, straight))
