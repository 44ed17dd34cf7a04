"""The matching without a matrix against SciPy's with one; its certificate against dense computations; its parts."""

from __future__ import annotations

from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from sae.alignment.alignment import Alignment, align, normalize_rows, verify
from sae.alignment.matching import best as matching
from sae.alignment.matching import candidates
from sae.alignment.matching.best import Matching, find_best_matching
from sae.alignment.matching.candidates import Known, find_violations, shortlist
from sae.alignment.matching.directions import Directions, Screen, compute_cosines
from sae.alignment.matching.sparse import Graph, solve

Array = NDArray[Any]
Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def upper_bound(cosines: Array, prices: Array) -> float:
    return float(prices.sum() + (cosines - prices).max(axis=1).sum())


def check(found: Matching, a: Array, b: Array) -> None:
    """All that a matching claims, from the matrix of all cosines."""
    c = normalize_rows(a) @ normalize_rows(b).T
    n, m = c.shape
    best = c[linear_sum_assignment(c, maximize=True)].sum()
    assert len(np.unique(found.partner)) == n
    np.testing.assert_allclose(found.cosine, c[np.arange(n), found.partner], atol=1e-7)
    assert found.sum == pytest.approx(best, abs=1e-8 * n)
    assert -1e-12 * n <= found.gap <= 1e-9 * n
    # The prices prove it without the solver: feasible, and as large as the sum.
    assert found.v.min() >= 0
    assert found.u.sum() + found.v.sum() == pytest.approx(best, abs=1e-8 * n)
    assert (found.u[:, None] + found.v >= c - 1e-11).all()
    assert (found.v[np.setdiff1d(np.arange(m), found.partner)] == 0).all()
    assert upper_bound(c, found.v) == pytest.approx(best, abs=1e-8 * n)
    for near, axis in zip(found.nearest, (1, 0), strict=True):
        np.testing.assert_allclose(near.cosine, c.max(axis=axis), atol=1e-7)
        at_it = np.take_along_axis(c, np.expand_dims(near.who, axis), axis).ravel()
        np.testing.assert_allclose(at_it, near.cosine, atol=1e-12)
        lowest = (c >= c.max(axis=axis, keepdims=True) - 1e-12).argmax(axis=axis)
        np.testing.assert_array_equal(near.who, lowest)


# Few distinct values, so that ties, equal rows and zero rows are the rule.
ENTRIES = st.sampled_from([-1.0, 0.0, 0.5, 1.0])


@st.composite
def tied_rows(draw: st.DrawFn) -> tuple[Array, Array]:
    n, wider, d = draw(st.integers(1, 12)), draw(st.integers(0, 6)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from([np.float32, np.float64]))
    rows = st.lists(ENTRIES, min_size=d, max_size=d)
    a, b = (np.array(draw(st.lists(rows, min_size=size, max_size=size)), dtype=kind) for size in (n, n + wider))
    return a, b


@settings(max_examples=150, deadline=None)
@given(tied_rows(), st.sampled_from(PRECISIONS), st.integers(1, 5))
def test_ties_duplicates_zeros_and_negatives(rows: tuple[Array, Array], precision: Precision, nearest: int) -> None:
    check(find_best_matching(*rows, precision=precision, nearest=nearest), *rows)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 20), st.integers(1, 8), st.sampled_from(PRECISIONS)
)
def test_random_directions_of_unequal_widths(seed: int, n: int, wider: int, d: int, precision: Precision) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)), rng.normal(size=(n + wider, d))
    check(find_best_matching(a, b, precision=precision, nearest=2), a, b)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_a_permuted_and_rescaled_copy_is_recovered(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, order = rng.normal(size=(n, 24)).astype(np.float32), rng.permutation(n)
    found = find_best_matching(a, (rng.uniform(0.01, 100, size=(n, 1)) * a)[order].astype(np.float32), nearest=3)
    np.testing.assert_array_equal(order[found.partner], np.arange(n))
    np.testing.assert_array_equal(found.nearest[0].who, found.partner)
    assert found.sum == pytest.approx(n)


def true_cosines(a: Array, b: Array) -> Array:
    """[n, m] in 64 significant bits, by which float64's own errors can be measured."""
    exact = [side.astype(np.longdouble) for side in (a, b)]
    a, b = (side / np.sqrt((side * side).sum(axis=1, keepdims=True)) for side in exact)
    return a @ b.T


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 10), st.integers(2, 60))
def test_the_bound_holds_for_the_true_cosines(seed: int, n: int, wider: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)), rng.normal(size=(n + wider, d))
    found = find_best_matching(a, b, nearest=3)
    c = true_cosines(a, b)
    best = c[linear_sum_assignment(c.astype(np.float64), maximize=True)].sum()
    assert best <= found.upper_bound  # by no more than the difference is float64 wrong
    assert best >= found.sum - n * (d + 16) * 2.0**-52


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("length", [3e-41, 1e-30, 1e-13, 1e13, 1e36])
def test_rows_of_any_length_keep_their_direction(kind: type[np.floating[Any]], length: float) -> None:
    a, b = shared_half(60, 60, 12)
    a = (a * length).astype(kind)
    a[:, 0] /= 1000  # some numbers are far smaller than others
    i, j = (at.ravel() for at in np.indices((60, 60)))
    found = compute_cosines(Directions.of(a), Directions.of(b), i, j)
    np.testing.assert_allclose(found, true_cosines(a, b).ravel().astype(np.float64), rtol=0, atol=28 * 2.0**-52)


@pytest.mark.parametrize("at_a_time", [1, 50, 10_000])
def test_an_exact_look_in_portions_is_equal(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    a, b = shared_half(200, 230, 6)
    whole = find_best_matching(a, b, nearest=2)
    monkeypatch.setattr(candidates, "_LOOKED_AT", at_a_time)
    some = find_best_matching(a, b, nearest=2)
    np.testing.assert_array_equal(some.partner, whole.partner)
    np.testing.assert_array_equal(some.v, whole.v)
    assert (some.candidates, some.rounds) == (whole.candidates, whole.rounds)


def shared_half(n: int, m: int, d: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, d), dtype=np.float32), rng.standard_normal((m, d), dtype=np.float32)
    b[: n // 2] = a[: n // 2] + 0.5 * b[: n // 2]
    return a, b[rng.permutation(m)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small pair has many blocks, samples and full lists."""
    monkeypatch.setattr(candidates, "_TILE", (96, 130))
    monkeypatch.setattr(candidates, "_SAMPLE", 100)


def special(name: str) -> tuple[Array, Array]:
    a, b = shared_half(500, {"unequal": 650, "nearly equal": 503}.get(name, 500), 24)
    if name == "zeros in the rows":
        a[::3] = 0
    elif name == "zeros in both":
        a[::4], b[::2] = 0, 0
    elif name == "duplicates":
        a[:80], b[40:90] = a[0], b[40]
    elif name == "all negative":
        a, b = np.abs(a), -np.abs(b)
    elif name == "negative or zero":
        a, b = np.abs(a), -np.abs(b)
        b[::2] = 0
    elif name == "one cluster":
        a, b = a * 0.05 + 1, b * 0.05 + 1
    elif name == "all zero":
        a, b = 0 * a, b
    return a, b


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "name",
    [
        "shared",
        "unequal",
        "nearly equal",
        "zeros in the rows",
        "zeros in both",
        "duplicates",
        "all negative",
        "negative or zero",
        "one cluster",
        "all zero",
    ],
)
def test_every_precision_finds_the_same_best(name: str) -> None:
    a, b = special(name)
    found = {precision: find_best_matching(a, b, precision=precision, nearest=6) for precision in PRECISIONS}
    for one in found.values():
        check(one, a, b)
    assert found["float32"].sum == pytest.approx(found["bfloat16"].sum, abs=1e-9)
    if name == "shared":  # no ties: the best matching is the only one
        np.testing.assert_array_equal(found["float32"].partner, found["bfloat16"].partner)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["identical", "on a line", "one column over and over", "zero columns", "one cluster"])
def test_similar_latents_do_not_all_become_candidates(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: Precision
) -> None:
    """The screens cannot tell their cosines from the prices; were each a candidate, that would be the whole matrix."""
    monkeypatch.setattr(matching, "_MOST", 8)
    monkeypatch.setattr(matching, "_MOST_AT_ALL", 16)
    n, m = 500, 1000 if name == "zero columns" else 500
    a, b = shared_half(n, m, 16)
    if name == "identical":
        a[:], b[:] = a[0], 3 * a[0]
    elif name == "on a line":
        a, b = a[:, :1] * a[0], b[:, :1] * a[0]
    elif name == "one column over and over":
        b[:250] = b[0]
    elif name == "zero columns":
        a, b = np.abs(a), -np.abs(b)
        b[100:] = 0
    else:
        a, b = a * 1e-3 + 1, b * 1e-3 + 1
    found = find_best_matching(a, b, precision=precision, nearest=6)
    check(found, a, b)
    assert found.candidates < n * m / 6


@pytest.mark.usefixtures("small_tiles")
def test_it_is_deterministic_whatever_the_threads() -> None:
    a, b = shared_half(700, 720, 16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            results.append(find_best_matching(a, b, nearest=4))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other.partner, results[0].partner)
        np.testing.assert_array_equal(other.cosine, results[0].cosine)
    np.testing.assert_array_equal(results[2].v, results[0].v)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("d", [3, 64, 768])
def test_the_margin_holds_and_is_tight(precision: Precision, d: int) -> None:
    rng = np.random.default_rng(d)
    a, b = rng.normal(size=(300, d)).astype(np.float32), rng.normal(size=(400, d)).astype(np.float32)
    b[:100] = a[:100] + 0.1 * b[:100]
    b[100:200] = -a[100:200]
    screens = [Screen.of(Directions.of(side), precision, "cpu") for side in (a, b)]
    screened = (screens[0].rows @ screens[1].rows.T).double().numpy()
    true = normalize_rows(a) @ normalize_rows(b).T
    margin = screens[0].margin(screens[1])
    allowed = margin.absolute + margin.relative * np.abs(screened)
    assert (np.abs(true - screened) <= allowed).all()
    assert (true <= margin.above(screened)).all()
    assert margin.absolute <= (1.3 * 2.0**-8 if precision == "bfloat16" and d > 3 else 2.0**-7) + 3e-6
    assert np.abs(true - screened).max() > (0.1 * allowed.min() if precision == "bfloat16" else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_margin_holds_for_any_summation_order(precision: Precision) -> None:
    """One after the other, as no library does any more, thousands of equal terms are all rounded the same way."""
    rows = np.ones((2, 60_000), np.float32)
    sides = [Screen.of(Directions.of(rows[at : at + 1]), precision, "cpu") for at in range(2)]
    one, other = (side.rows.float().numpy()[0] for side in sides)
    summed = float(np.add.accumulate(one * other)[-1])
    error = abs(summed - one.astype(np.float64) @ other.astype(np.float64))
    slack = 3e-6
    assert slack < error <= sides[0].margin(sides[1]).absolute - sides[0].error - sides[1].error


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_the_shortlist_passes_over_is_bounded(precision: Precision) -> None:
    a, b = shared_half(400, 520, 8)
    sides = [Directions.of(side) for side in (a, b)]
    screens = [Screen.of(side, precision, "cpu") for side in sides]
    i, j, known = shortlist(screens[0], screens[1], 5)
    c = normalize_rows(a) @ normalize_rows(b).T
    left = np.ones(c.shape, dtype=bool)
    left[i, j] = False
    assert (c <= np.minimum(known.row[:, None], known.column))[left].all()
    # Rows and columns have their k nearest, up to what rounding can confuse.
    kth = np.sort(c, axis=1)[:, -5]
    assert (known.row <= kth + 3 * screens[0].margin(screens[1]).absolute + 0.02).all()
    np.testing.assert_allclose(compute_cosines(sides[0], sides[1], i, j), c[i, j], atol=1e-7)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("most", [3, 10_000])
def test_no_pair_that_exceeds_its_prices_is_overlooked(precision: Precision, most: int) -> None:
    """Prices in the midst of small cosines: what the screens get wrong decides there."""
    a, b = shared_half(300, 410, 8)
    rng = np.random.default_rng(0)
    u, v = rng.uniform(-0.05, 0.05, 300), rng.uniform(0, 0.05, 410)
    c = normalize_rows(a) @ normalize_rows(b).T
    over = c - u[:, None] - v
    sides = [Directions.of(side) for side in (a, b)]
    screens = Screen.of(sides[0], precision, "cpu"), Screen.of(sides[1], precision, "cpu")
    known = Known(np.full(300, np.inf), np.full(410, np.inf), np.full(300, np.inf), np.zeros(410))
    found, excess, _ = find_violations(sides[0], sides[1], screens, u, v, known, np.full(300, most), 1e-9)
    if most == 10_000:
        there = np.zeros(c.shape, dtype=bool)
        there[found.rows, found.columns] = True
        assert ((over > 1e-12) & (over < 1e-3)).sum() > 50
        assert there[over > 1e-12].all()
    assert (excess >= np.maximum(over.max(axis=1), 0) - 1e-12).all()
    left = np.ones(c.shape, dtype=bool)
    left[found.rows, found.columns] = False
    assert (c <= known.u[:, None] + known.v + 1e-12)[left].all()


def test_dropped_pairs_are_bounded_by_the_screens_margin() -> None:
    rng = np.random.default_rng(0)
    absolute, relative = 0.01, 0.004
    x = rng.uniform(-0.9, 0.9, size=(30, 40)).astype(np.float32)
    true = x + absolute + relative * np.abs(x)  # all of them as far above as they can be
    u, v, most = rng.uniform(-3, -2, 30), rng.uniform(0, 0.5, 40), rng.integers(1, 50, 30)
    i, j = (at.ravel().astype(np.int32) for at in np.indices(x.shape))
    dropped = np.full(30, -1e-3)
    keep = candidates.choose_most(i, x.ravel(), v[j], u, most, dropped, absolute, relative, False).reshape(x.shape)
    np.testing.assert_array_equal(keep.sum(axis=1), np.minimum(most, 40))
    left = np.where(keep, -np.inf, true - u[:, None] - v).max(axis=1)
    np.testing.assert_array_equal(dropped[most >= 40], -1e-3)
    assert (dropped >= left - 1e-12).all()
    least = np.where(keep, true - u[:, None] - v, np.inf).min(axis=1)
    assert (dropped <= least + 1e-6).all()


def test_the_excess_includes_dropped_pairs() -> None:
    a, b = (normalize_rows(side) for side in shared_half(200, 210, 8))
    noise = np.random.default_rng(0).normal(size=a.shape)
    coarse = a + 0.3 * normalize_rows(noise)  # so coarse that a row's best is often not its best as the screens tell
    screens = Screen(torch.from_numpy(coarse).float(), 0.3 + 1e-5), Screen(torch.from_numpy(b).float(), 1e-5)
    known = Known(np.full(200, np.inf), np.full(210, np.inf), np.full(200, np.inf), np.zeros(210))
    u, v = np.full(200, -1.5), np.zeros(210)
    found, excess, _ = find_violations(Directions.of(a), Directions.of(b), screens, u, v, known, np.full(200, 1), 1e-3)
    over = a @ b.T - u[:, None]
    assert (np.bincount(found.rows, minlength=200) == 1).all()
    assert (over[found.rows, found.columns] < over.max(axis=1)[found.rows] - 1e-3).any()
    assert (excess >= over.max(axis=1) - 1e-12).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("summed", [False, True])
def test_a_gpu_finds_what_the_compiled_loop_finds(precision: Precision, summed: bool) -> None:
    a, b = (Screen.of(Directions.of(side), precision, "cpu") for side in shared_half(150, 210, 8))
    tiles = candidates.Tiles(a, b)
    tile = tiles.multiply(a.rows, b.rows)
    rng = np.random.default_rng(0)
    row, column = rng.uniform(0, 0.4, 150).astype(np.float32), rng.uniform(-0.1, 0.9, 210).astype(np.float32)
    found = []
    for on_cpu in (True, False):
        tiles.on_cpu = on_cpu
        i, j, x = (
            np.concatenate(parts) for parts in zip(*tiles.find_above(tile, row, column, 0.004, summed), strict=True)
        )
        found.append((i * 210 + j, x))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert 0 < len(found[0][0]) < tile.numel()


def test_a_truncated_search_reports_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = special("duplicates")
    monkeypatch.setattr(matching, "_ROUNDS", 1)
    monkeypatch.setattr(matching, "_MOST", 2)
    found = find_best_matching(a, b, nearest=2)
    c = normalize_rows(a) @ normalize_rows(b).T
    best = c[linear_sum_assignment(c, maximize=True)].sum()
    assert found.sum < best - 1e-3
    assert best <= found.upper_bound


@pytest.mark.parametrize("widths", [(260, 260), (200, 330), (330, 200)])
def test_align_tables_match_scipy_and_verify(widths: tuple[int, int]) -> None:
    """The tables are SciPy's, the stored prices verify, and a spoiled matching does not."""
    encoders, decoders = shared_half(min(widths), max(widths), 16), shared_half(min(widths), max(widths), 16, seed=1)
    sides = (1, 0) if widths[0] > widths[1] else (0, 1)
    weights = [space[side] for side in sides for space in (encoders, decoders)]
    found = align(*weights)
    for space, (W_a, W_b) in (("encoder", weights[::2]), ("decoder", weights[1::2])):
        c = normalize_rows(W_a) @ normalize_rows(W_b).T
        rows, columns = linear_sum_assignment(c, maximize=True)
        for side, own, other, of in ((found.a, rows, columns, c), (found.b, columns, rows, c.T)):
            partner = np.full(len(of), -1)
            partner[own] = other
            cosine = np.where(partner >= 0, of[np.arange(len(of)), partner], np.nan)
            np.testing.assert_array_equal(side[f"{space}_partner"], partner)
            np.testing.assert_allclose(side[f"{space}_cosine"], cosine, atol=1e-6)
            np.testing.assert_array_equal(side[f"max_{space}_neighbor"], of.argmax(axis=1))
            np.testing.assert_allclose(side[f"max_{space}_cosine"], of.max(axis=1), atol=1e-6)
    assert found.certificate["search"]["encoder"]["candidates"] > 0
    for space in ("encoder", "decoder"):
        assert found.certificate[space]["certified"]
        assert found.certificate[space]["gap_per_latent"] <= 1e-9
    assert all(space["certified"] for space in verify(found, *weights).values())

    # The least harm that can be done: two unshared latents, hardly better off with their own partners.
    side = found.a if widths[0] <= widths[1] else found.b
    partner = side["decoder_partner"].to_numpy().copy()
    low = np.argsort(side["decoder_cosine"].to_numpy())[:2]
    partner[low] = partner[low[::-1]]
    spoiled = side.assign(decoder_partner=partner)
    tables = (spoiled, found.b) if widths[0] <= widths[1] else (found.a, spoiled)
    checked = verify(Alignment(*tables, found.certificate), *weights)
    assert checked["encoder"]["certified"]
    assert not checked["decoder"]["certified"]
    assert checked["decoder"]["gap"] > 0


def test_the_lowest_of_equal_neighbours_is_named() -> None:
    a, b = shared_half(1403, 1507, 40)
    of = np.random.default_rng(0).integers(0, 300, len(b))
    b = b[of]  # the last few columns of a product are multiplied by other instructions than the same ones before
    _, first, which = np.unique(of, return_index=True, return_inverse=True)
    who = find_best_matching(a, b).nearest[0].who
    np.testing.assert_array_equal(first[which][who], who)


@pytest.mark.parametrize("turn", [0.3, 1.3])
def test_pairs_in_a_plane_are_certified(turn: float) -> None:
    """Every row's best partner but one is taken by its neighbour: a chain through all of them."""
    angle = np.arange(300) / 300 * 1.5
    a, b = (np.stack([np.cos(at), np.sin(at)], axis=1) for at in (angle, angle + turn / 300))
    found = align(a, a, b, b)
    c = normalize_rows(a) @ normalize_rows(b).T
    for space in ("encoder", "decoder"):
        assert found.certificate[space]["certified"]
        assert found.certificate[space]["sum"] == pytest.approx(c[linear_sum_assignment(c, maximize=True)].sum())
    assert all(space["certified"] for space in verify(found, a, a, b, b).values())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(0, 5), st.booleans())
def test_the_sparse_solver_is_exact_from_earlier_solutions(seed: int, n: int, wider: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    m = n + wider
    c = rng.choice([-1, 0, 0.5, 1], size=(n, m)) if tied else rng.normal(size=(n, m))
    there = (rng.random((n, m)) < 0.5) | (np.arange(m) == np.arange(n)[:, None])
    found = None
    for _ in range(3):
        i, j = there.nonzero()
        starts = np.searchsorted(i, np.arange(n + 1)).astype(np.int64)
        found = solve(Graph(starts, j.astype(np.int32), c[i, j]), m, found)
        weights = np.where(there, c, -100)
        best = weights[linear_sum_assignment(weights, maximize=True)].sum()
        assert c[np.arange(n), found.partner].sum() == pytest.approx(best)
        assert there[np.arange(n), found.partner].all()
        assert found.u.sum() + found.v.sum() == pytest.approx(best)
        assert (found.u[:, None] + found.v >= weights - 1e-9).all()
        assert found.v.min() >= 0
        there |= rng.random((n, m)) < 0.3


def test_edges_that_do_not_suffice_are_an_error() -> None:
    with pytest.raises(ValueError, match="no matching"):
        solve(Graph(np.array([0, 1, 2]), np.array([1, 1], np.int32), np.ones(2)), 3)


def test_more_rows_than_columns_are_an_error() -> None:
    with pytest.raises(ValueError, match="exchange them"):
        find_best_matching(np.ones((3, 2)), np.ones((2, 2)))
