"""A byte that has changed in a firing store is found when it is read, or changes no number."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_harvest import FakeStream, M, latents_at, run, small_stream
from tiny_study import change_record

from sae.common.errors import BadInput, UserError
from sae.firings.store import FiringStore, latent_statistics


def everything(folder: Path) -> list[Any]:
    """All that a store says, read in the ways that its users read it."""
    store = FiringStore.open(folder)
    windows = np.arange(store.n_windows)
    parts: list[Any] = [store.n_tokens, store.n_firings, latent_statistics(store).to_dict("list")]
    parts += [array.tolist() for latent in range(M) for array in store.firings(latent)]
    parts += [array.tolist() for array in store.firing_in(windows)]
    parts += [store.content().tolist(), store.has_special().tolist(), store.sequences_of(windows).tolist()]
    return [*parts, *(at.tolist() for window in windows[::7] for at in latents_at(store, int(window)))]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        (store,) = run(small_stream(root, patch), root)
    return store.folder


@given(st.data())
def test_no_flipped_byte_changes_a_number(
    stored: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = everything(stored)
    folder = Path(shutil.copytree(stored, tmp_path_factory.mktemp("flipped") / "firings"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with suppress(UserError):
        assert everything(folder) == whole
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("size", [0, 1, 60, 128, 129])
def test_a_part_cut_to_any_length_is_refused(stored: Path, tmp_path: Path, size: int) -> None:
    for number, part in enumerate(sorted(stored.rglob("*.npy"))[:9]):
        folder = Path(shutil.copytree(stored, tmp_path / str(number) / "firings"))
        cut = folder / part.relative_to(stored)
        cut.write_bytes(part.read_bytes()[:size])
        with pytest.raises(BadInput, match=r"is damaged .*delete the folder and harvest again"):
            everything(folder)


def test_a_store_from_before_digests_is_the_same(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "firings"))
    store = FiringStore.open(folder)
    assert store.check()
    shards = [{k: v for k, v in shard.items() if k != "digests"} for shard in store.record["shards"]]
    change_record(folder / "store.json", digests={}, shards=shards)
    assert everything(folder) == everything(stored)
    assert not FiringStore.open(folder).check()


def test_a_harvest_does_not_grow_from_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: FakeStream = small_stream(tmp_path, monkeypatch)
    (store,) = run(stream, tmp_path, tokens=100)
    part = store.folder / store.record["index"] / "positions.npy"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(BadInput, match=r"positions.npy does not match its digest"):
        run(stream, tmp_path)
