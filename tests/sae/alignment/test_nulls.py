"""Dictionaries that share nothing: what they keep of the sibling, and what they do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.alignment.alignment import align
from sae.alignment.nulls import COLUMNS, add_null, draw_offset, draw_rotation, read_null, rotate_sibling


def weights(seed: int, m: int = 30, d: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    encoder, decoder = rng.normal(size=(2, m, d)).astype(np.float32)
    return encoder, decoder


@given(st.integers(1, 40), st.integers(0, 99))
def test_a_rotation_is_one(d: int, seed: int) -> None:
    turn = draw_rotation(d, np.random.default_rng(seed))
    assert turn @ turn.T == pytest.approx(np.eye(d), abs=1e-10)


def test_rotations_favour_no_direction() -> None:
    """Haar: the image of a fixed vector is uniform on the sphere, whose components have mean 0 and variance 1 / D."""
    rng = np.random.default_rng(0)
    images = np.array([draw_rotation(5, rng)[0] for _ in range(4000)])
    assert np.abs(images.mean(axis=0)).max() < 0.03
    assert (images**2).mean(axis=0) == pytest.approx(np.full(5, 0.2), abs=0.02)


def test_the_rotated_sibling_keeps_its_inner_geometry() -> None:
    encoder, decoder = weights(0)
    turned = rotate_sibling((encoder, decoder), ("a", "b"))
    assert turned[0] @ turned[0].T == pytest.approx(encoder @ encoder.T, abs=1e-3)
    assert turned[0] @ turned[1].T == pytest.approx(encoder @ decoder.T, abs=1e-3)  # encoder to decoder too
    assert np.abs((turned[0] * encoder).sum(1)).mean() < 0.5 * (encoder**2).sum(1).mean()


def test_each_pair_has_its_own_reproducible_null() -> None:
    of = weights(0)
    once, again, other = (rotate_sibling(of, pair) for pair in (("a", "b"), ("a", "b"), ("a", "c")))
    assert np.array_equal(once[0], again[0])
    assert not np.array_equal(once[0], other[0])
    assert not np.array_equal(once[0], rotate_sibling(of, ("a", "b"), seed=1)[0])


@given(st.integers(1, 200), st.integers(4, 64), st.integers(0, 99))
def test_moved_firings_never_overlap_their_old_place(n: int, per_sequence: int, seed: int) -> None:
    offset = draw_offset(("a", "b"), n * per_sequence, per_sequence, seed)
    assert 0 < offset < n * per_sequence
    assert n * per_sequence / 4 - per_sequence <= offset <= 3 * n * per_sequence / 4 + per_sequence
    assert per_sequence // 4 <= offset % per_sequence <= per_sequence // 4 + per_sequence // 2
    assert offset + draw_offset(("b", "a"), n * per_sequence, per_sequence, seed) == n * per_sequence


def test_each_pair_has_an_offset_of_its_own() -> None:
    pairs = [("a", "b"), ("a", "c"), ("b", "c"), ("b", "d")]
    assert len({draw_offset(pair, 2_000_000, 128) for pair in pairs}) == 4
    assert draw_offset(("a", "b"), 2_000_000, 128) == draw_offset(("a", "b"), 2_000_000, 128)
    assert draw_offset(("a", "b"), 2_000_000, 128) != draw_offset(("a", "b"), 2_000_000, 128, seed=1)


def test_both_sides_of_unequal_widths_have_the_null() -> None:
    a, b = weights(0, m=20), weights(1, m=30)
    made = align(*a, *b)
    one, other = add_null((made.a, made.b), a, b, ("a", "b"))
    for side, mine, theirs in ((one, a, b), (other, b, a)):
        table = read_null(side)
        assert table is not None
        assert list(table) == list(COLUMNS)
        assert len(table) == len(mine[0])
        matched = table["decoder_partner"] >= 0
        assert matched.sum() == 20
        assert table.loc[matched, "decoder_partner"].is_unique
        assert table["decoder_partner"].max() < len(theirs[0])
        assert table.loc[matched, "decoder_cosine"].notna().all()
    rotated = rotate_sibling(b, ("a", "b"))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a[1], rotated[1])]
    cosines = unit[0] @ unit[1].T
    seen = read_null(one)
    assert seen is not None
    assert seen["decoder_cosine"].to_numpy() == pytest.approx(
        cosines[np.arange(20), seen["decoder_partner"].to_numpy()], abs=1e-5
    )
    back = read_null(other)
    assert back is not None
    assert back["decoder_partner"].to_numpy()[seen["decoder_partner"]] == pytest.approx(np.arange(20))
    assert read_null(made.a) is None
