"""One dictionary in training: its weights, Adam's moments, and everything else that its next step depends on.

Recipe (Gao et al. 2024; Paulo & Belrose 2025): Adam on FVU + AuxK, linear warm-up and decay, decoder rows of unit
length, with the part of the gradient along each row removed. A latent is dead when it had no strictly positive
activation for ``dead_tokens`` tokens; a slot that top-k filled with zero does not count as firing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from sae.common.errors import NotFinite, SettingsDiffer
from sae.common.precision import Precision, resolve
from sae.common.ranks import Job
from sae.dictionaries.kernels.steps import kernels_for
from sae.dictionaries.sae import AuxK, Loss, Objective, Sae
from sae.settings import TrainingSettings
from sae.training.sparsity import SparsityControl
from sae.training.stacked import LossAndGradient
from sae.training.state import State, latest_state, write_state

_LOG_ROWS = 200
_MEANS = ("fvu", "auxk", "l0", "sparsity", "other")

LogRow = dict[str, float]


class Batch(NamedTuple):
    """The activations of one step, with the device and dtype of the dictionaries."""

    x: Tensor  # [B, D]
    variance: float  # V: the total variance of x, or of y where there is one
    y: Tensor | None = None  # [B, D_out] what transcoders predict


@dataclass
class TrainLog:
    """The log of one seed's training."""

    rows: list[LogRow]  # about 200, evenly spaced means, as in ``training.parquet``
    resumed_from: int  # the step at which this call took over; 0 for a new training

    def table(self) -> pd.DataFrame:
        """Return the rows; ``sparsity`` is that part of the loss, coefficient included, and 0 without one."""
        return pd.DataFrame(self.rows)


@dataclass(frozen=True)
class Plan:
    """The settings resolved for a run of ``steps`` steps."""

    steps: int
    warmup: int
    peak_rate: float
    dead_tokens: int
    k_aux: int
    sparsity_warmup: int
    log_every: int
    precision: Precision

    @classmethod
    def of(cls, settings: TrainingSettings, steps: int, d_in: int, device: str | torch.device = "cpu") -> Plan:
        return cls(
            steps=steps,
            warmup=min(settings.warmup_steps, steps // 10),
            peak_rate=settings.learning_rate or 2e-4 / math.sqrt(settings.num_latents / 2**14),
            dead_tokens=settings.dead_tokens or min(10_000_000, max(1, settings.tokens // 20)),
            k_aux=settings.k_aux or max(1, d_in // 2),
            sparsity_warmup=min(settings.sparsity_warmup_steps or max(1, steps // 5), steps),
            log_every=max(1, steps // _LOG_ROWS),
            precision=resolve(settings.precision, device),
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ...: linearly up to the peak, then down, never quite to 0."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        return self.peak_rate * (self.steps - step) / (self.steps - self.warmup)


def _sum_over_ranks(job: Job, loss: Loss, gradient: dict[str, Tensor]) -> tuple[Loss, dict[str, Tensor]]:
    """Return loss and gradient of the whole batch from this rank's; the gradient is changed in place."""
    if job.size == 1:
        return loss, gradient
    sums = [loss.fvu, loss.auxk, loss.sparsity, *([] if loss.other is None else [loss.other])]
    # Firings are whole numbers far below 2^53, so they fit among the float64 ones.
    numbers = torch.cat([torch.stack(sums).double(), loss.firings.double()])
    job.add_up([*gradient.values(), numbers])
    if loss.least is not None:
        job.least_of(loss.least)
    fvu, auxk, sparsity, *other = numbers[: len(sums)]
    firings = numbers[len(sums) :].long()
    return Loss(fvu, auxk, sparsity, firings, other[0] if other else None, loss.least), gradient


@dataclass
class Learner:
    """One dictionary in training; states with its ``identity`` are kept in ``folder``, ``<run>/training-state``."""

    sae: Sae
    settings: TrainingSettings
    steps: int
    folder: Path
    identity: dict[str, Any]
    rows: list[LogRow] = field(default_factory=list)
    tokens: int = 0
    sums: LogRow = field(default_factory=lambda: {"steps": 0, **dict.fromkeys(_MEANS, 0.0)})
    """of the steps since the latest row of the log"""
    control: SparsityControl = field(default_factory=SparsityControl)
    resumed_from: int = 0

    def __post_init__(self) -> None:
        weights = self.sae.parameters()
        self.plan = Plan.of(self.settings, self.steps, self.sae.d_in, self.sae.device)
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.silent = torch.zeros(self.sae.num_latents, dtype=torch.int64, device=self.sae.device)

    @property
    def name(self) -> str:
        return self.folder.parent.name

    def objective(self, batch: Batch, job: Job) -> Objective:
        """Return the objective of the next step on ``batch``."""
        auxk = AuxK(self.silent >= self.plan.dead_tokens, self.plan.k_aux, self.settings.auxk)
        target = None if batch.y is None else job.rows(batch.y)
        settings, tokens = self.settings, len(batch.x)
        return Objective(
            batch.variance, tokens, auxk, self.coefficient, settings.bandwidth, self.plan.precision, job, target
        )

    def step(self, batch: Batch, step: int, job: Job, found: LossAndGradient | None = None) -> None:
        """Learn from one batch, of which ``job`` may give us some rows; ``found`` is a loss computed already."""
        x = batch.x
        if found is None:
            found = self.sae.loss_and_gradient(job.rows(x), self.objective(batch, job))
        loss, gradient = _sum_over_ranks(job, *found)
        self._check(loss, gradient, step)
        kernels = kernels_for(self.sae.device)
        for name, weight in self.sae.parameters().items():
            if self.settings.frozen == "everything" or (self.settings.frozen == "decoder" and name == "W_dec"):
                continue
            moments, rate = (self.first[name], self.second[name]), self.plan.rate(step)
            kernels.adam(weight, gradient[name], *moments, step=step + 1, rate=rate, unit_rows=name == "W_dec")
        self.sae.measure(loss, step)
        self.silent += len(x)
        self.silent[loss.firings > 0] = 0
        self._log(loss, len(x), step)
        if self.sae.penalised and self.sae.k is not None:
            progress, pace = (step + 1) / self.plan.sparsity_warmup, self.plan.rate(step) / self.plan.peak_rate
            l0 = float(loss.firings.sum()) / len(x)
            self.control.observe(l0, float(loss.sparsity), self.sae.k, progress, pace)

    @property
    def coefficient(self) -> float:
        """Of the sparsity term in the next step; 0 without one."""
        return self.control.coefficient if self.sae.penalised else 0.0

    def _check(self, loss: Loss, gradient: dict[str, Tensor], step: int) -> None:
        """Stop before a number that is not finite reaches the weights."""
        numbers = {name: getattr(loss, name) for name in ("fvu", "auxk", "sparsity")}
        numbers |= {f"gradient of {name}": g.sum().double() for name, g in gradient.items()}
        # A pre-activation that is NaN is never among the largest, so NaN weights would not appear in the gradient.
        numbers |= {f"sum of {name}": w.sum().double() for name, w in self.sae.parameters().items()}
        fetched = torch.stack(list(numbers.values())).tolist()  # all at once: each fetch waits for a GPU
        bad = [name for name, value in zip(numbers, fetched, strict=True) if not math.isfinite(value)]
        if bad:
            self.check_finite(step - 1)
            raise NotFinite(
                f"{self.name}: the {bad[0]} is not finite at step {step + 1} of {self.steps}, with finite "
                f"activations and weights, at learning rate {self.plan.rate(step):.3g}: the training has diverged; "
                "train under another name with a lower training.learning_rate"
            )

    def check_finite(self, step: int) -> None:
        """Raise NotFinite if anything that a step changes holds NaN or infinity after ``step``."""
        for name, tensor in self.tensors().items():
            if not tensor.is_floating_point() or math.isfinite(float(tensor.sum())):
                continue
            if not bool(torch.isfinite(tensor).all()):
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
                raise NotFinite(
                    f"{self.name}: {name} holds {kind} after step {step + 1} of {self.steps}, at learning rate "
                    f"{self.plan.rate(max(0, step)):.3g}: the training has diverged (train under another name with a "
                    "lower training.learning_rate), or this machine's memory is faulty (give the same command again)"
                )

    def _log(self, loss: Loss, tokens: int, step: int) -> None:
        self.tokens += tokens
        self.sums["steps"] += 1
        l0, sparsity = float(loss.firings.sum()) / tokens, self.coefficient * float(loss.sparsity)
        other = 0.0 if loss.other is None else float(loss.other)
        for name, value in zip(_MEANS, (float(loss.fvu), float(loss.auxk), l0, sparsity, other), strict=True):
            self.sums[name] += value
        if (step + 1) % self.plan.log_every and step + 1 != self.steps:
            return
        mean = {name: self.sums[name] / self.sums["steps"] for name in _MEANS}
        self.sums = {"steps": 0, **dict.fromkeys(_MEANS, 0.0)}
        self.rows.append(
            {
                "step": step + 1,
                "tokens": self.tokens,
                "loss": mean["fvu"] + self.settings.auxk * mean["auxk"] + mean["sparsity"] + mean["other"],
                "fvu": mean["fvu"],
                "auxk": mean["auxk"],
                "sparsity": mean["sparsity"],
                "sparsity_coefficient": self.coefficient,
                "l0": mean["l0"],
                "dead_fraction": float((self.silent >= self.plan.dead_tokens).double().mean()),
                "learning_rate": self.plan.rate(step),
            }
        )

    def note(self) -> str:
        """Summarise the latest row for the progress bar."""
        return f"FVU {self.rows[-1]['fvu']:.3f}, dead {self.rows[-1]['dead_fraction']:.1%}" if self.rows else ""

    def write(self, step: int, job: Job) -> None:
        """Write the state after ``step`` to the folder, if every number in it is finite."""
        self.check_finite(step)
        job.check_alike(list(self.tensors().values()))
        if job.writes:
            write_state(self.folder, step + 1, self._state())

    def _state(self) -> State:
        sums, control = dict(self.sums), vars(self.control)
        record = {"identity": self.identity, "rows": self.rows, "tokens": self.tokens, "sums": sums, "control": control}
        return State({name: t.cpu() for name, t in self.tensors().items()}, record)

    def resume(self, job: Job) -> None:
        """Load the last state in the folder, if there is one; where ranks share the seed, rank 0's."""
        step, state = latest_state(self.folder, self.identity) if job.writes else (0, None)
        begun, tensors = self._state(), self.tensors()
        if state is not None:
            if _form(state) != _form(begun):
                raise SettingsDiffer(
                    f"{self.name}: the unfinished training of that name is from another version of this program; "
                    f"choose another name, or delete {self.folder}"
                )
            for name, tensor in tensors.items():
                # In place: BLAS may round differently for data at another alignment.
                tensor.copy_(state.tensors[name])
        record = job.alike(list(tensors.values()), {"step": step, **(state or begun).record})
        self.resumed_from, self.rows, self.tokens = record["step"], record["rows"], record["tokens"]
        self.sums, self.control = record["sums"], SparsityControl(**record["control"])

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a step changes, by name; the very tensors, not copies."""
        weights = {**self.sae.weights(), **self.sae.parameters()}
        groups = {"weight": weights, "first": self.first, "second": self.second}
        named = {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}
        return {**named, "silent": self.silent}


def _form(state: State) -> list[Any]:
    """Return the names and shapes in a state, which differ between versions of this program."""
    parts = [set(part) for part in (state.record, *(state.record.get(name, {}) for name in ("sums", "control")))]
    return [{name: t.shape for name, t in state.tensors.items()}, *parts]
