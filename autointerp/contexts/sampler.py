"""Draw the texts that an explainer and a judge see for a latent, from the firing store.

A judge must be tested on text that the explainer never saw. Corpora repeat themselves (licence headers, boilerplate):
drawn from one list, 20 to 40 % of the test texts would be known. So near-duplicate windows form a *group*
(:mod:`autointerp.contexts.near_duplicates`), and each group and document has one side, once for all latents
(:mod:`autointerp.contexts.sides`). A latent never gets two windows of one group.

Within a side, hashes of the sample seed, the latent and the group decide. So every process draws the same, and a larger
harvest changes a draw only where new texts displace old ones.

Silent contexts are matched by position (:mod:`autointerp.contexts.positions`). Two kinds of harder negatives are scored
separately, and matched by position as far as possible: contexts in which a neighbour fires strongly, and contexts with
the token on which the latent mostly peaks.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from autointerp.contexts.positions import (
    Hashes,
    Queue,
    Ring,
    count_in_proportion,
    count_round_robin,
    draw_by_slot,
    draw_in_turn,
    is_among,
)
from autointerp.contexts.sides import EXPLAIN, JUDGE, NEITHER, SideArray, split_by_text
from sae.firings.store import FiringStore, Ints, mix_bits
from sae.settings import ContextSettings

METHOD = 3  # raise it when the same settings would draw other contexts: it is part of the key of scores
_LATENTS_REMEMBERED = 8  # explaining, testing and eligible are called in turn for the same latent

STRONG = 0.25  # a neighbour fires strongly in this share of its windows, those with the highest peaks
_PEAKS = 200  # contexts whose peaks decide the latent's top token
_WALK = 1 << 16  # windows searched for a token at most
_BLOCK = 1 << 12
_FEWEST = 5  # contexts of a harder kind: fewer are of no use for a score
_NONE: Ints = np.empty(0, np.int64)


def _side_of(explain: bool) -> int:
    return EXPLAIN if explain else JUDGE


Kind = Literal["active", "random", "hard", "same_token", "mismarked"]
BackgroundKind = Literal["random", "hard"]
DecodeTokens = Callable[[npt.NDArray[Any]], list[str]]
NeighboursOf = Callable[[int], Ints]


@dataclass(frozen=True)
class Context:
    """A window of text with the activations of one latent. w tokens."""

    window: int
    """The window's number in the firing store."""
    tokens: tuple[str, ...]
    """The text, split by the subject model's tokenizer."""
    activations: tuple[float, ...]
    """The latent's activation at each token, zero where it is silent."""
    active: bool
    """Whether the latent fires anywhere in it."""
    stratum: int | None
    """The quantile of its peak activation, 0 the weakest; None where silent."""
    kind: Kind
    """``active``; ``random``, ``hard`` or ``same_token`` for a silent one; ``mismarked`` for one in which the latent
    fires, but not on the tokens of ``marks``."""
    marks: tuple[bool, ...] | None = None
    """The tokens shown to the judge as activating, rightly or not; None for no marks."""

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def truth(self) -> bool:
        """The right verdict: the latent fires here, and on the marked tokens if there are any."""
        return self.active and self.kind != "mismarked"

    def marked(self, threshold: float = 0.3) -> list[bool]:
        """Return for each token whether its activation is above ``threshold`` times the context's peak."""
        bar = threshold * max(self.activations, default=0.0)
        return [a > bar for a in self.activations]


@dataclass(frozen=True)
class TestSet:
    """Contexts for a judge: active ones spread over the strata, silent ones position-matched; no window twice.

    Any beginning of a list is as representative as the whole.
    """

    __test__: ClassVar[bool] = False  # tells pytest that this is not a test

    active: list[Context]
    inactive: list[Context]
    hard: list[Context] = field(default_factory=list)
    """Silent contexts in which a neighbour fires strongly; empty where there are too few."""
    same_token: list[Context] = field(default_factory=list)
    """Silent contexts that hold the latent's top token; empty where there are too few."""


class _Actives(NamedTuple):
    """The groups of usable texts in which a latent fires, without special tokens: [n] each, ``group`` ascending."""

    windows: Ints
    group: Hashes
    strata: Ints
    firing: Hashes
    """All groups in which it fires, special tokens or not, ascending: none of them counts as silent."""


class ContextSampler:
    """Draws contexts for any latent of one firing store. Equal arguments draw equal contexts in every process.

    Args:
        store: the firings of one run.
        decode_tokens: token ids [w] to the text of each, such as :meth:`sae.text.corpus.Corpus.decode`.
        settings: the number of contexts of each kind, and the sample seed.
        groups: [W] the group of each window; by default only equal texts share one.
        neighbours: gives the neighbours of a latent; without it no hard negatives are drawn.
        sides: [W] the side of each window; by default a hash of its group decides.
    """

    def __init__(
        self,
        store: FiringStore,
        decode_tokens: DecodeTokens,
        settings: ContextSettings,
        groups: Hashes | None = None,
        neighbours: NeighboursOf | None = None,
        sides: SideArray | None = None,
    ) -> None:
        self.store = store
        self._groups = store.content() if groups is None else groups
        self.sides = split_by_text(self._groups) if sides is None else sides
        self._neighbours = neighbours
        self.settings = settings
        self._decode = decode_tokens
        self._seed = mix_bits(mix_bits(np.array([settings.sample_seed], np.uint64)))[0]
        self._rings: dict[bool, list[Ring]] = {}
        self._remembered: OrderedDict[int, _Actives] = OrderedDict()

    # --- drawing ------------------------------------------------------------------------------------------------------

    def explaining(self, latent: int) -> list[Context]:
        """Return up to ``n_explain`` activating contexts for an explainer, evenly from all strata."""
        return self._active_contexts(latent, self._draw_active(latent, True, self.settings.n_explain))

    def activating(self, latent: int, n: int) -> list[Context]:
        """Return up to ``n`` activating contexts that no explainer sees, those of :meth:`testing` first."""
        return self._active_contexts(latent, self._draw_active(latent, False, n))

    def background(self, latent: int, n: int, kind: BackgroundKind = "random") -> list[Context]:
        """Return up to ``n`` silent contexts for an explainer to compare with, matched to :meth:`explaining`.

        With ``kind`` hard, a neighbour fires strongly in each.
        """
        positives = self._actives(latent).windows[self._draw_active(latent, True, self.settings.n_explain)]
        draw = self._draw_inactive if kind == "random" else self._draw_hard
        return self._silent_contexts(draw(latent, positives, n, explain=True), kind)

    def testing(self, latent: int) -> TestSet:
        """Return the test set: contexts that no explainer sees.

        Up to ``n_active`` activating and ``n_inactive`` silent contexts, in the settings' proportion if there are fewer
        activating ones; and up to ``n_hard`` and ``n_same_token`` harder ones, of groups that no earlier kind has.

        Each slot gives silent and harder contexts in proportion to its activating ones; the nearest slots make up for
        missing ones. Silent contexts are in the order of a hash.
        """
        drawn = self._draw_active(latent, False, self.settings.n_active)
        positives = self._actives(latent).windows[drawn]
        n = self._n_inactive(len(positives))
        random = self._draw_inactive(latent, positives, n, explain=False)
        hard = self._draw_hard(latent, positives, self.settings.n_hard, explain=False, taken=random)
        taken = np.concatenate([random, hard])
        same_token = self._draw_same_token(latent, positives, self.settings.n_same_token, taken)
        return TestSet(
            self._active_contexts(latent, drawn),
            self._silent_contexts(random, "random"),
            self._silent_contexts(hard, "hard"),
            self._silent_contexts(same_token, "same_token"),
        )

    def eligible(self, latent: int) -> tuple[bool, str]:
        """Return whether there are enough contexts to explain and test the latent; if not, with the reason."""
        settings = self.settings
        actives = self._actives(latent)
        explain = int((self.sides[actives.windows] == EXPLAIN).sum())
        test = len(actives.windows) - explain
        if len(self.store.windows(latent)[0]) == 0:
            return False, "never fires in the harvest"
        if explain < settings.min_explain:
            return False, f"{explain} activating contexts to explain from, {settings.min_explain} needed"
        if test < settings.min_active:
            return False, f"{test} activating contexts to test on, {settings.min_active} needed"
        wanted = self._n_inactive(min(test, settings.n_active))
        texts = self._test_ring.group
        if len(texts) - len(actives.firing) >= wanted:  # true for nearly all latents, and counting takes time
            return True, ""
        silent = len(texts) - int(is_among(texts, actives.firing).sum())
        if silent < wanted:
            return False, f"fires nearly everywhere: {silent} silent contexts to test on, {wanted} needed"
        return True, ""

    # --- the activating side --------------------------------------------------------------------------

    def _actives(self, latent: int) -> _Actives:
        if latent in self._remembered:
            return self._remembered[latent]
        windows, peaks = self.store.windows(latent)
        group = self._groups[windows]
        kept = np.flatnonzero(~self.store.has_special(windows) & (self.sides[windows] != NEITHER))
        distinct, first = np.unique(group[kept], return_index=True)  # the earliest window of each group
        kept = kept[first]
        # Equal peaks are common in half precision: the group's hash breaks ties, not its position.
        rank = np.empty(len(kept), np.int64)
        rank[np.lexsort((distinct, peaks[kept]))] = np.arange(len(kept))
        strata = rank * self.settings.n_strata // max(len(kept), 1)
        found = _Actives(windows[kept], distinct, strata, np.unique(group))
        self._remembered[latent] = found
        while len(self._remembered) > _LATENTS_REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    def _draw_active(self, latent: int, explain: bool, wanted: int) -> Ints:
        """Return up to ``wanted`` numbers of :meth:`_actives`, the next by priority from each stratum in turn."""
        actives = self._actives(latent)
        here = np.flatnonzero(self.sides[actives.windows] == _side_of(explain))
        priority = mix_bits(actives.group[here] ^ self._key(latent))
        by_stratum = np.lexsort((priority, actives.strata[here]))
        strata = actives.strata[here][by_stratum]
        turn = np.arange(len(here)) - np.searchsorted(strata, strata)
        return here[by_stratum[np.lexsort((priority[by_stratum], turn))]][:wanted]

    def _active_contexts(self, latent: int, drawn: Ints) -> list[Context]:
        actives = self._actives(latent)
        windows = actives.windows[drawn]
        strata = actives.strata[drawn].tolist()
        activations = self.store.activations(latent, windows).tolist()
        return [
            Context(window, texts, tuple(values), True, stratum, "active")
            for window, texts, values, stratum in zip(
                windows.tolist(), self._texts(windows), activations, strata, strict=True
            )
        ]

    # --- the silent side ------------------------------------------------------------------------------

    def _draw_inactive(self, latent: int, positives: Ints, n: int, explain: bool) -> Ints:
        """Draw ``n`` silent windows from the slots of the positives, no group twice."""
        if len(positives) == 0 or n == 0:
            return _NONE
        rings = self._silent_rings(explain)
        firing, key = self._actives(latent).firing, self._key(latent)
        drawn = [(np.empty(0, np.int64), np.empty(0, np.uint64))]

        def draw(slot: int, many: int) -> int:
            taken = np.sort(np.concatenate([group for _, group in drawn]))
            drawn.append(rings[slot].draw(key, many, firing, taken))
            return many - len(drawn[-1][0])

        draw_by_slot(count_round_robin(self.store.slot(positives), n, len(rings)), draw)
        windows, group = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        return windows[np.argsort(mix_bits(group ^ key))]

    def _draw_hard(self, latent: int, positives: Ints, n: int, explain: bool, taken: Ints = _NONE) -> Ints:
        """Draw up to ``n`` windows in which a neighbour fires strongly and the latent is silent, in no taken group."""
        if n == 0 or self._neighbours is None or not len(positives):
            return _NONE
        firing, key, excluded = self._actives(latent).firing, self._key(latent), np.unique(self._groups[taken])
        queues = []
        for neighbour in self._neighbours(latent).tolist():
            windows, peaks = self.store.windows(neighbour)
            strong = windows[peaks >= np.quantile(peaks, 1 - STRONG)] if len(windows) else windows
            group = self._groups[strong]
            usable = (self.sides[strong] == _side_of(explain)) & ~self.store.has_special(strong)
            usable &= ~is_among(group, firing) & ~is_among(group, excluded)
            distinct, first = np.unique(group[usable], return_index=True)
            queues.append(self._queue(strong[usable][first], distinct, key).shorten(2 * n))
        return self._from_queues(queues, positives, n, key, fewest=1 if explain else _FEWEST)

    def _draw_same_token(self, latent: int, positives: Ints, n: int, taken: Ints) -> Ints:
        """Draw up to ``n`` silent windows that hold the latent's top token, in no taken group."""
        if n == 0 or not len(positives):
            return _NONE
        token = self.find_top_token(latent)
        firing, key, excluded = self._actives(latent).firing, self._key(latent), np.unique(self._groups[taken])
        lacking = self._count_wanted(positives, n)
        found = [(np.empty(0, np.int64), np.empty(0, np.uint64))]
        for windows, group in self._test_ring.walk(key, _BLOCK, _WALK):
            silent = np.flatnonzero(~is_among(group, firing) & ~is_among(group, excluded))
            holding = silent[(self.store.tokens(windows[silent]) == token).any(axis=1)]
            found.append((windows[holding], group[holding]))
            lacking -= np.bincount(self.store.slot(windows[holding]), minlength=len(lacking))
            if (lacking <= 0).all():
                break
        windows, group = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return self._from_queues([self._queue(windows, group, key).shorten(n)], positives, n, key)

    def _queue(self, windows: Ints, group: Hashes, key: np.uint64) -> Queue:
        return Queue(windows, group, self.store.slot(windows), mix_bits(group ^ key))

    def _from_queues(self, queues: list[Queue], positives: Ints, n: int, key: np.uint64, fewest: int = _FEWEST) -> Ints:
        windows, group = draw_in_turn(queues, self._count_wanted(positives, n))
        order = np.argsort(mix_bits(mix_bits(group ^ key)))  # not the priority, by which slots and neighbours differ
        return windows[order] if len(windows) >= min(n, fewest) else windows[:0]

    def _count_wanted(self, positives: Ints, n: int) -> Ints:
        """Return how many of ``n`` harder contexts each slot gives."""
        return count_in_proportion(self.store.slot(positives), n, self.store.windows_per_sequence)

    def find_top_token(self, latent: int) -> int:
        """Return the token on which the latent most often peaks, over up to 200 of its contexts; it must fire."""
        actives = self._actives(latent)
        windows = actives.windows[np.argsort(mix_bits(actives.group ^ self._key(latent)))[:_PEAKS]]
        peaks = self.store.activations(latent, windows).argmax(axis=1)
        tokens, counts = np.unique(self.store.tokens(windows)[np.arange(len(windows)), peaks], return_counts=True)
        return int(tokens[counts.argmax()])

    def _silent_rings(self, explain: bool) -> list[Ring]:
        """Return the texts of one side arranged for drawing, by slot."""
        if explain not in self._rings:
            usable = self._usable(explain)
            slots = self.store.slot(usable)
            self._rings[explain] = [
                Ring.of(usable[slots == slot], self._groups, self._seed)
                for slot in range(self.store.windows_per_sequence)
            ]
        return self._rings[explain]

    @functools.cached_property
    def _test_ring(self) -> Ring:
        """All texts of the test side."""
        return Ring.of(self._usable(explain=False), self._groups, self._seed)

    def _usable(self, explain: bool) -> Ints:
        return np.flatnonzero(~self.store.has_special() & (self.sides == _side_of(explain)))

    def _silent_contexts(self, windows: Ints, kind: Kind) -> list[Context]:
        silence = (0.0,) * self.store.window
        return [
            Context(window, texts, silence, False, None, kind)
            for window, texts in zip(windows.tolist(), self._texts(windows), strict=True)
        ]

    # --- both -----------------------------------------------------------------------------------------

    def _n_inactive(self, n_active: int) -> int:
        return round(n_active * self.settings.n_inactive / self.settings.n_active)

    def _key(self, latent: int) -> np.uint64:
        return mix_bits(np.array([latent], np.uint64) ^ self._seed)[0]

    def _texts(self, windows: Ints) -> list[tuple[str, ...]]:
        return [tuple(self._decode(tokens)) for tokens in self.store.tokens(windows)]
