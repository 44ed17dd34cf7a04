"""The firing store against brute force, and the harvest against kill -9 at every step that touches the disk."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_harvest import (
    SPECIAL,
    USED,
    WINDOW,
    D,
    FakeStream,
    M,
    N,
    T,
    a_corpus,
    an_sae,
    dense,
    latents_at,
    run,
    small_stream,
)
from tiny_study import change_record

from sae.activations.skipping import Skip
from sae.common.errors import BadInput, NotFound, SettingsDiffer, UserError
from sae.common.files import read_json, write_json
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.sae import Firings
from sae.firings import index as firing_index
from sae.firings.harvest import harvest
from sae.firings.index import Source
from sae.firings.store import (
    FiringStore,
    create_array,
    hash_windows,
    latent_statistics,
    mix_bits,
    read_digest,
    split_latents,
)


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    return small_stream(tmp_path, monkeypatch)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_equals_brute_force(stream: FakeStream, tmp_path: Path) -> None:
    for store, name in zip(run(stream, tmp_path, "ab"), "ab", strict=True):
        expected = dense(stream, an_sae(ord(name)))
        windows = expected.reshape(-1, WINDOW, M)
        assert (store.n_windows, store.n_tokens, store.n_firings) == (
            len(windows),
            len(expected),
            np.count_nonzero(expected),
        )
        every = np.arange(store.n_windows)
        for latent in range(M):
            positions, values = store.firings(latent)
            assert positions.tolist() == np.flatnonzero(expected[:, latent]).tolist()
            np.testing.assert_allclose(values, expected[positions, latent], rtol=2e-3)
            ids, peaks = store.windows(latent)
            assert ids.tolist() == np.flatnonzero(windows[:, :, latent].any(1)).tolist()
            np.testing.assert_allclose(peaks, windows[ids, :, latent].max(1), rtol=2e-3)
            np.testing.assert_allclose(store.activations(latent, every), windows[:, :, latent], rtol=2e-3)
        for window in every:
            fired = [sorted(latents.tolist()) for latents in latents_at(store, int(window))]
            assert fired == [np.flatnonzero(token).tolist() for token in windows[window]]
        some = every[::-2]  # in any order, across shards
        found = np.stack(store.firing_in(some))
        there = np.stack(np.nonzero(windows[some])[::2])
        assert sorted(found.T.tolist()) == sorted(there.T.tolist())
        order = stream.corpus.order(0, 7)
        tokens = stream.corpus.tokens[order][:, :USED].reshape(-1, WINDOW)
        assert (store.tokens(every) == tokens).all()
        assert (store.has_special() == (tokens == SPECIAL).any(1)).all()
        assert store.n_special_tokens == (tokens == SPECIAL).sum() > 0
        assert (store.content() == hash_windows(tokens)).all()
        assert store.slot(every).tolist() == (every % (T // WINDOW)).tolist()


def test_statistics_equal_brute_force(stream: FakeStream, tmp_path: Path) -> None:
    (store,) = run(stream, tmp_path)
    expected = dense(stream, an_sae(ord("a"))).astype(float)
    table = latent_statistics(store)
    counts = (expected > 0).sum(0)
    assert table["latent"].tolist() == list(range(M))
    assert table["n_firings"].tolist() == counts.tolist()
    assert table["n_windows"].tolist() == (expected.reshape(-1, WINDOW, M).any(1)).sum(0).tolist()
    assert table["dead"].tolist() == (counts == 0).tolist()
    assert 5 <= table["dead"].sum() < M
    np.testing.assert_allclose(table["mean_activation"], expected.sum(0) / np.maximum(counts, 1), rtol=2e-3)
    np.testing.assert_allclose(table["max_activation"], expected.max(0), rtol=2e-3)
    n_special = stream.corpus.is_special(stream.corpus.tokens[:, :USED]).sum()
    np.testing.assert_allclose(table["firing_frequency"], counts / (N * USED - n_special))


def test_one_pass_equals_separate_harvests(stream: FakeStream, tmp_path: Path) -> None:
    run(stream, tmp_path / "together", "abc")
    assert sorted(stream.asked) == list(range(N))
    for name in "abc":
        run(stream, tmp_path / "alone", name)
        alone = files(tmp_path / "alone" / name)
        assert alone == files(tmp_path / "together" / name)


def test_a_finished_run_takes_no_part(stream: FakeStream, tmp_path: Path) -> None:
    run(stream, tmp_path, "a")
    before = files(tmp_path / "a")
    stream.asked.clear()
    run(stream, tmp_path, "a", tokens=50)
    assert stream.asked == []
    run(stream, tmp_path, "ab")
    assert sorted(stream.asked) == list(range(N))
    assert files(tmp_path / "a") == before


def test_growing_equals_harvesting_at_once(stream: FakeStream, tmp_path: Path) -> None:
    for tokens in (3 * USED, 10 * USED, 23 * USED, N * USED):
        (grown,) = run(stream, tmp_path / "grown", tokens=tokens)
        assert grown.n_tokens == tokens
    assert len(stream.asked) == 3 + 10 + (23 - 8) + (N - 20)
    run(stream, tmp_path / "once")
    assert files(tmp_path / "grown") == files(tmp_path / "once")


def in_a_child(work: Callable[[], None]) -> bool:
    """Run ``work`` in a forked child; whether it ended well. A child may be killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1), "the child failed instead of being killed"
    return os.WIFEXITED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("grown", [False, True])
def test_killed_anywhere_it_resumes_to_equal_results(stream: FakeStream, tmp_path: Path, grown: bool) -> None:
    torch.set_num_threads(1)
    run(stream, tmp_path / "undisturbed", "ab")
    expected = [files(tmp_path / "undisturbed" / name) for name in "ab"]
    rows, rename, replace, unlink, save = FakeStream.rows, Path.rename, Path.replace, Path.unlink, np.save
    events = 0

    def dies_at(fatal: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal events
            events += 1
            if events == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    def killed(root: Path, fatal: int, tokens: int) -> Callable[[], None]:
        def work() -> None:
            FakeStream.rows = dies_at(fatal, rows)  # type: ignore[method-assign]
            Path.rename = dies_at(fatal, rename)  # type: ignore[method-assign, assignment]
            Path.replace = dies_at(fatal, replace)  # type: ignore[method-assign, assignment]
            Path.unlink = dies_at(fatal, unlink)  # type: ignore[method-assign]
            np.save = dies_at(fatal, save)
            run(stream, root, "ab", tokens)

        return work

    fatal = 1
    while True:
        root = tmp_path / f"{fatal}"
        if grown:
            run(stream, root, "ab", 13 * USED)
        if in_a_child(killed(root, fatal, N * USED)):
            break
        left = {name: len(list((root / name / "firings" / "shards").glob("0*"))) for name in "ab"}
        if not grown and not (root / "a" / "firings" / "store.json").exists():
            with pytest.raises(NotFound, match=r"unfinished|does not exist"):
                FiringStore.open(root / "a" / "firings")
        if grown:  # the smaller store stays readable until the larger one takes its place
            assert [FiringStore.open(root / name / "firings").n_sequences in (13, N) for name in "ab"] == [True, True]
        run(stream, root, "ab")
        assert [files(root / name) for name in "ab"] == expected, f"killed at event {fatal} with {left} shards"
        fatal += 29 if grown else 37  # a sample of some hundreds, a different one in each case
    assert fatal > 100


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"window": 5}, "window: 4 there, 5 now"),
        ({"order_seed": 8}, "order_seed"),
        ({"weights": {"a": "x"}}, "weights"),
    ],
)
def test_another_harvest_is_refused_or_discarded(
    stream: FakeStream, tmp_path: Path, changed: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(stream, tmp_path)
    with pytest.raises(SettingsDiffer, match=named) as error:
        run(stream, tmp_path, **changed)
    assert "\n" not in str(error.value)
    (tmp_path / "a" / "firings" / "store.json").unlink()
    run(stream, tmp_path, **changed)
    assert "discarding" in capsys.readouterr().err


def test_opening_refuses_what_is_not_whole(stream: FakeStream, tmp_path: Path) -> None:
    run(stream, tmp_path)
    folder = tmp_path / "a" / "firings"
    with pytest.raises(NotFound, match="does not exist"):
        FiringStore.open(tmp_path / "nowhere")
    record = read_json(folder / "store.json")
    change_record(folder / "store.json", schema=99)
    with pytest.raises(SettingsDiffer, match="schema 99, this program reads 1"):
        FiringStore.open(folder)
    with pytest.raises(SettingsDiffer, match="schema 99"):
        run(stream, tmp_path)
    (folder / "store.json").write_text("{")
    with pytest.raises(BadInput, match=r"store.json' is damaged"):
        FiringStore.open(folder)
    write_json(folder / "store.json", {**record, "n_firings": record["n_firings"] + 1})
    with pytest.raises(BadInput, match="does not match its digest"):
        FiringStore.open(folder)
    write_json(folder / "store.json", record)
    change_record(folder / "store.json", n_firings=record["n_firings"] + 1)
    with pytest.raises(BadInput, match="contradict each other"):
        FiringStore.open(folder)
    write_json(folder / "store.json", record)
    latents = next(iter(sorted((folder / "shards").iterdir()))) / "latents.npy"
    whole = latents.read_bytes()
    latents.write_bytes(whole[:-10])
    with pytest.raises(BadInput, match="cut short"):
        FiringStore.open(folder)
    latents.write_bytes(whole)
    assert FiringStore.open(folder).n_firings == record["n_firings"]
    assert read_digest(folder) == FiringStore.open(folder).digest
    with pytest.raises(NotFound, match="does not exist"):
        read_digest(tmp_path / "nowhere")


def test_the_corpus_must_be_the_harvested_one(stream: FakeStream, tmp_path: Path) -> None:
    run(stream, tmp_path)
    folder = stream.corpus.folder
    write_json(folder / "corpus.json", {**read_json(folder / "corpus.json"), "fingerprint": "other"})
    with pytest.raises(BadInput, match="is not the harvested one"):
        FiringStore.open(tmp_path / "a" / "firings").tokens([0])
    folder.rename(folder.with_name("moved"))
    with pytest.raises(NotFound, match="is gone; restore it"):
        FiringStore.open(tmp_path / "a" / "firings").tokens([0])


def test_wrong_names_are_told_in_one_line(stream: FakeStream, tmp_path: Path) -> None:
    (store,) = run(stream, tmp_path)
    with pytest.raises(NotFound, match="latents 0 to 39"):
        store.windows(M)
    with pytest.raises(NotFound, match="windows 0 to"):
        store.tokens([store.n_windows])
    with pytest.raises(BadInput, match="window 20 does not fit in sequences of 19"):
        run(stream, tmp_path, window=20)


def test_what_half_precision_cannot_hold_is_counted(stream: FakeStream, tmp_path: Path) -> None:
    class Extreme:
        architecture, num_latents, d_in, k = "fake", M, D, 3
        W_enc = W_dec = torch.zeros(M, D)
        b_enc, b_dec = torch.zeros(M), torch.zeros(D)

        def weights(self) -> dict[str, torch.Tensor]:
            return {"W_enc": self.W_enc}

        def encode_fast(self, x: torch.Tensor) -> Firings:
            values = torch.tensor([1e6, 1e-12, 0.0]).repeat(len(x), 1)
            return Firings(values, torch.tensor([1, 2, 3]).repeat(len(x), 1))

    folder = tmp_path / "a" / "firings"
    harvest(stream, {"a": Extreme()}, {"a": folder}, {"a": ""}, N * USED, WINDOW, 7)  # type: ignore[arg-type, dict-item]
    store = FiringStore.open(folder)
    tokens = store.n_tokens - store.n_special_tokens
    assert (store.record["n_clipped"], store.record["n_raised"], store.n_firings) == (tokens, tokens, 2 * tokens)
    assert store.firings(1)[1].max() == np.float16(65504)
    assert store.firings(2)[1].min() > 0
    assert len(store.firings(3)[0]) == 0


def test_activations_that_are_not_finite_stop_it(stream: FakeStream, tmp_path: Path) -> None:
    sae = an_sae(0)
    sae.W_enc[7] = 1e38
    with pytest.raises(UserError, match="run 'a' overflows float32 on these activations"):
        harvest(stream, {"a": sae}, {"a": tmp_path / "f"}, {"a": ""}, 100, WINDOW, 0)  # type: ignore[arg-type]


def test_an_sae_that_never_fires_has_a_store(stream: FakeStream, tmp_path: Path) -> None:
    sae = an_sae(0)
    sae.b_enc[:] = -100.0
    harvest(stream, {"a": sae}, {"a": tmp_path / "f"}, {"a": ""}, N * USED, WINDOW, 0)  # type: ignore[arg-type]
    store = FiringStore.open(tmp_path / "f")
    assert store.n_firings == 0
    assert latent_statistics(store)["dead"].all()
    assert [len(latents) for latents in latents_at(store, 3)] == [0] * WINDOW
    assert store.windows(0)[0].tolist() == []


def test_space_is_reserved_before_mapping(tmp_path: Path) -> None:
    """A sparse file would be mapped too, and the first write that finds the disk full would kill the process."""
    create_array(tmp_path / "x.npy", np.uint8, (1 << 20,))
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 1 << 20
    assert not create_array(tmp_path / "none.npy", np.uint32, (0,)).size


def test_a_full_disk_is_one_line(stream: FakeStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="the disk is full"):
            run(stream, tmp_path)
    (store,) = run(stream, tmp_path)
    assert store.n_tokens == N * USED


def test_bytes_per_firing(tmp_path: Path) -> None:
    """At k = 8 and windows of 32: what a firing costs on disk, all files of the store counted."""
    stream = FakeStream(a_corpus(tmp_path / "corpus", np.ones((512, 256), np.uint16)))
    folder = tmp_path / "f"
    harvest(stream, {"a": TopKSae.init(D, 64, 8, 0)}, {"a": folder}, {"a": ""}, 512 * 256, 32, 0)  # type: ignore[arg-type]
    store = FiringStore.open(folder)
    assert store.n_firings > 0.95 * 512 * 256 * 8
    assert sum(map(len, files(folder).values())) / store.n_firings <= 8.5


def test_reading_imports_no_torch() -> None:
    code = "import sys, sae.firings.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.lists(st.lists(st.integers(0, 6), max_size=40), max_size=5), st.integers(0, 200))
def test_sources_are_cut_anywhere_without_loss(tokens_of: list[list[int]], limit: int) -> None:
    """A source hands out its firings once each, in order, however its latents straddle the pieces."""
    counts = np.array([len(t) for t in tokens_of], np.int64)
    positions = np.concatenate([np.cumsum(np.array(t, np.int64)) for t in tokens_of] or [np.empty(0, np.int64)]).astype(
        np.uint32
    )
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    source = Source(offsets, positions, positions.astype(np.float16), base=1000, limit=limit)
    whole = [[p + 1000 for p in positions[a:b].tolist() if p < limit] for a, b in itertools.pairwise(offsets)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(firing_index, "_BLOCK_FIRINGS", 7)
        assert source.counts().tolist() == [len(w) for w in whole]
        got: list[list[int]] = [[] for _ in tokens_of]
        for first, last in split_latents(offsets, 11):
            for many, found, _ in source.slices(first, last):
                for latent, part in enumerate(np.split(found, np.cumsum(many)[:-1]), first):
                    got[latent] += part.tolist()
    assert got == whole


@given(st.lists(st.integers(0, 30), min_size=1, max_size=50), st.integers(1, 40))
def test_latent_blocks_cover_all_and_stay_small(counts: list[int], limit: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    blocks = list(split_latents(offsets, limit))
    assert [b for block in blocks for b in range(*block)] == list(range(len(counts)))
    for first, last in blocks:
        assert last - first == 1 or offsets[last] - offsets[first] <= limit


def test_hash_is_fixed_for_good() -> None:
    """Splits and samples hang on it: another value would move texts across the split."""
    assert mix_bits(np.array([0, 1], np.uint64)).tolist() == [16294208416658607535, 10451216379200822465]
    one, other = hash_windows(np.array([[1, 2, 3], [3, 2, 1]], np.uint16)).tolist()
    assert one != other
    assert hash_windows(np.array([[1, 2, 3]], np.int64)).tolist() == [one]


def test_skipped_tokens_grow_to_equal_results(stream: FakeStream, tmp_path: Path) -> None:
    norms = stream.values.double().norm(dim=-1).numpy()
    stream.skip = Skip(positions=WINDOW, token_ids=(3, 4), norm_limit=float(np.quantile(norms, 0.8)))
    run(stream, tmp_path / "grown", tokens=N // 2 * USED)
    (grown,) = run(stream, tmp_path / "grown")
    (whole,) = run(stream, tmp_path / "whole")
    assert grown.record == whole.record
    order = stream.corpus.order(0, 7)
    tokens = stream.corpus.tokens[order][:, :USED]
    special = stream.corpus.is_special(tokens)
    unseen = np.isin(tokens, (3, 4)) | (np.arange(USED) < WINDOW)
    skipped = (unseen | (norms[order][:, :USED] > stream.skip.norm_limit)) & ~special
    expected = dense(stream, an_sae(ord("a")))
    expected[skipped.ravel()] = 0
    assert whole.n_skipped_tokens == skipped.sum()
    assert whole.n_firings == (expected > 0).sum()
    for latent in range(M):
        np.testing.assert_array_equal(whole.firings(latent)[0], np.flatnonzero(expected[:, latent]))
    unusable = special.reshape(-1, WINDOW).any(1) | unseen.reshape(-1, WINDOW).all(1)
    np.testing.assert_array_equal(whole.has_special(), unusable)
    stream.skip = Skip(positions=1)
    with pytest.raises(SettingsDiffer, match=r"skip\.positions"):
        run(stream, tmp_path / "whole")
