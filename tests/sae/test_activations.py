"""The same bits whoever asks: in any portions, with a cache, without one, after a kill, on a full disk."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sae.activations as activations_module
from sae.activations import ActivationCache, ActivationStream, TrainingBatches
from sae.corpus import Corpus, prepare_corpus
from sae.errors import BadInput, UserError
from sae.settings import CorpusSettings
from sae.subject import Subject, load_tokenizer

HOOKPOINT = "layers.1.mlp"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four sequences, so that a small corpus has many."""
    monkeypatch.setattr("sae.corpus.BLOCK_TOKENS", 64)


@pytest.fixture(scope="module")
def subject(tiny_neox_dir: Path) -> Subject:
    return Subject.load(str(tiny_neox_dir))


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


def expected(subject: Subject, corpus: Corpus) -> torch.Tensor:
    """Every sequence's activations, each computed with its block, ``[N, T, D]``."""
    out = torch.empty(corpus.n_sequences, corpus.context, 16)
    for number in range(corpus.n_blocks):
        block = corpus.block(number)
        out[block] = subject.activations(corpus.rows(block), [HOOKPOINT])[HOOKPOINT]
    return out


# --- the stream -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_the_bits_do_not_depend_on_the_portions(subject: Subject, corpus: Corpus, cached: bool) -> None:
    truth = expected(subject, corpus)
    rng = np.random.default_rng(0)
    for portion in (1, 3, 4, 5, corpus.n_sequences):
        cache = ActivationCache.for_stream(corpus, subject, HOOKPOINT) if cached else None
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
    broken = Subject.load(str(tiny_neox_dir))
    bias = broken.model.get_submodule(HOOKPOINT).dense_4h_to_h.bias
    bias[2] = torch.nan
    cache = ActivationCache.for_stream(corpus, broken, HOOKPOINT)
    with pytest.raises(UserError, match=r"NaN at layers\.1\.mlp in block \d+ .*weights are damaged") as caught:
        ActivationStream(broken, corpus, HOOKPOINT, cache).rows(np.arange(3))
    assert "\n" not in str(caught.value)
    assert cache is not None
    assert not cache.has(np.arange(corpus.n_sequences)).any()
    half = Subject.load(str(tiny_neox_dir), dtype="float16")
    half.model.get_submodule(HOOKPOINT).dense_4h_to_h.bias[0] = torch.inf
    with pytest.raises(UserError, match=r"infinity .* use subject\.dtype float32"):
        ActivationStream(half, corpus, HOOKPOINT).rows(np.arange(3))


def test_sequences_longer_than_the_model_are_refused_at_once(
    tiny_llama_dir: Path, lines: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("".join(lines))
    settings = CorpusSettings(kind="text", source=(str(tmp_path / "a.txt"),), context=64)
    corpus = prepare_corpus(settings, *load_tokenizer(str(tiny_llama_dir)), tmp_path)
    with pytest.raises(BadInput, match="63 or less"):  # its tokenizer's BOS takes a position
        ActivationStream(Subject.load(str(tiny_llama_dir)), corpus, HOOKPOINT)


# --- the cache --------------------------------------------------------------------------------------------


def test_a_filled_cache_spares_the_model(subject: Subject, corpus: Corpus, forwards: list[int]) -> None:
    everything = np.arange(corpus.n_sequences)
    first = ActivationStream(subject, corpus, HOOKPOINT, ActivationCache.for_stream(corpus, subject, HOOKPOINT))
    values = first.rows(everything)
    assert not first._held
    forwards.clear()
    again = ActivationStream(subject, corpus, HOOKPOINT, ActivationCache.for_stream(corpus, subject, HOOKPOINT))
    assert torch.equal(again.rows(everything), values)
    assert forwards == []
    other = ActivationCache.for_stream(corpus, subject, "layers.0.mlp")
    assert other is not None
    assert first.cache is not None
    assert other.folder != first.cache.folder
    assert not other.has(everything).any()
    folder = other.folder
    other.delete()
    assert not folder.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "c", 10, (4, 3), dtype)
    values = torch.randn(5, 4, 3).to(dtype)
    assert cache.put(2, values)
    assert cache.has(np.arange(10)).tolist() == [False] * 2 + [True] * 5 + [False] * 3
    back = cache.get(np.array([6, 2, 3]))
    assert back.dtype == dtype
    assert torch.equal(back, values[[4, 0, 1]])
    assert (tmp_path / "c" / "slots.bin").stat().st_size <= 10 * 4 * 3 * dtype.itemsize


def test_killed_at_any_moment_what_is_marked_is_whole(tmp_path: Path) -> None:
    values = torch.randn(8, 4, 3)
    child = os.fork()
    if child == 0:
        cache = ActivationCache(tmp_path / "c", 10, (4, 3), torch.float32)
        cache.put(0, values[:4])
        real = os.pwrite

        def killed_before_the_mark(file: int, data: Any, offset: int) -> int:
            if file == cache._filled_file:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(file, data, offset)

        os.pwrite = killed_before_the_mark  # type: ignore[assignment]
        cache.put(4, values[4:])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    cache = ActivationCache(tmp_path / "c", 10, (4, 3), torch.float32)
    assert cache.has(np.arange(10)).tolist() == [True] * 4 + [False] * 6
    assert torch.equal(cache.get(np.arange(4)), values[:4])


def test_after_a_restart_of_the_machine_the_cache_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: ActivationCache(tmp_path / "c", 4, (2, 2), torch.float32)  # noqa: E731
    make().put(0, torch.ones(2, 2, 2))
    assert make().has(np.arange(4)).sum() == 2
    monkeypatch.setattr(activations_module, "_boot", lambda: "another")
    assert make().has(np.arange(4)).sum() == 0


def test_a_cache_above_the_limit_or_the_disk_is_left_out(
    subject: Subject, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ActivationCache.for_stream(corpus, subject, HOOKPOINT, limit_bytes=1000) is None
    assert "limit" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert ActivationCache.for_stream(corpus, subject, HOOKPOINT) is None
    assert "free" in capsys.readouterr().err
    assert not (corpus.folder / "activations").exists()


def test_a_disk_that_fills_up_costs_time_only(
    subject: Subject, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = expected(subject, corpus)
    stream = ActivationStream(subject, corpus, HOOKPOINT, ActivationCache.for_stream(corpus, subject, HOOKPOINT))
    stream.rows(np.arange(4))
    real, left = os.pwrite, [4]

    def full(file: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        for start in range(0, corpus.n_sequences, 5):
            index = np.arange(start, min(start + 5, corpus.n_sequences))
            assert torch.equal(stream.rows(index), truth[index])
    assert left[0] == -1  # not tried again


# --- training batches -------------------------------------------------------------------------------------


def test_batches_are_whole_sequences_in_order_without_special_tokens(subject: Subject, corpus: Corpus) -> None:
    truth = expected(subject, corpus)
    batches = TrainingBatches(ActivationStream(subject, corpus, HOOKPOINT), tokens=2000, batch_tokens=100, order_seed=3)
    assert (batches.sequences_per_step, batches.tokens_per_step) == (6, 96)
    assert len(batches) == 21  # 2,000 tokens, rounded up
    epochs = [corpus.order(e, 3) for e in range(3)]
    order = np.concatenate(epochs)
    removed = 0
    for step, x in enumerate(batches):
        index = order[step * 6 : step * 6 + 6]
        np.testing.assert_array_equal(batches.sequences(step), index)
        keep = corpus.tokens[index].reshape(-1) != 0
        assert x.dtype == torch.float32
        assert torch.equal(x, truth[index].reshape(-1, 16)[torch.from_numpy(keep)])
        removed += int((~keep).sum())
    assert step == 20
    assert removed > 0
    assert corpus.n_sequences < 21 * 6  # a step has crossed into the second epoch


def test_batches_come_one_by_one_as_well_as_in_turn(subject: Subject, corpus: Corpus) -> None:
    make = lambda: TrainingBatches(ActivationStream(subject, corpus, HOOKPOINT), 1000, 64)  # noqa: E731
    in_turn = list(make())
    batches = make()
    for step in (7, 0, len(batches) - 1, 3):
        assert torch.equal(batches[step], in_turn[step])
    assert torch.equal(batches[-1], in_turn[-1])
    assert all(torch.equal(a, b) for a, b in zip(batches[2:5], in_turn[2:5], strict=True))
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_precision_of_the_model_does_not_change_the_type_of_batches(tiny_neox_dir: Path, corpus: Corpus) -> None:
    half = Subject.load(str(tiny_neox_dir), dtype="bfloat16")
    stream = ActivationStream(half, corpus, HOOKPOINT, ActivationCache.for_stream(corpus, half, HOOKPOINT))
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
