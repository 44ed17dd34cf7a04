"""Two dictionaries by their firings: the matching against SciPy's on the whole table, and what a side's row says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_store import store_of
from scipy.optimize import linear_sum_assignment

from sae.alignment import cofiring
from sae.alignment.alignment import read_sides, write_sides
from sae.alignment.behaviour import Behaviour, Member, compare_behaviour, match_by_jaccard
from sae.alignment.cofiring import count_cofirings
from sae.alignment.nulls import FIRING_COLUMNS


def table(rng: np.random.Generator, windows: int, m: int) -> np.ndarray:
    return rng.random((4 * windows, m)) < rng.random(m) ** 2


def jaccards(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    together = a.T.astype(float) @ b
    either = a.sum(0)[:, None] + b.sum(0) - together
    return np.divide(together, either, out=np.zeros_like(together), where=either > 0)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(0, 999))
def test_the_matching_is_the_best_there_is(m: int, other: int, windows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = table(rng, windows, m), table(rng, windows, other)
    none = [np.full((size, 1), -1, np.int32) for size in (m, other)]
    one, back = (
        count_cofirings(store_of(x), store_of(y), asked, np.zeros(x.shape[1], bool))
        for x, y, asked in ((a, b, none[0]), (b, a, none[1]))
    )
    partner, together, gap = match_by_jaccard(one, back)
    exact = jaccards(a, b)
    rows, columns = linear_sum_assignment(exact, maximize=True)
    some = np.flatnonzero(partner >= 0)
    assert len(set(partner[some])) == len(some)
    reached = exact[some, partner[some]].sum()
    best = exact[rows, columns].sum()
    assert reached <= best + 1e-9
    assert best - reached <= gap * min(m, other) + 1e-9
    if max(m, other) <= cofiring.NEAREST:
        assert reached == pytest.approx(best)
        assert gap < 1e-9
    assert together[some].tolist() == (a.T.astype(int) @ b)[some, partner[some]].tolist()
    assert (together[some] > 0).all()


def test_beyond_the_nearest_the_gap_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cofiring, "NEAREST", 2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = table(rng, 6, 25), table(rng, 6, 20)
        asked = [np.full((size, 1), -1, np.int32) for size in (25, 20)]
        one = count_cofirings(store_of(a), store_of(b), asked[0], np.zeros(25, bool))
        back = count_cofirings(store_of(b), store_of(a), asked[1], np.zeros(20, bool))
        partner, _, gap = match_by_jaccard(one, back)
        exact = jaccards(a, b)
        best = exact[linear_sum_assignment(exact, maximize=True)].sum()
        some = np.flatnonzero(partner >= 0)
        assert -1e-9 <= best - exact[some, partner[some]].sum() <= 20 * gap + 1e-9


def test_a_side_says_what_the_tables_say(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    a, b = (table(rng, 200, m) | (rng.random((800, m)) < 0.03) for m in (12, 16))
    b[:, 3] = a[:, 5]
    W_a, W_b = rng.normal(size=(12, 8)), rng.normal(size=(16, 8))
    to_b, to_a = rng.permutation(16)[:12].astype(np.int32), np.full(16, -1, np.int32)
    to_a[to_b] = np.arange(12)
    lone = rng.random(12) < 0.5
    lone[5] = True
    told: list[int] = []
    found = compare_behaviour(
        Member(store_of(a), W_a, to_b, lone, rng.normal(size=(16, 8))),
        Member(store_of(b), W_b, to_a, np.ones(16, bool), None),
        advance=told.append,
    )
    assert sum(told) == 28
    one, other = found.sides
    exact = jaccards(a, b)
    assert one["max_jaccard"].to_numpy() == pytest.approx(exact.max(axis=1), abs=1e-6)
    assert one.loc[5, "max_jaccard_neighbor"] == 3
    assert one.loc[5, "relation"] == "same"
    assert one.loc[5, "relation_latents"] == [3]
    back_again = other["jaccard_partner"].to_numpy()
    for latent, j in enumerate(one["jaccard_partner"].to_numpy()):
        assert back_again[j] == latent
        for prefix, partner in (("", j), ("decoder_partner_", to_b[latent])):
            row, both = one.iloc[latent], (a[:, latent] & b[:, partner]).sum()
            assert row[f"{prefix}jaccard"] == pytest.approx(exact[latent, partner], abs=1e-6, nan_ok=True)
            assert row[f"{prefix}p_there"] == pytest.approx(both / a[:, latent].sum(), abs=1e-6)
            assert row[f"{prefix}p_here"] == pytest.approx(both / b[:, partner].sum(), abs=1e-6)
    assert one["relation"].notna().tolist() == lone.tolist()
    assert one["rebuilt__rotated"].notna().tolist() == lone.tolist()
    assert "rebuilt__rotated" not in other
    assert other["decoder_partner_jaccard"].isna().tolist() == (to_a < 0).tolist()
    assert len(one["nearest_firing"][5]) <= 4
    write_sides(tmp_path / "a--b.parquet", ("a", "b"), (one, other), inputs="x")
    back, mine = read_sides(tmp_path, "b", "a")
    assert back["max_jaccard"].to_numpy() == pytest.approx(other["max_jaccard"].to_numpy())
    assert list(mine["relation_latents"][5]) == [3]


def test_the_null_is_the_comparison_with_moved_firings() -> None:
    rng = np.random.default_rng(5)
    a, b = (table(rng, 200, m) | (rng.random((800, m)) < 0.03) for m in (12, 16))
    b[:, :6] = a[:, :6]
    W_a, W_b = rng.normal(size=(12, 8)), rng.normal(size=(16, 8))
    to_b, to_a = np.arange(12, dtype=np.int32), np.r_[np.arange(12), [-1] * 4].astype(np.int32)

    def compared(b: np.ndarray, offset: int | None) -> Behaviour:
        one = Member(store_of(a), W_a, to_b, np.ones(12, bool), None)
        other = Member(store_of(b), W_b, to_a, rng.random(16) < 2, None)
        return compare_behaviour(one, other, advance=told.append, offset=offset)

    told: list[int] = []
    found = compared(b, 333)
    assert sum(told) == 2 * 28
    # Moving b's tokens on for both directions is the same as moving a's back.
    for side, plain, moved in zip(
        found.sides, compared(b, None).sides, compared(np.roll(b, -333, axis=0), None).sides, strict=True
    ):
        null = side[[f"{name}__shifted" for name in FIRING_COLUMNS]].set_axis(FIRING_COLUMNS, axis=1)
        pd.testing.assert_frame_equal(null, moved[list(FIRING_COLUMNS)])
        pd.testing.assert_frame_equal(side[list(plain)], plain)
        assert set(side) - set(plain) == {f"{name}__shifted" for name in FIRING_COLUMNS}
    first = found.sides[0][:6]
    assert (first["decoder_partner_jaccard"] == 1).all()
    assert (first["decoder_partner_jaccard__shifted"] < 0.9).all()


def test_silent_latents_have_no_partner_and_no_numbers() -> None:
    a = np.zeros((40, 3), bool)
    a[:25, 0] = True
    W = np.eye(3)
    everyone = Member(store_of(a), W, np.arange(3, dtype=np.int32), np.ones(3, bool), W)
    one, _ = compare_behaviour(everyone, everyone).sides
    assert one["jaccard_partner"].tolist() == [0, -1, -1]
    assert one["relation"].tolist() == ["same", "rare", "rare"]
    assert one["jaccard"].isna().tolist() == [False, True, True]
    assert one["decoder_partner_p_there"].isna().tolist() == [False, True, True]
    assert one.loc[1, "max_jaccard_neighbor"] == -1
