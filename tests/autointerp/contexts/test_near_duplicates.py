"""Near-duplicates: against brute force over all pairs, and over text that repeats itself as corpora do."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contexts import DenseStore, sampler

from autointerp.contexts import near_duplicates as near
from autointerp.contexts.material import Material
from autointerp.contexts.near_duplicates import group_windows, load_groups
from sae.common.files import table_metadata
from sae.firings.store import mix_bits
from sae.study.run import Run

W = 32


def store_of(tokens: np.ndarray) -> DenseStore:
    return DenseStore(tokens, np.zeros(tokens.shape))


def grams(row: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + 5].tolist()) for i in range(len(row) - 4)}


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    one, other = grams(a), grams(b)
    return len(one & other) / len(one | other)


def headers(n: int, seed: int, changed: int) -> np.ndarray:
    """``n`` copies of one text, each with up to ``changed`` tokens replaced: years and names in a licence header."""
    rng = np.random.default_rng(seed)
    rows = np.tile(rng.integers(1, 5000, W), (n, 1))
    for row in rows:
        row[rng.integers(0, W, changed)] = rng.integers(5000, 10**6, changed)
    return rows


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 4), st.sampled_from([0.4, 0.6, 0.8]))
def test_groups_are_the_components_of_all_pairs(seed: int, changed: int, threshold: float) -> None:
    """Nothing is joined that no chain of near-duplicates joins; what is near is found, but for a chance below 1 %."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([headers(6, seed + i, changed) for i in range(4)] + [rng.integers(1, 40, (16, W))])
    tokens = tokens[rng.permutation(len(tokens))]
    found = group_windows(store_of(tokens), threshold)  # type: ignore[arg-type]
    n = len(tokens)
    near_to = np.array([[jaccard(a, b) for b in tokens] for a in tokens])
    reach = np.linalg.matrix_power((near_to >= threshold).astype(float), n) > 0
    same = found[:, None] == found
    assert not (same & ~reach).any()
    if threshold >= 0.6:
        assert not ((near_to >= threshold + 0.15) & ~same).any()


def test_only_pairs_above_the_threshold_are_joined() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.integers(1, 5000, (600, W)), 2, axis=0)
    rows[1::2, 8] += 10**6
    rows[1::2, 10] += 10**6  # seven of the 28 5-grams differ
    assert jaccard(rows[0], rows[1]) == pytest.approx(21 / 35)
    for threshold, least, most in ((0.6, 0.98, 1.0), (0.61, 0.0, 0.0)):
        found = group_windows(store_of(rows), threshold).reshape(-1, 2)  # type: ignore[arg-type]
        assert least <= (found[:, 0] == found[:, 1]).mean() <= most


def test_equal_texts_are_one_group_whatever_the_threshold() -> None:
    tokens = np.random.default_rng(0).integers(1, 3, (200, 6))
    store = store_of(tokens)
    for threshold in (0.3, 0.9):
        found = group_windows(store, threshold)  # type: ignore[arg-type]
        for a, b in ((0, 1), *np.random.default_rng(1).integers(0, 200, (300, 2)).tolist()):
            if (tokens[a] == tokens[b]).all():
                assert found[a] == found[b]


def test_duplicate_group_keeps_its_name_as_harvest_grows() -> None:
    rng = np.random.default_rng(3)
    tokens = np.concatenate([headers(9, i, 1) for i in range(20)])[rng.permutation(180)]
    before = group_windows(store_of(tokens[:120]), 0.4)  # type: ignore[arg-type]
    after = group_windows(store_of(tokens), 0.4)  # type: ignore[arg-type]
    assert (before == after[:120]).all()
    assert len(np.unique(after)) == 20


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_near_duplicates_are_never_on_both_sides(seed: int) -> None:
    """Licence headers that differ in a year: the explainer and the judge never share one, nor see two of them."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([*(headers(12, seed + i, 1) for i in range(12)), rng.integers(1, 10**6, (150, W))])
    tokens = tokens[rng.permutation(len(tokens))]
    activations = rng.random((len(tokens), W)) * (rng.random((len(tokens), 1)) < 0.4)
    store = DenseStore(tokens, activations)
    groups = group_windows(store, 0.6)  # type: ignore[arg-type]
    drawn = sampler(store, groups=groups, n_explain=20, n_active=20, n_inactive=20)
    shown = drawn.explaining(0) + drawn.background(0, 20)
    test = drawn.testing(0)
    tested = [*test.active, *test.inactive, *test.same_token]
    for side in (shown, tested):
        assert len({int(groups[c.window]) for c in side}) == len(side)
    windows = [[c.window for c in side] for side in (shown, tested)]
    assert not set(groups[windows[0]]) & set(groups[windows[1]])
    for a in windows[0] + windows[1]:
        for b in windows[0] + windows[1]:
            assert a == b or jaccard(tokens[a], tokens[b]) < 0.75  # MinHash misses none of these in practice
    fires = set(groups[store.windows(0)[0]])
    assert not fires & {groups[c.window] for c in tested if not c.active}, "a text is silent only if its copies are"


def test_sixty_thousand_windows_take_seconds() -> None:
    numbers = mix_bits(np.arange(60_000 * W, dtype=np.uint64)).reshape(-1, W)
    tokens = (numbers % np.uint64(5000)).astype(np.int64)
    tokens[30_000:35_000] = tokens[0]  # a crowd of near copies, each with one token of its own
    tokens[30_000:35_000, 7] = np.arange(5000)
    store = store_of(tokens)
    hashes = store.content()
    store.content = lambda ids=slice(None): hashes[ids]  # type: ignore[method-assign]
    started = time.process_time()
    found = group_windows(store, 0.6)  # type: ignore[arg-type]
    assert time.process_time() - started < 20
    assert len(np.unique(found[30_000:35_000])) == 1
    assert len(np.unique(found)) == 55_000


def test_groups_are_worked_out_once_for_a_harvest(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open("run_a", tiny_root)
    store = run.store()
    first = load_groups(run, store, 0.6)
    assert first.shape == (store.n_windows,)
    assert len(np.unique(first)) <= len(np.unique(store.content()))
    path = run.firings_folder / "groups.parquet"
    assert table_metadata(path)["inputs"]

    def refuse(*_: object) -> None:
        raise AssertionError("worked out again")

    with monkeypatch.context() as patched:
        patched.setattr(near, "group_windows", refuse)
        assert (load_groups(run, store, 0.6) == first).all()
        assert (Material.of(run).sampler._groups == first).all()
        assert (load_groups(run, store, 1.0) == store.content()).all()
        with pytest.raises(AssertionError):
            load_groups(run, store, 0.7)
