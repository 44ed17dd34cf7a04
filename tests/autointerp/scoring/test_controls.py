"""The swapped control: partners are other latents, dissimilar ones, each used once where that can be had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.scoring.swapping import swap_partners


class Firings:
    """A firing store of so many windows, by latent."""

    def __init__(self, n_windows: int, windows: dict[int, Any]) -> None:
        self.n_windows = n_windows
        self._windows = {latent: np.asarray(ids, dtype=np.int64) for latent, ids in windows.items()}

    def windows(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self._windows[latent]
        return ids, np.ones(len(ids), dtype=np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@given(st.lists(st.integers(0, 399), unique=True, max_size=120), st.integers(0, 5))
def test_partners_are_other_dissimilar_latents(latents: list[int], seed: int) -> None:
    decoder = np.random.default_rng(3).normal(size=(400, 64)).astype(np.float32)
    partners = swap_partners(latents, decoder, seed=seed)
    assert list(partners) == [latent for latent in latents if latent in partners]
    for latent, partner in partners.items():
        assert partner != latent
        assert partner in latents
        assert abs(cosine(decoder[latent], decoder[partner])) < 0.2
    assert partners == swap_partners(sorted(latents), decoder, seed=seed)
    if len(latents) > 10:
        assert set(partners.values()) == set(latents)  # each explanation is used once


def test_another_seed_gives_other_partners() -> None:
    decoder = np.random.default_rng(3).normal(size=(100, 64))
    one, two = swap_partners(range(100), decoder), swap_partners(range(100), decoder, seed=1)
    assert sum(one[latent] == two[latent] for latent in range(100)) < 15


def test_more_latents_leave_most_partners_as_they_were() -> None:
    decoder = np.random.default_rng(3).normal(size=(1000, 256))
    few, more = swap_partners(range(500), decoder), swap_partners(range(550), decoder)
    assert sum(few[latent] == more[latent] for latent in few) > 400


def test_similar_directions_are_no_control() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.eye(4), 5, axis=0) * rng.choice([-1, 1], (20, 1))  # opposite directions are similar too
    partners = swap_partners(range(20), groups)
    assert len(set(partners.values())) == 20
    assert all(a // 5 != b // 5 for a, b in partners.items())
    assert swap_partners(range(5), groups) == {}
    assert swap_partners([7], groups) == {}
    assert swap_partners([], groups) == {}


def test_where_partners_cannot_all_differ_some_are_shared() -> None:
    rows = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    partners = swap_partners(range(4), rows)
    assert {partners[0], partners[1], partners[2]} == {3}
    assert partners[3] in (0, 1, 2)


@given(st.lists(st.integers(0, 199), unique=True, min_size=2, max_size=120), st.integers(1, 6), st.integers(0, 5))
def test_partners_have_another_text(latents: list[int], n_texts: int, seed: int) -> None:
    decoder = np.eye(200)
    texts = {
        latent: f"Text{'  ' * (latent % 2)} {latent % n_texts}." for latent in latents
    }  # white space is no difference
    partners = swap_partners(latents, decoder, texts=texts, seed=seed)
    assert all(a % n_texts != b % n_texts for a, b in partners.items())
    some_differ = len({latent % n_texts for latent in latents}) > 1
    assert set(partners) == (set(latents) if some_differ else set())


@given(st.lists(st.integers(0, 399), unique=True, max_size=120), st.integers(0, 5))
def test_different_texts_change_no_partner(latents: list[int], seed: int) -> None:
    decoder = np.random.default_rng(3).normal(size=(400, 64)).astype(np.float32)
    texts = {latent: f"statement {latent}" for latent in latents}
    assert swap_partners(latents, decoder, texts=texts, seed=seed) == swap_partners(latents, decoder, seed=seed)


def test_one_text_among_many_equal_ones_is_found() -> None:
    """However far away on the ring it is."""
    texts = dict.fromkeys(range(300), "Commas.") | {17: "Full stops."}
    partners = swap_partners(range(300), np.eye(300), texts=texts)
    assert {partner for latent, partner in partners.items() if latent != 17} == {17}
    assert len(partners) == 300


@pytest.mark.parametrize("n_windows", [900, 90_000])
def test_latents_that_fire_together_are_no_control(n_windows: int) -> None:
    """Two groups that fire in the same windows, and two that avoid each other; directions all different."""
    rng = np.random.default_rng(1)
    fires = rng.random(n_windows) < 0.3
    also = rng.random(n_windows) < 0.3
    kinds = [fires, fires, ~fires, also, also, ~also]
    store = Firings(n_windows, {i: np.flatnonzero(kind) for i, kind in enumerate(kinds)})
    decoder = np.eye(6)
    partners = swap_partners(range(6), decoder, store)
    assert len(set(partners.values())) == 6
    assert all((a < 3) != (b < 3) for a, b in partners.items())


def test_silent_and_always_firing_latents_have_partners() -> None:
    store = Firings(100, {0: [], 1: np.arange(100), 2: np.arange(0, 100, 7)})
    assert set(swap_partners(range(3), np.eye(3), store)) == {0, 1, 2}
    decoder = np.vstack([np.zeros(3), np.eye(3)])  # a dead latent's row may be zero
    assert len(swap_partners(range(4), decoder)) == 4
