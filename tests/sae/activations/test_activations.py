"""The same bits whoever asks: in any portions, with a cache, without one, after a kill, on a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae.activations.cache import ActivationCache, open_caches
from sae.activations.stream import (
    ActivationStream,
    TrainingBatches,
    find_missing_blocks,
    open_streams,
    read_batches,
    read_rows,
)
from sae.activations.subject import Subject, load_tokenizer
from sae.common.errors import BadInput, UserError
from sae.settings import CorpusSettings
from sae.text.corpus import Corpus
from sae.text.packing import prepare_corpus

HOOKPOINT = "layers.1.mlp"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four sequences, so that a small corpus has many."""
    monkeypatch.setattr("sae.text.corpus.BLOCK_TOKENS", 64)


@pytest.fixture(scope="module")
def subject(tiny_neox_dir: Path) -> Subject:
    return Subject.load(str(tiny_neox_dir), dtype="float32")


@pytest.fixture
def corpus(tiny_neox_dir: Path, lines: list[str], tmp_path: Path) -> Corpus:
    """Some seventy sequences of 16 tokens; the last block is not full."""
    for i, line in enumerate(lines):
        (tmp_path / f"{i}.txt").write_text(line * 3)
    settings = CorpusSettings(kind="text", source=(str(tmp_path),), context=16)
    made = prepare_corpus(settings, *load_tokenizer(str(tiny_neox_dir)), tmp_path)
    assert made.block_rows == 4
    assert made.n_sequences % 4 != 0
    return made


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry, the number of sequences, with every forward pass."""
    count: list[int] = []
    real = Subject.activations

    def counted(self: Subject, tokens: Any, hookpoints: Any) -> Any:
        count.append(len(tokens))
        return real(self, tokens, hookpoints)

    monkeypatch.setattr(Subject, "activations", counted)
    return count


def expected(subject: Subject, corpus: Corpus, hookpoint: str = HOOKPOINT) -> torch.Tensor:
    """Every sequence's activations, each computed with its block, ``[N, T, D]``."""
    out = torch.empty(corpus.n_sequences, corpus.context, 16)
    for number in range(corpus.n_blocks):
        block = corpus.block(number)
        out[block] = subject.activations(corpus.rows(block), [hookpoint])[hookpoint]
    return out


def cache_of(corpus: Corpus, subject: Subject, hookpoint: str = HOOKPOINT) -> ActivationCache:
    return open_caches(corpus, subject, [hookpoint], 10**9)[hookpoint]


# --- the stream -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_the_bits_do_not_depend_on_the_portions(subject: Subject, corpus: Corpus, cached: bool) -> None:
    truth = expected(subject, corpus)
    rng = np.random.default_rng(0)
    for portion in (1, 3, 4, 5, corpus.n_sequences):
        cache = cache_of(corpus, subject) if cached else None
        stream = ActivationStream(subject, corpus, "gpt_neox." + HOOKPOINT, cache)
        assert (stream.hookpoint, stream.width, stream.context) == (HOOKPOINT, 16, 16)
        order = rng.permutation(corpus.n_sequences)
        for start in range(0, len(order), portion):
            index = order[start : start + portion]
            assert torch.equal(stream.rows(index), truth[index])
        assert stream.rows(np.array([5, 5, 2])).equal(truth[[5, 5, 2]])
        if cache is not None:
            cache.delete()


def test_read_in_order_every_block_is_computed_once(subject: Subject, corpus: Corpus, forwards: list[int]) -> None:
    stream = ActivationStream(subject, corpus, HOOKPOINT)
    for epoch in range(2):
        for portion in (3, 7, 16, 40):  # below and above a group of four blocks of four
            forwards.clear()
            stream._held.clear()
            order = corpus.order(epoch, seed=1)
            for start in range(0, len(order), portion):
                stream.rows(order[start : start + portion])
            assert len(forwards) == corpus.n_blocks
            assert sum(forwards) == corpus.n_sequences
            assert len(stream._held) <= 4


def test_nan_and_infinity_are_told(tiny_neox_dir: Path, corpus: Corpus) -> None:
    broken = Subject.load(str(tiny_neox_dir), dtype="float32")
    bias = broken.model.get_submodule(HOOKPOINT).dense_4h_to_h.bias
    bias[2] = torch.nan
    cache = cache_of(corpus, broken)
    with pytest.raises(UserError, match=r"NaN at layers\.1\.mlp in block \d+ .*weights are damaged") as caught:
        ActivationStream(broken, corpus, HOOKPOINT, cache).rows(np.arange(3))
    assert "\n" not in str(caught.value)
    assert not cache.has(np.arange(corpus.n_sequences)).any()
    half = Subject.load(str(tiny_neox_dir), dtype="float16")
    half.model.get_submodule(HOOKPOINT).dense_4h_to_h.bias[0] = torch.inf
    with pytest.raises(UserError, match=r"infinity .* use subject\.dtype float32"):
        ActivationStream(half, corpus, HOOKPOINT).rows(np.arange(3))


def test_sequences_longer_than_the_model_are_refused(tiny_llama_dir: Path, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(lines))
    settings = CorpusSettings(kind="text", source=(str(tmp_path / "a.txt"),), context=64)
    corpus = prepare_corpus(settings, *load_tokenizer(str(tiny_llama_dir)), tmp_path)
    with pytest.raises(BadInput, match="63 or less"):  # its tokenizer's BOS takes a position
        ActivationStream(Subject.load(str(tiny_llama_dir), dtype="float32"), corpus, HOOKPOINT)


# --- several hookpoints -----------------------------------------------------------------------------------

THREE = ("layers.0.mlp", "layers.1.mlp", "layers.2.mlp")


@pytest.mark.parametrize("cached", [False, True])
def test_several_hookpoints_are_one_forward_pass(
    subject: Subject, corpus: Corpus, forwards: list[int], cached: bool
) -> None:
    truth = {h: expected(subject, corpus, h) for h in THREE}
    caches = open_caches(corpus, subject, THREE, 10**9) if cached else {}
    streams = open_streams(subject, corpus, THREE, caches)
    forwards.clear()
    for portion in (3, 40):  # below and above a group of four blocks of four
        order = corpus.order(0, seed=1)
        for start in range(0, len(order), portion):
            index = order[start : start + portion]
            for hookpoint, rows in zip(THREE, read_rows(list(streams.values()), index), strict=True):
                assert torch.equal(rows, truth[hookpoint][index])
            assert max(len(s._held) for s in streams.values()) <= (0 if cached else 4)
        assert len(forwards) == (0 if cached and portion == 40 else corpus.n_blocks)
        forwards.clear()
        for stream in streams.values():
            stream._held.clear()


def test_what_one_hookpoint_computes_fills_the_others_caches(
    subject: Subject, corpus: Corpus, forwards: list[int]
) -> None:
    streams = open_streams(subject, corpus, THREE, open_caches(corpus, subject, THREE, 10**9))
    everything = np.arange(corpus.n_sequences)
    streams["layers.0.mlp"].rows(everything)
    assert len(forwards) == corpus.n_blocks
    assert torch.equal(streams["layers.2.mlp"].rows(everything), expected(subject, corpus, "layers.2.mlp"))
    assert len(forwards) == 2 * corpus.n_blocks  # those of the comparison alone


def test_the_pass_stops_at_what_is_missing(subject: Subject, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    real = Subject.activations

    def watched(self: Subject, tokens: Any, names: Any) -> Any:
        asked.append(list(names))
        return real(self, tokens, names)

    monkeypatch.setattr(Subject, "activations", watched)
    cache = {"layers.2.mlp": cache_of(corpus, subject, "layers.2.mlp")}
    streams = open_streams(subject, corpus, THREE, cache)
    streams["layers.2.mlp"].rows(np.arange(4))
    asked.clear()
    streams["layers.0.mlp"].rows(np.arange(4))
    assert all(names == ["layers.0.mlp"] for names in asked)  # the last layer has its part already
    assert asked


def test_what_is_lacking_is_what_would_be_computed(subject: Subject, corpus: Corpus) -> None:
    cache = {THREE[0]: cache_of(corpus, subject, THREE[0])}
    streams = list(open_streams(subject, corpus, THREE, cache).values())
    streams[0].rows(np.arange(9))
    streams[1].rows(np.array([11]))
    rng = np.random.default_rng(3)
    for _ in range(12):
        index = rng.permutation(corpus.n_sequences)[: rng.integers(1, 40)]
        foretold = find_missing_blocks(streams, index)
        computed: list[int] = []

        def source(known: Any, number: int, computed: list[int] = computed) -> Any:
            computed.append(number)
            return {s.hookpoint: expected(subject, corpus, s.hookpoint)[corpus.block(number)] for s in known}

        read_rows(streams, index, source)
        assert computed == foretold


def test_batches_of_several_lengths_are_read_together(subject: Subject, corpus: Corpus, forwards: list[int]) -> None:
    streams = open_streams(subject, corpus, THREE, {})
    make = lambda hookpoint, tokens: TrainingBatches(streams[hookpoint], tokens, 64, order_seed=2)  # noqa: E731
    batches = [make(THREE[0], 500), make(THREE[0], 900), make(THREE[2], 500)]
    alone = [TrainingBatches(ActivationStream(subject, corpus, h), 900, 64, 2)[3] for h in (THREE[0], THREE[2])]
    forwards.clear()
    short, long, last = read_batches(batches, 3)
    needed = len(np.unique(corpus.place(batches[0].sequences(3))[0]))
    assert len(forwards) == needed
    assert short is long
    assert torch.equal(short, alone[0])
    assert torch.equal(last, alone[1])
    with pytest.raises(ValueError, match="same sequences"):
        read_batches([batches[0], TrainingBatches(streams[THREE[1]], 500, 32, order_seed=2)], 0)


def test_where_a_row_comes_from(subject: Subject, corpus: Corpus) -> None:
    batches = TrainingBatches(ActivationStream(subject, corpus, HOOKPOINT), 500, 64)
    index = batches.sequences(2)
    kept = np.flatnonzero(~corpus.is_special(corpus.rows(index)).reshape(-1))
    for row in (0, len(kept) - 1):
        sequence = int(index[kept[row] // 16])
        block = int(corpus.place(np.array([sequence]))[0][0])
        assert batches.describe(2, row) == f"sequence {sequence} of the corpus, block {block}"
    assert f"sequence {index[0]} and 3 more of the corpus, blocks " in batches.describe(2)


# --- training batches -------------------------------------------------------------------------------------


def test_batches_are_whole_sequences_without_special_tokens(subject: Subject, corpus: Corpus) -> None:
    truth = expected(subject, corpus)
    batches = TrainingBatches(ActivationStream(subject, corpus, HOOKPOINT), tokens=2000, batch_tokens=100, order_seed=3)
    assert (batches.sequences_per_step, batches.tokens_per_step) == (6, 96)
    assert len(batches) == 21  # 2,000 tokens, rounded up
    epochs = [corpus.order(e, 3) for e in range(3)]
    order = np.concatenate(epochs)
    removed = 0
    for step, x in enumerate(batches[i] for i in range(len(batches))):
        index = order[step * 6 : step * 6 + 6]
        np.testing.assert_array_equal(batches.sequences(step), index)
        keep = corpus.tokens[index].reshape(-1) != 0
        assert x.dtype == torch.float32
        assert torch.equal(x, truth[index].reshape(-1, 16)[torch.from_numpy(keep)])
        removed += int((~keep).sum())
    assert step == 20
    assert removed > 0
    assert corpus.n_sequences < 21 * 6  # a step has crossed into the second epoch


def test_batches_equal_one_by_one_and_in_turn(subject: Subject, corpus: Corpus) -> None:
    make = lambda: TrainingBatches(ActivationStream(subject, corpus, HOOKPOINT), 1000, 64)  # noqa: E731
    one, batches = make(), make()
    in_turn = [one[step] for step in range(len(one))]
    for step in (7, 0, len(batches) - 1, 3):
        assert torch.equal(batches[step], in_turn[step])
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_model_precision_does_not_change_the_batch_type(tiny_neox_dir: Path, corpus: Corpus) -> None:
    half = Subject.load(str(tiny_neox_dir), dtype="bfloat16")
    stream = ActivationStream(half, corpus, HOOKPOINT, cache_of(corpus, half))
    first = TrainingBatches(stream, 100, 64)[0]
    assert first.dtype == torch.float32
    assert torch.equal(first, TrainingBatches(stream, 100, 64)[0])  # the second time from the cache


def test_the_fingerprint_names_the_order(subject: Subject, corpus: Corpus) -> None:
    stream = ActivationStream(subject, corpus, HOOKPOINT)
    same = [TrainingBatches(stream, 1000, 64, order_seed=1).fingerprint for _ in range(2)]
    others = [
        TrainingBatches(stream, 1000, 64, order_seed=2).fingerprint,
        TrainingBatches(stream, 2000, 64, order_seed=1).fingerprint,
        TrainingBatches(stream, 1000, 96, order_seed=1).fingerprint,
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4
