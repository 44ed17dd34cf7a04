"""Matching against brute force, SciPy and matrices whose answer is known; the certificate against spoiled matchings."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sae.alignment.alignment import (
    UNMATCHED,
    Alignment,
    align,
    list_pairs,
    pair_inputs,
    pair_path,
    read_alignment,
    read_both_ways,
    verify,
    write_alignment,
)
from sae.common.errors import BadInput, NotFound
from sae.common.files import digest_file, read_table, table_metadata


def unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def dictionaries(n_a: int, n_b: int, d: int = 12, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Encoder and decoder of two dictionaries that share half of the narrower one."""
    rng = np.random.default_rng(seed)
    shared = min(n_a, n_b) // 2
    W_enc_a, W_dec_a = rng.normal(size=(2, n_a, d))
    W_enc_b, W_dec_b = rng.normal(size=(2, n_b, d))
    W_enc_b[:shared] = W_enc_a[:shared] + 0.2 * rng.normal(size=(shared, d))
    W_dec_b[:shared] = W_dec_a[:shared] + 0.2 * rng.normal(size=(shared, d))
    order = rng.permutation(n_b)
    return tuple(x.astype(np.float32) for x in (W_enc_a, W_dec_a, W_enc_b[order], W_dec_b[order]))


SIZES = st.integers(1, 6)
# Few distinct values, so that ties and zero rows are the rule.
ENTRIES = st.sampled_from([-1.0, 0.0, 0.5, 1.0])


@st.composite
def tied_dictionaries(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    n_a, n_b, d = draw(SIZES), draw(SIZES), draw(st.integers(1, 4))
    return tuple(
        np.array(draw(st.lists(st.lists(ENTRIES, min_size=d, max_size=d), min_size=n, max_size=n)))
        for n in (n_a, n_a, n_b, n_b)
    )


@settings(max_examples=60, deadline=None)
@given(tied_dictionaries())
def test_the_matching_is_best_and_meets_its_bound(weights: tuple[np.ndarray, ...]) -> None:
    found = align(*weights)
    for space, a, b in (("encoder", weights[0], weights[2]), ("decoder", weights[1], weights[3])):
        cosines = unit(a) @ unit(b).T
        narrow = cosines if len(a) <= len(b) else cosines.T
        n, m = narrow.shape
        best = max(narrow[np.arange(n), list(columns)].sum() for columns in permutations(range(m), n))
        certificate = found.certificate[space]
        assert certificate["sum"] == pytest.approx(best, abs=1e-9)
        assert certificate["upper_bound"] == pytest.approx(best, abs=1e-9)
        assert certificate["certified"]
        np.testing.assert_allclose(found.a[f"max_{space}_cosine"], cosines.max(axis=1), atol=1e-6)
        np.testing.assert_allclose(found.b[f"max_{space}_cosine"], cosines.max(axis=0), atol=1e-6)
        u, v = found.a[f"{space}_price"].to_numpy(), found.b[f"{space}_price"].to_numpy()
        assert (u[:, None] + v[None, :] >= cosines - 1e-9).all()
        assert u.sum() + v.sum() == pytest.approx(best, abs=1e-9)
    assert verify(found, *weights) == {
        space: pytest.approx(found.certificate[space], abs=1e-9) for space in ("encoder", "decoder")
    }


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_permuted_and_rescaled_copy_is_recovered(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    W_enc, W_dec = rng.normal(size=(2, n, 24))
    order = rng.permutation(n)
    scale = rng.uniform(0.01, 100, size=(n, 1))
    found = align(W_enc, W_dec, (scale * W_enc)[order], (scale * W_dec)[order])
    for space in ("encoder", "decoder"):
        np.testing.assert_array_equal(order[found.a[f"{space}_partner"]], np.arange(n))
        np.testing.assert_array_equal(found.b[f"{space}_partner"], order)
        np.testing.assert_array_equal(found.a[f"max_{space}_neighbor"], found.a[f"{space}_partner"])
        np.testing.assert_allclose(found.a[f"{space}_cosine"], 1, atol=1e-6)


@pytest.mark.parametrize(("n_a", "n_b"), [(300, 300), (200, 310), (310, 200), (1, 50), (50, 1), (1, 1)])
def test_agrees_with_scipy_and_is_certified(n_a: int, n_b: int) -> None:
    weights = dictionaries(n_a, n_b)
    found = align(*weights)
    for space, a, b in (("encoder", weights[0], weights[2]), ("decoder", weights[1], weights[3])):
        cosines = unit(a.astype(np.float64)) @ unit(b.astype(np.float64)).T
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        certificate = found.certificate[space]
        assert certificate["sum"] == pytest.approx(cosines[rows, columns].sum(), abs=1e-8)
        assert certificate["certified"]
        assert certificate["matched"] == min(n_a, n_b)
        partner = found.a[f"{space}_partner"].to_numpy()
        matched = partner != UNMATCHED
        assert matched.sum() == min(n_a, n_b)
        np.testing.assert_array_equal(found.b[f"{space}_partner"].to_numpy()[partner[matched]], np.flatnonzero(matched))
        np.testing.assert_array_equal(np.isnan(found.a[f"{space}_cosine"]), ~matched)
        np.testing.assert_allclose(
            found.a[f"{space}_cosine"][matched], cosines[np.flatnonzero(matched), partner[matched]], atol=1e-6
        )
        np.testing.assert_array_equal(found.b[f"max_{space}_neighbor"], cosines.argmax(axis=0))
    assert found.certificate["latents"] == [n_a, n_b]


def test_both_directions_say_the_same() -> None:
    weights = dictionaries(60, 80)
    there, back = align(*weights, names=("x", "y")), align(*weights[2:], *weights[:2], names=("y", "x")).swapped()
    pd.testing.assert_frame_equal(there.a, back.a)
    pd.testing.assert_frame_equal(there.b, back.b)
    assert there.certificate == back.certificate


def test_a_spoiled_matching_fails_the_certificate() -> None:
    """Exchanging the partners of any two shared latents must show, in the prices and when checked from the weights."""
    weights = dictionaries(200, 220)
    found = align(*weights)
    assert all(space["certified"] for space in verify(found, *weights).values())
    partner = found.a["decoder_partner"].to_numpy().copy()
    partner[[3, 5]] = partner[[5, 3]]
    spoiled = verify(Alignment(found.a.assign(decoder_partner=partner), found.b, found.certificate), *weights)
    assert spoiled["encoder"]["certified"]
    assert not spoiled["decoder"]["certified"]
    assert spoiled["decoder"]["gap"] > 0.1


def test_tampered_prices_and_partners_are_caught() -> None:
    weights = dictionaries(40, 60)
    found = align(*weights)
    raised = found.b.assign(encoder_price=found.b["encoder_price"] + 0.01)
    assert not verify(Alignment(found.a, raised, found.certificate), *weights)["encoder"]["certified"]
    lowered = found.b.assign(encoder_price=found.b["encoder_price"] - 5)  # would 'bound' below the matched sum
    checked = verify(Alignment(found.a, lowered, found.certificate), *weights)["encoder"]
    assert checked["upper_bound"] >= checked["sum"] - 1e-9
    twice = found.a.assign(
        encoder_partner=found.a["encoder_partner"].where(found.a["latent"] != 1, found.a["encoder_partner"][0])
    )
    with pytest.raises(BadInput, match="not one-to-one"):
        verify(Alignment(twice, found.b, found.certificate), *weights)


def test_zero_and_equal_rows_are_matched() -> None:
    rng = np.random.default_rng(1)
    W = rng.normal(size=(80, 10))
    W[:30] = 0
    W[30:50] = W[30]
    found = align(W, W, W[::-1], W[::-1])
    assert found.certificate["encoder"]["certified"]
    assert found.certificate["encoder"]["sum"] == pytest.approx(50)
    cosine = found.a["encoder_cosine"].to_numpy()
    assert (cosine[:30] == 0).all()
    assert sorted(found.a["encoder_partner"]) == list(range(80))


def test_very_small_and_very_large_rows_have_directions() -> None:
    tiny = np.array([[1e-38, 0], [0, 1e-30]], dtype=np.float32)
    huge = np.array([[3e38, 0], [0, 3e38]], dtype=np.float32)
    np.testing.assert_allclose(align(tiny, tiny, huge, huge).a["encoder_cosine"], 1)


def test_inputs_that_cannot_be_aligned_are_named() -> None:
    W_enc_a, W_dec_a, W_enc_b, W_dec_b = dictionaries(8, 8)
    names = ("run_x", "run_y")
    with pytest.raises(BadInput, match="run_x has d_in 12, d_out 12 and run_y has d_in 5, d_out 5"):
        align(W_enc_a, W_dec_a, W_enc_b[:, :5], W_dec_b[:, :5], names=names)
    with pytest.raises(BadInput, match="run_y: 8 encoder rows but 7 decoder rows"):
        align(W_enc_a, W_dec_a, W_enc_b, W_dec_b[:7], names=names)
    with pytest.raises(BadInput, match=r"run_x: the encoder has shape \(12,\)"):
        align(W_enc_a[0], W_dec_a, W_enc_b, W_dec_b, names=names)
    W_dec_b[4, 2] = np.nan
    with pytest.raises(BadInput, match=r"run_y: 1 decoder rows hold NaN or infinity .*latent 4"):
        align(W_enc_a, W_dec_a, W_enc_b, W_dec_b, names=names)


def test_pairs() -> None:
    assert list_pairs(["x", "y", "z"]) == [("x", "y"), ("x", "z"), ("y", "z")]
    for runs, words in ((["x"], "'x' alone"), ([], "no runs"), (["x", "y", "x"], "'x' is named twice")):
        with pytest.raises(BadInput, match=words):
            list_pairs(runs)


def test_a_pair_has_one_file_for_both_sides(tmp_path: Path) -> None:
    weights = dictionaries(30, 40)
    found = align(*weights, names=("run_a", "run_b"))
    path = write_alignment(tmp_path, "run_a", "run_b", found, inputs="0123")
    assert path.name == "run_a--run_b.parquet"
    first = digest_file(path)
    there, back = read_alignment(tmp_path, "run_a", "run_b"), read_alignment(tmp_path, "run_b", "run_a")
    for got, want in ((there.a, found.a), (there.b, found.b), (back.a, found.b), (back.b, found.a)):
        pd.testing.assert_frame_equal(got, want)
    assert back.certificate["runs"] == ["run_b", "run_a"]
    assert back.certificate["latents"] == [40, 30]
    assert there.certificate["inputs"] == "0123"
    assert all(space["certified"] for space in verify(there, *weights).values())
    assert all(space["certified"] for space in verify(back, *weights[2:], *weights[:2]).values())
    assert pair_inputs(tmp_path, "run_b", "run_a") == "0123"
    assert table_metadata(path)["runs"] == ["run_a", "run_b"]
    assert set(read_table(path)["run"]) == {"run_a", "run_b"}

    # Stored from the other side it replaces the same file, with the same bytes.
    assert write_alignment(tmp_path, "run_b", "run_a", found.swapped(), inputs="0123") == path
    assert digest_file(path) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run_a--run_b.json", "run_a--run_b.parquet"]

    tables = read_both_ways(tmp_path, ["run_b", "run_a"])
    pd.testing.assert_frame_equal(tables["run_a", "run_b"], found.a)
    pd.testing.assert_frame_equal(tables["run_b", "run_a"], found.b)


def test_missing_and_broken_alignments_are_named(tmp_path: Path) -> None:
    told = r"'run_a' and 'run_c' are not aligned yet; run `python cli\.py align run_a run_c --root .*`"
    with pytest.raises(NotFound, match=told):
        read_alignment(tmp_path, "run_a", "run_c")
    path = write_alignment(tmp_path, "run_a", "run_b", align(*dictionaries(5, 5)), inputs=None)
    with pytest.raises(NotFound, match="there is 'run_a--run_b'"):
        read_alignment(tmp_path, "run_a", "run_c")
    assert pair_path(tmp_path, "run_a", "run_c") is None
    assert pair_inputs(tmp_path, "run_a", "run_c") is None
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadInput, match="cannot be read; delete it"):
        read_alignment(tmp_path, "run_b", "run_a")


def test_runs_without_torch() -> None:
    code = "import sys, sae.alignment.alignment, sae.alignment.overlap; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
