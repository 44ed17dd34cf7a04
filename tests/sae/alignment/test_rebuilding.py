"""Directions rebuilt from four rows: against trying every four, and against planted combinations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.alignment.rebuilding import rebuild


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def explained_by(x: np.ndarray, rows: np.ndarray) -> float:
    return float(x @ rows.T @ np.linalg.pinv(rows @ rows.T, rcond=1e-9) @ rows @ x)


@given(st.integers(2, 8), st.integers(1, 10), st.integers(0, 999))
def test_variance_explained_is_reached_never_exceeded(d: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, b = rng.normal(size=(3, d)), rng.normal(size=(m, d))
    found = rebuild(x, b)
    ux, ub = unit(x), unit(b)
    for i in range(3):
        real = found.rows[i] >= 0
        assert len(set(found.rows[i][real])) == real.sum()
        built = (found.weights[i][real, None] * ub[found.rows[i][real]]).sum(axis=0)
        assert 1 - np.square(ux[i] - built).sum() == pytest.approx(found.explained[i], abs=2e-4)
        best = max(explained_by(ux[i], ub[list(four)]) for four in combinations(range(m), min(4, m)))
        assert found.explained[i] <= best + 2e-4
        greedy, taken = 0.0, list[int]()
        for _ in range(min(4, m)):  # orthogonal matching pursuit, the usual way to seek them
            left = ux[i] - np.linalg.pinv(ub[taken]) @ ub[taken] @ ux[i] if taken else ux[i]
            taken.append(int(np.abs(ub @ left).argmax()))
            greedy = explained_by(ux[i], ub[taken])
        assert found.explained[i] >= greedy - 0.15  # never far below; mostly above (see the next test)


def test_the_best_four_are_mostly_found() -> None:
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=(100, 12)), rng.normal(size=(16, 12))
    found, ux, ub = rebuild(x, b), unit(x), unit(b)
    best = np.array([max(explained_by(v, ub[list(four)]) for four in combinations(range(16), 4)) for v in ux])
    assert (found.explained >= best - 1e-4).mean() > 0.5
    assert (best - found.explained).mean() < 0.03


def test_a_planted_combination_is_found() -> None:
    rng = np.random.default_rng(1)
    b = rng.normal(size=(3000, 64))
    ub = unit(b)
    x = 0.9 * ub[10:40] + 0.6 * ub[100:130] - 0.4 * ub[200:230]
    found = rebuild(5 * x, 0.1 * b)
    length = np.linalg.norm(x, axis=1)
    assert found.explained == pytest.approx(np.ones(30), abs=1e-4)
    for i in range(30):
        assert found.rows[i].tolist() == [10 + i, 100 + i, 200 + i, -1]
        assert found.weights[i, :3] * length[i] == pytest.approx([0.9, 0.6, -0.4], abs=1e-3)
        assert found.nearest[i, 0] == 10 + i
        assert found.cosines[i] == pytest.approx(np.sort(ub @ unit(x[i]))[::-1][:4], abs=1e-5)


def test_a_row_that_is_there_needs_no_other() -> None:
    b = np.random.default_rng(2).normal(size=(50, 20))
    found = rebuild(b[:5] * 3, b)
    assert found.rows.tolist() == [[i, -1, -1, -1] for i in range(5)]
    assert found.explained == pytest.approx(np.ones(5), abs=1e-6)


def test_zeros_and_duplicates() -> None:
    b = np.random.default_rng(3).normal(size=(9, 6))
    b[3], b[4], b[5] = b[2], 0, 0
    x = np.stack([np.zeros(6), b[2], b[2] + b[0]])
    found = rebuild(x, b)
    assert found.explained == pytest.approx([0, 1, 1], abs=1e-4)
    assert found.rows[0].tolist() == [-1] * 4
    assert 2 in found.rows[1] or 3 in found.rows[1]
    assert np.isfinite(found.weights).all()
    assert rebuild(np.zeros((0, 6)), b).rows.shape == (0, 4)
    assert rebuild(x, b[:2]).rows.shape == (3, 4)
