"""Which pieces of text an explainer and a judge see for a latent: look-ups in the firing store.

A score means something only if the judge is tested on text that the explainer never saw. Drawing both
from one list lets the same text into both (20 to 40 % of it, as measured on a peer), and distinct windows
are not enough, since corpora repeat themselves: licence headers, boilerplate, quoted files. So the side
of a window is decided by a hash of its *tokens*, once for all latents: equal texts always land on the
same side, and a latent never sees one text twice.

What is drawn from a side is decided by hashes too, of the sample seed, the latent and the text, and never
by the state of a random generator: a draw depends on what is drawn from and on nothing else, it is the
same in every process, and when the harvest grows it changes only as far as newcomers displace what was
there.

Contexts in which the latent is silent are matched by position: as many from each slot of the sequence as
the activating ones have, so that a judge cannot win by telling where in a document a text stands.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sae.firings import FiringStore, Ints, mix
from sae.settings import ContextSettings

METHOD = 1  # of drawing; part of what scores are keyed by: raise it when the same settings would draw other contexts
EXPLAIN_SHARE = 0.4  # of all texts; the test set is the larger because its error bars are what is reported
_LATENTS_REMEMBERED = 8  # explaining, testing and eligible are asked one after another for the same latent

Hashes = npt.NDArray[np.uint64]
Kind = Literal["active", "random", "hard", "same_token"]
DecodeTokens = Callable[[npt.NDArray[Any]], list[str]]


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
    """``active``, or how a context in which the latent is silent was chosen."""

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    def marked(self, threshold: float = 0.3) -> list[bool]:
        """Which tokens to show as activating: above ``threshold`` times the context's own peak."""
        bar = threshold * max(self.activations, default=0.0)
        return [a > bar for a in self.activations]


@dataclass(frozen=True)
class TestSet:
    """What a judge is tested on: the active ones spread over the strata, the inactive ones position-matched.

    Any beginning of either list is as representative as the whole.
    """

    __test__: ClassVar[bool] = False  # for pytest: no test

    active: list[Context]
    inactive: list[Context]


class _Actives(NamedTuple):
    """The distinct texts in which a latent fires, special tokens apart: [n] each, ``content`` ascending.

    A text that is silent in one place and fires in another is among them, and so is never called silent.
    """

    windows: Ints
    content: Hashes
    strata: Ints


class ContextSampler:
    """Draws contexts for any latent of one firing store. Equal arguments draw equal contexts, everywhere.

    Args:
        store: the firings of one run.
        decode_tokens: token ids [w] to the text of each, such as :meth:`sae.corpus.Corpus.decode`.
        settings: how many of what, and the sample seed.
    """

    def __init__(self, store: FiringStore, decode_tokens: DecodeTokens, settings: ContextSettings) -> None:
        self.store = store
        self.settings = settings
        self._decode = decode_tokens
        self._seed = mix(mix(np.array([settings.sample_seed], np.uint64)))[0]
        self._rings: dict[bool, list[_Ring]] = {}
        self._remembered: OrderedDict[int, _Actives] = OrderedDict()

    # --- what is drawn --------------------------------------------------------------------------------

    def explaining(self, latent: int) -> list[Context]:
        """Up to ``n_explain`` activating contexts for an explainer, evenly from all strata."""
        return self._active_contexts(latent, self._draw_active(latent, explain=True))

    def background(self, latent: int, n: int) -> list[Context]:
        """Up to ``n`` contexts in which the latent is silent, from the explainer's side of the split.

        Position-matched to :meth:`explaining`. For explainers that need something to compare with.
        """
        positives = self._actives(latent).windows[self._draw_active(latent, explain=True)]
        return self._inactive_contexts(self._draw_inactive(latent, positives, n, explain=True))

    def testing(self, latent: int) -> TestSet:
        """Up to ``n_active`` activating and ``n_inactive`` silent contexts that no explainer ever sees.

        Where fewer activating contexts exist, the silent ones keep the settings' proportion to them.
        """
        drawn = self._draw_active(latent, explain=False)
        positives = self._actives(latent).windows[drawn]
        n = self._n_inactive(len(positives))
        inactive = self._draw_inactive(latent, positives, n, explain=False)
        return TestSet(self._active_contexts(latent, drawn), self._inactive_contexts(inactive))

    def eligible(self, latent: int) -> tuple[bool, str]:
        """Whether there is enough to explain the latent and to test on, and if not, what is missing."""
        settings = self.settings
        actives = self._actives(latent)
        explain = int(self._explain_side(actives.content).sum())
        test = len(actives.windows) - explain
        if len(self.store.windows(latent)[0]) == 0:
            return False, "never fires in the harvest"
        if explain < settings.min_explain:
            return False, f"{explain} activating contexts to explain from, {settings.min_explain} needed"
        if test < settings.min_active:
            return False, f"{test} activating contexts to test on, {settings.min_active} needed"
        wanted = self._n_inactive(min(test, settings.n_active))
        silent = self._n_test_texts - test
        if silent < wanted:
            return False, f"fires nearly everywhere: {silent} silent contexts to test on, {wanted} needed"
        return True, ""

    # --- the activating side --------------------------------------------------------------------------

    def _actives(self, latent: int) -> _Actives:
        if latent in self._remembered:
            return self._remembered[latent]
        windows, peaks = self.store.windows(latent)
        content = self.store.content(windows)
        ordinary = ~self.store.has_special(windows)
        kept = np.flatnonzero(ordinary)
        distinct, first = np.unique(content[kept], return_index=True)  # of equal texts the earliest window
        kept = kept[first]
        # Equal peaks are common in half precision: the text's hash decides among them, not its place.
        rank = np.empty(len(kept), np.int64)
        rank[np.lexsort((distinct, peaks[kept]))] = np.arange(len(kept))
        strata = rank * self.settings.n_strata // max(len(kept), 1)
        found = _Actives(windows[kept], distinct, strata)
        self._remembered[latent] = found
        while len(self._remembered) > _LATENTS_REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    def _draw_active(self, latent: int, explain: bool) -> Ints:
        """Which of :meth:`_actives` to show. Every stratum gives its first by priority, then its second …

        Strata that run out leave their share to the others. Any beginning of the list is as evenly spread
        as the whole.
        """
        wanted = self.settings.n_explain if explain else self.settings.n_active
        actives = self._actives(latent)
        here = np.flatnonzero(self._explain_side(actives.content) == explain)
        priority = mix(actives.content[here] ^ self._key(latent))
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
        """``n`` windows from the slots of the first ``n`` positives (round and round), no text twice.

        A slot that has too few silent texts is made up for by the nearest slots that have some.
        """
        if len(positives) == 0 or n == 0:
            return np.empty(0, np.int64)
        rings = self._silent_rings(explain)
        need = np.bincount(np.resize(self.store.slot(positives), n), minlength=len(rings))
        active, key = self._actives(latent).content, self._key(latent)
        drawn = [(np.empty(0, np.int64), np.empty(0, np.uint64))]

        def draw(slot: int, many: int) -> int:
            """Draw up to ``many`` texts from one slot; returns how many are lacking."""
            taken = np.sort(np.concatenate([content for _, content in drawn]))
            drawn.append(rings[slot].after(key, many, active, taken))
            return many - len(drawn[-1][0])

        lacking = {slot: draw(slot, int(need[slot])) for slot in np.flatnonzero(need).tolist()}
        for slot, many in lacking.items():
            for other in sorted(range(len(rings)), key=lambda s, slot=slot: (abs(s - slot), s)):  # type: ignore[misc]
                if many == 0:
                    break
                many = draw(other, many)
        windows, content = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        return windows[np.argsort(mix(content ^ key))]

    def _silent_rings(self, explain: bool) -> list[_Ring]:
        """For each slot the texts of one side, arranged for drawing; made once."""
        if explain not in self._rings:
            content = self.store.content()
            usable = np.flatnonzero(~self.store.has_special() & (self._explain_side(content) == explain))
            slots = self.store.slot(usable)
            self._rings[explain] = [
                _Ring.of(usable[slots == slot], content, self._seed) for slot in range(self.store.windows_per_sequence)
            ]
        return self._rings[explain]

    @functools.cached_property
    def _n_test_texts(self) -> int:
        """How many different texts the test side has, whatever fires in them."""
        return len(np.unique(np.concatenate([ring.content for ring in self._silent_rings(explain=False)])))

    def _inactive_contexts(self, windows: Ints) -> list[Context]:
        silence = (0.0,) * self.store.window
        return [
            Context(window, texts, silence, False, None, "random")
            for window, texts in zip(windows.tolist(), self._texts(windows), strict=True)
        ]

    # --- both -----------------------------------------------------------------------------------------

    def _n_inactive(self, n_active: int) -> int:
        return round(n_active * self.settings.n_inactive / self.settings.n_active)

    @staticmethod
    def _explain_side(content: Hashes) -> npt.NDArray[np.bool_]:
        """Whether each text belongs to the explainer.

        The same for every latent, run and sample seed: what was explained under one is tested under others.
        """
        return mix(content) < np.uint64(int(EXPLAIN_SHARE * 2**64))

    def _key(self, latent: int) -> np.uint64:
        return mix(np.array([latent], np.uint64) ^ self._seed)[0]

    def _texts(self, windows: Ints) -> list[tuple[str, ...]]:
        return [tuple(self._decode(tokens)) for tokens in self.store.tokens(windows)]


class _Ring(NamedTuple):
    """Texts around a circle at the places that their hashes give them.

    Drawing for a latent starts at the latent's own place and goes round: a uniform sample of the texts
    that costs as much as what is drawn, however large the harvest, and that newcomers disturb only where
    they come to stand.
    """

    places: Hashes  # ascending
    windows: Ints
    content: Hashes

    @classmethod
    def of(cls, windows: Ints, content: Hashes, seed: np.uint64) -> _Ring:
        distinct, first = np.unique(content[windows], return_index=True)
        places = mix(distinct ^ seed)
        order = np.argsort(places)
        return cls(places[order], windows[first][order], distinct[order])

    def after(self, key: np.uint64, n: int, *excluded: Hashes) -> tuple[Ints, Hashes]:
        """The first ``n`` texts from ``key`` on that are in none of ``excluded`` (each sorted), or all there are."""
        size = len(self.places)
        begin = int(np.searchsorted(self.places, key))
        looked = min(2 * n, size)
        while True:
            around = (begin + np.arange(looked)) % max(size, 1)
            for hashes in excluded:
                around = around[~_among(self.content[around], hashes)]
            found = around[:n]
            if len(found) == n or looked == size:
                return self.windows[found], self.content[found]
            looked = min(4 * looked, size)


def _among(values: Hashes, in_sorted: Hashes) -> npt.NDArray[np.bool_]:
    if len(in_sorted) == 0:
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(in_sorted, values), len(in_sorted) - 1)
    return in_sorted[at] == values
