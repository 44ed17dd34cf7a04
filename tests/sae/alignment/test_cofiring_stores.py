"""Counts of firing together out of stores on disk, of several shards, grown or not, against activations in full."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made_store import store_of
from small_harvest import USED, FakeStream, M, N, an_sae, dense, run, small_stream

from sae.alignment import cofiring
from sae.alignment.cofiring import Cofirings, compute_jaccard, count_cofirings
from sae.firings.store import FiringStore

ASKED = np.arange(M, dtype=np.int32)[::-1, None].copy()


@pytest.fixture(params=["shard by shard", "in memory"])
def stream(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    monkeypatch.setattr(cofiring, "_PIECE", 50)
    monkeypatch.setattr(cofiring, "_IN_MEMORY", 0 if request.param == "shard by shard" else cofiring._IN_MEMORY)
    monkeypatch.setattr(cofiring, "_MAPPED", 2)  # so that shards are closed and opened again
    return small_stream(tmp_path, monkeypatch)


def counted(store: FiringStore, other: FiringStore, shift: int = 0) -> Cofirings:
    return count_cofirings(store, other, ASKED, np.ones(M, bool), shift=shift)


def assert_equal(found: Cofirings, a: np.ndarray, b: np.ndarray) -> None:
    """``found`` is what the tables of activations [T, M] say."""
    a, b = a > 0, b > 0
    together = a.T.astype(int) @ b
    assert found.n_tokens == len(a)
    assert found.firings.tolist() == a.sum(axis=0).tolist()
    assert found.firings_there.tolist() == b.sum(axis=0).tolist()
    assert found.asked_together.tolist() == np.take_along_axis(together, ASKED, axis=1).tolist()
    exact = compute_jaccard(together, a.sum(axis=0)[:, None], b.sum(axis=0))
    for latent in range(M):
        order = sorted(np.flatnonzero(together[latent]), key=lambda j: (-round(exact[latent, j], 9), j))
        order = order[: cofiring.NEAREST]
        kept = found.near[latent] >= 0
        assert found.near[latent][kept].tolist() == order
        assert found.near_together[latent][kept].tolist() == together[latent, order].tolist()
    # Relations have their own tests against planted answers; here they must not depend on how tokens are stored.
    in_memory = counted(store_of(a), store_of(b))
    assert found.relation.tolist() == in_memory.relation.tolist()
    assert found.members.tolist() == in_memory.members.tolist()
    assert (found.relation > 0).any()


def test_over_several_shards(stream: FakeStream, tmp_path: Path) -> None:
    a, b = run(stream, tmp_path, "ab")
    assert a.n_shards == b.n_shards == 8
    assert a.n_tokens % a.tokens_per_shard  # the last is shorter
    one, other = (dense(stream, an_sae(ord(name))) for name in "ab")
    assert_equal(counted(a, b), one, other)
    assert_equal(counted(b, a), other, one)
    for shift in (1, USED // 2, 7 * USED + 3, N * USED - 1):
        assert_equal(counted(a, b, shift), one, np.roll(other, -shift, axis=0))


def test_over_grown_stores_of_different_lengths(stream: FakeStream, tmp_path: Path) -> None:
    """What only one of the two holds counts for nothing; a store that was grown is as good as one made at once."""
    one, other = (dense(stream, an_sae(ord(name))) for name in "ab")
    steps = (3, 10, 23, N)
    for shorter, longer in pairwise(steps):
        (b,) = run(stream, tmp_path, "b", tokens=shorter * USED)
        for of_a in (shorter, longer):  # as long as the other, then longer
            (a,) = run(stream, tmp_path, "a", tokens=of_a * USED)
            assert (a.n_tokens, b.n_tokens) == (of_a * USED, shorter * USED)
            both = one[: shorter * USED], other[: shorter * USED]
            assert_equal(counted(a, b), *both)
            assert_equal(counted(b, a), *both[::-1])
            shift = shorter * USED // 3
            assert_equal(counted(a, b, shift), both[0], np.roll(both[1], -shift, axis=0))
            assert_equal(counted(b, a, shift), both[1], np.roll(both[0], -shift, axis=0))
