"""What may be shown to whom: properties over small firing stores in which texts repeat themselves."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.contexts.sampler import Context, ContextSampler
from sae.firings.store import hash_windows, mix_bits
from sae.settings import ContextSettings

WINDOW, SLOTS, SPECIAL = 4, 3, 0


class DenseStore:
    """A firing store in memory, for latent 0 (and its mirror image, latent 1), from dense arrays.

    tokens [W, w] and activations [W, w].
    """

    window = WINDOW

    def __init__(self, tokens: np.ndarray, activations: np.ndarray, slots: int = SLOTS) -> None:
        self.all_tokens, self.dense = tokens, activations.astype(np.float32)
        self.windows_per_sequence = slots
        self.n_windows = len(tokens)

    def _latent(self, latent: int) -> np.ndarray:
        return self.dense if latent == 0 else self.dense[:, ::-1]

    def windows(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.flatnonzero((self.dense > 0).any(1))
        return ids, self._latent(latent)[ids].max(1)

    def activations(self, latent: int, ids: np.ndarray) -> np.ndarray:
        return self._latent(latent)[ids]

    def tokens(self, ids: np.ndarray) -> np.ndarray:
        return self.all_tokens[ids]

    def slot(self, ids: np.ndarray) -> np.ndarray:
        return ids % self.windows_per_sequence

    def content(self, ids: Any = slice(None)) -> np.ndarray:
        return hash_windows(self.all_tokens)[ids]

    def has_special(self, ids: Any = slice(None)) -> np.ndarray:
        return (self.all_tokens == SPECIAL).any(1)[ids]


def texts(tokens: np.ndarray) -> list[str]:
    return [f" {t}" for t in tokens]


def sampler(
    store: Any,
    decode: Callable[[np.ndarray], list[str]] = texts,
    groups: np.ndarray | None = None,
    neighbours: Callable[[int], np.ndarray] | None = None,
    **settings: int,
) -> ContextSampler:
    return ContextSampler(store, decode, ContextSettings(**settings), groups, neighbours)  # type: ignore[arg-type]


def a_store(n: int, seed: int = 0, vocabulary: int = 10**6, share_active: float = 0.3) -> DenseStore:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocabulary, (n, WINDOW))
    active = rng.random(n) < share_active
    activations = rng.exponential(size=(n, WINDOW)) * (rng.random((n, WINDOW)) < 0.4)
    activations[:, 1] += 0.1  # so that every window would fire …
    return DenseStore(tokens, activations * active[:, None])  # … were the latent not silent in most


@st.composite
def repetitive_stores(draw: st.DrawFn) -> DenseStore:
    """Few different texts, many copies, some with special tokens; copies may fire here and not there."""
    seed = draw(st.integers(0, 2**32 - 1))
    n_texts, n_windows = draw(st.integers(1, 60)), draw(st.integers(1, 150))
    rng = np.random.default_rng(seed)
    pool = rng.integers(0 if draw(st.booleans()) else 1, 30, (n_texts, WINDOW))
    tokens = pool[rng.integers(0, n_texts, n_windows)]
    levels = rng.integers(1, 4, (n_windows, WINDOW))  # few levels: equal peaks are the rule
    fires = rng.random((n_windows, 1)) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    return DenseStore(tokens, levels * fires * (rng.random((n_windows, WINDOW)) < 0.6))


@given(repetitive_stores(), st.integers(0, 5), st.integers(1, 12))
def test_no_text_is_on_both_sides_nor_twice(store: DenseStore, sample_seed: int, strata: int) -> None:
    sampled = sampler(store, n_explain=6, n_active=8, n_inactive=8, n_strata=strata, sample_seed=sample_seed)
    shown = sampled.explaining(0) + sampled.background(0, 7)
    test = sampled.testing(0)
    tested = test.active + test.inactive
    assert not {c.text for c in shown} & {c.text for c in tested}
    for side in (shown, tested):
        assert len({c.text for c in side}) == len(side)
    # … nor across latents or sample seeds: what explains one latent once tests none ever.
    assert not {c.text for c in shown} & {c.text for c in sampled.testing(1).active}
    again = sampler(store, n_active=50, n_inactive=50, sample_seed=sample_seed + 1).testing(0)
    assert not {c.text for c in shown} & {c.text for c in again.active + again.inactive}
    firing_texts = {tuple(store.all_tokens[w]) for w in np.flatnonzero((store.dense > 0).any(1))}
    for context in shown + tested:
        tokens = store.all_tokens[context.window]
        assert SPECIAL not in tokens
        assert context.tokens == tuple(texts(tokens))
        assert context.activations == tuple(store.dense[context.window].tolist())
        assert context.active == any(context.activations) == (context.kind == "active") == (context.stratum is not None)
        if not context.active:
            assert tuple(tokens) not in firing_texts
    generous = sampler(store, n_explain=6, n_active=8, n_inactive=8, min_explain=1, min_active=2)
    eligible, reason = generous.eligible(0)
    test = generous.testing(0)
    enough = len(test.active) >= 2 and len(test.inactive) == len(test.active) and len(generous.explaining(0)) >= 1
    assert eligible == (reason == "") == enough


@given(st.integers(0, 10**6), st.integers(200, 500))
def test_enough_text_gives_what_was_asked_for(seed: int, n: int) -> None:
    """Counts, and position-matching one for one. (In less text a slot may run out, and its neighbours stand in.)"""
    store = a_store(n * 3, seed)
    sampled = sampler(store, n_explain=8, n_active=10, n_inactive=10, n_strata=5, min_explain=8, min_active=10)
    assert sampled.eligible(0)[0]
    test = sampled.testing(0)
    assert len(sampled.explaining(0)) == 8
    assert len(test.active) == len(test.inactive) == 10
    assert Counter(c.window % SLOTS for c in test.active) == Counter(c.window % SLOTS for c in test.inactive)
    background = sampled.background(0, 16)
    slots = Counter(c.window % SLOTS for c in sampled.explaining(0))
    assert Counter(c.window % SLOTS for c in background) == Counter({slot: 2 * n for slot, n in slots.items()})


@given(st.integers(0, 10**6), st.integers(60, 200))
def test_little_text_still_gives_the_numbers_asked_for(seed: int, n: int) -> None:
    """Where a slot has run out its neighbours stand in: as many silent contexts, each once, none of them firing."""
    sampled = sampler(
        a_store(n * 3, seed), n_explain=8, n_active=10, n_inactive=10, n_strata=5, min_explain=8, min_active=10
    )
    if not sampled.eligible(0)[0]:
        assert n < 120
        return
    test = sampled.testing(0)
    assert len(sampled.explaining(0)) == 8
    assert len(test.active) == len(test.inactive) == 10
    assert len({c.window for c in test.inactive}) == 10
    assert not {c.window for c in test.inactive} & set(sampled.store.windows(0)[0].tolist())


def test_strata_cover_the_whole_range_evenly() -> None:
    store = a_store(6000)
    sampled = sampler(store, n_explain=40, n_active=50, n_strata=10)
    _, peaks = store.windows(0)
    edges = np.quantile(peaks, np.linspace(0, 1, 11))
    for contexts, each in ((sampled.explaining(0), 4), (sampled.testing(0).active, 5)):
        assert Counter(c.stratum for c in contexts) == dict.fromkeys(range(10), each)
        assert Counter(c.stratum for c in contexts[:20]) == dict.fromkeys(range(10), 2), "a beginning is as even"
        for context in contexts:
            assert context.stratum is not None
            low, high = edges[context.stratum], edges[context.stratum + 1]
            assert low * 0.98 <= max(context.activations) <= high * 1.02


def test_a_thin_stratum_gives_its_share_to_others() -> None:
    store = a_store(100, share_active=0.35)
    sampled = sampler(store, n_explain=40, n_active=50, n_strata=10)
    shown, tested = sampled.explaining(0), sampled.testing(0)
    assert len(shown) + len(tested.active) == len(store.windows(0)[0]), "all there are, though fewer than asked for"
    assert len(tested.inactive) == len(tested.active)


def test_draws_do_not_depend_on_order_or_process() -> None:
    store = a_store(900)
    one, other = sampler(store), sampler(store)
    expected = (one.explaining(0), one.testing(0), one.background(0, 9))
    assert (other.background(0, 9), other.testing(0), other.explaining(0)) == expected[::-1]
    assert [c.window for c in one.explaining(0)] != [c.window for c in one.explaining(1)]
    assert [c.window for c in one.testing(0).inactive] != [c.window for c in one.testing(1).inactive]
    reseeded = sampler(store, sample_seed=1)
    assert [c.window for c in reseeded.explaining(0)] != [c.window for c in one.explaining(0)]


def test_draws_stay_what_they_are() -> None:
    """Hashes alone decide: these windows must not change, or scores made earlier cannot be compared."""
    numbers = mix_bits(np.arange(600 * WINDOW, dtype=np.uint64)).reshape(600, WINDOW)
    store = DenseStore((numbers % 1000 + 1).astype(np.int64), (numbers % 7 == 0) * (numbers % 97 + 1.0))
    sampled = sampler(store)
    test = sampled.testing(0)
    first = [[c.window for c in some[:4]] for some in (sampled.explaining(0), test.active, test.inactive)]
    assert first == [[217, 94, 469, 171], [503, 44, 268, 326], [497, 549, 9, 208]]


@given(st.integers(0, 10**6))
def test_growth_without_firings_changes_no_active_context(seed: int) -> None:
    whole = a_store(600, seed)
    whole.dense[400:] = 0
    before = sampler(DenseStore(whole.all_tokens[:400], whole.dense[:400]))
    after = sampler(whole)
    assert after.explaining(0) == before.explaining(0)
    assert after.testing(0).active == before.testing(0).active


def test_growth_changes_only_as_much_as_is_new() -> None:
    """A tenth more text changes about a tenth of what is drawn, and never the side of a text."""
    kept: list[float] = []
    for seed in range(10):
        whole = a_store(6600, seed)
        before = sampler(DenseStore(whole.all_tokens[:6000], whole.dense[:6000]))
        after = sampler(whole)
        pairs = [
            (before.explaining(0), after.explaining(0)),
            (before.testing(0).active, after.testing(0).active),
            (before.testing(0).inactive, after.testing(0).inactive),
        ]
        kept += [len({c.text for c in a} & {c.text for c in b}) / len(a) for a, b in pairs]
        shown = {c.text for c in before.explaining(0) + before.background(0, 40)}
        assert not shown & {c.text for c in after.testing(0).active + after.testing(0).inactive}
    assert np.mean(kept) > 0.75


def test_the_silent_side_is_drawn_evenly() -> None:
    """Every silent test-side text is about as likely as any other, over latents: no text is a favourite."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 10**6, (300, WINDOW))
    activations = np.zeros((300, WINDOW))
    activations[:60, 0] = rng.random(60) + 0.1
    sampled = sampler(DenseStore(tokens, activations, slots=1), n_active=10, n_inactive=10)
    usable = len(sampled._silent_rings(explain=False)[0].windows)
    positives = np.arange(10)
    drawn = Counter[int]()
    for key in range(4000):
        sampled._key = lambda _, key=key: mix_bits(np.array([key], np.uint64))[0]  # type: ignore[method-assign, misc]
        drawn.update(sampled._draw_inactive(0, positives, 10, explain=False).tolist())
    active_tested = len(sampled._actives(0).windows) - len(sampled.explaining(0))
    silent = usable - active_tested
    assert len(drawn) == silent
    counts = np.array(list(drawn.values()))
    assert counts.mean() == pytest.approx(4000 * 10 / silent)
    assert counts.max() < 6 * counts.mean()


def test_a_full_slot_is_made_up_by_neighbours() -> None:
    store = a_store(300, share_active=0.0)
    store.dense[::3, 0] = 1.0  # fires in every first slot, and nowhere else
    sampled = sampler(store, n_active=20, n_inactive=20)
    test = sampled.testing(0)
    assert {c.window % SLOTS for c in test.active} == {0}
    assert {c.window % SLOTS for c in test.inactive} == {1}
    assert len(test.inactive) == 20


@pytest.mark.parametrize(
    ("share", "n", "words"),
    [
        (0.0, 300, "never fires"),
        (0.02, 300, "activating contexts to explain from, 10 needed"),
        (0.14, 300, "activating contexts to test on, 30 needed"),
        (1.0, 300, "fires nearly everywhere: 0 silent contexts"),
        (0.4, 600, ""),
    ],
)
def test_eligibility_says_what_is_missing(share: float, n: int, words: str) -> None:
    eligible, reason = sampler(a_store(n, share_active=share), min_explain=10, min_active=30).eligible(0)
    assert eligible == (words == "")
    assert words in reason
    assert "\n" not in reason


def test_marking_is_relative_to_the_context() -> None:
    context = Context(3, ("a", "b", "c"), (0.0, 3.0, 10.0), True, 0, "active")
    assert context.text == "abc"
    assert context.marked() == [False, False, True]
    assert context.marked(0.2) == [False, True, True]
    assert context.marked(0.0) == [False, True, True]
    silent = Context(3, ("a", "b"), (0.0, 0.0), False, None, "random")
    assert silent.marked() == silent.marked(0.0) == [False, False]


def test_hundreds_of_latents_take_seconds() -> None:
    """60k windows: look-ups, not scans. Decoding left out: it is the tokenizer's time."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 1000, (60_000, WINDOW))
    activations = np.zeros((60_000, WINDOW))
    activations[rng.random(60_000) < 0.1, 2] = 1.0
    store = DenseStore(tokens, activations, slots=8)
    hashes, special = hash_windows(tokens), np.zeros(60_000, bool)
    store.content = lambda ids=slice(None): hashes[ids]  # type: ignore[method-assign]
    store.has_special = lambda ids=slice(None): special[ids]  # type: ignore[method-assign]
    sampled = sampler(store, decode=lambda t: ["x"] * len(t))
    started = time.process_time()
    for latent in range(40):
        sampled.explaining(latent)
        sampled.testing(latent)
    assert time.process_time() - started < 4.0


def test_from_a_real_subject_model_to_contexts(tiny_neox_dir: Path, lines: list[str], tmp_path: Path) -> None:
    """Text, model, dictionary, harvest, contexts: what is shown is the corpus's text and the SAE's activations."""
    import torch

    from sae.activations.stream import ActivationStream
    from sae.activations.subject import Subject, load_tokenizer
    from sae.dictionaries.architectures.topk import TopKSae
    from sae.firings.harvest import harvest
    from sae.firings.store import FiringStore
    from sae.settings import CorpusSettings
    from sae.text.packing import prepare_corpus

    rng = np.random.default_rng(0)
    words = "".join(lines).split(" ")
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(" ".join(rng.choice(words, 150)))
    settings = CorpusSettings(kind="text", source=(str(tmp_path),), context=32)
    corpus = prepare_corpus(settings, *load_tokenizer(str(tiny_neox_dir)), tmp_path)
    stream = ActivationStream(Subject.load(str(tiny_neox_dir), dtype="float32"), corpus, "layers.1.mlp")
    sae = TopKSae.init(16, 24, 4, seed=0)
    harvest(stream, {"a": sae}, {"a": tmp_path / "firings"}, {"a": ""}, 10**6, 8, 0)
    store = FiringStore.open(tmp_path / "firings")
    assert 0 < store.n_special_tokens <= 20
    sampled = sampler(store, corpus.decode, n_explain=10, n_active=10, n_inactive=10, min_active=10)
    order = corpus.order(0, 0)
    chosen = [latent for latent in range(24) if sampled.eligible(latent)[0]][:4]
    assert len(chosen) == 4
    for latent in chosen:
        test = sampled.testing(latent)
        assert len(test.active) == len(test.inactive) == 10
        for context in [*sampled.explaining(latent), *test.active, *test.inactive]:
            rank, slot = divmod(context.window, 4)
            here = slice(slot * 8, slot * 8 + 8)
            assert context.text == stream.subject.tokenizer.decode(corpus.tokens[order[rank], here].tolist())
            values, indices = sae.encode(stream.rows(order[[rank]])[0])
            dense = torch.zeros(32, 24).scatter_(1, indices, values)
            np.testing.assert_allclose(context.activations, dense[here, latent], rtol=1e-3, atol=1e-6)


def test_no_torch_is_imported() -> None:
    code = "import sys, autointerp.contexts.sampler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
