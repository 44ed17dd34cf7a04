"""Training: S seeds of one dictionary, side by side on the same batches.

The subject model's forward pass is the dear part, so each batch is made once and given to every seed. The seeds
share nothing else: a seed trained alone, or beside others, ends with the same weights, which is what lets a study
grow by seeds without touching those it has.

Recipe (Gao et al. 2024; Paulo & Belrose 2025): Adam on FVU + AuxK, linear warm-up and decay, decoder rows of
unit length from whose gradient the part along the row is removed. A latent is dead when it had no strictly
positive activation for ``dead_tokens`` tokens; a slot that top-k filled with zero does not count as firing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sae import kernels
from sae.dictionary import Sae
from sae.errors import BadInput
from sae.files import digest
from sae.objective import AuxK, Loss, Objective, total_variance
from sae.progress import track
from sae.settings import TrainingSettings
from sae.training_state import State, latest_states, write_states

_BETAS = (0.9, 0.999)
_EPS = 6.25e-10  # Gao et al. 2024: gradients of rare latents are of the size of the usual 1e-8
_LOG_ROWS = 200

LogRow = dict[str, float]


@dataclass
class TrainLog:
    """How one seed's training went."""

    rows: list[LogRow]
    """about 200, evenly spaced, each the mean since the row before; the columns of ``training.parquet``"""
    resumed_from: int
    """the step at which this call took over; 0 when it began afresh"""

    def table(self) -> pd.DataFrame:
        """Columns step, tokens, loss, fvu, auxk, l0, dead_fraction, learning_rate."""
        return pd.DataFrame(self.rows)


@dataclass(frozen=True)
class Plan:
    """What the settings come to for a run of so many steps."""

    steps: int
    warmup: int
    peak_rate: float
    dead_tokens: int
    k_aux: int
    log_every: int

    @classmethod
    def of(cls, settings: TrainingSettings, steps: int, d_in: int) -> Plan:
        return cls(
            steps=steps,
            warmup=min(settings.warmup_steps, steps // 10),
            peak_rate=settings.learning_rate or 2e-4 / math.sqrt(settings.num_latents / 2**14),
            dead_tokens=settings.dead_tokens or min(10_000_000, max(1, settings.tokens // 20)),
            k_aux=settings.k_aux or max(1, d_in // 2),
            log_every=max(1, steps // _LOG_ROWS),
        )

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: up to the peak in a straight line, then down, never quite to 0."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        return self.peak_rate * (self.steps - step) / (self.steps - self.warmup)


def train(
    batches: Sequence[Tensor],
    saes: Sequence[Sae],
    settings: TrainingSettings,
    state_folders: Sequence[Path],
) -> list[TrainLog]:
    """Train ``saes`` (one per seed, changed in place) on ``batches``, one step per batch [B, D].

    Goes on from the states in ``state_folders`` (``<run>/training-state``, one per seed) if they are there; what
    comes out is bit for bit what an uninterrupted training gives, on a CPU with the same number of threads. The
    last state stays on disk: call ``discard_states`` once the checkpoint is safe. Each seed's log, the part from
    before an interruption included, is returned.

    Raises BadInput where there is nothing to train on or a number stops being finite; SettingsDiffer where the
    states belong to a training with other settings, batches or initial weights.
    """
    if not len(batches):
        raise BadInput("there is not one batch to train on; give more text, or lower training.batch_tokens")
    plan = Plan.of(settings, len(batches), saes[0].d_in)
    seeds = [
        _Seed(sae, plan, settings.auxk, folder.parent.name) for sae, folder in zip(saes, state_folders, strict=True)
    ]
    identities = [_identity(sae, settings, batches) for sae in saes]
    first = _resume(seeds, state_folders, identities)
    label, size = f"train {len(seeds)} seed{'s' * (len(seeds) > 1)}", settings.batch_tokens
    with track(label, plan.steps * size, "tokens", first * size) as bar:
        for step in range(first, plan.steps):
            x, variance = _batch(batches, step, saes[0])
            for seed in seeds:
                seed.step(x, variance, step)
            if (step + 1) % settings.checkpoint_steps == 0 or step + 1 == plan.steps:
                states = [seed.state(identity) for seed, identity in zip(seeds, identities, strict=True)]
                write_states(state_folders, step + 1, states)
            bar.advance(size, seeds[0].note())
    return [TrainLog(seed.rows, first) for seed in seeds]


@dataclass
class _Sums:
    """What the next row of the log is the mean of."""

    steps: int = 0
    fvu: float = 0.0
    auxk: float = 0.0
    l0: float = 0.0


@dataclass
class _Seed:
    """One dictionary in training, with everything that its next step depends on."""

    sae: Sae
    plan: Plan
    auxk: float
    name: str
    rows: list[LogRow] = field(default_factory=list)
    tokens: int = 0
    sums: _Sums = field(default_factory=_Sums)

    def __post_init__(self) -> None:
        weights = self.sae.parameters()
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.silent = torch.zeros(self.sae.num_latents, dtype=torch.int64, device=self.sae.device)

    def step(self, x: Tensor, variance: float, step: int) -> None:
        """Learn from one batch [B, D] with total variance ``variance``."""
        auxk = AuxK(self.silent >= self.plan.dead_tokens, self.plan.k_aux, self.auxk)
        loss, gradient = self.sae.loss_and_gradient(x, Objective(variance, len(x), auxk))
        self._check(loss, gradient, step)
        for name, weight in self.sae.parameters().items():
            kernels.adam(
                weight,
                gradient[name],
                self.first[name],
                self.second[name],
                step=step + 1,
                rate=self.plan.rate(step),
                betas=_BETAS,
                eps=_EPS,
                unit_rows=name == "W_dec",
            )
        self.silent += len(x)
        self.silent[loss.firings > 0] = 0
        self._log(loss, len(x), step)

    def _check(self, loss: Loss, gradient: dict[str, Tensor], step: int) -> None:
        """Stop before a number that is not finite reaches the weights."""
        bad = [name for name in ("fvu", "auxk") if not math.isfinite(getattr(loss, name))]
        bad += [f"gradient of {name}" for name, g in gradient.items() if not math.isfinite(float(g.sum()))]
        if bad:
            raise BadInput(
                f"{self.name}: the {bad[0]} is not finite at step {step + 1} of {self.plan.steps}, at learning rate "
                f"{self.plan.rate(step):.3g}; train again with a lower training.learning_rate"
            )

    def _log(self, loss: Loss, tokens: int, step: int) -> None:
        self.tokens += tokens
        sums = self.sums
        sums.steps += 1
        sums.fvu += float(loss.fvu)
        sums.auxk += float(loss.auxk)
        sums.l0 += float(loss.firings.sum()) / tokens
        if (step + 1) % self.plan.log_every and step + 1 != self.plan.steps:
            return
        fvu, auxk = sums.fvu / sums.steps, sums.auxk / sums.steps
        row: LogRow = {
            "step": step + 1,
            "tokens": self.tokens,
            "loss": fvu + self.auxk * auxk,
            "fvu": fvu,
            "auxk": auxk,
            "l0": sums.l0 / sums.steps,
            "dead_fraction": float((self.silent >= self.plan.dead_tokens).double().mean()),
            "learning_rate": self.plan.rate(step),
        }
        self.sums = _Sums()
        self.rows.append(row)

    def note(self) -> str:
        """The latest row in a few words, for the progress bar."""
        return f"FVU {self.rows[-1]['fvu']:.3f}, dead {self.rows[-1]['dead_fraction']:.1%}" if self.rows else ""

    def state(self, identity: dict[str, Any]) -> State:
        record = {"identity": identity, "rows": self.rows, "tokens": self.tokens, "sums": vars(self.sums)}
        return State({name: t.cpu() for name, t in self._tensors().items()}, record)

    def restore(self, state: State) -> None:
        for name, tensor in self._tensors().items():
            # Into the memory that is there: BLAS may round differently for data at another alignment.
            tensor.copy_(state.tensors[name])
        self.rows, self.tokens = state.record["rows"], state.record["tokens"]
        self.sums = _Sums(**state.record["sums"])

    def _tensors(self) -> dict[str, Tensor]:
        groups = {"weight": self.sae.parameters(), "first": self.first, "second": self.second}
        named = {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}
        return {**named, "silent": self.silent}


def _resume(seeds: Sequence[_Seed], folders: Sequence[Path], identities: Sequence[dict[str, Any]]) -> int:
    step, states = latest_states(folders, identities)
    for seed, state in zip(seeds, states, strict=bool(states)):
        seed.restore(state)
    return step


def _identity(sae: Sae, settings: TrainingSettings, batches: Sequence[Tensor]) -> dict[str, Any]:
    """All that the trained weights depend on, as JSON. ``sae`` is still as it was initialised."""
    initial = {name: hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for name, t in sae.parameters().items()}
    return {
        "settings": settings.model_dump(mode="json", exclude={"checkpoint_steps"}),
        "k": sae.k,
        "steps": len(batches),
        "batches": getattr(batches, "fingerprint", None),
        "initial_weights": digest(initial)[:16],
    }


def _batch(batches: Sequence[Tensor], step: int, sae: Sae) -> tuple[Tensor, float]:
    """A step's activations [B, D] as the dictionaries need them, and their total variance."""
    x = batches[step].to(device=sae.device, dtype=sae.dtype).contiguous()
    variance = total_variance(x) if len(x) else 0.0
    if not math.isfinite(variance):
        raise BadInput(
            f"the activations of step {step + 1} hold NaN or infinite values (or overflow when squared); "
            "use a wider subject.dtype, or another hookpoint"
        )
    if variance <= 0:
        raise BadInput(
            f"the activations of step {step + 1} ({len(x)} tokens) do not vary, so there is nothing to explain; "
            "use another hookpoint, or a larger training.batch_tokens"
        )
    return x, variance
