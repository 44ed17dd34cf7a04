"""How many latents fire, kept where it is wanted: the coefficient of the sparsity term as something controlled.

TopK and BatchTopK fire as often as they are told. ReLU, Gated and JumpReLU fire as their penalty lets them, and what
coefficient gives which L0 depends on the activations, the width, the architecture and the length of the run. To
compare architectures at the same L0 without a search, the coefficient is adjusted as training goes.

* What is steered is log L0 by log lambda: over the range that matters the one falls about as the other rises.
* Half of the latents fire when training begins. Held against k at once, that error would drive the coefficient far
  beyond what k needs, and latents that a passing excess kills do not come back by themselves. So L0 is led to k, from
  wherever it begins, along a path that is straight in log L0, and only the distance from the path is an error.
* A proportional-integral rule in its velocity form: each step changes log lambda by P times the change of the error
  plus I times the error. The weights answer in proportion to the learning rate, so I follows it: otherwise, when
  the rate has nearly decayed, the coefficient would run away from weights that no longer move. Nor may the term
  outgrow the error that it is weighed against: optimisers that normalise their steps would not feel it.
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
_NEVER = 1e-3  # what no firing at all counts as, in latents per token


@dataclass
class SparsityControl:
    """The coefficient of one dictionary in training, and all that its next value depends on but the settings."""

    log_coefficient: float = _FIRST
    begun: float | None = None
    """log L0 of the first batch"""
    smoothed: float = 0.0
    """log L0, averaged over the latest ten batches or so"""
    error: float = 0.0
    """distance from the path at the latest step"""

    @property
    def coefficient(self) -> float:
        """lambda, for the next step."""
        return math.exp(self.log_coefficient)

    def observe(self, l0: float, sparsity: float, k: int, progress: float, pace: float) -> None:
        """Take note of a step in which ``l0`` latents fired per token, of which there are to be ``k``.

        ``sparsity`` is S, the term without its coefficient. ``progress`` says how much of the path is behind (1 and
        more: all of it), ``pace`` is the learning rate as a share of its peak.
        """
        log_l0 = math.log(max(l0, _NEVER))
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
