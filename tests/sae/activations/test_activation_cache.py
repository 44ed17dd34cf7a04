"""The cache saves time and nothing else: whole or damaged, full, cut or gone, the stream gives the same numbers."""

# ruff: noqa: F811 - the fixtures are imported by name

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
from hypothesis import given, settings
from hypothesis import strategies as st
from test_activations import HOOKPOINT, cache_of, corpus, expected, forwards, small_blocks, subject  # noqa: F401

from sae.activations.cache import ActivationCache, open_caches, open_caches_to_read
from sae.activations.stream import ActivationStream
from sae.activations.subject import Subject
from sae.text.corpus import Corpus

SLOT = 16 * 16 * 4


def test_a_filled_cache_spares_the_model(subject: Subject, corpus: Corpus, forwards: list[int]) -> None:
    everything = np.arange(corpus.n_sequences)
    first = ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject))
    values = first.rows(everything)
    assert not first._held
    forwards.clear()
    again = ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject))
    assert torch.equal(again.rows(everything), values)
    assert forwards == []
    other = cache_of(corpus, subject, "layers.0.mlp")
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
    assert cache.has(np.arange(12)).tolist() == [False] * 2 + [True] * 5 + [False] * 5
    back, whole = cache.get(np.array([6, 2, 3]))
    assert back.dtype == dtype
    assert whole.all()
    assert torch.equal(back, values[[4, 0, 1]])
    assert (tmp_path / "c" / "slots.bin").stat().st_size <= 10 * 4 * 3 * dtype.itemsize


def test_readers_change_nothing(subject: Subject, corpus: Corpus, forwards: list[int]) -> None:
    filled = cache_of(corpus, subject)
    everything = np.arange(corpus.n_sequences)
    half = everything[: corpus.block_rows]
    values = ActivationStream(subject, corpus, HOOKPOINT, filled).rows(half)
    before = {path.name: path.read_bytes() for path in filled.folder.iterdir()}
    forwards.clear()
    reader = open_caches_to_read(corpus, subject, [HOOKPOINT, "layers.0.mlp"])
    assert list(reader) == [subject.resolve(HOOKPOINT)]  # of the other hookpoint nothing is there
    stream = ActivationStream(subject, corpus, HOOKPOINT, reader[subject.resolve(HOOKPOINT)])
    assert torch.equal(stream.rows(half), values)
    assert forwards == []
    stream.rows(everything)
    assert forwards
    assert {path.name: path.read_bytes() for path in filled.folder.iterdir()} == before


# --- damage -----------------------------------------------------------------------------------------------


def test_killed_anytime_marked_files_are_whole(tmp_path: Path) -> None:
    values = torch.randn(8, 4, 3)
    child = os.fork()
    if child == 0:
        cache = ActivationCache(tmp_path / "c", 10, (4, 3), torch.float32)
        cache.put(0, values[:4])
        real = os.pwrite

        def killed_before_the_mark(file: int, data: Any, offset: int) -> int:
            if file == cache._sums_file:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(file, data, offset)

        os.pwrite = killed_before_the_mark  # type: ignore[assignment]
        cache.put(4, values[4:])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    cache = ActivationCache(tmp_path / "c", 10, (4, 3), torch.float32)
    assert cache.has(np.arange(10)).tolist() == [True] * 4 + [False] * 6
    assert torch.equal(cache.get(np.arange(4))[0], values[:4])


@given(st.integers(0, 70 * SLOT - 1), st.integers(0, 7))
@settings(max_examples=60)
def test_one_flipped_bit_anywhere_is_found(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flip") / "c"
    cache = ActivationCache(folder, 70, (16, 16), torch.float32)
    values = torch.arange(70 * 256, dtype=torch.float32).reshape(70, 16, 16)
    cache.put(0, values)
    flip(folder / "slots.bin", at, bit)
    back, whole = ActivationCache(folder, 70, (16, 16), torch.float32).get(np.arange(70))
    assert np.flatnonzero(~whole).tolist() == [at // SLOT]
    assert torch.equal(back[torch.from_numpy(whole)], values[torch.from_numpy(whole)])


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def test_a_damaged_slot_is_recomputed_with_one_warning(
    subject: Subject, corpus: Corpus, forwards: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    everything = np.arange(corpus.n_sequences)
    truth = expected(subject, corpus)
    ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject)).rows(everything)
    folder = cache_of(corpus, subject).folder
    for slot in (5, 30):
        flip(folder / "slots.bin", slot * SLOT + 7)
    forwards.clear()
    capsys.readouterr()
    stream = ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject))
    for start in range(0, corpus.n_sequences, 9):
        assert torch.equal(stream.rows(everything[start : start + 9]), truth[start : start + 9])
    assert len(forwards) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "checksum" in said[0]
    forwards.clear()
    assert torch.equal(ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject)).rows(everything), truth)
    assert forwards == []  # mended on disk


def test_a_truncated_or_foreign_cache_costs_only_time(subject: Subject, corpus: Corpus) -> None:
    everything = np.arange(corpus.n_sequences)
    truth = expected(subject, corpus)
    ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject)).rows(everything)
    folder = cache_of(corpus, subject).folder
    os.truncate(folder / "slots.bin", 10 * SLOT + 3)
    assert torch.equal(ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject)).rows(everything), truth)
    (folder / "meta.json").write_text("{")
    assert not cache_of(corpus, subject).has(everything).any()


# --- bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1000, 9 * SLOT, 40 * SLOT])
def test_disk_use_is_bounded_and_the_rest_recomputed(
    subject: Subject, corpus: Corpus, forwards: list[int], room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = expected(subject, corpus)
    caches = open_caches(corpus, subject, [HOOKPOINT], room)
    kept = room // (SLOT + 8) // 4 * 4  # in whole blocks
    assert [cache.slots for cache in caches.values()] == ([kept] if kept else [])
    assert ("--activation-cache" in capsys.readouterr().err) == (room > 0)
    stream = ActivationStream(subject, corpus, HOOKPOINT, caches.get(HOOKPOINT))
    for _ in range(2):
        forwards.clear()
        order = corpus.order(0, 1)
        for start in range(0, len(order), 3):
            assert torch.equal(stream.rows(order[start : start + 3]), truth[order[start : start + 3]])
        assert len(stream._held) <= 4
    assert len(forwards) == corpus.n_blocks - kept // 4
    assert sum(f.stat().st_size for f in corpus.folder.glob("activations/*/*.bin")) <= room


def test_the_limit_may_change(subject: Subject, corpus: Corpus) -> None:
    everything = np.arange(corpus.n_sequences)
    ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject)).rows(everything)
    smaller = open_caches(corpus, subject, [HOOKPOINT], 20 * (SLOT + 8))[HOOKPOINT]
    assert smaller.has(everything).sum() == 20
    assert (smaller.folder / "slots.bin").stat().st_size == 20 * SLOT
    larger = open_caches(corpus, subject, [HOOKPOINT], 30 * (SLOT + 8))[HOOKPOINT]
    assert larger.has(everything).sum() == 20
    assert larger.get(np.arange(20))[1].all()


def test_hookpoints_share_the_cache_limit(subject: Subject, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    limit = 40 * (SLOT + 8)
    first = open_caches(corpus, subject, ["layers.0.mlp", "layers.1.mlp"], limit)
    assert [cache.slots for cache in first.values()] == [20, 20]
    for hookpoint, cache in first.items():
        ActivationStream(subject, corpus, hookpoint, cache).rows(np.arange(40))
    os.utime(first["layers.0.mlp"].folder / "meta.json", (1, 1))
    capsys.readouterr()
    second = open_caches(corpus, subject, ["layers.2.mlp"], limit + SLOT * 8)["layers.2.mlp"]
    assert second.slots == 44
    assert not first["layers.0.mlp"].folder.exists()
    assert "make room" in capsys.readouterr().err
    # Whoever still had it open loses no more than its time.
    stream = ActivationStream(subject, corpus, "layers.0.mlp", first["layers.0.mlp"])
    assert torch.equal(stream.rows(np.arange(8)), expected(subject, corpus, "layers.0.mlp")[:8])


def test_a_disk_without_room_leaves_it_out(
    subject: Subject, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert open_caches(corpus, subject, [HOOKPOINT], 10**9) == {}
    assert "the free disk space" in capsys.readouterr().err
    assert not (corpus.folder / "activations").exists()


def test_a_disk_that_fills_up_costs_time_only(
    subject: Subject, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = expected(subject, corpus)
    stream = ActivationStream(subject, corpus, HOOKPOINT, cache_of(corpus, subject))
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
