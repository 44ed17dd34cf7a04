"""Silent contexts from where the activating ones stand: a judge must not win by telling a document's end from its head.

A *slot* is a window's place in its sequence. Which slots are wanted is told by the activating contexts; the texts are
taken slot by slot, and what a slot cannot give is taken from the nearest slots that can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from autointerp.contexts.rings import Hashes
from sae.firings.store import Ints


class Queue(NamedTuple):
    """Texts that one source can give, [n] each. They are taken by priority, the lowest first."""

    windows: Ints
    group: Hashes
    slot: Ints
    priority: Hashes

    def shortened(self, n: int) -> Queue:
        """The first ``n`` of each slot: no more are ever taken where ``n`` are wanted in all."""
        order = np.lexsort((self.priority, self.slot))
        slot = self.slot[order]
        kept = order[np.arange(len(slot)) - np.searchsorted(slot, slot) < n]
        return Queue(self.windows[kept], self.group[kept], self.slot[kept], self.priority[kept])


def one_by_one(slots: Ints, n: int, n_slots: int) -> Ints:
    """[S] how many of ``n`` texts each slot is to give: as the first ``n`` activating ones (round and round)."""
    return np.bincount(np.resize(slots, n if len(slots) else 0), minlength=n_slots)


def in_proportion(slots: Ints, n: int, n_slots: int) -> Ints:
    """[S] how many of ``n`` texts each slot is to give: in proportion to all activating ones, by largest remainders.

    Of equal remainders that slot comes first which comes first among ``slots``: they are in no order, so on the whole
    no slot is favoured.
    """
    found, first, count = np.unique(slots, return_index=True, return_counts=True)
    exact = count * n / max(1, len(slots))
    whole = np.floor(exact).astype(np.int64)
    lacking = n - int(whole.sum()) if len(slots) else 0
    whole[np.lexsort((first, whole - exact))[:lacking]] += 1
    need = np.zeros(n_slots, np.int64)
    need[found] = whole
    return need


def match(need: Ints, draw: Callable[[int, int], int]) -> None:
    """Draw ``need`` [S] texts of every slot, and of the nearest others what a slot lacks.

    Args:
        draw: takes so many of a slot, as far as it has them; returns how many are lacking.
    """
    lacking = {slot: draw(slot, int(need[slot])) for slot in np.flatnonzero(need).tolist()}
    for slot, many in lacking.items():
        for other in sorted(range(len(need)), key=lambda s, slot=slot: (abs(s - slot), s)):  # type: ignore[misc]
            if many == 0:
                break
            many = draw(other, many)


def in_turn(queues: Sequence[Queue], need: Ints) -> tuple[Ints, Hashes]:
    """Windows and groups out of ``queues`` for ``need`` [S], matched by slot; no group twice.

    Within a slot the queue that has given least comes next, so that none speaks for all.
    """
    waiting = [[_by_priority(queue, slot) for queue in queues] for slot in range(len(need))]
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

    match(need, draw)
    return np.array(list(found.values()), np.int64), np.array(list(found), np.uint64)


def _by_priority(queue: Queue, slot: int) -> list[tuple[int, int, int]]:
    """(priority, group, window) of one slot, the first to be taken at the end."""
    here = np.flatnonzero(queue.slot == slot)
    here = here[np.argsort(queue.priority[here])][::-1]
    columns = (queue.priority[here], queue.group[here], queue.windows[here])
    return list(zip(*(column.tolist() for column in columns), strict=True))
