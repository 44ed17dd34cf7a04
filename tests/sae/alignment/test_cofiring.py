"""Counts of firing together against products of whole tables; what became of a latent against planted answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_store import store_of

from sae.alignment import cofiring, relation
from sae.alignment.cofiring import Cofirings, compute_jaccard, count_cofirings
from sae.common.errors import BadInput


def counted(a: np.ndarray, b: np.ndarray, relate: bool = True, shift: int = 0) -> Cofirings:
    """Of two tables [T, M] of what fires where; each latent is asked about latent 0 of the other."""
    asked = np.zeros((a.shape[1], 1), np.int32)
    return count_cofirings(store_of(a), store_of(b), asked, np.full(a.shape[1], relate), shift=shift)


def assert_same(one: Cofirings, other: Cofirings) -> None:
    for name in ("firings", "firings_there", "near", "near_together", "asked_together", "relation", "members"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.array_equal(one.covered, other.covered, equal_nan=True)


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 10), st.floats(0, 1), st.integers(0, 999))
def test_counts_are_those_of_whole_tables(m: int, other: int, windows: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.random((4 * windows + 4, size)) < density * rng.random(size) for size in (m, other))
    longer = np.concatenate([b, rng.random((8, other)) < 0.5])  # harvested further: what only one holds is left out
    for there in (b, longer):
        found = counted(a, there)
        together = a.T.astype(int) @ b
        assert found.n_tokens == len(a)
        assert np.array_equal(found.firings, a.sum(axis=0))
        assert np.array_equal(found.firings_there, b.sum(axis=0))
        assert np.array_equal(found.asked_together[:, 0], together[:, 0])
        either = found.firings[:, None] + found.firings_there - together
        exact = np.where(either > 0, together / np.maximum(either, 1), 0)
        for i in range(m):
            # Equal fractions may differ by rounding; 1e-9 is far below the distance of different ones.
            order = sorted(np.flatnonzero(together[i]), key=lambda j: (-round(exact[i, j], 9), j))
            order = order[: cofiring.NEAREST]
            kept = found.near[i] >= 0
            assert found.near[i][kept].tolist() == order
            assert found.near_together[i][kept].tolist() == together[i, order].tolist()


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 10), st.integers(0, 9999), st.integers(0, 999))
def test_a_shift_rolls_the_other_table(m: int, other: int, windows: int, shift: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.random((4 * windows + 4, size)) < rng.random(size) for size in (m, other))
    shift %= len(a)
    longer = np.concatenate([b, rng.random((8, other)) < 0.5])  # the part that only one holds does not come round
    for there in (b, longer):
        assert_same(counted(a, there, shift=shift), counted(a, np.roll(b, -shift, axis=0)))


def test_a_shift_beyond_the_tokens_is_refused() -> None:
    fires = np.ones((8, 1), bool)
    for shift in (-1, 8):
        with pytest.raises(BadInput, match="0 to 7"):
            counted(fires, fires, shift=shift)


def test_shifted_a_latent_meets_itself_no_more() -> None:
    rng = np.random.default_rng(0)
    bursts = np.repeat(rng.random((T // 20, 3)) < 0.02, 20, axis=0)
    assert [relation.NAMES[i] for i in counted(bursts, bursts).relation] == ["same"] * 3
    moved = counted(bursts, bursts, shift=T // 2 + 3)
    assert moved.firings_there.tolist() == bursts.sum(axis=0).tolist()
    assert [relation.NAMES[i] for i in moved.relation] == ["new"] * 3


def test_latent_with_many_firings_is_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    b = rng.random((4000, 90)) < 0.03
    a = np.column_stack([b[:, i] | b[:, i + 1] | (rng.random(4000) < 0.004) for i in range(60)])
    whole = counted(a, b)
    monkeypatch.setattr(cofiring, "_PIECE", 7)
    pieces = counted(a, b)
    assert_same(whole, pieces)
    assert {relation.NAMES[i] for i in whole.relation} >= {"split"}


def test_progress_adds_up() -> None:
    told: list[int] = []
    fires = np.ones((4, 600), bool)
    asked, relate = np.zeros((600, 1), np.int32), np.zeros(600, bool)
    count_cofirings(store_of(fires), store_of(fires[:, :3]), asked, relate, told.append)
    assert sum(told) == 600


def test_jaccard_of_silence_is_zero() -> None:
    assert compute_jaccard([0, 2], [0, 3], [0, 3]).tolist() == [0.0, 0.5]


# --- relations: the latent in question is the first of A; F is where it fires ---------------------------------------

T = 20_000
F = slice(0, 400)


def relation_of(*there: np.ndarray) -> tuple[str, list[int], float]:
    """What the latent that fires on F is among ``there``, with forty others that fire at random and fill the tokens."""
    rng = np.random.default_rng(0)
    a, others = np.zeros((T, 1), bool), rng.random((T, 40)) < rng.uniform(0.001, 0.03, 40)
    a[F] = True
    found = counted(a, np.column_stack([*there, others]))
    members = found.members[0]
    return relation.NAMES[found.relation[0]], members[members >= 0].tolist(), float(found.covered[0])


def on(*parts: slice) -> np.ndarray:
    fires = np.zeros(T, bool)
    for part in parts:
        fires[part] = True
    return fires


def test_nothing_there_is_new() -> None:
    assert relation_of(on(slice(3000, 3400)))[0] == "new"


def test_the_same_under_another_number() -> None:
    assert relation_of(on(slice(3000, 3400)), on(slice(50, 420))) == ("same", [1], pytest.approx(0.875))


def test_a_planted_split_is_recognised() -> None:
    """Three narrower latents share its tokens, each with a few more of its own elsewhere."""
    parts = on(slice(0, 180), slice(1000, 1040)), on(slice(180, 300), slice(1100, 1130)), on(slice(300, 380))
    told, members, covered = relation_of(*parts)
    assert told == "split"
    assert members == [0, 1, 2]
    assert covered == pytest.approx(0.95)


def test_parts_that_leave_a_fifth_are_no_split() -> None:
    assert relation_of(on(slice(0, 150)), on(slice(150, 300)))[0] == "new"  # .75
    assert relation_of(on(slice(0, 160)), on(slice(160, 325)))[0] == "split"  # .81


def test_a_planted_absorption_is_recognised() -> None:
    """A wider latent fires on 3/4 of F and as much elsewhere, and is silent on the rest, where a narrower one fires."""
    wide, narrow = on(slice(0, 300), slice(2000, 2450)), on(slice(290, 400))
    assert relation_of(wide, narrow) == ("absorbed", [0, 1], 1.0)
    assert relation_of(narrow, wide) == ("absorbed", [1, 0], 1.0)
    also_fires_there = on(slice(0, 400), slice(2000, 2450))
    assert relation_of(also_fires_there, narrow)[0] == "broader"  # silent nowhere: nothing was absorbed
    half_fires_there = on(slice(0, 350), slice(2000, 2450))
    assert relation_of(half_fires_there, narrow)[0] == "broader"
    assert relation_of(on(slice(0, 300), slice(2000, 2450)))[0] == "new"  # .75, and nothing for the rest


def test_a_wider_latent_that_contains_it() -> None:
    assert relation_of(on(slice(40, 560), slice(2000, 2300))) == ("broader", [0], pytest.approx(0.9))


def test_what_fires_everywhere_contains_nothing() -> None:
    assert relation_of(on(slice(0, T)))[0] == "new"
    assert relation_of(on(slice(0, 4004)))[0] == "new"  # not quite five times as often within F as overall
    assert relation_of(on(slice(0, 4000)))[0] == "broader"
    assert relation_of(on(slice(0, 780)))[0] == "same"


def test_many_similar_latents_do_not_hide_one() -> None:
    alike = [on(slice(0, 180 + i), slice(1000, 1040)) for i in range(10)]
    assert relation_of(*alike, on(slice(175, 360)))[0] == "split"
    inside = [on(slice(0, 150 + i), slice(1000, 1040)) for i in range(10)]
    wide = on(slice(0, 340), slice(2000, 2450))
    assert relation_of(wide, *inside, on(slice(335, 400))) == ("absorbed", [0, 11], 1.0)


def test_as_many_firings_are_still_inside() -> None:
    assert relation_of(on(slice(0, 240), slice(1000, 1160)), on(slice(240, 400)))[0] == "split"


def test_dense_latents_are_not_split_by_chance() -> None:
    rng = np.random.default_rng(0)
    for share, density in ((0.6, 0.5), (0.55, 0.35), (0.7, 0.7)):
        a, b = rng.random((T, 1)) < share, rng.random((T, 4)) < density
        assert relation.NAMES[counted(a, b).relation[0]] == "new"
    assert relation.NAMES[counted(a, a | (rng.random((T, 1)) < 0.02)).relation[0]] == "same"


def test_few_firings_are_not_judged() -> None:
    fires = np.zeros((T, 1), bool)
    fires[:19] = True
    assert relation.NAMES[counted(fires, fires).relation[0]] == "rare"
    fires[:20] = True
    assert relation.NAMES[counted(fires, fires).relation[0]] == "same"
    assert counted(fires, fires, relate=False).relation[0] == -1


@given(st.integers(0, 9999))
def test_whatever_is_said_holds(seed: int) -> None:
    """The conditions of each relation, from the tables, for made-up families of latents."""
    rng = np.random.default_rng(seed)
    a = on(F)
    there = []
    for _ in range(rng.integers(1, 20)):
        begin, length = rng.integers(0, 500), rng.integers(10, 500)
        fires = on(slice(begin, begin + length)) & (rng.random(T) < rng.uniform(0.5, 1))
        there.append(fires | (rng.random(T) < rng.choice([0, 0.01, 0.2])))
    b = np.column_stack(there)
    found = counted(a[:, None], b)
    told, members = relation.NAMES[found.relation[0]], found.members[0][found.members[0] >= 0]
    inside_f, total = b[a].sum(axis=0), b.sum(axis=0)
    closeness = (inside_f / (400 + total - inside_f)).max()
    assert told != "same" or closeness >= 0.5
    assert told == "same" or closeness < 0.52  # what chance would give is little here
    if told != "new":
        union = b[a][:, members].any(axis=1).mean()
        assert found.covered[0] == pytest.approx(union, abs=1e-6)
        assert told == "same" or union >= 0.8
    lifted = inside_f * T >= 5 * total * 400
    narrow, wide = lifted & (total <= 400) & (inside_f >= 0.5 * total), lifted & (total > 400)
    if told in ("new", "broader"):  # nothing was overlooked: no two inside cover it, nor a wide one and its exception
        f, small = b[a], np.flatnonzero(narrow)
        for i, x in enumerate(small):
            for y in small[i + 1 :]:
                pair = (f[:, x] | f[:, y]).mean()
                best_first = max(f[:, x].mean(), f[:, y].mean()) == f[:, small].mean(axis=0).max()
                assert pair < 0.8 or not best_first or min(pair - f[:, x].mean(), pair - f[:, y].mean()) < 0.05
        for big in np.flatnonzero(wide):
            for x in small:
                out = ~f[:, big]
                assert not (
                    0.5 <= f[:, big].mean() <= 0.95
                    and f[out, x].mean() >= 0.7
                    and f[f[:, x], big].mean() <= 0.3
                    and (f[:, big] | f[:, x]).mean() >= 0.8
                )
    if told == "new":
        assert not (inside_f[wide] >= 0.8 * 400).any()
    if told == "split":
        assert 2 <= len(members) <= 4
        assert narrow[members].all()
    if told == "absorbed":
        big, small = members
        assert wide[big]
        assert narrow[small]
        assert b[a & b[:, small], big].mean() <= 0.3
    if told == "broader":
        assert wide[members].all()
