"""The control of L0: on made-up responses here; on dictionaries in ``test_architectures_training``."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.training.sparsity import SparsityControl


def run(
    k: int, first: float, gain: float, lag: float, at: float, noise: float, drift: float = 0.0, steps: int = 2000
) -> tuple[SparsityControl, np.ndarray]:
    """L0 by step, of something whose log L0 follows ``-gain * log(lambda / at)`` with a lag of so many steps.

    The lag grows as the learning rate decays; where the coefficient is low, L0 stays at ``first``. ``at`` is the
    coefficient at which one latent fires, and changes by ``drift`` in the course of the run.
    """
    control, l0, found = SparsityControl(), math.log(first), []
    random = np.random.default_rng(0)
    for step in range(steps):
        pace = min(1.0, (steps - step) / (0.9 * steps))
        settled = min(math.log(first), -gain * (control.log_coefficient - math.log(at) - drift * step / steps))
        l0 += (settled - l0) * pace / lag
        measured = math.exp(l0 + noise * random.standard_normal())
        found.append(measured)
        control.observe(measured, 1e-3, k, (step + 1) / (0.2 * steps), pace)
    return control, np.array(found)


@given(
    k=st.sampled_from([1, 8, 64]),
    spread=st.floats(4, 200),
    gain=st.floats(0.5, 2),
    lag=st.floats(1, 60),
    at=st.floats(1e-2, 10),
    noise=st.floats(0, 0.03),
    drift=st.floats(-0.7, 0.7),
)
def test_l0_is_brought_to_k_and_stays(
    k: int, spread: float, gain: float, lag: float, at: float, noise: float, drift: float
) -> None:
    control, l0 = run(k, k * spread, gain, lag, at * k ** (1 / gain), noise, drift)
    errors = np.log(l0 / k)
    assert abs(errors[-100:].mean()) < math.log(1.1)  # what the study asks of matched L0
    assert errors[1000:].std() < 0.04 + 2 * noise  # it does not swing
    assert errors.min() > -1.0  # nor overshoot by much: latents that die of it may not come back
    assert math.isfinite(control.coefficient)


def test_l0_is_led_there_along_a_path() -> None:
    _, l0 = run(8, 512, 1.0, 20, 3.0, 0.0)
    assert l0[200] == pytest.approx(math.sqrt(8 * 512), rel=0.4)  # half-way, on a logarithmic scale
    assert l0[600:].max() < 8.8


def test_the_term_does_not_outgrow_the_error() -> None:
    control = SparsityControl()
    for _ in range(1000):
        control.observe(100.0, 40.0, 8, 1.0, 1.0)  # nothing that one does helps
    assert control.coefficient * 40.0 == pytest.approx(2.0)


def test_from_below_too() -> None:
    control = SparsityControl()
    for _ in range(400):
        control.observe(2.0, 1.0, 8, 1.0, 1.0)
    assert control.coefficient < 1e-3


def test_silence_is_no_breakdown() -> None:
    control = SparsityControl()
    control.observe(100.0, 1.0, 8, 0.1, 1.0)
    for _ in range(50):
        control.observe(0.0, 0.0, 8, 1.0, 1.0)
    assert 0 < control.coefficient < 1e-3


def test_it_resumes_from_its_record() -> None:
    one, steps = SparsityControl(), [300.0, 250.1, 200.2, 100.3, 20.4, 7.5]
    for i, l0 in enumerate(steps):
        other = SparsityControl(**json.loads(json.dumps(vars(one))))
        for control in (one, other):
            control.observe(l0, 2.0, 8, i / 4, 1 - i / 7)
        assert one == other
