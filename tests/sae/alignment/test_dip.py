"""The dip against a linear programme that tries every mode, and its interval against samples whose dip is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from sae.alignment.dip import compute_dip, read_dip_test, run_dip_test


def by_linear_programmes(values: list[float]) -> float:
    """min over modes m of the least d for which a function convex before m and concave after it is within d.

    Variables: the function's value at each place (the limit from the left at m), its value at m, and d.
    """
    at, counts = np.unique(values, return_counts=True)
    reached = np.cumsum(counts) / len(values)
    below, n, best = np.concatenate([[0.0], reached[:-1]]), len(at), 1.0
    for m in range(n):
        rows: list[np.ndarray] = []
        limits: list[float] = []

        def under(
            limit: float, *terms: tuple[int, float], rows: list[np.ndarray] = rows, limits: list[float] = limits
        ) -> None:
            row = np.zeros(n + 2)
            for variable, factor in terms:
                row[variable] += factor
            rows.append(row)
            limits.append(limit)

        for i in range(n):
            for variable, level in ((i, below[i]), (n if i == m else i, reached[i])):
                under(level, (variable, 1), (n + 1, -1))
                under(-level, (variable, -1), (n + 1, -1))
        under(0, (m, 1), (n, -1))
        sides = (list(range(m + 1)), at[: m + 1], 1), ([n, *range(m + 1, n)], at[m:], -1)
        for side, places, sign in sides:
            gaps = np.diff(places)
            for (a, b), c, left, right in zip(pairwise(side), side[2:], gaps, gaps[1:], strict=False):
                under(0, (b, sign * (1 / left + 1 / right)), (a, -sign / left), (c, -sign / right))
            for a, b in pairwise(side):
                under(0, (a, 1), (b, -1))
        cost = np.zeros(n + 2)
        cost[-1] = 1
        found = linprog(cost, A_ub=np.array(rows), b_ub=np.array(limits), bounds=(0.0, 1.0))
        best = min(best, found.fun if found.fun is not None else 1.0)
    return best


@given(st.lists(st.one_of(st.integers(0, 6).map(float), st.floats(0, 6, width=16)), min_size=2, max_size=9))
def test_it_is_the_least_distance_to_one_mode(values: list[float]) -> None:
    assert compute_dip(values) == pytest.approx(max(by_linear_programmes(values), 0.5 / len(values)), abs=1e-7)


def test_two_spikes_and_one() -> None:
    assert compute_dip([0.0] * 50 + [1.0] * 50) == pytest.approx(0.25)
    assert compute_dip([3.0] * 50) == pytest.approx(0.01)
    assert np.isnan(compute_dip([]))


@given(st.integers(2, 200), st.floats(0.1, 5), st.integers(0, 99))
def test_scale_and_order_do_not_matter(n: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(size=n), 3)
    assert compute_dip(scale * rng.permutation(x) + 7) == pytest.approx(compute_dip(x), abs=1e-6)
    assert compute_dip(-x) == pytest.approx(compute_dip(x), abs=1e-12)


def mixture(n: int, rng: np.random.Generator, apart: float = 4.0) -> np.ndarray:
    return rng.normal(size=n) + apart * (rng.random(n) < 0.4)


def test_chance_differs_from_two_modes() -> None:
    rng = np.random.default_rng(0)
    one = run_dip_test([rng.normal(size=800), rng.random(800)])
    assert one.p_value > 0.05
    assert run_dip_test([mixture(800, rng)]).p_value < 0.002
    assert run_dip_test([mixture(800, rng), mixture(800, rng)]).value.low > one.value.high
    assert np.isnan(run_dip_test([[1.0], []]).p_value)  # too little to say anything
    samples = [mixture(800, rng), rng.random(500)]
    drawn, not_drawn = run_dip_test(samples), run_dip_test(samples, draw=False)
    assert (not_drawn.of_sample, not_drawn.p_value) == (drawn.of_sample, drawn.p_value)
    assert np.isnan(not_drawn.value.value)


def test_p_values_of_uniforms_are_spread_evenly() -> None:
    rng = np.random.default_rng(1)
    p = np.array([run_dip_test([rng.random(60)]).p_value for _ in range(60)])
    assert 0.3 < p.mean() < 0.7
    assert (p < 0.05).mean() < 0.15


def piled_up(n: int, rng: np.random.Generator) -> np.ndarray:
    """Most about .35, the rest piled up below .97: what matched cosines look like."""
    low = rng.random(n) < 0.6
    return np.where(low, rng.normal(0.35, 0.12, n), np.minimum(1, 0.97 - np.abs(rng.normal(0, 0.12, n))))


@pytest.mark.parametrize("shape", [mixture, piled_up])
def test_the_interval_covers_the_truth(shape: Callable[[int, np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    truth = compute_dip(shape(400_000, rng))
    inside = 0
    for _ in range(60):
        low, high = run_dip_test([shape(500, rng)]).value[1:]
        inside += low <= truth <= high
    assert inside >= 51  # of 60; where it covers 93 %, fewer has a chance of about one in a hundred


def test_repeated_latents_are_one_observation() -> None:
    """Four samples that are nearly copies: taken for independent, the interval would be half as wide."""
    rng = np.random.default_rng(3)
    truth = compute_dip(piled_up(400_000, rng))
    inside, widths = 0, []
    for _ in range(40):
        once = piled_up(400, rng)
        copies = [once + rng.normal(0, 0.01, 400) for _ in range(4)]
        told = run_dip_test(copies, [np.arange(400)] * 4).value
        inside += told.low <= truth <= told.high
        widths.append((told.high - told.low, np.diff(run_dip_test(copies).value[1:])[0]))
    assert inside >= 33
    joint, apart = np.mean(widths, axis=0)
    assert joint > 1.5 * apart


def test_a_stored_dip_is_reused_without_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    samples, units, path = [rng.normal(size=200), rng.normal(size=8)], [np.arange(200), np.arange(8)], tmp_path / "dips"
    expected = {draw: run_dip_test(samples, units, draw=draw) for draw in (True, False)}
    found = {draw: read_dip_test(path, samples, units, draw) for draw in (True, False)}

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("worked out again")

    monkeypatch.setattr("sae.alignment.dip.run_dip_test", refused)
    for draw in (True, False):
        again = read_dip_test(path, samples, units, draw)
        assert np.array_equal(np.hstack(again), np.hstack(expected[draw]), equal_nan=True)
        assert np.array_equal(np.hstack(found[draw]), np.hstack(expected[draw]), equal_nan=True)
    for other in ([samples[0] + 1e-9, samples[1]], [samples[0][::-1], samples[1]]):
        with pytest.raises(AssertionError, match="again"):
            read_dip_test(path, other, units, True)


def test_a_damaged_file_of_dips_is_replaced(tmp_path: Path) -> None:
    samples, units, path = [np.linspace(0, 1, 50)], [np.arange(50)], tmp_path / "dips"
    expected = read_dip_test(path, samples, units, True)
    for content in ("{", "[]", '{"a": 3}', '{"a": [1]}', '{"a": ["x", 1, 1, 1, 1]}'):
        path.write_text(content)
        assert read_dip_test(path, samples, units, True) == expected
        assert read_dip_test(path, samples, units, True) == expected


def test_an_unwritable_dip_is_computed_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    samples, units = [np.linspace(0, 1, 50)], [np.arange(50)]
    assert read_dip_test(tmp_path / "file" / "dips", samples, units, True) == run_dip_test(samples, units)
