"""Silent contexts are taken from the slots that are wanted, and from the nearest others where those run out."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_negatives import Store, a_store, sampler

from autointerp.contexts.positions import Queue, count_in_proportion, count_round_robin, draw_in_turn

N_SLOTS = 4
Texts = list[tuple[int, int]]


def queue(texts: Texts, first: int = 0) -> Queue:
    """(slot, group) of each text; the window's number says which it is."""
    slot, group = (np.array(column, np.int64) for column in (zip(*texts, strict=True) if texts else ((), ())))
    windows = first + np.arange(len(texts))
    return Queue(windows, group.astype(np.uint64), slot, (windows * 2654435761 % 2**32).astype(np.uint64))


texts = st.lists(
    st.tuples(st.integers(0, N_SLOTS - 1), st.integers(0, 60)), max_size=40, unique_by=lambda text: text[1]
)
needs = st.lists(st.integers(0, 6), min_size=N_SLOTS, max_size=N_SLOTS)


@given(st.lists(texts, max_size=4), needs)
def test_the_nearest_make_up_for_a_full_slot(sources: list[Texts], need: list[int]) -> None:
    queues = [queue(source, 100 * i) for i, source in enumerate(sources)]
    windows, group = draw_in_turn(queues, np.array(need))
    where = {100 * i + j: text for i, source in enumerate(sources) for j, text in enumerate(source)}
    assert [where[w][1] for w in windows.tolist()] == group.tolist()
    assert len(set(group.tolist())) == len(group), "no group twice"
    every = {text[1] for text in where.values()}
    assert len(windows) == min(sum(need), len(every)), "as many as are wanted while there are any"
    given_by = Counter(where[w][0] for w in windows.tolist())
    unused = [text for text in where.values() if text[1] not in set(group.tolist())]
    for slot, _ in unused:
        assert given_by[slot] >= need[slot], "a slot that has more gave all that was wanted of it"
    if len(sources) == 1 and all(Counter(text[0] for text in sources[0])[s] >= need[s] for s in range(N_SLOTS)):
        assert [given_by[slot] for slot in range(N_SLOTS)] == need


def test_the_nearest_slot_comes_first() -> None:
    found, _ = draw_in_turn([queue([(0, 0), (2, 1), (3, 2), (3, 3)])], np.array([0, 2, 0, 0]))
    assert sorted(found.tolist()) == [0, 1], "slots 0 and 2, both next to slot 1"


def test_no_source_speaks_for_all() -> None:
    rich, poor = [(0, i) for i in range(30)], [(0, 100 + i) for i in range(3)]
    windows, _ = draw_in_turn(
        [queue(rich), queue(poor, 100), queue([(0, 200 + i) for i in range(30)], 200)], np.array([9])
    )
    assert Counter((windows // 100).tolist()) == {0: 3, 1: 3, 2: 3}


def test_slots_are_those_of_the_activating_contexts() -> None:
    assert count_round_robin(np.array([2, 2, 0]), 7, N_SLOTS).tolist() == [2, 0, 5, 0]
    for counted in (count_round_robin, count_in_proportion):
        assert counted(np.array([], np.int64), 7, N_SLOTS).tolist() == [0, 0, 0, 0]
    assert count_in_proportion(np.array([2, 0, 2, 0]), 3, N_SLOTS).tolist() == [1, 0, 2, 0], "the first of equals"
    assert count_in_proportion(np.array([0, 2, 0, 2]), 3, N_SLOTS).tolist() == [2, 0, 1, 0]


@given(st.lists(st.integers(0, N_SLOTS - 1), min_size=1, max_size=50), st.integers(0, 60))
def test_slot_shares_are_rounded_to_the_nearest(slots: list[int], n: int) -> None:
    found = count_in_proportion(np.array(slots), n, N_SLOTS)
    assert found.sum() == n
    exact = np.bincount(slots, minlength=N_SLOTS) * n / len(slots)
    assert (np.abs(found - exact) < 1).all()
    if n == len(slots):
        assert found.tolist() == count_round_robin(np.array(slots), n, N_SLOTS).tolist()


@given(st.integers(0, 10**6), st.integers(0, 2))
def test_harder_contexts_stand_where_the_activating_ones_do(seed: int, slot: int) -> None:
    """A latent that fires at one end of the sequence only, while its neighbours and its token are everywhere."""
    store = a_store(seed, n=1800)
    elsewhere = np.arange(store.n_windows) % 3 != slot
    store.dense[0, elsewhere] = 0
    test = sampler(Store(store.all_tokens, store.dense)).testing(0)
    for contexts in (test.active, test.inactive, test.hard, test.same_token):
        assert contexts
        assert {context.window % 3 for context in contexts} == {slot}
