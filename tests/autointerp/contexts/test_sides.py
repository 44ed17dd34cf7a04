"""Documents on one side: properties over corpora with documents of all lengths, and runs from before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_contexts import SPECIAL, DenseStore, texts

from autointerp.contexts.material import Material
from autointerp.contexts.sampler import ContextSampler
from autointerp.contexts.sides import (
    EXPLAIN,
    EXPLAIN_SHARE,
    JUDGE,
    NEITHER,
    SECTIONS,
    TOLERANCE,
    assign_documents,
    cut_long_documents,
    split_by_document,
)
from sae.common.files import table_metadata
from sae.common.records import write_record
from sae.settings import ContextSettings, Settings
from sae.study.run import Run, study_runs
from sae.study.stage import Compute, fit_to_study

WINDOW, SLOTS = 4, 3
CONTEXT = WINDOW * SLOTS + 1  # the last token of a sequence is in no window


class CorpusStore(DenseStore):
    """A harvest in a shuffled order of a corpus with documents that end at ``ends``."""

    def __init__(self, lengths: list[int], seed: int, vocabulary: int, end_token: bool) -> None:
        rng = np.random.default_rng(seed)
        flat = rng.integers(1, vocabulary, sum(lengths))
        ends = np.cumsum(lengths)
        if end_token:
            flat[ends - 1] = SPECIAL
        n = len(flat) // CONTEXT
        order = rng.permutation(n)
        used = flat[: n * CONTEXT].reshape(n, CONTEXT)[order, : WINDOW * SLOTS].reshape(-1, WINDOW)
        super().__init__(used, rng.exponential(size=used.shape) * (rng.random(used.shape) < 0.4))
        self.order, self.provenance = order, {"context": CONTEXT}
        kept = ends[ends < n * CONTEXT]
        self.corpus = SimpleNamespace(document_ends=np.append(kept, n * CONTEXT))

    def sequences_of(self, windows: np.ndarray) -> np.ndarray:
        return self.order[windows // SLOTS]

    def documents_of(self, window: int) -> set[int]:
        """The documents with a token in a window, one token after the other."""
        first = self.order[window // SLOTS] * CONTEXT + window % SLOTS * WINDOW
        ends = self.corpus.document_ends.tolist()
        return {sum(end <= token for end in ends) for token in range(first, first + WINDOW)}


@st.composite
def stores(draw: st.DrawFn) -> CorpusStore:
    """Short and long documents, in a vocabulary so small that windows repeat, or a large one."""
    lengths = draw(st.lists(st.one_of(st.integers(1, 6), st.integers(7, 80)), min_size=20, max_size=50))
    lengths[0] += CONTEXT
    vocabulary = draw(st.sampled_from([3, 1000]))
    return CorpusStore(lengths, draw(st.integers(0, 2**32 - 1)), vocabulary, draw(st.booleans()))


@given(stores())
def test_no_document_has_windows_on_both_sides(store: Any) -> None:
    sides = split_by_document(store, store.content())
    if sides.n_cut:
        return
    on = {
        side: set().union(*(store.documents_of(w) for w in np.flatnonzero(sides.of_window == side).tolist()))
        for side in (EXPLAIN, JUDGE)
    }
    assert not on[EXPLAIN] & on[JUDGE]


@given(stores())
def test_no_text_is_on_both_sides(store: Any) -> None:
    sides, content = split_by_document(store, store.content()).of_window, store.content()
    usable = ~store.has_special()
    assert not set(content[usable & (sides == EXPLAIN)]) & set(content[usable & (sides == JUDGE)])


@given(stores())
def test_unused_windows_span_sides_or_repeat(store: Any) -> None:
    sides, content = split_by_document(store, store.content()), store.content()
    if sides.n_cut:
        return
    explain = assign_documents(np.diff(store.corpus.document_ends, prepend=0))
    for window in np.flatnonzero(sides.of_window == NEITHER).tolist():
        own = {bool(explain[document]) for document in store.documents_of(window)}
        copies = np.flatnonzero((content == content[window]) & (sides.of_window != NEITHER))
        assert len(own) == 2 or (sides.of_window[copies] != (EXPLAIN if own == {True} else JUDGE)).all()


@given(stores(), st.integers(0, 3))
def test_what_is_shown_follows_the_sides(store: Any, sample_seed: int) -> None:
    sides = split_by_document(store, store.content()).of_window
    settings = ContextSettings(n_explain=6, n_active=8, n_inactive=8, sample_seed=sample_seed)
    sampler = ContextSampler(store, texts, settings, sides=sides)
    shown = [c.window for c in sampler.explaining(0) + sampler.background(0, 7)]
    test = sampler.testing(0)
    assert (sides[shown] == EXPLAIN).all()
    assert (sides[[c.window for c in test.active + test.inactive + test.same_token]] == JUDGE).all()
    assert (sides[[c.window for c in sampler.activating(0, 10**6)]] == JUDGE).all()


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300), st.integers(0, 5))
def test_share_is_off_by_half_a_document(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths)
    explain = assign_documents(sizes, seed)
    assert abs(sizes[explain].sum() - EXPLAIN_SHARE * sizes.sum()) <= sizes.max() / 2 + 1e-6 * sizes.sum()


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60))
def test_cut_documents_give_the_wanted_share(lengths: list[int]) -> None:
    lengths[0] += SECTIONS
    ends = np.cumsum(lengths)
    cut, n_cut = cut_long_documents(ends)
    sizes = np.diff(cut, prepend=0)
    assert set(ends) <= set(cut)
    assert (sizes > 0).all()
    assert sizes.max() <= max(1, ends[-1] // SECTIONS)
    assert n_cut == sum(length > ends[-1] // SECTIONS for length in lengths)
    explain = assign_documents(sizes)
    assert abs(sizes[explain].sum() / ends[-1] - EXPLAIN_SHARE) <= 0.5 / SECTIONS + 1e-6


def test_one_document_is_cut_into_sections() -> None:
    store: Any = CorpusStore([CONTEXT * 400], 0, 10**6, end_token=False)
    sides = split_by_document(store, store.content())
    assert (sides.n_documents, sides.n_cut) == (1, 1)
    described = sides.describe()
    assert abs(described["explain"] - EXPLAIN_SHARE) < 0.03
    assert described["neither"] < 0.03
    assert described["documents_cut"] == 1


def test_many_documents_are_never_cut() -> None:
    rng = np.random.default_rng(0)
    store: Any = CorpusStore(rng.integers(5, 200, 300).tolist(), 0, 10**6, end_token=True)
    sides = split_by_document(store, store.content())
    assert sides.n_cut == 0
    assert abs(sides.describe()["explain"] - EXPLAIN_SHARE) < TOLERANCE
    other = split_by_document(store, store.content(), seed=1)
    assert (other.of_window != sides.of_window).mean() > 0.3


@given(st.integers(0, 2**32 - 1), st.integers(1, 39))
def test_a_larger_harvest_keeps_the_sides(seed: int, n: int) -> None:
    store: Any = CorpusStore([13] * 40, seed, 10**6, end_token=False)
    whole = split_by_document(store, store.content()).of_window
    store.n_windows = n * SLOTS
    store.all_tokens = store.all_tokens[: n * SLOTS]
    assert (split_by_document(store, store.content()).of_window == whole[: n * SLOTS]).all()


# --- runs from before ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_copy(tiny_root: Path) -> Run:
    return Run.open("run_a", tiny_root)


def make_old(run: Run) -> Run:
    """Return the run as a program from before this split wrote it."""
    record: dict[str, Any] = {key: value for key, value in run.record.items() if key != "digest"}
    contexts = {key: value for key, value in record["settings"]["contexts"].items() if key != "split"}
    record["settings"] = {**record["settings"], "contexts": contexts}
    write_record(run.record_path, record)
    return Run.open(run.name, run.root)


def test_runs_from_before_keep_their_split(tiny_copy: Run) -> None:
    run = make_old(tiny_copy)
    assert run.settings.contexts.split == "text"
    assert "split" not in run.settings.contexts.model_dump(mode="json")  # so that hashes stay
    material = Material.of(run)
    reference = ContextSampler(material.store, run.corpus().decode, run.settings.contexts, material._groups)
    for latent in range(8):
        assert material.sampler.explaining(latent) == reference.explaining(latent)
    material.eligibility()
    assert table_metadata(run.stage_path("contexts"))["split"] is None


def test_new_seeds_take_the_split_of_the_study(tiny_copy: Run) -> None:
    run = make_old(tiny_copy)
    assert study_runs(run.study, run.root)[0].name == run.name
    given_settings = Settings().with_values(subject={"dtype": "float32"})
    fitted = fit_to_study(run.study, given_settings, run.root, Compute("cpu"))
    assert (given_settings.contexts.split, fitted.contexts.split) == ("document", "text")
    assert fit_to_study("another", given_settings, run.root, Compute("cpu")) == given_settings


def test_new_runs_record_how_documents_were_split(tiny_copy: Run) -> None:
    assert tiny_copy.record["settings"]["contexts"]["split"] == "document"
    material = Material.of(tiny_copy)
    material.eligibility()
    split = table_metadata(tiny_copy.stage_path("contexts"))["split"]
    assert split["documents"] == len(tiny_copy.corpus().document_ends)
    assert split["explain"] == pytest.approx(EXPLAIN_SHARE, abs=TOLERANCE)
    assert split["explain"] + split["judge"] + split["neither"] == pytest.approx(1, abs=1e-3)
