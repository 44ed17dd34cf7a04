"""Which pieces of text an explainer and a judge see for a latent: look-ups in the firing store.

A score means something only if the judge is tested on text that the explainer never saw. Drawing both
from one list lets the same text into both (20 to 40 % of it, as measured on a peer), and distinct windows
are not enough, since corpora repeat themselves, word for word or nearly so: licence headers, boilerplate,
quoted files. So windows whose texts nearly agree form a *group* (:mod:`autointerp.contexts.near_duplicates`), and the
side of a window is decided by a hash of its group, once for all latents: what repeats itself always lands on
the same side, and a latent never sees two windows of one group.

What is drawn from a side is decided by hashes too, of the sample seed, the latent and the group, and never
by the state of a random generator: a draw depends on what is drawn from and on nothing else, it is the
same in every process, and when the harvest grows it changes only as far as newcomers displace what was
there.

Contexts in which the latent is silent are matched by position: as many from each slot of the sequence as
the activating ones have, so that a judge cannot win by telling where in a document a text stands. Two further
kinds of silent context ask harder questions: those in which a neighbour of the latent fires strongly, and those
that hold the token on which the latent mostly peaks. They are drawn apart, and are scored apart; they are matched
by position as far as there are such texts, which for them is no matter of course
(:mod:`autointerp.contexts.positions`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from autointerp.contexts.positions import Queue, in_proportion, in_turn, match, one_by_one
from autointerp.contexts.rings import Hashes, Ring, among
from sae.firings.store import FiringStore, Ints, mix_bits
from sae.settings import ContextSettings

METHOD = 3  # of drawing; part of what scores are keyed by: raise it when the same settings would draw other contexts
EXPLAIN_SHARE = 0.4  # of all texts; the test set is the larger because its error bars are what is reported
_LATENTS_REMEMBERED = 8  # explaining, testing and eligible are asked one after another for the same latent

STRONG = 0.25  # a neighbour fires strongly in this share of its windows, those with the highest peaks
_PEAKS = 200  # contexts whose peaks are asked which token is the latent's
_WALK = 1 << 16  # windows looked through for a token at most: what is rarer is missing
_BLOCK = 1 << 12
_FEWEST = 5  # of a harder kind: fewer say nothing

Kind = Literal["active", "random", "hard", "same_token", "mismarked"]
DecodeTokens = Callable[[npt.NDArray[Any]], list[str]]
NeighboursOf = Callable[[int], Ints]


@dataclass(frozen=True)
class Context:
    """A window of text and what one latent does in it. w tokens."""

    window: int
    """The window's number in the firing store."""
    tokens: tuple[str, ...]
    """The text, cut as the subject model's tokenizer cuts it."""
    activations: tuple[float, ...]
    """The latent's activation at each token, zero where it is silent."""
    active: bool
    """Whether the latent fires anywhere in it."""
    stratum: int | None
    """Which quantile of the latent's peak activations it falls in, 0 the weakest; None where silent."""
    kind: Kind
    """``active``; how a context in which the latent is silent was chosen; ``mismarked`` for one in which it fires,
    but not on the tokens of ``marks``."""
    marks: tuple[bool, ...] | None = None
    """Which tokens the judge is shown as activating, rightly or not; None where it is shown none."""

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def truth(self) -> bool:
        """What a judge that knows everything says: the latent fires here, and on the marked tokens if there are any."""
        return self.active and self.kind != "mismarked"

    def marked(self, threshold: float = 0.3) -> list[bool]:
        """Which tokens to show as activating: above ``threshold`` times the context's own peak."""
        bar = threshold * max(self.activations, default=0.0)
        return [a > bar for a in self.activations]


@dataclass(frozen=True)
class TestSet:
    """What a judge is tested on: the active ones spread over the strata, the inactive ones position-matched.

    Any beginning of either list is as representative as the whole. No window is there twice.
    """

    __test__: ClassVar[bool] = False  # for pytest: no test

    active: list[Context]
    inactive: list[Context]
    hard: list[Context] = field(default_factory=list)
    """Silent contexts in which a neighbour of the latent fires strongly; empty where there are too few."""
    same_token: list[Context] = field(default_factory=list)
    """Silent contexts that hold the latent's top token; empty where there are too few."""


class _Actives(NamedTuple):
    """The groups of texts in which a latent fires, special tokens apart: [n] each, ``group`` ascending."""

    windows: Ints
    group: Hashes
    strata: Ints
    firing: Hashes
    """All groups in which it fires anywhere, special tokens or not, ascending: none of them is ever called silent."""


class ContextSampler:
    """Draws contexts for any latent of one firing store. Equal arguments draw equal contexts, everywhere.

    Args:
        store: the firings of one run.
        decode_tokens: token ids [w] to the text of each, such as :meth:`sae.text.corpus.Corpus.decode`.
        settings: how many of what, and the sample seed.
        groups: [W] the group of each window, equal for texts that nearly agree; by default only equal texts share one.
        neighbours: the latents whose firing makes hard negatives of a latent; without it none are drawn.
    """

    def __init__(
        self,
        store: FiringStore,
        decode_tokens: DecodeTokens,
        settings: ContextSettings,
        groups: Hashes | None = None,
        neighbours: NeighboursOf | None = None,
    ) -> None:
        self.store = store
        self._groups = store.content() if groups is None else groups
        self._neighbours = neighbours
        self.settings = settings
        self._decode = decode_tokens
        self._seed = mix_bits(mix_bits(np.array([settings.sample_seed], np.uint64)))[0]
        self._rings: dict[bool, list[Ring]] = {}
        self._remembered: OrderedDict[int, _Actives] = OrderedDict()

    # --- what is drawn --------------------------------------------------------------------------------

    def explaining(self, latent: int) -> list[Context]:
        """Up to ``n_explain`` activating contexts for an explainer, evenly from all strata."""
        return self._active_contexts(latent, self._draw_active(latent, True, self.settings.n_explain))

    def activating(self, latent: int, n: int) -> list[Context]:
        """Up to ``n`` activating contexts that no explainer ever sees; the first are those of :meth:`testing`."""
        return self._active_contexts(latent, self._draw_active(latent, False, n))

    def background(self, latent: int, n: int) -> list[Context]:
        """Up to ``n`` contexts in which the latent is silent, from the explainer's side of the split.

        Position-matched to :meth:`explaining`. For explainers that need something to compare with.
        """
        positives = self._actives(latent).windows[self._draw_active(latent, True, self.settings.n_explain)]
        return self._silent_contexts(self._draw_inactive(latent, positives, n, explain=True), "random")

    def testing(self, latent: int) -> TestSet:
        """Up to ``n_active`` activating and ``n_inactive`` silent contexts that no explainer ever sees.

        Where fewer activating contexts exist, the silent ones keep the settings' proportion to them. With them up to
        ``n_hard`` and ``n_same_token`` of the harder kinds, in groups that none of the kinds before has.

        Position: of the random ones each slot of the sequence gives as many as of the activating ones (where both are
        equally many), of the harder kinds the same share, to the nearest whole number. A slot that has too few is made
        up for by the nearest that have some: with random ones that hardly happens, while neighbours may fire, and
        tokens stand, in some slots only. Within a list of silent contexts the order is that of a hash.
        """
        drawn = self._draw_active(latent, False, self.settings.n_active)
        positives = self._actives(latent).windows[drawn]
        n = self._n_inactive(len(positives))
        random = self._draw_inactive(latent, positives, n, explain=False)
        hard = self._draw_hard(latent, positives, self.settings.n_hard, random)
        taken = np.concatenate([random, hard])
        same_token = self._draw_same_token(latent, positives, self.settings.n_same_token, taken)
        return TestSet(
            self._active_contexts(latent, drawn),
            self._silent_contexts(random, "random"),
            self._silent_contexts(hard, "hard"),
            self._silent_contexts(same_token, "same_token"),
        )

    def eligible(self, latent: int) -> tuple[bool, str]:
        """Whether there is enough to explain the latent and to test on, and if not, what is missing."""
        settings = self.settings
        actives = self._actives(latent)
        explain = int(self._explain_side(actives.group).sum())
        test = len(actives.windows) - explain
        if len(self.store.windows(latent)[0]) == 0:
            return False, "never fires in the harvest"
        if explain < settings.min_explain:
            return False, f"{explain} activating contexts to explain from, {settings.min_explain} needed"
        if test < settings.min_active:
            return False, f"{test} activating contexts to test on, {settings.min_active} needed"
        wanted = self._n_inactive(min(test, settings.n_active))
        texts = self._test_ring.group
        if len(texts) - len(actives.firing) >= wanted:  # so it is for nearly all, and counting takes time
            return True, ""
        silent = len(texts) - int(among(texts, actives.firing).sum())
        if silent < wanted:
            return False, f"fires nearly everywhere: {silent} silent contexts to test on, {wanted} needed"
        return True, ""

    # --- the activating side --------------------------------------------------------------------------

    def _actives(self, latent: int) -> _Actives:
        if latent in self._remembered:
            return self._remembered[latent]
        windows, peaks = self.store.windows(latent)
        group = self._groups[windows]
        kept = np.flatnonzero(~self.store.has_special(windows))
        distinct, first = np.unique(group[kept], return_index=True)  # of each group the earliest window
        kept = kept[first]
        # Equal peaks are common in half precision: the group's hash decides among them, not its place.
        rank = np.empty(len(kept), np.int64)
        rank[np.lexsort((distinct, peaks[kept]))] = np.arange(len(kept))
        strata = rank * self.settings.n_strata // max(len(kept), 1)
        found = _Actives(windows[kept], distinct, strata, np.unique(group))
        self._remembered[latent] = found
        while len(self._remembered) > _LATENTS_REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    def _draw_active(self, latent: int, explain: bool, wanted: int) -> Ints:
        """Which of :meth:`_actives` to show, ``wanted`` at most.

        Every stratum gives its first by priority, then its second …. Strata that run out leave their share to the
        others. Any beginning of the list is as evenly spread as the whole.
        """
        actives = self._actives(latent)
        here = np.flatnonzero(self._explain_side(actives.group) == explain)
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
        """``n`` windows from the slots of the first ``n`` positives (round and round), no group twice.

        A slot that has too few silent texts is made up for by the nearest slots that have some.
        """
        if len(positives) == 0 or n == 0:
            return np.empty(0, np.int64)
        rings = self._silent_rings(explain)
        firing, key = self._actives(latent).firing, self._key(latent)
        drawn = [(np.empty(0, np.int64), np.empty(0, np.uint64))]

        def draw(slot: int, many: int) -> int:
            taken = np.sort(np.concatenate([group for _, group in drawn]))
            drawn.append(rings[slot].after(key, many, firing, taken))
            return many - len(drawn[-1][0])

        match(one_by_one(self.store.slot(positives), n, len(rings)), draw)
        windows, group = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        return windows[np.argsort(mix_bits(group ^ key))]

    def _draw_hard(self, latent: int, positives: Ints, n: int, taken: Ints) -> Ints:
        """Up to ``n`` windows in which a neighbour fires strongly and the latent does not, none in a taken group.

        Slots as in :meth:`testing`. Within a slot the neighbour that has given least gives next, by priority.
        """
        if n == 0 or self._neighbours is None or not len(positives):
            return np.empty(0, np.int64)
        firing, key, gone = self._actives(latent).firing, self._key(latent), np.unique(self._groups[taken])
        queues = []
        for neighbour in self._neighbours(latent).tolist():
            windows, peaks = self.store.windows(neighbour)
            strong = windows[peaks >= np.quantile(peaks, 1 - STRONG)] if len(windows) else windows
            group = self._groups[strong]
            usable = ~self._explain_side(group) & ~self.store.has_special(strong)
            usable &= ~among(group, firing) & ~among(group, gone)
            distinct, first = np.unique(group[usable], return_index=True)
            queues.append(self._queue(strong[usable][first], distinct, key).shortened(2 * n))
        return self._from_queues(queues, positives, n, key)

    def _draw_same_token(self, latent: int, positives: Ints, n: int, taken: Ints) -> Ints:
        """Up to ``n`` windows that hold the latent's top token and in which it is silent, none in a taken group.

        Slots as in :meth:`testing`; it is looked for more until each slot has enough.
        """
        if n == 0 or not len(positives):
            return np.empty(0, np.int64)
        token = self.top_token(latent)
        firing, key, gone = self._actives(latent).firing, self._key(latent), np.unique(self._groups[taken])
        lacking = self._wanted(positives, n)
        found = [(np.empty(0, np.int64), np.empty(0, np.uint64))]
        for windows, group in self._test_ring.walk(key, _BLOCK, _WALK):
            silent = np.flatnonzero(~among(group, firing) & ~among(group, gone))
            holding = silent[(self.store.tokens(windows[silent]) == token).any(axis=1)]
            found.append((windows[holding], group[holding]))
            lacking -= np.bincount(self.store.slot(windows[holding]), minlength=len(lacking))
            if (lacking <= 0).all():
                break
        windows, group = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return self._from_queues([self._queue(windows, group, key).shortened(n)], positives, n, key)

    def _queue(self, windows: Ints, group: Hashes, key: np.uint64) -> Queue:
        return Queue(windows, group, self.store.slot(windows), mix_bits(group ^ key))

    def _from_queues(self, queues: list[Queue], positives: Ints, n: int, key: np.uint64) -> Ints:
        windows, group = in_turn(queues, self._wanted(positives, n))
        order = np.argsort(mix_bits(mix_bits(group ^ key)))  # not the priority, by which slots and neighbours differ
        return _unless_too_few(windows[order], n)

    def _wanted(self, positives: Ints, n: int) -> Ints:
        """[S] how many of ``n`` harder contexts each slot is to give."""
        return in_proportion(self.store.slot(positives), n, self.store.windows_per_sequence)

    def top_token(self, latent: int) -> int:
        """The token on which the latent most often peaks, over up to 200 of its contexts; it must fire somewhere."""
        actives = self._actives(latent)
        asked = actives.windows[np.argsort(mix_bits(actives.group ^ self._key(latent)))[:_PEAKS]]
        peaks = self.store.activations(latent, asked).argmax(axis=1)
        tokens, counts = np.unique(self.store.tokens(asked)[np.arange(len(asked)), peaks], return_counts=True)
        return int(tokens[counts.argmax()])

    def _silent_rings(self, explain: bool) -> list[Ring]:
        """For each slot the texts of one side, arranged for drawing; made once."""
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
        """All texts of the test side, whatever their slot and whatever fires in them."""
        return Ring.of(self._usable(explain=False), self._groups, self._seed)

    def _usable(self, explain: bool) -> Ints:
        return np.flatnonzero(~self.store.has_special() & (self._explain_side(self._groups) == explain))

    def _silent_contexts(self, windows: Ints, kind: Kind) -> list[Context]:
        silence = (0.0,) * self.store.window
        return [
            Context(window, texts, silence, False, None, kind)
            for window, texts in zip(windows.tolist(), self._texts(windows), strict=True)
        ]

    # --- both -----------------------------------------------------------------------------------------

    def _n_inactive(self, n_active: int) -> int:
        return round(n_active * self.settings.n_inactive / self.settings.n_active)

    @staticmethod
    def _explain_side(group: Hashes) -> npt.NDArray[np.bool_]:
        """Whether each group belongs to the explainer.

        The same for every latent, run and sample seed: what was explained under one is tested under others.
        """
        return mix_bits(group) < np.uint64(int(EXPLAIN_SHARE * 2**64))

    def _key(self, latent: int) -> np.uint64:
        return mix_bits(np.array([latent], np.uint64) ^ self._seed)[0]

    def _texts(self, windows: Ints) -> list[tuple[str, ...]]:
        return [tuple(self._decode(tokens)) for tokens in self.store.tokens(windows)]


def _unless_too_few(windows: Ints, n: int) -> Ints:
    return windows if len(windows) >= min(n, _FEWEST) else windows[:0]
