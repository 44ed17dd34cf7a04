"""Training: S seeds of one dictionary, side by side on the same batches; and several such groups at once.

The subject model's forward pass is the dear part, so each batch is made once and given to every seed. The seeds
share nothing else: a seed trained alone, or beside others, ends with the same weights, which is what lets a study
grow by seeds without touching those it has.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.common.errors import BadInput, NotFinite
from sae.common.files import digest
from sae.common.interrupt import Interrupt, defer_interrupts, raise_signal
from sae.common.precision import resolve
from sae.common.progress import track
from sae.common.ranks import ALONE, Job
from sae.dictionaries.objective import total_variance
from sae.dictionaries.sae import Sae
from sae.settings import TrainingSettings
from sae.training.learner import Learner, LogRow, Plan, TrainLog
from sae.training.stacked import LossAndGradient, stack_on_gpu
from sae.training.state import kept_steps, write_state

CHECKPOINT_SECONDS = 60.0
"""Checkpoints are at most so far apart, next to those every ``checkpoint_steps``: what ``kill -9`` can cost."""
_MOST_WRITING = 0.05  # of the time: where a checkpoint takes long to write, they are further apart


@dataclass(frozen=True)
class Group:
    """Dictionaries that train under the same settings on the same batches: one for each seed."""

    batches: Sequence[Tensor]
    """one step each, [B, D]"""
    saes: Sequence[Sae]
    """as they were initialised; changed in place"""
    settings: TrainingSettings
    state_folders: Sequence[Path]
    """``<run>/training-state`` of each"""


class Watch(Protocol):
    """Who is told of a training as it goes."""

    def row(self, run: str, row: LogRow) -> None:
        """``run`` has a new row in its log."""

    def end(self, group: int, logs: list[TrainLog]) -> None:
        """Every dictionary of the ``group``-th group is trained; others may still go on."""


def train(
    batches: Sequence[Tensor],
    saes: Sequence[Sae],
    settings: TrainingSettings,
    state_folders: Sequence[Path],
    job: Job = ALONE,
) -> list[TrainLog]:
    """:func:`train_groups` of one group: ``saes`` (one per seed, changed in place) on ``batches``, [B, D] each."""
    return train_groups([Group(batches, saes, settings, state_folders)], job)[0]


def each_alone(batches: Sequence[Sequence[Tensor]], step: int) -> Sequence[Tensor]:
    """The step's batch of each, one after the other."""
    return [of_one[step] for of_one in batches]


def train_groups(
    groups: Sequence[Group],
    job: Job = ALONE,
    read: Callable[[Sequence[Any], int], Sequence[Tensor]] = each_alone,
    watch: Watch | None = None,
) -> list[list[TrainLog]]:
    """Train several groups side by side, step by step, on batches that are read together. Returns each group's logs.

    At every step ``read`` is given the batches of the groups that take it and the step's number: that is where they
    share one forward pass. Apart from that groups do not meet, so each ends as it would alone; each has its own number
    of steps, and ``watch`` is told as soon as one has done its last.

    Every dictionary goes on from its own state, if there is one; the one that is furthest behind sets the step, those
    ahead wait for it. What comes out is bit for bit what an uninterrupted training gives, on a CPU with the same
    number of threads. The last state stays on disk: call ``discard_states`` once the checkpoint is safe. ``job`` says
    what other processes train beside this one.

    States are written every ``checkpoint_steps``, about every minute, after the last step, and on Ctrl-C or SIGTERM at
    the end of the step that runs; then KeyboardInterrupt or Terminated is raised.

    Raises BadInput where there is nothing to train on or a number stops being finite: the last state on disk is then
    from before that, and the same command goes on from it. Raises SettingsDiffer where a state belongs to a training
    with other settings, batches or initial weights.
    """
    logs: list[list[TrainLog]] = [[] for _ in groups]
    waiting = {i: _Training(group, job) for i, group in enumerate(groups)}
    first = min(training.first for training in waiting.values())
    longest = max(waiting.values(), key=lambda training: training.steps)
    last, each = longest.steps, longest.tokens / longest.steps
    with track(_label(groups), longest.tokens, "tokens", first * each) as bar, defer_interrupts() as interrupt:
        clock = _Clock(job, interrupt)
        for step in range(first, last + 1):
            for i in [i for i, training in waiting.items() if step >= training.steps]:
                logs[i] = waiting.pop(i).logs()  # and with it goes the memory of its moments
                if watch is not None:
                    watch.end(i, logs[i])
            active = [training for training in waiting.values() if step >= training.first]
            if not active:
                continue
            found = read([training.group.batches for training in active], step)
            ready: dict[Any, tuple[Tensor, float]] = {}
            for training, raw in zip(active, found, strict=True):
                if not training.seeds:
                    continue  # other processes train this group
                sae = training.group.saes[0]
                form = id(raw), sae.device, sae.dtype
                if form not in ready:
                    ready[form] = _ready(raw, training.group.batches, step, sae)
                training.step(*ready[form], step, watch)
            bar.advance(each, next((t.seeds[0].note() for t in active if t.seeds), ""))
            clock.checkpoint(active, step)
    return logs


def _label(groups: Sequence[Group]) -> str:
    """What is trained, as it was asked for: the controls that a study brings with it are counted apart."""
    own = [group for group in groups if group.settings.frozen == "nothing"] or groups
    n = sum(len(group.saes) for group in own)
    controls = sum(len(group.saes) for group in groups) - n
    what = f"{n} seed{'s' * (n != 1)}" if len(own) == 1 else f"{n} SAEs under {len(own)} settings"
    return f"train {what}" + (f" and {controls} control{'s' * (controls > 1)}" if controls else "")


class _Clock:
    """Says when checkpoints are due that no setting asks for: after a while, or because the command is to end."""

    def __init__(self, job: Job, interrupt: Interrupt) -> None:
        self._job, self._interrupt = job, interrupt
        self._last, self._apart = time.monotonic(), CHECKPOINT_SECONDS

    def checkpoint(self, active: Sequence[_Training], step: int) -> None:
        """Write the states of ``active`` after a step where they are due; end where a signal has come.

        Ranks agree on it: the first to be due, or to be interrupted, is so for all.
        """
        wish = self._interrupt.signal or int(time.monotonic() - self._last >= self._apart)  # no signal is number 1
        wish = -self._job.least(-wish)
        if not wish:
            return
        before = time.monotonic()
        for training in active:
            training.checkpoint(step)
        self._last = time.monotonic()
        self._apart = max(CHECKPOINT_SECONDS, (self._last - before) / _MOST_WRITING)
        if wish > 1:
            raise_signal(wish)


class _Training:
    """One group as it trains."""

    def __init__(self, group: Group, job: Job) -> None:
        if not len(group.batches):
            raise BadInput("there is not one batch to train on; give more text, or lower training.batch_tokens")
        self.group, self.job = group, job
        self.steps = len(group.batches)
        self.tokens = min(group.settings.tokens, self.steps * group.settings.batch_tokens)
        self.written = 0
        self.identities = [_identity(sae, group.settings, group.batches) for sae in group.saes]
        self.stack = stack_on_gpu(group.saes)
        self.seeds = [
            Learner(
                sae,
                Plan.of(group.settings, self.steps, sae.d_in, sae.device),
                group.settings.auxk,
                folder.parent.name,
            )
            for sae, folder in zip(group.saes, group.state_folders, strict=True)
        ]
        for seed, folder, identity in zip(self.seeds, group.state_folders, self.identities, strict=True):
            seed.resume(folder, identity, job)
        self.first = job.least(min((seed.resumed_from for seed in self.seeds), default=self.steps))

    def step(self, x: Tensor, variance: float, step: int, watch: Watch | None) -> None:
        """One step of every seed that has not done it yet, and their states where the settings ask for them."""
        together = self._together(x, variance, step)
        due = (step + 1) % self.group.settings.checkpoint_steps == 0 or step + 1 == self.steps
        for seed, found, folder, identity in zip(
            self.seeds, together, self.group.state_folders, self.identities, strict=True
        ):
            if step < seed.resumed_from:
                continue  # this one is ahead of the others
            rows = len(seed.rows)
            with self._where(step, folder):
                seed.step(x, variance, step, self.job, found)
            if due:
                self._write(seed, folder, identity, step)
            if watch is not None and len(seed.rows) > rows and self.job.writes:
                watch.row(seed.name, seed.rows[-1])
        self.written = step + 1 if due else self.written

    def checkpoint(self, step: int) -> None:
        """Write the state of every seed after the step, unless that is done."""
        if self.written == step + 1:
            return
        for seed, folder, identity in zip(self.seeds, self.group.state_folders, self.identities, strict=True):
            if step >= seed.resumed_from:
                self._write(seed, folder, identity, step)
        self.written = step + 1

    def _write(self, seed: Learner, folder: Path, identity: dict[str, Any], step: int) -> None:
        with self._where(step, folder):
            seed.check_finite(step)
        self.job.check_alike(list(seed.tensors().values()))
        if self.job.writes:
            write_state(folder, step + 1, seed.state(identity))

    @contextmanager
    def _where(self, step: int, folder: Path) -> Iterator[None]:
        """Add to an error of numbers which batch it came with, and from where the training resumes."""
        try:
            yield
        except NotFinite as error:
            raise NotFinite(f"{error}{_told(self.group.batches, step)}; {_stands(folder)}") from None

    def _together(self, x: Tensor, variance: float, step: int) -> Sequence[LossAndGradient | None]:
        """Each seed's loss and gradient, where one launch does them all; None where each has to do its own."""
        if self.stack is None or any(step < seed.resumed_from for seed in self.seeds):
            return [None] * len(self.seeds)
        return self.stack.loss_and_gradient(
            self.job.rows(x), [seed.objective(x, variance, self.job) for seed in self.seeds]
        )

    def logs(self) -> list[TrainLog]:
        return [TrainLog(seed.rows, seed.resumed_from) for seed in self.seeds]


def _identity(sae: Sae, settings: TrainingSettings, batches: Sequence[Tensor]) -> dict[str, Any]:
    """All that the trained weights depend on, as JSON. ``sae`` is still as it was initialised."""
    initial = {name: hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for name, t in sae.parameters().items()}
    return {
        "settings": {**settings.identity(), "precision": resolve(settings.precision, sae.device)},
        "k": sae.k,
        "steps": len(batches),
        "batches": getattr(batches, "fingerprint", None),
        "initial_weights": digest(initial)[:16],
    }


def _ready(raw: Tensor, batches: Sequence[Tensor], step: int, sae: Sae) -> tuple[Tensor, float]:
    """A step's activations [B, D] as the dictionaries need them, and their total variance."""
    x = raw.to(device=sae.device, dtype=sae.dtype).contiguous()
    variance = total_variance(x) if len(x) else 0.0
    if not math.isfinite(variance):
        rows = x.double().square().sum(1)
        where = _told(batches, step, int(torch.where(torch.isfinite(rows), rows, math.inf).argmax()))
        raise NotFinite(
            f"the activations of step {step + 1} hold NaN or infinite values (or overflow when squared){where}; "
            "use a wider subject.dtype, or another hookpoint"
        )
    if variance <= 0:
        raise BadInput(
            f"the activations of step {step + 1} ({len(x)} tokens) do not vary, so there is nothing to explain; "
            "use another hookpoint, or a larger training.batch_tokens"
        )
    return x, variance


def _told(batches: Sequence[Tensor], step: int, row: int | None = None) -> str:
    """Where in the corpus a step's batch, or a row of it, comes from; empty for batches that do not know."""
    describe = getattr(batches, "describe", None)
    return f" ({describe(step, row)})" if describe is not None else ""


def _stands(folder: Path) -> str:
    steps = kept_steps(folder)
    if not steps:
        return "there is no checkpoint of it yet"
    return f"its checkpoint of step {steps[-1]} stands, and the same command goes on from there"
