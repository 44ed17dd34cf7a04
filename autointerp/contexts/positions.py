"""Draw texts matched by position, so that a judge cannot win by a text's place in its document.

A *slot* is a window's place in its sequence. If a slot has too few texts, the nearest slots make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sae.firings.store import Ints, mix_bits

Hashes = npt.NDArray[np.uint64]


class Ring(NamedTuple):
    """Groups of texts on a circle, at the places of their hashes; each with its first window.

    A draw starts at the latent's own place: a uniform sample of the groups, in time independent of the harvest's size.
    """

    places: Hashes  # ascending
    windows: Ints
    group: Hashes

    @classmethod
    def of(cls, windows: Ints, groups: Hashes, seed: np.uint64) -> Ring:
        """Arrange ``windows`` [n] (ascending), given the group of every window [W]; the seed changes the places."""
        distinct, first = np.unique(groups[windows], return_index=True)
        places = mix_bits(distinct ^ seed)
        order = np.argsort(places)
        return cls(places[order], windows[first][order], distinct[order])

    def draw(self, key: np.uint64, n: int, *excluded: Hashes) -> tuple[Ints, Hashes]:
        """Return up to ``n`` windows from ``key`` on, and their groups, which are in none of ``excluded`` (sorted)."""
        size = len(self.places)
        begin = int(np.searchsorted(self.places, key))
        n_read = min(2 * n, size)
        while True:
            around = (begin + np.arange(n_read)) % max(size, 1)
            for hashes in excluded:
                around = around[~is_among(self.group[around], hashes)]
            found = around[:n]
            if len(found) == n or n_read == size:
                return self.windows[found], self.group[found]
            n_read = min(4 * n_read, size)

    def walk(self, key: np.uint64, block: int, most: int) -> Iterator[tuple[Ints, Hashes]]:
        """Yield windows and groups from ``key`` on, ``block`` at a time and ``most`` in all, each once."""
        size = len(self.places)
        begin = int(np.searchsorted(self.places, key))
        for start in range(0, min(size, most), block):
            around = (begin + np.arange(start, min(start + block, size, most))) % size
            yield self.windows[around], self.group[around]


def is_among(values: Hashes, in_sorted: Hashes) -> npt.NDArray[np.bool_]:
    """[n] whether each of ``values`` is in ``in_sorted``."""
    if len(in_sorted) == 0:
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(in_sorted, values), len(in_sorted) - 1)
    return in_sorted[at] == values


class Queue(NamedTuple):
    """Texts of one source, [n] each, taken in ascending order of priority."""

    windows: Ints
    group: Hashes
    slot: Ints
    priority: Hashes

    def shorten(self, n: int) -> Queue:
        """Return the first ``n`` of each slot, enough where ``n`` are drawn in all."""
        order = np.lexsort((self.priority, self.slot))
        slot = self.slot[order]
        kept = order[np.arange(len(slot)) - np.searchsorted(slot, slot) < n]
        return Queue(self.windows[kept], self.group[kept], self.slot[kept], self.priority[kept])


def count_round_robin(slots: Ints, n: int, n_slots: int) -> Ints:
    """Return the number of ``n`` texts that each slot gives: those of the first ``n`` activating ones, repeated."""
    return np.bincount(np.resize(slots, n if len(slots) else 0), minlength=n_slots)


def count_in_proportion(slots: Ints, n: int, n_slots: int) -> Ints:
    """Split ``n`` over the slots in proportion to the activating ones' ``slots``, by largest remainders."""
    found, first, count = np.unique(slots, return_index=True, return_counts=True)
    exact = count * n / max(1, len(slots))
    whole = np.floor(exact).astype(np.int64)
    lacking = n - int(whole.sum()) if len(slots) else 0
    whole[np.lexsort((first, whole - exact))[:lacking]] += 1
    need = np.zeros(n_slots, np.int64)
    need[found] = whole
    return need


def draw_by_slot(need: Ints, draw: Callable[[int, int], int]) -> None:
    """Draw ``need[slot]`` texts of every slot, and from the nearest slots what it lacks.

    ``draw`` takes a slot and a number, draws up to that many and returns how many are lacking.
    """
    lacking = {slot: draw(slot, int(need[slot])) for slot in np.flatnonzero(need).tolist()}
    for slot, many in lacking.items():
        for other in sorted(range(len(need)), key=lambda s, slot=slot: (abs(s - slot), s)):  # type: ignore[misc]
            if many == 0:
                break
            many = draw(other, many)


def draw_in_turn(queues: Sequence[Queue], need: Ints) -> tuple[Ints, Hashes]:
    """Return windows and groups out of ``queues``, ``need[slot]`` of each slot where possible, no group twice.

    Within a slot the queue that has given least comes next, so that none dominates.
    """
    waiting = [[_sort_slot(queue, slot) for queue in queues] for slot in range(len(need))]
    given = [0] * len(queues)
    found: dict[int, int] = {}  # group → window

    def draw(slot: int, many: int) -> int:
        while many:
            heads = []
            for number, queue in enumerate(waiting[slot]):
                while queue and queue[-1][1] in found:
                    queue.pop()
                if queue:
                    heads.append((given[number], queue[-1][0], number))
            if not heads:
                break
            _, _, number = min(heads)
            _, group, window = waiting[slot][number].pop()
            found[group] = window
            given[number] += 1
            many -= 1
        return many

    draw_by_slot(need, draw)
    return np.array(list(found.values()), np.int64), np.array(list(found), np.uint64)


def _sort_slot(queue: Queue, slot: int) -> list[tuple[int, int, int]]:
    """Return (priority, group, window) of one slot, the next one last."""
    here = np.flatnonzero(queue.slot == slot)
    here = here[np.argsort(queue.priority[here])][::-1]
    columns = (queue.priority[here], queue.group[here], queue.windows[here])
    return list(zip(*(column.tolist() for column in columns), strict=True))
