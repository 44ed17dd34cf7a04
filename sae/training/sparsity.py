"""Steer how many latents fire by adjusting the coefficient of the sparsity term during training.

ReLU, Gated and JumpReLU fire as their penalty allows, and the L0 of a coefficient depends on everything else. With
the control, architectures are compared at the same L0 without a search.

* It acts on log lambda to steer log L0: over the relevant range one falls about as the other rises.
* Half of the latents fire at first, and a coefficient driven high by that error would kill latents for good. So L0
  follows a path to k, straight in log L0, and only the distance from the path is an error.
* Proportional-integral rule in velocity form: each step changes log lambda by P times the change of the error plus I
  times the error. I follows the learning rate, or the coefficient would run away from weights that no longer move. The
  term may not outgrow the error that it is weighed against: optimisers that normalise their steps would not feel it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_FIRST = math.log(1e-3)
_PROPORTIONAL = 0.5
_INTEGRAL = 0.03
_FASTEST = 0.05  # of log lambda in a step
_MOST = 2.0  # lambda S, in units of all the variance there is to explain; useful ones are well below 1
_MEMORY = 0.1  # weight of the newest batch in the smoothed L0
_LEAST = 1e-3  # of L0, in latents per token: no firing at all counts as this


@dataclass
class SparsityControl:
    """The coefficient of one dictionary in training, and the state that its next value depends on."""

    log_coefficient: float = _FIRST
    begun: float | None = None  # log L0 of the first batch
    smoothed: float = 0.0  # log L0, averaged over about the latest ten batches
    error: float = 0.0  # distance from the path at the latest step

    @property
    def coefficient(self) -> float:
        """lambda, for the next step."""
        return math.exp(self.log_coefficient)

    def observe(self, l0: float, sparsity: float, k: int, progress: float, pace: float) -> None:
        """Adjust the coefficient after a step with ``l0`` firings per token; the target is ``k``.

        ``sparsity`` is S without its coefficient, ``progress`` the completed share of the path (complete from 1 on),
        ``pace`` the learning rate as a share of its peak.
        """
        log_l0 = math.log(max(l0, _LEAST))
        if self.begun is None:
            self.begun = self.smoothed = log_l0
        self.smoothed += _MEMORY * (log_l0 - self.smoothed)
        aim = self.begun + (math.log(k) - self.begun) * min(1.0, progress)
        error = self.smoothed - aim
        change = _PROPORTIONAL * (error - self.error) + _INTEGRAL * pace * error
        self.log_coefficient += min(max(change, -_FASTEST), _FASTEST)
        if sparsity > 0:
            self.log_coefficient = min(self.log_coefficient, math.log(_MOST / sparsity))
        self.error = error
