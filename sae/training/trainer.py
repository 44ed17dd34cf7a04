"""Train S seeds of one dictionary together on the same batches, and several such groups at once.

Each batch is computed once, by the expensive forward pass, and given to every seed. A seed ends with the same weights
alone or with others, so a study can grow by seeds.
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
from sae.dictionaries.sae import Sae, total_variance
from sae.settings import TrainingSettings
from sae.training.learner import Batch, Learner, LogRow, TrainLog
from sae.training.stacked import LossAndGradient, stack_on_gpu
from sae.training.state import kept_steps

CHECKPOINT_SECONDS = 60.0  # most time between checkpoints, the cost of ``kill -9``
_MOST_WRITING = 0.05  # of the time: where a checkpoint takes long to write, they are further apart


class Batches(Protocol):
    """A number of steps with a batch [B, D] each."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Group:
    """Dictionaries that train under the same settings on the same batches: one for each seed."""

    batches: Batches
    saes: Sequence[Sae]  # as they were initialised; changed in place
    settings: TrainingSettings
    state_folders: Sequence[Path]  # ``<run>/training-state`` of each
    targets: Batches | None = None  # what transcoders predict, [B, D_out] for the same tokens


class Watch(Protocol):
    """An observer of a training."""

    def row(self, run: str, row: LogRow) -> None:
        """Receive a new row of the log of ``run``."""

    def end(self, group: int, logs: list[TrainLog]) -> None:
        """Note that every dictionary of the ``group``-th group is trained; others may continue."""


def read_each(batches: Sequence[Batches], step: int) -> Sequence[Tensor]:
    """Return the step's batch of each group, read one after the other."""
    return [of_one[step] for of_one in batches]


def train_groups(
    groups: Sequence[Group],
    job: Job = ALONE,
    read: Callable[[Sequence[Any], int], Sequence[Tensor]] = read_each,
    watch: Watch | None = None,
) -> list[list[TrainLog]]:
    """Train several groups side by side, step by step, and return each group's logs.

    At every step ``read`` gets the step's number and the batches of the groups that take it, so that they can share one
    forward pass. Each group ends as it would alone, after its own number of steps; ``watch`` is then notified.

    Training starts at the step of the dictionary furthest behind; those ahead wait for it. On a CPU with the same
    number of threads the results are bit for bit those of an uninterrupted training. States are written every
    ``checkpoint_steps``, about every minute, after the last step, and on Ctrl-C or SIGTERM at the end of the current
    step; then KeyboardInterrupt or Terminated is raised. The last one stays until ``discard_states``.

    Raises BadInput without training data or for a number that is not finite (the last state is from before that), and
    SettingsDiffer if a state belongs to other settings, batches or initial weights.
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
                logs[i] = [TrainLog(seed.rows, seed.resumed_from) for seed in waiting.pop(i).seeds]  # frees its moments
                if watch is not None:
                    watch.end(i, logs[i])
            active = [training for training in waiting.values() if step >= training.first]
            if not active:
                continue
            wanted = [of for t in active for of in (t.group.batches, t.group.targets) if of is not None]
            read_in_turn = iter(read(wanted, step))
            ready: dict[Any, tuple[Tensor, float]] = {}
            for training in active:
                prepared = []
                for of in (training.group.batches, training.group.targets):
                    if of is None:
                        continue
                    raw = next(read_in_turn)
                    if not training.seeds:
                        continue  # other processes train this group
                    sae = training.group.saes[0]
                    form = id(raw), sae.device, sae.dtype
                    if form not in ready:
                        ready[form] = _prepare(raw, of, step, sae)
                    prepared.append(ready[form])
                if prepared:
                    (x, _), (y, variance) = prepared[0], prepared[-1]
                    training.step(Batch(x, variance, None if len(prepared) == 1 else y), step, watch)
            bar.advance(each, next((t.seeds[0].note() for t in active if t.seeds), ""))
            clock.checkpoint(active, step)
    return logs


def _label(groups: Sequence[Group]) -> str:
    own = [group for group in groups if group.settings.frozen == "nothing"] or groups
    n = sum(len(group.saes) for group in own)
    controls = sum(len(group.saes) for group in groups) - n
    name = f"{n} seed{'s' * (n != 1)}" if len(own) == 1 else f"{n} SAEs under {len(own)} settings"
    return f"train {name}" + (f" and {controls} control{'s' * (controls > 1)}" if controls else "")


class _Clock:
    """Writes checkpoints that no setting asks for: after a while, or when a signal ends the command."""

    def __init__(self, job: Job, interrupt: Interrupt) -> None:
        self._job, self._interrupt = job, interrupt
        self._last, self._apart = time.monotonic(), CHECKPOINT_SECONDS

    def checkpoint(self, active: Sequence[_Training], step: int) -> None:
        """Write the states of ``active`` if they are due on any rank; raise after a signal on any rank."""
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
    """One group in training."""

    def __init__(self, group: Group, job: Job) -> None:
        if not len(group.batches):
            raise BadInput("there is not one batch to train on; give more text, or lower training.batch_tokens")
        self.group, self.job = group, job
        self.steps = len(group.batches)
        self.tokens = min(group.settings.tokens, self.steps * group.settings.batch_tokens)
        self.written = 0
        identities = [_identity(sae, group) for sae in group.saes]
        self.stack = stack_on_gpu(group.saes)
        self.seeds = [
            Learner(sae, group.settings, self.steps, folder, identity)
            for sae, folder, identity in zip(group.saes, group.state_folders, identities, strict=True)
        ]
        for seed in self.seeds:
            seed.resume(job)
        self.first = job.least(min((seed.resumed_from for seed in self.seeds), default=self.steps))

    def step(self, batch: Batch, step: int, watch: Watch | None) -> None:
        """Take one step of every seed that has not taken it yet, and write the states if the settings ask for them."""
        found: Sequence[LossAndGradient | None] = [None] * len(self.seeds)
        if self.stack is not None and all(step >= seed.resumed_from for seed in self.seeds):
            objectives = [seed.objective(batch, self.job) for seed in self.seeds]
            found = self.stack.loss_and_gradient(self.job.rows(batch.x), objectives)
        due = (step + 1) % self.group.settings.checkpoint_steps == 0 or step + 1 == self.steps
        for seed, of_seed in zip(self.seeds, found, strict=True):
            if step < seed.resumed_from:
                continue  # this one is ahead of the others
            rows = len(seed.rows)
            with self._located(step, seed):
                seed.step(batch, step, self.job, of_seed)
                if due:
                    seed.write(step, self.job)
            if watch is not None and len(seed.rows) > rows and self.job.writes:
                watch.row(seed.name, seed.rows[-1])
        self.written = step + 1 if due else self.written

    def checkpoint(self, step: int) -> None:
        """Write the state of every seed after the step, unless it is written already."""
        if self.written == step + 1:
            return
        for seed in self.seeds:
            if step >= seed.resumed_from:
                with self._located(step, seed):
                    seed.write(step, self.job)
        self.written = step + 1

    @contextmanager
    def _located(self, step: int, seed: Learner) -> Iterator[None]:
        """Add to a NotFinite error the place of the batch in the corpus, and the step to resume from."""
        try:
            yield
        except NotFinite as error:
            steps = kept_steps(seed.folder)
            resumes = "the same command resumes from its checkpoint of step"
            kept = f"{resumes} {steps[-1]}" if steps else "it has no checkpoint"
            raise NotFinite(f"{error}{_place(self.group.batches, step)}; {kept}") from None


def _identity(sae: Sae, group: Group) -> dict[str, Any]:
    """Return everything that the trained weights depend on, as JSON. ``sae`` must be as initialised."""
    settings, batches = group.settings, group.batches
    initial = {name: hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for name, t in sae.parameters().items()}
    return {
        "settings": {**settings.identity(), "precision": resolve(settings.precision, sae.device)},
        "k": sae.k,
        "steps": len(batches),
        "batches": getattr(batches, "fingerprint", None),
        "initial_weights": digest(initial)[:16],
        **({} if group.targets is None else {"target": getattr(group.targets, "hookpoint", None)}),
    }


def _prepare(raw: Tensor, batches: Batches, step: int, sae: Sae) -> tuple[Tensor, float]:
    """Return a step's activations [B, D] with the device and dtype of ``sae``, and their total variance."""
    x = raw.to(device=sae.device, dtype=sae.dtype).contiguous()
    variance = total_variance(x) if len(x) else 0.0
    if not math.isfinite(variance):
        rows = x.double().square().sum(1)
        place = _place(batches, step, int(torch.where(torch.isfinite(rows), rows, math.inf).argmax()))
        raise NotFinite(
            f"the activations of step {step + 1} hold NaN or infinite values (or overflow when squared){place}; "
            "use a wider subject.dtype, or another hookpoint"
        )
    if variance <= 0:
        raise BadInput(
            f"the activations of step {step + 1} ({len(x)} tokens) do not vary, so there is nothing to explain; "
            "use another hookpoint, or a larger training.batch_tokens"
        )
    return x, variance


def _place(batches: Batches, step: int, row: int | None = None) -> str:
    """Return the place in the corpus of a step's batch, or of a row of it; empty if unknown."""
    describe = getattr(batches, "describe", None)
    return f" ({describe(step, row)})" if describe is not None else ""
