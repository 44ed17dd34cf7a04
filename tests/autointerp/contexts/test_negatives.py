"""The harder silent contexts: where a neighbour fires, and where the latent's own token stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contexts import texts

from autointerp.contexts.material import Material
from autointerp.contexts.neighbours import NEAREST, Neighbours
from autointerp.contexts.sampler import ContextSampler, TestSet
from sae.firings.store import hash_windows
from sae.settings import ContextSettings
from sae.study.run import Run

W, SLOTS = 6, 3


class Store:
    """A firing store in memory: tokens [W, w] and activations [M, W, w]."""

    window, windows_per_sequence = W, SLOTS

    def __init__(self, tokens: np.ndarray, dense: np.ndarray) -> None:
        self.all_tokens, self.dense, self.n_windows = tokens, dense.astype(np.float32), len(tokens)
        self.num_latents = len(dense)
        self.latent_offsets = np.concatenate([[0], np.cumsum((dense > 0).sum((1, 2)))])

    def windows(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.flatnonzero((self.dense[latent] > 0).any(1))
        return ids, self.dense[latent, ids].max(1)

    def activations(self, latent: int, ids: np.ndarray) -> np.ndarray:
        return self.dense[latent, ids]

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        return self.all_tokens[ids]

    def firing_in(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        latent, row, _ = np.nonzero(self.dense[:, ids] > 0)
        return row, latent

    def slot(self, ids: np.ndarray) -> np.ndarray:
        return ids % SLOTS

    def content(self, ids: Any = slice(None)) -> np.ndarray:
        return hash_windows(self.all_tokens)[ids]

    def has_special(self, ids: Any = slice(None)) -> np.ndarray:
        return (self.all_tokens == 0).any(1)[ids]


TOP = 7  # the token on which latent 0 fires, mostly


def a_store(seed: int, n: int = 1200, m: int = 12) -> Store:
    """Latent 0 fires on most tokens 7; latents 1 to 3 fire wherever it does and elsewhere, the others anywhere."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 400, (n, W))
    tokens[rng.random((n, W)) < 0.05] = TOP
    tokens[n // 2 :: 7] = tokens[0]  # one text, many times
    dense = rng.random((m, n, W)) * (rng.random((m, n, W)) < 0.03)
    dense[0] = (tokens == TOP) * (rng.random((n, 1)) < 0.6) * (1 + rng.random((n, W)))
    for near in (1, 2, 3):
        dense[near] = np.maximum(dense[0] * 0.5, rng.random((n, W)) * (rng.random((n, W)) < 0.08))
    return Store(tokens, dense)


def sampler(store: Store, **values: int) -> ContextSampler:
    return ContextSampler(
        store,  # type: ignore[arg-type]
        texts,
        ContextSettings(**{"n_hard": 12, "n_same_token": 12, **values}),  # type: ignore[arg-type]
        neighbours=lambda _: np.array([1, 2, 3]),
    )


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_harder_contexts_are_what_they_are_called(seed: int) -> None:
    store = a_store(seed)
    drawn = sampler(store)
    test = drawn.testing(0)
    fires = {tuple(store.all_tokens[w]) for w in np.flatnonzero((store.dense[0] > 0).any(1))}
    strong = {n: np.quantile(store.windows(n)[1], 0.75) for n in (1, 2, 3)}
    assert len(test.hard) == len(test.same_token) == 12
    for context in test.hard:
        assert context.kind == "hard"
        assert any(store.dense[n, context.window].max() >= bar - 1e-6 for n, bar in strong.items())
    for context in test.same_token:
        assert context.kind == "same_token"
        assert TOP in store.all_tokens[context.window]
    explained = {c.text for c in drawn.explaining(0) + drawn.background(0, 40)}
    every = [*test.active, *test.inactive, *test.hard, *test.same_token]
    assert len({c.text for c in every}) == len(every), "no text twice, whatever its kind"
    assert not explained & {c.text for c in every}
    for context in test.hard + test.same_token:
        tokens = tuple(store.all_tokens[context.window])
        assert tokens not in fires, "a copy of it fires"
        assert 0 not in tokens
        assert (context.active, context.truth, context.stratum, max(context.activations)) == (False, False, None, 0.0)
    again = sampler(store).testing(0)
    assert again == test
    assert sampler(store, sample_seed=1).testing(0).hard != test.hard


def test_all_neighbours_are_asked_in_turn() -> None:
    store = a_store(1)
    store.dense[3, :, :] *= np.arange(store.n_windows)[:, None] % 8 == 0  # one that fires seldom
    test = sampler(store, n_hard=9).testing(0)
    strong = {n: (store.windows(n)[0], store.windows(n)[1]) for n in (1, 2, 3)}
    by = [sum(c.window in ids[peaks >= np.quantile(peaks, 0.75)] for c in test.hard) for ids, peaks in strong.values()]
    assert all(n >= 3 for n in by)


def test_growth_changes_estimates_by_the_new_share() -> None:
    kept: list[float] = []
    for seed in range(8):
        whole = a_store(seed, 3300)
        before = sampler(Store(whole.all_tokens[:3000], whole.dense[:, :3000])).testing(0)
        after = sampler(whole).testing(0)
        for a, b in ((before.hard, after.hard), (before.same_token, after.same_token)):
            kept.append(len({c.text for c in a} & {c.text for c in b}) / len(a))
    assert np.mean(kept) > 0.7


def test_a_missing_figure_spoils_nothing_else() -> None:
    store = a_store(2)
    store.dense[0] = (store.all_tokens == TOP) * 1.0  # wherever the token is, the latent fires
    test = sampler(store).testing(0)
    assert test.same_token == []
    assert len(test.hard) == 12
    lonely = ContextSampler(store, texts, ContextSettings())  # type: ignore[arg-type]
    assert lonely.testing(0).hard == []
    none = sampler(store, n_hard=0, n_same_token=0).testing(0)
    assert none == TestSet(test.active, test.inactive)
    store.dense[0] = 0
    assert sampler(store).testing(0) == TestSet([], [])


def test_the_top_token_is_where_it_peaks() -> None:
    store = a_store(3)
    assert sampler(store).find_top_token(0) == TOP
    store.dense[0, :, 0] = 5.0 * (store.dense[0] > 0).any(1)  # now the first token of the window, whatever it is
    store.all_tokens[:, 0] = 3
    assert sampler(store).find_top_token(0) == 3


def test_neighbours_are_the_nearest_by_brute_force() -> None:
    store = a_store(4, m=30)
    store.dense[11] = 0  # dead
    store = Store(store.all_tokens, store.dense)
    rng = np.random.default_rng(0)
    decoder = rng.normal(size=(30, 8))
    decoder[11] = decoder[0]
    found = Neighbours(store, lambda: decoder)  # type: ignore[arg-type]
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    ranked = [i for i in np.argsort(-(unit @ unit[0])).tolist() if i not in (0, 11)]
    assert found.find_by_direction(0).tolist() == ranked[:NEAREST]
    assert set(found.find_by_firing(0)[:3].tolist()) == {1, 2, 3}
    both = found(0).tolist()
    assert len(set(both)) == len(both)
    assert not {0, 11} & set(both)
    assert both[:NEAREST] == ranked[:NEAREST]
    assert {1, 2, 3} <= set(both)
    assert len(found.find_by_firing(11)) == 0


def test_run_draws_from_its_own_weights_and_firings(tiny_root: Path) -> None:
    material = Material.of(Run.open("run_a", tiny_root))
    frame = material.eligibility()
    for latent in frame["latent"][frame["eligible"]].tolist()[:3]:
        test = material.sampler.testing(latent)
        silent = {c.window for c in test.hard + test.same_token}
        assert silent
        assert not silent & set(material.store.windows(latent)[0].tolist())
        near = Neighbours(material.store, material.run.read_decoder)(latent).tolist()
        for context in test.hard:
            there = set(material.store.firing_in([context.window])[1].tolist())
            assert there & set(near)


@pytest.mark.parametrize("kind", ["hard", "same_token"])
def test_a_fooled_judge_loses_only_on_those_negatives(kind: str) -> None:
    import pandas as pd

    from autointerp.scoring.scorers.detection import DetectionScorer

    test = sampler(a_store(5)).testing(0)
    items = DetectionScorer().items(test)
    assert {c.kind for c in items} == {"active", "random", "hard", "same_token"}
    rows = [
        {"context": c.window, "truth": c.truth, "p": float(c.truth or c.kind == kind), "failure": None,
         "label": float(c.truth or c.kind == kind), "negative_kind": None if c.truth else c.kind}
        for c in items
    ]  # fmt: skip
    row = DetectionScorer().score(pd.DataFrame(rows), items).as_columns()
    other = {"hard": "same_token", "same_token": "hard"}[kind]
    assert row["balanced_accuracy"] == row["tnr"] == row[f"tnr_{other}"] == row[f"ba_{other}"] == 1.0
    assert (row[f"tnr_{kind}"], row[f"ba_{kind}"], row[f"auroc_{kind}"]) == (0.0, 0.5, 0.5)
    assert row[f"tnr_{kind}_low"] == 0.0 < row[f"tnr_{kind}_high"] < 0.4
    assert (row["n_inactive"], row[f"n_{kind}"], row["n_failed"]) == (len(test.inactive), 12, 0)
    gone = {"p": np.nan, "label": np.nan, "failure": "gone"}
    lost = pd.DataFrame([{**r, **gone} if r["negative_kind"] == kind else r for r in rows])
    failed = DetectionScorer().score(lost, items).as_columns()
    assert (failed["status"], failed["n_failed"], failed[f"n_failed_{kind}"]) == ("ok", 0, 12)
    assert np.isnan(failed[f"ba_{kind}"])
    assert failed[f"ba_{other}"] == 1.0
    unasked = DetectionScorer().score(pd.DataFrame([r for r in rows if r["negative_kind"] != kind]), items).as_columns()
    assert (unasked[f"n_{kind}"], unasked[f"n_failed_{kind}"], unasked["n_failed"]) == (0, 12, 0)
